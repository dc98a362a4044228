"""The turns of the engine: start a step of the requests in slots, read the one before."""

from collections.abc import Sequence

import numpy as np

from lora_jax.generation import batch as batches
from lora_jax.generation import lockstep, masks, progress, scheduler
from lora_jax.generation import request as requests

_FEW = 4  # requests at most, while guessed tokens are worth their computation


class Loop:
    """Keeps one step on the devices while the host reads the tokens of the step before.

    speculate: guess so many tokens from repetitions in the text; 0: none. alone: no other process
    makes the same turns.
    """

    def __init__(
        self, batch: batches.Batch, schedule: scheduler.Scheduler, speculate: int, *, alone: bool
    ):
        self._batch, self._scheduler = batch, schedule
        self._masks = masks.Masks(batch.num_slots, batch.vocab_size, waits=not alone)
        self.speculate = speculate if batch.can_speculate else 0
        self._dispatched: progress.Step | None = None

    @property
    def has_work(self) -> bool:
        return self._scheduler.has_work or self._dispatched is not None

    def end_all(self, reason: str, error: str | None = None) -> None:
        """Ends all requests."""
        self._scheduler.end_all(reason, error)
        self._dispatched = None

    def close(self) -> None:
        """Ends all requests, and the threads of their grammars."""
        self.end_all("abort")
        self._masks.close()

    def turn(self, followers: lockstep.Leader | None) -> None:
        """At most one step of all slots, then some tokens of the prompts that wait."""
        self._scheduler.take(followers)
        self._scheduler.admit()
        guesses = 0 < len(self._scheduler.running) <= _FEW and self.speculate
        if guesses or (self._dispatched and self._dispatched.counts is not None):
            self._read()  # the next step depends on its tokens
        ready = [work for work in self._scheduler.running
                 if not work.unfilled and not work.done and work.left > 0]  # fmt: skip
        current = self._batch.current(ready)
        ready = self._masks.in_time(current)
        if any(work.matcher for work in ready):
            following = self._follow_grammars(ready)
        elif drafts := self._drafts(ready) if guesses else {}:
            following = self._batch.verify(ready, drafts, self.speculate)
        else:
            following = self._batch.decode(ready) if ready else None
        self._batch.fill(self._scheduler.running)
        self._read()
        self._dispatched = following
        if current and not ready:
            self._masks.wait(current)

    def _follow_grammars(self, ready: list[progress.Work]) -> progress.Step | None:
        """Starts a step in which grammars say what may come.

        What they say depends on the tokens of the step before. Those are read, and the grammars
        advance, while the devices compute the logits. A request whose grammar takes longer misses
        the end of this step, and the next ones until it is known what may come.
        """
        logits = self._batch.forward(ready)
        self._read()
        ready, allowed, failed = self._masks.take([work for work in ready if not work.done])
        for work, error in failed:
            reason = error.on_one_line()
            self._scheduler.end(work, work.output.end("error", reason, is_users=True))
        return self._batch.choose(ready, logits, allowed) if ready else None

    def _drafts(self, ready: list[progress.Work]) -> dict[int, Sequence[int]]:
        """Guesses at the next tokens of greedy requests, by slot."""
        found = {}
        for work in ready:
            if work.request.sampling.is_plain_greedy:
                most = min(self.speculate, work.left - 1)
                if (turn := self._batch.before_turn(work)) is not None:
                    most = min(most, turn)
                draft = work.lookup.draft(most)
                if draft:
                    found[work.slot.index] = draft
                    self._scheduler.totals["guessed"] += len(draft)
        return found

    def _read(self) -> None:
        """Reads the tokens of the step that was dispatched, and delivers them."""
        step, self._dispatched = self._dispatched, None
        if step is None:
            return
        tokens = np.asarray(step.tokens).reshape(self._batch.num_slots, -1)
        logprobs = step.logprobs and type(step.logprobs)(*map(np.asarray, step.logprobs))
        for work in step.works:
            if work.done:
                continue  # it ended with the token before this one
            index, top = work.slot.index, work.request.sampling.logprobs
            count = 1
            if step.counts is not None:
                count = int(np.asarray(step.counts)[index])
                work.sent += count
                self._scheduler.totals["accepted"] += count - 1
            for token in tokens[index, :count].tolist():
                own = None if top is None else progress.logprob(token, logprobs, index, top)
                self._deliver(work, token, own)
                if work.done:
                    break

    def _deliver(self, work: progress.Work, token: int, logprob: requests.Logprob | None) -> None:
        # The token before it is in the cache now.
        work.slot.tokens.append((*work.request.prompt[-1:], *work.output.tokens[-1:])[-1])
        self._scheduler.totals["generated"] += 1
        piece = work.output.push(token, logprob)
        if self.speculate:
            work.lookup.extend([token])
        if work.matcher:
            work.matcher.accept(token)
            if work.matcher.finished and not piece.finish_reason:
                work.request.emit(piece)
                piece = work.output.end("stop")
        if piece.finish_reason:
            self._scheduler.end(work, piece)
        else:
            work.request.emit(piece)
