"""How Ctrl-C or SIGTERM ends a run: after the step that is being done."""

import contextlib
import os
import signal
import threading
from collections.abc import Iterator

import jax

from lora_jax.parallel import processes


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """Ctrl-C raises KeyboardInterrupt inside, whatever it did before."""
    if not _in_main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


class Stop:
    """Ctrl-C or SIGTERM asks to stop after this step; a second Ctrl-C ends at once.

    code: 130 after Ctrl-C. After SIGTERM, of a machine that is wanted for something else, 75:
    start again. Of many processes one is enough, and all stop after the same step, with 75.
    Outside of the main thread, which alone may handle signals, nothing asks.
    """

    def __init__(self):
        self.asked = False
        self.code = processes.RESTART

    def __enter__(self) -> "Stop":
        numbers = (signal.SIGINT, signal.SIGTERM) if _in_main_thread() else ()
        self._before = {number: signal.signal(number, self._ask) for number in numbers}
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _ask(self, number: int, _) -> None:
        if self.asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.asked = True
        if number == signal.SIGINT and jax.process_count() == 1:
            self.code = 130
        # print() may not be entered again from a signal handler.
        os.write(2, b"\nstopping after this step, to save; again to stop at once\n")


def _in_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()
