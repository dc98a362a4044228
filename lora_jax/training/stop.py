"""Ctrl-C and SIGTERM end a run after the current step."""

import contextlib
import os
import signal
import threading
from collections.abc import Iterator

import jax

from lora_jax.parallel import processes


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """Within this context Ctrl-C raises KeyboardInterrupt."""
    if not _in_main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


class Stop:
    """`asked` is set by Ctrl-C or SIGTERM; a second Ctrl-C raises KeyboardInterrupt.

    code: the exit code, 130 after Ctrl-C, 75 after SIGTERM: a machine that is preempted starts the
    run again. With several processes a signal to one of them stops all after the same step, and
    the code is always 75. Outside of the main thread signals cannot be handled, so nothing happens.
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
        # print() is not reentrant: a signal handler must not call it.
        text = b"stopping after this step, to save"
        before, after = (b"", b"; press Ctrl-C again to stop at once")
        if number == signal.SIGTERM:
            before, after = (b"SIGTERM: ", b"")
        os.write(2, b"\n" + before + text + after + b"\n")


def _in_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()
