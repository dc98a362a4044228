"""A model folder → its tokenizer, and text → ids for both training and generation.

Imports no jax. transformers, which takes seconds to import, is imported when a tokenizer is loaded.
May import `hub`. `conversion` reads tokenizers that have no tokenizer.json.
"""

import json
import os
import pathlib
import shutil
import sys
import tempfile
import typing
from collections.abc import Iterable, Sequence

from lora_jax import errors, extras, hub
from lora_jax.tokenizer import conversion

if typing.TYPE_CHECKING:
    import transformers


# The first that is there is read.
_TOKENIZERS = ("tokenizer.json", *conversion.FILES)
_BESIDE = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
# The default chat template, and a folder of others by their names.
_TEMPLATE, _TEMPLATES = "chat_template.jinja", "additional_chat_templates"


def load(
    folder: str | pathlib.Path, adapter: str | pathlib.Path | None = None
) -> "transformers.PreTrainedTokenizerBase":
    """The tokenizer of the model in `folder`.

    adapter: the folder of an adapter. If it has a tokenizer or a chat template, which other
    programs save with an adapter, that is used instead.

    tokenizer.json is used as it is, whatever tokenizer_class says: transformers 5.23's
    LlamaTokenizer (AutoTokenizer's choice) rebuilds it and encodes runs of spaces differently from
    the model's own SentencePiece. tokenizer_config.json (add_bos_token, special tokens) and the
    chat template are respected. Without tokenizer.json, another file is converted; see
    `conversion`.

    Raises:
      errors.UserError: the tokenizer is missing or unreadable, or a package that converts it is not
        installed.
    """
    extras.require("transformers", "tokenizers")  # older ones add bos and eos in other ways
    folder = pathlib.Path(folder)
    if adapter is not None:
        own = pathlib.Path(adapter)
        if any((own / name).is_file() for name in _TOKENIZERS):
            return load(own)
        reader = load(folder)
        if templates := _chat_templates(own):
            if "default" not in templates:
                templates = _chat_templates(folder) | templates
            only = [*templates] == ["default"]
            reader.chat_template = templates["default"] if only else templates
        return reader
    for name in _TOKENIZERS:
        if (folder / name).is_file():
            hub.refuse_lfs_pointer(folder / name)
    if (folder / "tokenizer.json").is_file():
        return _from_json(folder, folder)
    if any((folder / name).is_file() for name in conversion.FILES):
        return _converted(folder)
    raise errors.UserError(
        expected="tokenizer.json or tokenizer.model, or vocab.json and merges.txt, or tekken.json",
        found="none of them",
        where=str(folder),
        do="copy the tokenizer files of the base model into the folder",
    )


def copy(adapter: str | pathlib.Path, into: str | pathlib.Path) -> None:
    """Copies what `load` takes from an adapter's folder over the files of a model."""
    own, into = pathlib.Path(adapter), pathlib.Path(into)
    if any((own / name).is_file() for name in _TOKENIZERS):
        for name in (*_TOKENIZERS, "merges.txt", *_BESIDE):
            if (own / name).is_file():
                shutil.copyfile(own / name, into / name)
    templates = _chat_templates(own)
    if "default" in templates:  # which precedes all of the base
        shutil.rmtree(into / _TEMPLATES, ignore_errors=True)
    for name, source in templates.items():
        path = into / (_TEMPLATE if name == "default" else f"{_TEMPLATES}/{name}.jinja")
        path.parent.mkdir(exist_ok=True)
        path.write_text(source, encoding="utf-8")


def keep_stops(folder: str | pathlib.Path, ids: Sequence[int]) -> None:
    """Writes the ids at which generation stops into generation_config.json."""
    path = pathlib.Path(folder) / "generation_config.json"
    config = _read_json(path) | {"eos_token_id": list(ids)}
    path.write_text(json.dumps(config, indent=2) + "\n")


def eos_ids(
    tokenizer: "transformers.PreTrainedTokenizerBase", folder: str | pathlib.Path
) -> tuple[int, ...]:
    """The ids that end a text: first the tokenizer's, which training appends, then those of
    generation_config.json and config.json in `folder`, which may be the texts of tokens.

    Raises:
      errors.UserError: none of them has one, or one is neither an id nor a token.
    """
    found = [tokenizer.eos_token_id]
    for name in ("generation_config.json", "config.json"):
        value = _read_json(pathlib.Path(folder) / name).get("eos_token_id")
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
            do="omit --chat, or use a chat model",
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
            do="use the tokenizer that the model was made with, without tokens added later",
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


def _chat_templates(folder: pathlib.Path) -> dict[str, str]:
    """{name: chat template} of a folder, which may have no tokenizer.

    Files precede tokenizer_config.json. Raises: UserError if one cannot be read.
    """
    paths = {path.stem: path for path in sorted((folder / _TEMPLATES).glob("*.jinja"))}
    if (folder / _TEMPLATE).is_file():
        paths["default"] = folder / _TEMPLATE
    try:
        found: typing.Any = {
            name: path.read_text(encoding="utf-8") for name, path in paths.items()
        } or _read_json(folder / "tokenizer_config.json").get("chat_template")
        if isinstance(found, list):
            found = {each["name"]: each["template"] for each in found}
        templates = {"default": found} if isinstance(found, str) else dict(found or {})
        for name, template in templates.items():
            if not isinstance(template, str) or pathlib.PurePath(name).name != name:
                raise TypeError(f"a {type(template).__name__} of the name {name!r}")
        return {name: template for name, template in templates.items() if template}
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise errors.UserError(
            expected="a chat template, or several with their names",
            found=f"{type(error).__name__}: {error}",
            where=[f"{folder}/{_TEMPLATE}", f"{folder}/tokenizer_config.json"],
            do="copy the file again",
        ) from error


def _read_json(path: pathlib.Path) -> dict:
    """The object in a JSON file, {} if there is no such file."""
    try:
        found = json.loads(path.read_text(encoding="utf-8-sig")) if path.is_file() else {}
        if not isinstance(found, dict):
            raise ValueError(f"a {type(found).__name__}")
        return found
    except (OSError, ValueError, RecursionError) as error:
        raise errors.UserError(
            expected="a JSON object",
            found=str(error),
            where=str(path),
            do="copy the file from the base model again",
        ) from error


def _from_json(
    folder: pathlib.Path, origin: pathlib.Path
) -> "transformers.PreTrainedTokenizerBase":
    """The tokenizer in `folder`/tokenizer.json. origin: the folder that error messages name."""
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # "PyTorch was not found"
    import transformers

    config = _read_json(folder / "tokenizer_config.json")
    # transformers 5 ignores these two if there is a tokenizer.json. Older versions did not, and
    # models were trained with them, so explicit values are passed on.
    explicit = {k: config[k] for k in ("add_bos_token", "add_eos_token") if k in config}
    _chat_templates(origin)  # which raises what is wrong with them
    before = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    try:
        # model_max_length has no effect but a warning that the model cannot take longer texts. The
        # model's own limits count, of which many tokenizers do not know.
        return transformers.PreTrainedTokenizerFast.from_pretrained(
            folder,
            trust_remote_code=False,
            local_files_only=True,
            model_max_length=sys.maxsize,
            **explicit,
        )
    except Exception as error:  # the Rust library raises bare Exceptions
        raise errors.UserError(
            expected="a tokenizer in the tokenizers library's format",
            found=f"{type(error).__name__}: {error}",
            where=str(origin),
            do="copy the tokenizer files of the base model again",
        ) from error
    finally:
        transformers.logging.set_verbosity(before)


def _converted(folder: pathlib.Path) -> "transformers.PreTrainedTokenizerBase":
    """The tokenizer of a folder without tokenizer.json, from the other files that it may have."""
    with tempfile.TemporaryDirectory() as temporary:
        copy = pathlib.Path(temporary)
        for name in (*_BESIDE, _TEMPLATE):
            if (folder / name).is_file():
                shutil.copy(folder / name, copy / name)
        if (folder / _TEMPLATES).is_dir():
            shutil.copytree(folder / _TEMPLATES, copy / _TEMPLATES)
        backend, settings = conversion.convert(folder)
        backend.save(str(copy / "tokenizer.json"))
        path = copy / "tokenizer_config.json"
        path.write_text(json.dumps(settings | _read_json(path)), encoding="utf-8")
        return _from_json(copy, folder)
