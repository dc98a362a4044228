"""Token ids and their log-probabilities in the forms of OpenAI's API."""

import codecs
import functools
import math
import typing
from collections.abc import Sequence
from typing import Any

from lora_jax.generation import request

if typing.TYPE_CHECKING:
    import transformers

_LEAST = -9999.0  # for −∞, which JSON does not have


class Tokens:
    """The texts and bytes of tokens."""

    def __init__(self, reader: "transformers.PreTrainedTokenizerBase"):
        self._reader = reader
        self._special = frozenset(reader.all_special_ids)
        self.bytes = functools.lru_cache(maxsize=65536)(self._bytes)

    def _bytes(self, token: int) -> bytes:
        from lora_jax.generation import text

        return text.token_bytes(self._reader, token)

    def text(self, token: int, as_ids: bool = False) -> str:
        if as_ids:
            return f"token_id:{token}"
        return self.bytes(token).decode("utf-8", "replace")

    def whole(self, ids: Sequence[int], skip_special_tokens: bool) -> str:
        """The text of consecutive tokens."""
        return self._reader.decode([*ids], skip_special_tokens=skip_special_tokens)

    def is_special(self, token: int) -> bool:
        return token in self._special


def chat(
    tokens: Tokens, entries: Sequence[request.Logprob], top: int, as_ids: bool
) -> dict[str, Any]:
    """The logprobs of a chat's choice or chunk."""

    def one(token: int, value: float) -> dict[str, Any]:
        return {
            "token": tokens.text(token, as_ids),
            "logprob": _finite(value),
            "bytes": [*tokens.bytes(token)],
        }

    return {
        "content": [
            {
                **one(entry.token, entry.logprob),
                "top_logprobs": [one(*each) for each in entry.top[:top]],
            }
            for entry in entries
        ],
        "refusal": None,
    }


def prompt(tokens: Tokens, entries: Sequence[request.Logprob], top: int) -> list[Any]:
    """vLLM's prompt_logprobs: null for the first token, {id: its log-probability} for the others.

    rank: null for a token of the prompt that is not among the `top` most likely.
    """

    def one(token: int, value: float, rank: int | None) -> dict[str, Any]:
        return {"logprob": _finite(value), "rank": rank, "decoded_token": tokens.text(token)}

    found: list[Any] = [None]
    for entry in entries:
        ranked = {
            str(token): one(token, value, rank)
            for rank, (token, value) in enumerate(entry.top[:top], start=1)
        }
        found.append({str(entry.token): one(entry.token, entry.logprob, None), **ranked})
    return found


class Offsets:
    """Writes the logprobs of a completion, and follows where its tokens begin in the text.

    text_offset counts characters of the text with its prompt, if that is echoed.
    """

    def __init__(
        self,
        tokens: Tokens,
        top: int,
        *,
        echoed: str | None,
        as_ids: bool,
        skip_special_tokens: bool,
    ):
        """echoed: the text of the prompt, if the first tokens are the prompt's."""
        self._tokens, self._top, self._as_ids = tokens, top, as_ids
        self._skip = skip_special_tokens
        # SentencePiece puts a space before a text, which the text does not have.
        self._drops_space = echoed is not None and not echoed.startswith(" ")
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._at = 0

    def first(self, token: int) -> dict[str, Any]:
        """That of the prompt's first token, which has no log-probability."""
        return {
            "tokens": [self._tokens.text(token, self._as_ids)],
            "token_logprobs": [None],
            "top_logprobs": [None],
            "text_offset": [self._offset(token)],
        }

    def of(self, entries: Sequence[request.Logprob]) -> dict[str, Any]:
        """Those of the next tokens."""
        return {
            "tokens": [self._tokens.text(entry.token, self._as_ids) for entry in entries],
            "token_logprobs": [_finite(entry.logprob) for entry in entries],
            "top_logprobs": [self._most_likely(entry) for entry in entries],
            "text_offset": [self._offset(entry.token) for entry in entries],
        }

    def _most_likely(self, entry: request.Logprob) -> dict[str, float]:
        """Tokens that look alike, such as halves of a character, share the larger value."""
        found: dict[str, float] = {}
        for token, value in (*entry.top[: self._top], (entry.token, entry.logprob)):
            name = self._tokens.text(token, self._as_ids)
            found[name] = max(_finite(value), found.get(name, -math.inf))
        return found

    def _offset(self, token: int) -> int:
        offset = self._at
        if not (self._skip and self._tokens.is_special(token)):
            own = self._tokens.bytes(token)
            if self._drops_space:
                own, self._drops_space = own.removeprefix(b" "), False
            self._at += len(self._decoder.decode(own))
        return offset


def joined(parts: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The logprobs of consecutive parts of a completion as one."""
    return {name: [each for part in parts for each in part[name]] for name in parts[0]}


def _finite(value: float) -> float:
    return max(float(value), _LEAST)
