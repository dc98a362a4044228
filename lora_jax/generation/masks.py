"""The tokens that the grammars of requests allow next, computed beside the engine's thread.

A mask takes microseconds, of a very ambiguous grammar a tenth of a second. The thread that computes
it lets other Python threads run, and a request whose mask is late misses a step.
"""

import concurrent.futures
from collections.abc import Sequence

import numpy as np

from lora_jax import errors
from lora_jax.generation import grammar as grammars
from lora_jax.generation import progress

_PATIENCE = 0.005  # seconds that a step waits for a mask: about as long as the devices compute it


class Masks:
    """Computes the masks of a batch's requests, each in a thread of its own.

    waits: a step waits for all of its masks, however long they take. Several processes have to
    take the same requests into a step, and do not know which masks are late in another.
    """

    def __init__(self, num_slots: int, vocab_size: int, *, waits: bool):
        self._num_slots, self._num_words = num_slots, -(-vocab_size // 32)
        self._patience = None if waits else _PATIENCE
        self._threads = concurrent.futures.ThreadPoolExecutor(num_slots, "masks")

    def in_time(self, works: Sequence[progress.Work]) -> list[progress.Work]:
        """Those whose masks are not late: the others miss this step."""
        return [work for work in works if work.mask is None or work.mask.done()]

    def wait(self, works: Sequence[progress.Work]) -> None:
        """Waits a moment, or until the mask of one of the works is there."""
        coming = [work.mask for work in works if work.mask]
        concurrent.futures.wait(coming, _PATIENCE, concurrent.futures.FIRST_COMPLETED)

    def take(
        self, works: Sequence[progress.Work]
    ) -> tuple[list[progress.Work], np.ndarray, list[tuple[progress.Work, errors.UserError]]]:
        """(the works that take part in the step, the tokens that may come in each slot, as bits,
        those whose grammars fail and why).
        """
        allowed = np.full((self._num_slots, self._num_words), -1, np.int32)
        for work in works:
            if work.matcher and work.mask is None:
                work.mask = self._threads.submit(self._mask, work.matcher)
        coming = [work.mask for work in works if work.mask]
        concurrent.futures.wait(coming, self._patience)
        taken, failed = [], []
        for work in self.in_time(works):
            try:
                if work.mask:
                    allowed[work.slot.index] = work.mask.result()
                    work.mask = None
                taken.append(work)
            except errors.UserError as error:
                failed.append((work, error))
        return taken, allowed, failed

    def close(self) -> None:
        """Ends the threads; none is waited for."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    def _mask(self, matcher: grammars.Matcher) -> np.ndarray:
        mask = np.empty(self._num_words, np.int32)
        matcher.mask(mask)
        return mask
