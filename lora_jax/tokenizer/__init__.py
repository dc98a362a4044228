"""Text ↔ token ids, the same for training and generation. `files` reads the tokenizer of a folder.

Imports no jax. May import `hub`.
"""

import json
import pathlib
import typing
from collections.abc import Iterable, Sequence

from lora_jax import errors
from lora_jax.tokenizer import added as additions
from lora_jax.tokenizer import files

if typing.TYPE_CHECKING:
    import transformers

load, save, copy = files.load, files.save, files.copy
copy_chat_template, add, missing = files.copy_chat_template, additions.add, additions.missing


def keep_stops(folder: str | pathlib.Path, ids: Sequence[int]) -> None:
    """Writes the ids at which generation stops into generation_config.json."""
    path = pathlib.Path(folder) / "generation_config.json"
    config = files.read_json(path) | {"eos_token_id": list(ids)}
    path.write_text(json.dumps(config, indent=2) + "\n")


def eos_ids(
    tokenizer: "transformers.PreTrainedTokenizerBase", folder: str | pathlib.Path
) -> tuple[int, ...]:
    """The ids that end a text: first the tokenizer's, which training appends, then those of
    generation_config.json and config.json in `folder`, which may be the texts of tokens. If
    neither has any, those of text_config, the language model in a composite model.

    Raises:
      errors.UserError: none of them has one, or one is neither an id nor a token.
    """
    found = [tokenizer.eos_token_id]
    names = ("generation_config.json", "config.json")
    raw = [files.read_json(pathlib.Path(folder) / name) for name in names]
    given = [each.get("eos_token_id") for each in raw]
    if given == [None, None] and isinstance(text := raw[1].get("text_config"), dict):
        given = [text.get("eos_token_id")]
    for value in given:
        found += value if isinstance(value, list) else [value]
    vocab = tokenizer.get_vocab() if any(isinstance(each, str) for each in found) else {}
    found = [vocab.get(each) if isinstance(each, str) else each for each in found]
    ids = tuple(dict.fromkeys(_id(each) for each in found if each is not None))
    if not ids:
        raise errors.UserError(
            expected="an end-of-text token",
            found="none",
            where=[f"{folder}/tokenizer_config.json", f"{folder}/generation_config.json"],
            do='set "eos_token" in tokenizer_config.json',
        )
    return ids


def _id(given: object) -> int:
    if not (isinstance(given, int) or (isinstance(given, float) and given.is_integer())):
        raise errors.UserError(
            expected="eos_token_id: an id, a token, or a list of them",
            found=repr(given),
            where="generation_config.json or config.json",
        )
    return int(given)


def chat_prompt(tokenizer: "transformers.PreTrainedTokenizerBase", text: str) -> list[int]:
    """The ids of `text` as a user's turn, followed by the start of the assistant's turn.

    They are those with which a chat begins that is trained: only the template adds a BOS.
    Raises: UserError if the tokenizer has no chat template, or if it refuses the turn.
    """
    if not tokenizer.chat_template:
        raise errors.UserError(
            expected="a tokenizer with a chat template",
            found="none",
            do="--chat-template, or a chat model; or omit --chat",
        )
    turn = [{"role": "user", "content": text}]
    try:
        encoded = tokenizer.apply_chat_template(
            turn, tokenize=True, add_generation_prompt=True, return_dict=True
        )
    except Exception as error:  # an expression of a template can fail in any way
        raise errors.UserError(
            expected="a chat template that takes a user's turn",
            found=f"{type(error).__name__}: {error}",
            where=str(tokenizer.name_or_path),
            do="omit --chat, or correct the template",
        ) from error
    return encoded["input_ids"]


def check_ids(
    tokenizer: "transformers.PreTrainedTokenizerBase",
    sequences: Iterable[Sequence[int]],
    num_embeddings: int,
) -> None:
    """Raises: UserError if an id has no row in the embedding: jax would read another row."""
    largest = max((max(ids, default=0) for ids in sequences), default=0)
    if largest >= num_embeddings:
        token = tokenizer.convert_ids_to_tokens(int(largest))
        raise errors.UserError(
            expected=f"ids below {num_embeddings}, the rows of the model's embedding",
            found=f"the id {largest}" + (f" of the token {token!r}" if token else ""),
            where=str(tokenizer.name_or_path),
            do="use the tokenizer that the model was made with, without tokens added later; "
            "train --add-tokens and --add-special-tokens give a model rows for new ones",
        )


def check_text(texts: Iterable[str]) -> None:
    """Raises: UserError if a text has half of a character, which a wrong encoding leaves."""
    if broken := [text for text in texts if any("\ud800" <= c <= "\udfff" for c in text)]:
        raise errors.UserError(
            expected="text in UTF-8",
            found=[ascii(text[:60]) for text in broken],
            do="check the terminal's or the file's encoding",
        )


def encode(
    tokenizer: "transformers.PreTrainedTokenizerBase", texts: Sequence[str]
) -> list[list[int]]:
    """The ids of each text as a model's input: one BOS if the tokenizer adds one, then the text.

    There is never an EOS at the end, even if the tokenizer adds one, because a prompt must stay
    open; and no second BOS if the text starts with one.
    """
    if not texts:
        return []
    check_text(texts)
    bos = tokenizer.bos_token_id
    adds_bos = bos is not None and tokenizer("").input_ids[:1] == [bos]
    bodies = tokenizer(list(texts), add_special_tokens=False, verbose=False).input_ids
    return [[bos, *ids] if adds_bos and ids[:1] != [bos] else ids for ids in bodies]


def continuation(
    tokenizer: "transformers.PreTrainedTokenizerBase",
    prompt: Sequence[int],
    new: Sequence[int],
    *,
    skip_special_tokens: bool = True,
) -> str:
    """The text that the ids `new` add after `prompt`.

    They are decoded together, because SentencePiece tokens on their own lose a leading space, and
    never "cleaned up": that would change text that a stream has emitted.
    """
    before, whole = (
        tokenizer.decode(
            ids, skip_special_tokens=skip_special_tokens, clean_up_tokenization_spaces=False
        )
        for ids in ([*prompt], [*prompt, *new])
    )
    return added(before, whole)


def added(before: str, whole: str) -> str:
    """What the text of all tokens adds to that of the first ones.

    Where the first ones end within a character, their text ends with U+FFFD; then the whole
    character is new.
    """
    while before.endswith("\ufffd") and not whole.startswith(before):
        before = before[:-1]
    return whole[len(before) :]
