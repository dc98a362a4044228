"""Tokens that a tokenizer gets besides its own, such as a chat template's. Imports no jax."""

import pathlib
import typing
from collections.abc import Sequence

from lora_jax import errors
from lora_jax.tokenizer import files

if typing.TYPE_CHECKING:
    import transformers


def add(
    tokenizer: "transformers.PreTrainedTokenizerBase",
    tokens: Sequence[str],
    special_tokens: Sequence[str],
    num_rows: int,
) -> tuple[int, ...]:
    """The ids of the new tokens, which the tokenizer then has, in ascending order.

    They get the ids after those of the tokenizer, as from add_tokens of transformers.

    special_tokens: those that a decoder may leave out. num_rows: of the model's embedding. Tokens
    that the tokenizer has beyond these rows count as new, whether they are given or not.
    Raises: UserError if a given token has a row already.
    """
    import tokenizers

    if not tokens and not special_tokens:
        return ()
    known = tokenizer.get_vocab()
    given = (*tokens, *special_tokens)
    if there := [text for text in given if known.get(text, num_rows) < num_rows]:
        raise errors.UserError(
            expected="tokens that the model does not have",
            found=[f"{text!r}, which has the id {known[text]}" for text in there],
            where="--add-tokens, --add-special-tokens",
            do="leave them out; to train their embeddings, name them in --trainable-token-indices",
        )
    for texts, special in ((tokens, False), (special_tokens, True)):
        added = [tokenizers.AddedToken(text, normalized=False, special=special) for text in texts]
        tokenizer.add_tokens(added, special_tokens=special)
    ids = {tokenizer.convert_tokens_to_ids(text) for text in given}
    return tuple(sorted(ids | {*range(num_rows, max(ids) + 1)}))


def missing(
    tokenizer: "transformers.PreTrainedTokenizerBase", adapter: str | pathlib.Path
) -> list[str]:
    """The added tokens of the tokenizer in an adapter's folder that this one has not as such."""
    added = files.read_json(pathlib.Path(adapter) / "tokenizer.json").get("added_tokens")
    known = tokenizer.get_vocab() if added else {}
    return [each["content"] for each in added or () if known.get(each["content"]) != each["id"]]
