"""The tokens that grammars of requests allow next, in threads of their own if they take long.

A mask takes microseconds, of a very ambiguous grammar a twentieth of a second. While llguidance
computes one, other Python threads can run: a request whose masks take long has them computed in
another thread, and misses the steps until its mask is there.
"""

import concurrent.futures
import time
from collections.abc import Sequence

import numpy as np

from lora_jax import errors
from lora_jax.generation import progress

_LONG = 0.005  # seconds: about as long as a step takes


class Masks:
    """Computes the masks of a batch's requests.

    waits: a step waits for all of its masks, however long they take. Several processes have to
    take the same requests into a step, and do not know which masks are late in another.
    """

    def __init__(self, num_slots: int, vocab_size: int, *, waits: bool):
        self._num_slots, self._num_words = num_slots, -(-vocab_size // 32)
        self._waits = waits
        self._threads = concurrent.futures.ThreadPoolExecutor(num_slots, "masks")

    def in_time(self, works: Sequence[progress.Work]) -> list[progress.Work]:
        """Those whose masks are not late: the others miss this step."""
        return [work for work in works if work.mask is None or work.mask.done()]

    def wait(self, works: Sequence[progress.Work]) -> None:
        """Waits a moment, or until the mask of one of the works is there."""
        coming = [work.mask for work in works if work.mask]
        concurrent.futures.wait(coming, _LONG, concurrent.futures.FIRST_COMPLETED)

    def take(
        self, works: Sequence[progress.Work]
    ) -> tuple[list[progress.Work], np.ndarray, list[tuple[progress.Work, errors.UserError]]]:
        """(the works that take part in the step, the tokens that may come in each slot, as bits,
        those whose grammars fail and why).
        """
        allowed = np.full((self._num_slots, self._num_words), -1, np.int32)
        for work in works:
            if work.matcher and work.mask is None and work.is_slow and not self._waits:
                work.mask = self._threads.submit(self._mask, work)
        taken, failed = [], []
        for work in self.in_time(works):
            try:
                if work.matcher:
                    mask = work.mask.result() if work.mask else self._mask(work)
                    allowed[work.slot.index], work.mask = mask, None
                taken.append(work)
            except errors.UserError as error:
                failed.append((work, error))
        return taken, allowed, failed

    def close(self) -> None:
        """Ends the threads; none is waited for."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    def _mask(self, work: progress.Work) -> np.ndarray:
        mask, start = np.empty(self._num_words, np.int32), time.thread_time()
        work.matcher.mask(mask)
        work.is_slow = time.thread_time() - start > _LONG
        return mask
