"""A request to the engine: what was asked, and its output piece by piece. Imports no jax."""

import dataclasses
import queue
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

from lora_jax.generation import config


class Logprob(NamedTuple):
    """log p of one token, and (id, log p) of the most likely ones, the first the most likely."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


class Piece(NamedTuple):
    """What is new in the output of a request.

    text: never retracted; it may lag behind the tokens, because characters and stop strings may
    span tokens. tokens: their ids, with logprobs of each if they were asked for. finish_reason is
    "stop", "length", "abort" or "error" in the last piece, None in the others. stop_reason: the
    stop string or stop token id that ended the text, if it was not the model's EOS. error: the
    reason of "error". is_users: the error is of what was asked, not of the engine.
    """

    text: str = ""
    tokens: tuple[int, ...] = ()
    logprobs: tuple[Logprob, ...] = ()
    finish_reason: str | None = None
    stop_reason: str | int | None = None
    error: str | None = None
    is_users: bool = False


@dataclasses.dataclass(frozen=True)
class Result:
    """The whole output of a request. prompt_logprobs has no entry for the first token."""

    text: str
    tokens: tuple[int, ...]
    finish_reason: str
    stop_reason: str | int | None = None
    logprobs: tuple[Logprob, ...] = ()
    prompt_logprobs: tuple[Logprob, ...] = ()
    cached_tokens: int = 0


class Request:
    """A request and its output: iterate over its pieces, or wait for `result()`.

    prompt: token ids. adapters: {name: weight}; {} is the base. listener: called with each piece in
    the engine's thread, in place of the iterator. cached_tokens: of the prompt, those whose keys
    and values were there already. prompt_logprobs: filled before the first piece.
    """

    def __init__(
        self,
        prompt: tuple[int, ...],
        sampling: config.Sampling,
        adapters: Mapping[str, float],
        *,
        listener: Callable[[Piece], None] | None = None,
        advance: Callable[[], None] | None = None,
    ):
        self.prompt = prompt
        self.sampling = sampling
        self.adapters = dict(adapters)
        self.number = -1  # in the order in which the engine took its requests
        self.cached_tokens = 0
        self.prompt_logprobs: list[Logprob] = []
        self.aborted = threading.Event()
        self._listener = listener
        self._advance = advance
        self._pieces: queue.SimpleQueue[Piece] = queue.SimpleQueue()

    def abort(self) -> None:
        """Ends the request at the next step; its last piece says "abort"."""
        self.aborted.set()

    def emit(self, piece: Piece) -> None:
        """For the engine: delivers a piece."""
        (self._listener or self._pieces.put)(piece)

    def __iter__(self) -> Iterator[Piece]:
        while True:
            if self._advance is not None:
                while self._pieces.empty():
                    self._advance()
            piece = self._pieces.get()
            yield piece
            if piece.finish_reason:
                return

    def result(self) -> Result:
        """Waits for the end, and returns the whole output."""
        pieces = [*self]
        last = pieces[-1]
        if last.finish_reason == "error":
            raise RuntimeError(last.error)
        return Result(
            "".join(piece.text for piece in pieces),
            tuple(token for piece in pieces for token in piece.tokens),
            last.finish_reason,
            last.stop_reason,
            tuple(each for piece in pieces for each in piece.logprobs),
            tuple(self.prompt_logprobs),
            self.cached_tokens,
        )
