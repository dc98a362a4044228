"""From the engine's thread to the event loop: pieces of output, once per wake-up."""

import asyncio
import collections
import contextlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from lora_jax.generation import config, request

Sink = Callable[[request.Piece], None]


class Bridge:
    """Submits requests, and delivers their pieces in the event loop.

    A step of the engine gives a piece to each of its rows. They wake the loop up once.
    """

    def __init__(self, engine: Any):
        self._engine = engine
        self._loop = asyncio.get_running_loop()
        self._arrived: collections.deque[tuple[Sink, request.Piece]] = collections.deque()
        self._waking = False
        self.open = 0  # requests in the engine, those that wait included
        self.by_adapter: collections.Counter[str] = collections.Counter()  # of them

    def submit(
        self,
        prompt: Sequence[int],
        sampling: config.Sampling,
        adapters: Mapping[str, float],
        sink: Sink,
    ) -> request.Request:
        """Hands a request to the engine. sink: called with each piece, in the event loop.

        Raises: UserError as Engine.submit.
        """

        def arrive(piece: request.Piece) -> None:  # in the engine's thread
            self._arrived.append((counted, piece))
            if not self._waking:
                self._waking = True
                with contextlib.suppress(RuntimeError):  # the loop has ended
                    self._loop.call_soon_threadsafe(self._deliver)

        def counted(piece: request.Piece) -> None:
            if piece.finish_reason:
                self._count(adapters, -1)
            sink(piece)

        made = self._engine.submit(prompt, sampling, adapters=adapters, listener=arrive)
        self._count(adapters, 1)
        return made

    def _count(self, adapters: Mapping[str, float], one: int) -> None:
        self.open += one
        for name in adapters:
            self.by_adapter[name] += one
        self.by_adapter += collections.Counter()  # drops what is 0

    def _deliver(self) -> None:
        self._waking = False  # before reading: a piece from now on wakes the loop up again
        while self._arrived:
            sink, piece = self._arrived.popleft()
            sink(piece)


class Inbox:
    """What has arrived for the choices of one HTTP request."""

    def __init__(self) -> None:
        self._pieces: dict[int, list[request.Piece]] = {}
        self._arrived = asyncio.Event()

    def sink(self, index: int) -> Sink:
        """Takes the pieces of a choice."""

        def put(piece: request.Piece) -> None:
            self._pieces.setdefault(index, []).append(piece)
            self._arrived.set()

        return put

    async def take(self, timeout: float) -> dict[int, request.Piece]:
        """{choice: all that is new in it, as one piece}; {} if nothing arrives for so long."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout):
                await self._arrived.wait()
        self._arrived.clear()
        arrived, self._pieces = self._pieces, {}
        return {index: merge(pieces) for index, pieces in sorted(arrived.items())}


def merge(pieces: Sequence[request.Piece]) -> request.Piece:
    """Consecutive pieces of a request as one."""
    if len(pieces) == 1:
        return pieces[0]
    last = pieces[-1]
    return request.Piece(
        "".join(piece.text for piece in pieces),
        tuple(token for piece in pieces for token in piece.tokens),
        tuple(entry for piece in pieces for entry in piece.logprobs),
        last.finish_reason,
        last.stop_reason,
        last.error,
        last.is_users,
    )
