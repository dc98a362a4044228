"""The start of a run of several processes: each connects to process 0, or all of them fail.

They connect to the coordinator's port before jax uses it. So the error names a process that is
missing, and jax need not wait for it.
"""

import contextlib
import json
import socket
import time
from typing import Any

from lora_jax import errors
from lora_jax.parallel import cluster


class Missing(errors.UserError):
    """Not all processes have connected. A job manager may start them again."""


def gather(process: cluster.Process, wait: float) -> dict[int, socket.socket]:
    """In process 0: {process: its connection}, when all others have connected."""
    port = int(process.coordinator.rpartition(":")[2])
    found: dict[int, socket.socket] = {}
    end = time.monotonic() + wait
    try:
        # jax listens on this port next; SO_REUSEADDR allows that while the connections stay open.
        listener = socket.create_server(
            ("", port), family=socket.AF_INET6, dualstack_ipv6=True
        ) if socket.has_dualstack_ipv6() else socket.create_server(("", port))  # fmt: skip
    except OSError as error:
        raise errors.UserError(
            expected="a free coordinator port on this host, where process 0 runs",
            found=error.strerror or str(error),
            where=f"--coordinator {process.coordinator}",
            do="choose another port, in all processes",
        ) from None
    with listener:
        while len(found) < process.num_processes - 1:
            listener.settimeout(max(0.01, end - time.monotonic()))
            try:
                connection, _ = listener.accept()
            except TimeoutError:
                missing = [str(i) for i in range(1, process.num_processes) if i not in found]
                problem = f"no process {', '.join(missing)}"
                for connection in found.values():
                    _refuse(connection, problem)
                raise Missing(
                    expected=f"{process.num_processes} processes within {wait:g} s",
                    found=problem,
                    where=f"--coordinator {process.coordinator}",
                    do="start all of them, with the same --coordinator and --num-processes",
                ) from None
            connection.settimeout(5)
            try:
                hello = json.loads(_line(connection))
                who, count = hello["process_id"], hello["num_processes"]
            except (OSError, ValueError, KeyError, TypeError):
                connection.close()  # not a process of this run
                continue
            if count != process.num_processes or who in found or not 0 < who < count:
                problem = f"process 0 has --num-processes {process.num_processes}"
                if count == process.num_processes:
                    problem = f"there is a process {who} already"
                _refuse(connection, problem)
                continue
            found[who] = connection
    for connection in found.values():
        send(connection, {"go": True})
    return found


def join(process: cluster.Process, wait: float) -> socket.socket:
    """In any other process: its connection to process 0, when all processes have connected."""
    host, _, port = process.coordinator.rpartition(":")
    end, problem = time.monotonic() + wait, "no answer"
    while (left := end - time.monotonic()) > 0:
        connection = None
        try:
            connection = socket.create_connection((host.strip("[]"), int(port)), timeout=left)
            send(connection, {k: getattr(process, k) for k in ("process_id", "num_processes")})
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
        expected=f"process 0 of {process.num_processes} at the coordinator's address, "
        f"and all others, within {wait:g} s",
        found=problem,
        where=f"process {process.process_id}, --coordinator {process.coordinator}",
        do="check the address, and that no firewall blocks its port, and start all processes",
    )


def _refuse(connection: socket.socket, problem: str) -> None:
    with contextlib.suppress(OSError):  # already closed
        send(connection, {"refused": problem})
    connection.close()


def _line(connection: socket.socket) -> bytes:
    """The bytes up to a newline, read one by one: what follows is for another reader."""
    line = b""
    while not line.endswith(b"\n"):
        if not (byte := connection.recv(1)) or len(line) > 1000:
            raise ConnectionError("Connection closed")
        line += byte
    return line


def send(connection: socket.socket, message: dict[str, Any]) -> None:
    """Sends a message as a line of JSON."""
    connection.sendall(json.dumps(message).encode() + b"\n")
