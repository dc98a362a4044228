"""Many processes that are one run: how they meet, what process 0 tells, how they end together.

All start the same script. Before any device is touched they meet at the coordinator's port, each
with a connection to process 0, and go on to jax.distributed. The connections stay: through them
process 0 tells what it alone decides, and every process learns at once when another one ends. jax
notices that only after a heartbeat's time, and then aborts.
"""

import contextlib
import ctypes
import dataclasses
import glob
import json
import os
import queue
import re
import select
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any, NoReturn

from lora_jax import errors

RESTART = os.EX_TEMPFAIL  # 75: started again with --resume, the run goes on
WAIT = 300.0  # seconds for all processes to be started
HEARTBEAT = 30  # seconds without one after which jax counts a process as lost
_GRACE = 2.0  # seconds in which the cause of a failure may still become known


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a process stands among the others."""

    coordinator: str  # HOST:PORT of process 0
    num_processes: int
    process_id: int
    detected: bool = False  # told by the cluster, not by flags


class Missing(errors.UserError):
    """Not all processes have come. A job manager may start them again."""


_group: "_Group | None" = None  # None: this process is alone


def find(
    coordinator: str | None = None, num_processes: int | None = None, process_id: int | None = None
) -> Place | None:
    """The place that flags, or else the cluster, give to this process; None: it is alone.

    Raises: UserError for flags that are missing or out of range, a cluster that does not tell.
    """
    flags = {
        "--coordinator": coordinator,
        "--num-processes": num_processes,
        "--process-id": process_id,
    }
    typed = {flag: value for flag, value in flags.items() if value is not None}
    if not typed:
        return _detected()
    if typed == {"--num-processes": 1}:
        return None
    problems = [f"no {flag}" for flag in flags if flag not in typed]
    if coordinator is not None and not _is_address(coordinator):
        problems.append(f"--coordinator {coordinator}, not HOST:PORT")
    if num_processes is not None and num_processes < 1:
        problems.append(f"--num-processes {num_processes} (at least 1)")
    if process_id is not None and not 0 <= process_id < (num_processes or process_id + 1):
        problems.append(f"--process-id {process_id} (from 0 to --num-processes − 1)")
    if problems:
        raise errors.UserError(
            expected="--coordinator HOST:PORT (the same for all, a free port of process 0's host), "
            "--num-processes N and --process-id 0 … N − 1",
            found=problems,
            do="give all three, or none on a cluster that jax detects",
        )
    return Place(coordinator, num_processes, process_id) if num_processes > 1 else None


def _is_address(text: str) -> bool:
    match = re.fullmatch(r"(.+):(\d{1,5})", text)
    return match is not None and 0 < int(match[2]) < 2**16


def _detected() -> Place | None:
    """What jax's own detection finds, asked only where there are signs of a cluster."""
    names = ("SLURM_JOB_ID", "OMPI_MCA_orte_hnp_uri", "JOB_COMPLETION_INDEX",
             "TPU_WORKER_HOSTNAMES", "TPU_PROCESS_ADDRESSES")  # fmt: skip
    signs = [name for name in names if name in os.environ]
    signs += glob.glob("/dev/accel[0-9]*") + glob.glob("/dev/vfio/[0-9]*")
    # The shell of an allocation for many tasks, or one task started in it.
    if os.environ.get("SLURM_STEP_NUM_TASKS") == "1" and "OMPI_MCA_orte_hnp_uri" not in signs:
        return None
    if not signs:
        return None
    from jax._src import clusters

    for cluster in clusters.ClusterEnv._cluster_types:
        if cluster.opt_in_only_method or not _is_present(cluster):
            continue
        try:
            num_processes = cluster.get_process_count()
            if num_processes == 1:
                return None
            port = os.environ.get("JAX_COORDINATOR_PORT")
            address = cluster.get_coordinator_address(int(WAIT), port)
            return Place(address, num_processes, cluster.get_process_id(), detected=True)
        except Exception as error:
            raise errors.UserError(
                expected="a cluster that tells its processes who they are",
                found=f"{cluster.__name__}: {error}",
                do="give --coordinator, --num-processes and --process-id, "
                "or --num-processes 1 for a process alone",
            ) from error
    return None


def _is_present(cluster: Any) -> bool:
    if cluster.__name__ == "K8sCluster" and "JOB_COMPLETION_INDEX" not in os.environ:
        return False  # a pod, but of no indexed job
    try:
        return cluster.is_env_present()
    except Exception:  # a TPU without Google's metadata server, a pod without an account
        return False


def start(place: Place | None, wait: float = WAIT) -> None:
    """Waits for all processes and joins them, before jax touches a device. None: alone.

    Raises: Missing when process 0 or one of the others has not come in `wait` seconds.
    """
    global _group
    if place is None:
        return
    sockets = _gather(place, wait) if place.process_id == 0 else {0: _join(place, wait)}
    group = _group = _Group(place, sockets)
    import jax

    # On CPUs, programs in flight at once may meet in different orders in their collectives.
    jax.config.update("jax_cpu_enable_async_dispatch", False)
    # jax's own way to stop all after the same step, which `anyone` replaces: Orbax asks it, too,
    # from a thread and for the step that it has written, which sets the count of steps back.
    jax.config.update("jax_enable_preemption_service", False)
    _end_when_aborted(group)
    jax.distributed.initialize(
        place.coordinator,
        place.num_processes,
        place.process_id,
        # Where a cluster was detected, jax asks it as well which devices are this process's.
        cluster_detection_method=None if place.detected else "deactivate",
        heartbeat_timeout_seconds=HEARTBEAT,
        shutdown_timeout_seconds=HEARTBEAT,
    )


def leads() -> bool:
    """Whether this is process 0 (or alone), which alone prints and writes files."""
    return _group is None or _group.place.process_id == 0


def told(value: Any) -> Any:
    """What process 0 calls this with, in every process; all must call it. JSON's types."""
    return value if _group is None else _group.told(value)


def same(name: str, value: Any) -> None:
    """Raises UserError where a process has another `value` than process 0; all must call it."""
    if _group is None:
        return
    theirs = told(value)
    if json.dumps(theirs) != json.dumps(value):  # as texts: NaN is not equal to itself
        raise errors.UserError(
            expected=f"the same {name} in all processes",
            found=f"{value}, but process 0 has {theirs}",
            where=f"process {_group.place.process_id}",
            do="start all with the same command",
        )


def anyone(asks: bool) -> bool:
    """Whether a process asks, or has asked before: the same in all; all must call it.

    What the others ask process 0 may hear of in time for the next call only.
    """
    return asks if _group is None else _group.anyone(asks)


def when_lost(advice: str) -> None:
    """Sets what a message tells to do after the loss of a process."""
    if _group is not None:
        _group.advice = advice


def end(code: int, text: str, *, sure: bool = True) -> None:
    """Ends all processes with `code`; process 0 prints `text`, once if all fail alike.

    sure: False when the loss of a process may be the cause, which is told instead.
    Alone it does nothing. Nothing is waited for: what is at work in the background may wait for
    processes that are gone.
    """
    if _group is not None:
        _group.end(code, text, sure)


def leave() -> None:
    """Waits until all processes have come to their end, and lets them go."""
    global _group
    if _group is not None:
        import jax

        _group.wait_for_all()
        jax.distributed.shutdown()
        _group = None


# ---------------------------------------------------------------------------------- meeting


def _gather(place: Place, wait: float) -> dict[int, socket.socket]:
    """Process 0: a connection from each of the others."""
    port = int(place.coordinator.rpartition(":")[2])
    found: dict[int, socket.socket] = {}
    end = time.monotonic() + wait
    try:
        # jax listens on this port next: with SO_REUSEADDR the connections may stay.
        listener = socket.create_server(
            ("", port), family=socket.AF_INET6, dualstack_ipv6=True
        ) if socket.has_dualstack_ipv6() else socket.create_server(("", port))  # fmt: skip
    except OSError as error:
        raise errors.UserError(
            expected="a coordinator's port that is free on this host, process 0's",
            found=error.strerror or str(error),
            where=f"--coordinator {place.coordinator}",
            do="choose another port, in all processes",
        ) from None
    with listener:
        while len(found) < place.num_processes - 1:
            listener.settimeout(max(0.01, end - time.monotonic()))
            try:
                connection, _ = listener.accept()
            except TimeoutError:
                missing = [str(i) for i in range(1, place.num_processes) if i not in found]
                problem = f"no process {', '.join(missing)}"
                for connection in found.values():
                    _refuse(connection, problem)
                raise Missing(
                    expected=f"{place.num_processes} processes within {wait:g} s",
                    found=problem,
                    where=f"--coordinator {place.coordinator}",
                    do="start all of them, with the same --coordinator and --num-processes",
                ) from None
            connection.settimeout(5)
            try:
                hello = json.loads(_line(connection))
                who, count = hello["process_id"], hello["num_processes"]
            except (OSError, ValueError, KeyError, TypeError):
                connection.close()  # none of ours
                continue
            if count != place.num_processes or who in found or not 0 < who < count:
                problem = f"process 0 has --num-processes {place.num_processes}"
                if count == place.num_processes:
                    problem = f"there is a process {who} already"
                _refuse(connection, problem)
                continue
            found[who] = connection
    for connection in found.values():
        _send(connection, {"go": True})
    return found


def _join(place: Place, wait: float) -> socket.socket:
    """A connection to process 0, when all processes are there."""
    host, _, port = place.coordinator.rpartition(":")
    end, problem = time.monotonic() + wait, "no answer"
    while (left := end - time.monotonic()) > 0:
        connection = None
        try:
            connection = socket.create_connection((host.strip("[]"), int(port)), timeout=left)
            _send(connection, {k: getattr(place, k) for k in ("process_id", "num_processes")})
            connection.settimeout(max(0.01, end - time.monotonic()))
            answer = json.loads(_line(connection))
            if "go" in answer:
                return connection
            problem = answer["refused"]
            left = 0
        except (OSError, ValueError, KeyError) as error:
            problem = getattr(error, "strerror", None) or str(error) or type(error).__name__
        if connection is not None:
            connection.close()
        if not left:
            break
        time.sleep(min(0.2, left))
    raise Missing(
        expected=f"process 0 of {place.num_processes} at the coordinator's address, "
        f"and all others, within {wait:g} s",
        found=problem,
        where=f"process {place.process_id}, --coordinator {place.coordinator}",
        do="check the address and that a firewall lets its port through, and start all processes",
    )


def _refuse(connection: socket.socket, problem: str) -> None:
    with contextlib.suppress(OSError):  # gone already
        _send(connection, {"refused": problem})
    connection.close()


def _line(connection: socket.socket) -> bytes:
    """Up to a newline, byte by byte: what follows it belongs to others."""
    line = b""
    while not line.endswith(b"\n"):
        if not (byte := connection.recv(1)) or len(line) > 1000:
            raise ConnectionError("Connection closed")
        line += byte
    return line


def _send(connection: socket.socket, message: dict[str, Any]) -> None:
    connection.sendall(json.dumps(message).encode() + b"\n")


# ---------------------------------------------------------------------------------- being many


class _Group:
    """The connections of this process, and a thread that listens to them.

    From process 0: {"told": value}, {"end": code}, {"bye": true}. To it: {"asks": true},
    {"failed": code, "text": …} and {"bye": true}. A connection that closes without a word is a
    process that was lost.
    """

    def __init__(self, place: Place, sockets: dict[int, socket.socket]):
        self.place, self.advice = place, "start all processes again"
        self._sockets = sockets
        self._told: queue.Queue = queue.Queue()
        self._asked = False  # by this process or, in process 0, by any
        self._silent = set(sockets)  # those that have not said that they end
        self._all_said_bye = threading.Event()
        self._failure: tuple[float, int, str] | None = None  # when it is told, code, text
        self._ending = threading.Lock()  # never released: the first cause is the one to tell
        for connection in sockets.values():
            connection.settimeout(None)
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        threading.Thread(target=self._listen, daemon=True).start()

    @property
    def _leads(self) -> bool:
        return self.place.process_id == 0

    def told(self, value: Any) -> Any:
        if not self._leads:
            return self._told.get()
        self._send({"told": value})
        return json.loads(json.dumps(value))  # the same types in all

    def anyone(self, asks: bool) -> bool:
        if asks and not self._asked:
            self._asked = True
            if not self._leads:
                self._send({"asks": True})
        return self.told(self._asked)

    def end(self, code: int, text: str, sure: bool) -> NoReturn:
        if self._leads:
            time.sleep(0 if sure else _GRACE)  # the listening thread hears of a loss
            self._end_all(code, text)
        self._send({"failed": code, "text": text})
        time.sleep(2 * _GRACE)  # process 0 tells, and ends this one
        self._exit(code, text)

    def wait_for_all(self) -> None:
        if not self._leads:
            self._send({"bye": True})
        self._all_said_bye.wait()
        if self._leads:
            self._send({"bye": True})

    def lost(self, who: int) -> NoReturn:
        # The empty line: below a progress bar.
        text = f"\nprocess {who} of {self.place.num_processes} was lost; {self.advice}"
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
        """The messages that have come whole, each time it is asked; None: there will be no more."""
        rest = b""
        while True:
            try:
                some = self._sockets[who].recv(2**16)
            except OSError:
                some = b""
            *whole, rest = (rest + some).split(b"\n")
            yield [json.loads(line) for line in whole] + ([] if some else [None])

    def _hear(self, who: int, message: dict[str, Any]) -> None:
        if "told" in message:
            self._told.put(message["told"])
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
            text = f"process {who} of {self.place.num_processes}:\n{message['text']}"
            # Process 0 may fail for the same reason, or a third one be the cause.
            self._failure = self._failure or (time.monotonic() + _GRACE, message["failed"], text)

    def _end_all(self, code: int, text: str) -> NoReturn:
        self._ending.acquire()
        self._send({"end": code})
        time.sleep(0.1)  # the word is to be there before the connection's end
        self._print_and_exit(code, text)

    def _exit(self, code: int, text: str) -> NoReturn:
        self._ending.acquire()
        self._print_and_exit(code, text)

    def _print_and_exit(self, code: int, text: str) -> NoReturn:
        if text:
            os.write(2, f"{text}\n".encode(errors="replace"))
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError, RuntimeError):  # closed, being written to
                stream.flush()
        os._exit(code)

    def _send(self, message: dict[str, Any]) -> None:
        for connection in self._sockets.values():
            with contextlib.suppress(OSError):  # the listening thread hears of it
                _send(connection, message)


def _end_when_aborted(group: _Group) -> None:
    """Turns an abort of jax's runtime into an exit that says to start again.

    Its coordination service aborts every process once one has been silent for a heartbeat's time,
    and at once when process 0 is gone. It offers no other way, and a Python signal handler would
    run too late.
    """

    @ctypes.CFUNCTYPE(None, ctypes.c_int)
    def aborted(_):
        time.sleep(_GRACE)  # the listening thread may know which process it was
        n = group.place.num_processes
        text = f"\none of {n} processes was lost, or jax failed as told above; {group.advice}"
        group._print_and_exit(RESTART, text)

    group.aborted = aborted  # or it would be freed
    ctypes.CDLL(None).signal(signal.SIGABRT, aborted)
