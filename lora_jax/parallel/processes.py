"""A run of several processes: its start, decisions that process 0 broadcasts, and a common end.

All processes start the same script. Before any of them opens a device, each connects to process 0
(rendezvous.py); then they start jax.distributed. The connections stay open: process 0 broadcasts
its decisions through them, and every process learns at once when another one ends. jax alone
notices that only after a missed heartbeat, and then aborts.
"""

import contextlib
import ctypes
import json
import os
import queue
import select
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any, NoReturn

from lora_jax import errors
from lora_jax.parallel import cluster, rendezvous

RESTART = os.EX_TEMPFAIL  # exit code 75: the run can go on, if started again with --resume
HEARTBEAT = 30  # seconds without a heartbeat after which jax considers a process lost
_GRACE = 2.0  # seconds to wait for the actual cause of a failure

_group: "_Group | None" = None  # None: this process is alone


def start(process: cluster.Process | None, wait: float = cluster.WAIT) -> None:
    """Waits for all processes and connects them, before jax opens a device. None: this one alone.

    Raises: rendezvous.Missing if process 0 or another one has not connected within `wait` seconds.
    """
    global _group
    if process is None:
        return
    first = process.process_id == 0
    sockets = rendezvous.gather(process, wait) if first else {0: rendezvous.join(process, wait)}
    group = _group = _Group(process, sockets)
    import jax

    # On CPUs, programs that run at the same time may reach their collectives in different orders.
    jax.config.update("jax_cpu_enable_async_dispatch", False)
    # jax's own way to stop all processes after the same step, which `anyone` replaces. Orbax asks
    # it as well, from a thread and for the step that it has written, which resets the step count.
    jax.config.update("jax_enable_preemption_service", False)
    _end_when_aborted(group)
    jax.distributed.initialize(
        process.coordinator,
        process.num_processes,
        process.process_id,
        # In a detected cluster, jax also asks the cluster which devices belong to this process.
        cluster_detection_method=None if process.detected else "deactivate",
        heartbeat_timeout_seconds=HEARTBEAT,
        shutdown_timeout_seconds=HEARTBEAT,
    )


def leads() -> bool:
    """Whether this is process 0, or the only one: the one that prints and writes files."""
    return _group is None or _group.process.process_id == 0


def broadcast(value: Any) -> Any:
    """The `value` of process 0, in every process; all must call it. For JSON's types."""
    return value if _group is None else _group.broadcast(value)


def same(name: str, value: Any) -> None:
    """Raises UserError if a process's `value` differs from process 0's; all must call it."""
    if _group is None:
        return
    theirs = broadcast(value)
    if json.dumps(theirs) != json.dumps(value):  # as strings, because NaN is not equal to itself
        raise errors.UserError(
            expected=f"the same {name} in all processes",
            found=f"{value}, but process 0 has {theirs}",
            where=f"process {_group.process.process_id}",
            do="start all processes with the same command",
        )


def anyone(asks: bool) -> bool:
    """Whether any process asks now or has asked before; all must call it, and get the same answer.

    A request from another process may reach process 0 only in time for the next call.
    """
    return asks if _group is None else _group.anyone(asks)


def when_lost(advice: str) -> None:
    """Sets the advice in the message after the loss of a process."""
    if _group is not None:
        _group.advice = advice


def end(code: int, text: str, *, sure: bool = True) -> None:
    """Ends all processes with `code`; process 0 prints `text`, only once if all fail alike.

    sure: False if the cause may be the loss of a process, which is then reported instead. Does
    nothing in a single process. Does not wait for background work, which may itself be waiting for
    processes that are gone.
    """
    if _group is not None:
        _group.end(code, text, sure)


def leave() -> None:
    """Waits until all processes have reached their end, then disconnects."""
    global _group
    if _group is not None:
        import jax

        _group.wait_for_all()
        jax.distributed.shutdown()
        _group = None


class _Group:
    """The connections of this process, and a thread that listens to them.

    Process 0 sends {"broadcast": value}, {"end": code} and {"bye": true}; the others send it
    {"asks": true}, {"failed": code, "text": …} and {"bye": true}. A connection that closes without
    one of the last two means that its process was lost.
    """

    def __init__(self, process: cluster.Process, sockets: dict[int, socket.socket]):
        self.process, self.advice = process, "start all processes again"
        self._sockets = sockets
        self._broadcasts: queue.Queue = queue.Queue()
        self._asked = False  # by this process or, in process 0, by any
        self._silent = set(sockets)  # processes that have not announced their end
        self._all_said_bye = threading.Event()
        self._failure: tuple[float, int, str] | None = None  # when to report it, code, text
        self._ending = threading.Lock()  # never released: only the first cause is reported
        for connection in sockets.values():
            connection.settimeout(None)
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        threading.Thread(target=self._listen, daemon=True).start()

    @property
    def _leads(self) -> bool:
        return self.process.process_id == 0

    def broadcast(self, value: Any) -> Any:
        if not self._leads:
            return self._broadcasts.get()
        self._send({"broadcast": value})
        return json.loads(json.dumps(value))  # the same types in all processes

    def anyone(self, asks: bool) -> bool:
        if asks and not self._asked:
            self._asked = True
            if not self._leads:
                self._send({"asks": True})
        return self.broadcast(self._asked)

    def end(self, code: int, text: str, sure: bool) -> NoReturn:
        if self._leads:
            time.sleep(0 if sure else _GRACE)  # the listening thread may notice a loss
            self._end_all(code, text)
        self._send({"failed": code, "text": text})
        time.sleep(2 * _GRACE)  # process 0 reports it, and ends this process
        self._exit(code, text)

    def wait_for_all(self) -> None:
        if not self._leads:
            self._send({"bye": True})
        self._all_said_bye.wait()
        if self._leads:
            self._send({"bye": True})

    def lost(self, who: int) -> NoReturn:
        # The newline moves the message below a progress bar.
        text = f"\nprocess {who} of {self.process.num_processes} was lost; {self.advice}"
        if self._leads:
            self._end_all(RESTART, text)
        self._exit(RESTART, text)

    def _listen(self) -> None:
        lines = {who: self._lines(who) for who in self._sockets}
        by_socket = {connection: who for who, connection in self._sockets.items()}
        while by_socket:
            wait = max(0, self._failure[0] - time.monotonic()) if self._failure else None
            for connection in select.select(list(by_socket), [], [], wait)[0]:
                who = by_socket[connection]
                for message in next(lines[who]):
                    if message is not None:
                        self._hear(who, message)
                        continue
                    del by_socket[connection]
                    if who in self._silent:
                        self.lost(who)
            if self._failure and self._failure[0] <= time.monotonic():
                self._end_all(*self._failure[1:])

    def _lines(self, who: int) -> Iterator[list[dict[str, Any] | None]]:
        """Each time: the messages that have arrived complete; None at the end of the connection."""
        rest = b""
        while True:
            try:
                some = self._sockets[who].recv(2**16)
            except OSError:
                some = b""
            *whole, rest = (rest + some).split(b"\n")
            yield [json.loads(line) for line in whole] + ([] if some else [None])

    def _hear(self, who: int, message: dict[str, Any]) -> None:
        if "broadcast" in message:
            self._broadcasts.put(message["broadcast"])
        elif "asks" in message:
            self._asked = True
        elif "end" in message:
            self._exit(message["end"], "")
        elif "bye" in message:
            self._silent.discard(who)
            if not self._silent:
                self._all_said_bye.set()
        elif "failed" in message:
            self._silent.discard(who)
            text = f"process {who} of {self.process.num_processes}:\n{message['text']}"
            # Process 0 may fail for the same reason, or a third process may be the cause.
            self._failure = self._failure or (time.monotonic() + _GRACE, message["failed"], text)

    def _end_all(self, code: int, text: str) -> NoReturn:
        self._ending.acquire()
        self._send({"end": code})
        time.sleep(0.1)  # the message must arrive before the connection closes
        self._print_and_exit(code, text)

    def _exit(self, code: int, text: str) -> NoReturn:
        self._ending.acquire()
        self._print_and_exit(code, text)

    def _print_and_exit(self, code: int, text: str) -> NoReturn:
        if text:
            os.write(2, f"{text}\n".encode(errors="replace"))
        for stream in (sys.stdout, sys.stderr):
            # The stream may be closed, or in use by another thread.
            with contextlib.suppress(OSError, ValueError, RuntimeError):
                stream.flush()
        os._exit(code)

    def _send(self, message: dict[str, Any]) -> None:
        for connection in self._sockets.values():
            with contextlib.suppress(OSError):  # the listening thread will notice it
                rendezvous.send(connection, message)


def _end_when_aborted(group: _Group) -> None:
    """Turns an abort of jax's runtime into an exit with the advice to start again.

    Its coordination service aborts every process when one misses its heartbeat, and at once when
    process 0 is gone. It has no other notification, and a Python signal handler would run too late.
    """

    @ctypes.CFUNCTYPE(None, ctypes.c_int)
    def aborted(_):
        time.sleep(_GRACE)  # the listening thread may report which process it was
        n = group.process.num_processes
        text = f"\none of {n} processes was lost, or jax failed as shown above; {group.advice}"
        group._print_and_exit(RESTART, text)

    group.aborted = aborted  # keeps the callback alive
    ctypes.CDLL(None).signal(signal.SIGABRT, aborted)
