"""Sampled tokens of one request → its pieces of text, and the decision to stop. Imports no jax."""

from collections.abc import Collection
from typing import Any

from lora_jax.generation import request as requests
from lora_jax.generation import text


class Output:
    """What a request has generated so far."""

    def __init__(self, request: requests.Request, reader: Any, eos_ids: Collection[int]):
        sampling = request.sampling
        self.tokens: list[int] = []
        self._sampling = sampling
        self._eos = frozenset() if sampling.ignore_eos else frozenset(eos_ids)
        self._text = text.Detokenizer(
            reader, request.prompt, skip_special_tokens=sampling.skip_special_tokens
        )
        self._stops = text.StopStrings(sampling.stop, include=sampling.include_stop)

    def push(self, token: int, logprob: requests.Logprob | None = None) -> requests.Piece:
        """The piece that a token makes; the last piece if it ends the request."""
        self.tokens.append(token)
        logprobs = () if logprob is None else (logprob,)
        # Before min_tokens, stop tokens are not sampled, and stop strings do not count.
        early = len(self.tokens) < self._sampling.min_tokens
        own = token in self._sampling.stop_token_ids
        if not early and (own or token in self._eos):
            new = self._text.push(token) if self._sampling.include_stop else ""
            return self._last("stop", token if own else None, new, (token,), logprobs)
        new = self._text.push(token)
        if early:
            return requests.Piece(new, (token,), logprobs)
        if len(self.tokens) == self._sampling.max_new_tokens:
            return self._last("length", None, new, (token,), logprobs)
        new, found = self._stops.push(new, self._text.held)
        return requests.Piece(new, (token,), logprobs, "stop" if found else None, found)

    def end(
        self, reason: str, error: str | None = None, *, is_users: bool = False
    ) -> requests.Piece:
        """The last piece of a request that is ended from outside."""
        return self._last(reason, None, "", (), ())._replace(error=error, is_users=is_users)

    def _last(self, reason, stop_reason, new, tokens, logprobs) -> requests.Piece:
        """With all text that was withheld, in which a stop string may still be found."""
        text, found = self._stops.push(new + self._text.finish())
        if found is not None:
            return requests.Piece(text, tokens, logprobs, "stop", found)
        return requests.Piece(text + self._stops.finish(), tokens, logprobs, reason, stop_reason)
