"""The choices of one HTTP request: submitted, awaited, and ended when the client leaves."""

import dataclasses
import hashlib
import time
from collections.abc import AsyncIterator, Mapping, Sequence

from lora_jax import errors
from lora_jax.generation import config, request
from lora_jax.serving import bridge, refusal
from lora_jax.serving import metrics as measuring

_NO_RETRY = {"x-should-retry": "false"}  # openai's clients would ask twice more


@dataclasses.dataclass
class Choice:
    """A choice and what it has so far. discards: the output is not wanted, only the prompt's."""

    index: int
    prompt: Sequence[int]
    request: request.Request
    discards: bool = False
    text: str = ""
    tokens: tuple[int, ...] = ()
    logprobs: tuple[request.Logprob, ...] = ()
    finish_reason: str | None = None
    stop_reason: str | int | None = None

    def add(self, piece: request.Piece) -> request.Piece:
        """Takes a piece in; returns what of it is wanted."""
        if self.discards:
            end = "length" if piece.finish_reason else None
            piece = request.Piece(finish_reason=end)
        self.text += piece.text
        self.tokens += piece.tokens
        self.logprobs += piece.logprobs
        self.finish_reason, self.stop_reason = piece.finish_reason, piece.stop_reason
        return piece


class Generation:
    """n choices for each of some prompts; the choices of a prompt follow each other.

    Use it as a context manager: leaving it aborts what has not ended.
    """

    def __init__(self, link: bridge.Bridge, metrics: measuring.Metrics, timeout: float):
        self._link, self._metrics, self._timeout = link, metrics, timeout
        self._inbox = bridge.Inbox()
        self._since = time.monotonic()
        self._cut = "abort"  # why choices end that the engine has not ended
        self.choices: list[Choice] = []

    def submit(
        self,
        prompt: Sequence[int],
        sampling: config.Sampling,
        adapters: Mapping[str, float],
        n: int,
        *,
        discards: bool = False,
    ) -> None:
        """Adds n choices for a prompt. Raises: Refusal if the engine cannot serve them."""
        for number in range(n):
            own = dataclasses.replace(sampling, seed=seed_of(sampling.seed, number))
            index = len(self.choices)
            try:
                made = self._link.submit(prompt, own, adapters, self._inbox.sink(index))
            except errors.UserError as error:
                raise refusal.of(error) from None
            self.choices.append(Choice(index, prompt, made, discards))
        self._metrics.prompt_tokens.add(len(prompt))

    def __enter__(self) -> "Generation":
        return self

    def __exit__(self, *_: object) -> None:
        for choice in self.choices:
            if choice.finish_reason is None:
                choice.request.abort()
                choice.finish_reason = self._cut
                self._metrics.finished.add(1, self._cut)

    async def pieces(
        self, beat: float | None = None
    ) -> AsyncIterator[list[tuple[Choice, request.Piece]]]:
        """Yields what is new until all choices have ended. beat: [] after so many quiet seconds.

        Raises: Refusal if the engine fails, or after the time that a request may take.
        """
        end = self._since + self._timeout
        running = len(self.choices)
        seen: dict[int, float] = {}
        while running:
            left = end - time.monotonic()
            arrived = await self._inbox.take(max(left if beat is None else min(left, beat), 0))
            if not arrived and time.monotonic() >= end:
                self._cut = "timeout"
                raise refusal.Refusal(
                    f"The request took longer than {self._timeout:g} seconds.",
                    status=504, code="timeout", headers=_NO_RETRY,
                )  # fmt: skip
            running -= sum(piece.finish_reason is not None for piece in arrived.values())
            yield [self._taken(index, piece, seen) for index, piece in arrived.items()]

    def _taken(
        self, index: int, piece: request.Piece, seen: dict[int, float]
    ) -> tuple[Choice, request.Piece]:
        choice, now = self.choices[index], time.monotonic()
        if piece.tokens:
            self._metrics.generated_tokens.add(len(piece.tokens))
            if index in seen:
                each = (now - seen[index]) / len(piece.tokens)
                self._metrics.between_tokens.observe(each, len(piece.tokens))
            else:
                self._metrics.first_token.observe(now - self._since)
            seen[index] = now
        if piece.finish_reason:
            self._metrics.finished.add(1, piece.finish_reason)
            self._metrics.whole.observe(now - self._since)
        if piece.finish_reason == "error":
            choice.finish_reason = "error"
            raise refusal.Refusal(
                piece.error or "The engine failed.",
                status=400 if piece.is_users else 500,
                headers=_NO_RETRY,
            )
        if piece.finish_reason == "abort":
            choice.finish_reason = "abort"
            raise refusal.Refusal("The server is shutting down.", status=503)
        return choice, choice.add(piece)

    @property
    def usage(self) -> dict[str, object]:
        """OpenAI's usage so far. The prompt of several choices counts once."""
        prompts = {id(choice.prompt): choice for choice in self.choices}.values()
        num_prompt = sum(len(choice.prompt) for choice in prompts)
        generated = sum(len(choice.tokens) for choice in self.choices)
        cached = sum(choice.request.cached_tokens for choice in prompts)
        return {
            "prompt_tokens": num_prompt,
            "completion_tokens": generated,
            "total_tokens": num_prompt + generated,
            "prompt_tokens_details": {"cached_tokens": cached},
        }


def seed_of(seed: int | None, number: int) -> int | None:
    """The seed of a choice: the request's for the first, and others made of it for the others."""
    if seed is None or number == 0:
        return seed
    digest = hashlib.sha256(f"{seed} {number}".encode()).digest()
    return int.from_bytes(digest[:4], "little")
