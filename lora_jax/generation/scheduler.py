"""Requests from the queue into slots, the oldest first, and out of them again."""

import collections
from collections.abc import Sequence
from typing import NamedTuple

from lora_jax import errors
from lora_jax.generation import batch as batches
from lora_jax.generation import lockstep, progress
from lora_jax.generation import pool as pools
from lora_jax.generation import request as requests

_PATIENCE = 4  # how often, times the slots, later requests may be served before an earlier one


class Stats(NamedTuple):
    """Requests that wait and run now; and in total, their tokens and those found in the cache.

    guessed, accepted: tokens that were guessed by repetition, and those that were right.
    """

    waiting: int
    running: int
    slots: int
    requests: int
    prompt_tokens: int
    cached_tokens: int
    generated_tokens: int
    guessed_tokens: int
    accepted_tokens: int


class Scheduler:
    """The requests that wait, and those that are in slots of the batch with their adapters.

    inbox: requests from any thread, which wait from the next turn on. totals: what was counted.
    """

    def __init__(self, batch: batches.Batch, pool: pools.Pool | None, eos_ids: Sequence[int]):
        self._batch, self._pool, self._eos_ids = batch, pool, eos_ids
        self.inbox: collections.deque[progress.Work] = collections.deque()
        self.waiting: list[progress.Work] = []
        self.running: list[progress.Work] = []
        self.totals = collections.Counter()

    def stats(self) -> Stats:
        total = self.totals
        return Stats(
            len(self.waiting) + len(self.inbox), len(self.running), self._batch.num_slots,
            total["requests"], total["prompt"], total["cached"], total["generated"],
            total["guessed"], total["accepted"],
        )  # fmt: skip

    @property
    def has_work(self) -> bool:
        return bool(self.inbox or self.waiting or self.running)

    def abort(self, number: int) -> None:
        """Asks the request with this number to end, if it has not yet."""
        known = {work.request.number: work for work in (*self.waiting, *self.running)}
        known |= dict(enumerate(self.inbox, self.totals["requests"]))
        if number in known:
            known[number].request.abort()

    def take(self, followers: lockstep.Leader | None) -> None:
        """New requests join the queue; those that were aborted end."""
        new = [self.inbox.popleft() for _ in range(len(self.inbox))]
        for work in new:
            work.request.number = self.totals["requests"]
            self.totals["requests"] += 1
        self.waiting += new
        aborted = [work for work in (*self.waiting, *self.running)
                   if work.request.aborted.is_set() and not work.done]  # fmt: skip
        if followers:
            followers.send(
                [work.request for work in new], [work.request.number for work in aborted]
            )
        for work in aborted:
            self.end(work, work.output.end("abort"))
        self.waiting = [work for work in self.waiting if not work.done]

    def admit(self) -> None:
        """Free slots take requests, the oldest first."""
        left, blocked = [], False
        for work in self.waiting:
            if blocked or not self._start(work):
                left.append(work)
                blocked |= work.overtaken > _PATIENCE * self._batch.num_slots
                blocked |= not self._batch.has_free_slot
            else:
                for earlier in left:
                    earlier.overtaken += 1
        self.waiting = left

    def _start(self, work: progress.Work) -> bool:
        """Gives a request a slot and its adapters; False if there are none now."""
        if not self._batch.has_free_slot:
            return False
        if work.request.adapters:
            try:
                work.lease = self._pool.acquire(work.request.adapters)
            except errors.UserError as error:  # unloaded while it waited
                reason = error.on_one_line()
                self.end(work, work.output.end("error", reason, is_users=True))
                return True
            if work.lease is None:
                return False
        self._batch.admit(work, self._eos_ids)
        self.running.append(work)
        self.totals["prompt"] += len(work.request.prompt)
        self.totals["cached"] += work.filled
        return True

    def end(self, work: progress.Work, piece: requests.Piece) -> None:
        """Delivers the last piece, and frees what the request holds."""
        work.done = True
        if work.slot is not None:
            self._batch.free(work.slot)
            self.running.remove(work)
        if work.lease is not None:
            self._pool.release(work.lease)
        work.request.emit(piece)

    def end_all(self, reason: str, error: str | None = None) -> None:
        while self.inbox:
            self.waiting.append(self.inbox.popleft())
        for work in [*self.waiting, *self.running]:
            if not work.done:
                self.end(work, work.output.end(reason, error))
        self.waiting = []
