"""The record of cases that were right on this machine's device, in the cache folder.

A pass holds for the same chip, driver, compiler, kernels and shapes. While cases run, a locked file
says so. If the process ends there, as a fault in a compiler may end it, the lock ends with it: the
next process runs them one by one, and a case that ends that process too is not tried again.
"""

import contextlib
import fcntl
import functools
import hashlib
import importlib.metadata
import json
import os
import pathlib
import signal
import threading
from typing import Any

import jax

import lora_jax
from lora_jax import kernels
from lora_jax.parallel import devices
from lora_jax.selftest import case

_FLAGS = ("XLA_FLAGS", "LIBTPU_INIT_ARGS")  # of the compilers


def has_passed(one: case.Case) -> bool:
    """Whether the case has passed before."""
    return os.path.isfile(_path(one))


def note(one: case.Case, found: case.Finding) -> None:
    """Records a pass. If the cache folder cannot be written, it is checked again."""
    path = _path(one)
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        new = path.with_suffix(f".{os.getpid()}")
        new.write_text(json.dumps({"case": one.name, "distance": found.distance, **_where()}))
        new.replace(path)


class Mark:
    """A context in which a locked file exists. one: the case that runs; None: several.

    Without a cache folder that can be written, there is none. The number of a process would not do
    for a lock: each process of a container may have the same one. Ctrl-C, which may end the process
    at once, removes the file.
    """

    def __init__(self, one: case.Case | None = None):
        self.path = _path(one).with_suffix(".running") if one else _folder() / "cases.running"
        self._file: int | None = None
        self._interrupt: Any = None  # the handler of Ctrl-C outside of the context

    def is_left_behind(self) -> bool:
        """Whether a process has ended within the context."""
        try:
            file = os.open(self.path, os.O_RDONLY)
        except OSError:
            return False
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:  # the process goes on
            return False
        finally:
            os.close(file)
        return True

    def leave_behind(self) -> None:
        """As if this process had ended within the context."""
        with contextlib.suppress(OSError):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.path.touch()

    def __enter__(self) -> None:
        with contextlib.suppress(OSError):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = os.open(self.path, os.O_RDONLY | os.O_CREAT, 0o644)
            fcntl.flock(self._file, fcntl.LOCK_SH)
        handler = signal.getsignal(signal.SIGINT)
        if callable(handler) and threading.current_thread() is threading.main_thread():
            self._interrupt = handler
            signal.signal(signal.SIGINT, self._interrupted)

    def __exit__(self, *_: Any) -> None:
        if self._interrupt is not None:
            signal.signal(signal.SIGINT, self._interrupt)
        if self._file is not None:
            with contextlib.suppress(OSError):
                # The last process removes it.
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                self.path.unlink(missing_ok=True)
            os.close(self._file)
        self._file = self._interrupt = None

    def _interrupted(self, *about: Any) -> None:
        handler = self._interrupt
        self.__exit__()
        handler(*about)


def _folder() -> pathlib.Path:
    return devices.cache_folder() / "selftest"


def _path(one: case.Case) -> pathlib.Path:
    key = json.dumps([one.name, _where()])
    return _folder() / hashlib.sha256(key.encode()).hexdigest()[:24]


@functools.cache
def _where() -> dict[str, Any]:
    """What a result depends on, beside the case."""
    device = jax.local_devices()[0]
    return {
        "chip": device.device_kind,
        "devices": jax.device_count(),
        "driver": device.client.platform_version,
        "jaxlib": importlib.metadata.version("jaxlib"),
        "jax": jax.__version__,
        "lora_jax": lora_jax.__version__,
        "kernels": _sources(),
        "flags": [os.environ.get(name, "") for name in _FLAGS],
    }


def _sources() -> str:
    """A digest of the source of the kernels, which a checkout may change within a version."""
    found = hashlib.sha256()
    for path in sorted(pathlib.Path(kernels.__file__).parent.rglob("*.py")):
        found.update(path.read_bytes())
    return found.hexdigest()[:16]
