"""Serving until a signal: listen, answer, drain."""

import contextlib
import errno
import signal
import socket
import threading
from collections.abc import Callable, Iterator

import uvicorn

from lora_jax import errors
from lora_jax.serving import app, server

_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_OF_PORTS = (errno.EADDRINUSE, errno.EACCES)


def run(serving: server.Server, listening: socket.socket, ready: Callable[[str], None]) -> None:
    """Serves until SIGTERM or Ctrl-C. Then no connection is accepted, and requests have
    `limits.drain` seconds to end. A second Ctrl-C ends at once.

    listening: from `bind`. ready: called with the server's URL when it listens. Raises: UserError
    if it cannot listen.
    """
    limits = serving.limits
    with _taken(listening, limits.host, limits.port):
        listening.listen(2048)
    config = uvicorn.Config(
        app.make(serving),
        lifespan="on",
        access_log=False,
        log_level="warning",
        server_header=False,
        timeout_graceful_shutdown=max(1, round(limits.drain)),
        backlog=2048,
    )
    host = f"[{limits.host}]" if ":" in limits.host else limits.host
    ready(f"http://{host}:{listening.getsockname()[1]}")
    with listening:
        _Server(config).run(sockets=[listening])


def bind(host: str, port: int) -> socket.socket:
    """The address of a server, taken before the model is loaded, which takes long.

    It accepts no connection before `run`. Raises: UserError if it cannot be taken.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listening = socket.socket(family)
    with _taken(listening, host, port):
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind((host, port))
    return listening


@contextlib.contextmanager
def _taken(listening: socket.socket, host: str, port: int) -> Iterator[None]:
    """Raises: UserError if the address cannot be taken: another server may be there by now."""
    try:
        yield
    except OSError as error:
        listening.close()
        raise errors.UserError(
            expected="an address to listen on",
            found=error.strerror or str(error),
            where=f"--host {host} --port {port}",
            do="choose another --port; 0 takes a free one"
            if error.errno in _OF_PORTS
            else "choose an address of this machine: 127.0.0.1, or 0.0.0.0 for all of them",
        ) from None


class _Server(uvicorn.Server):
    """uvicorn's, which sends itself the signal again when it has drained: an exit code of −15."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {each: signal.signal(each, self.handle_exit) for each in _SIGNALS}
        try:
            yield
        finally:
            for each, handler in before.items():
                signal.signal(each, handler)
