"""The processes that measure: each case has one of its own, and all share the minutes of a call."""

import contextlib
import ctypes
import json
import os
import pathlib
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from typing import Any

import device_record

HERE = pathlib.Path(__file__).parent
MEMORY = "0.92"  # the part of a GPU's memory for JAX; the rest is for CUDA and its libraries
KILL_WITH_PARENT = 1  # PR_SET_PDEATHSIG of prctl


class OutOfTime(Exception):
    """The minutes are over before a case is."""


class Run:
    """The processes of one call, and the time that they have."""

    def __init__(self, minutes: float, peer_python: str, tiny: bool):
        self._end = time.monotonic() + 60 * minutes
        self._peer_python, self.tiny = peer_python, tiny

    @property
    def left(self) -> float:
        """Seconds."""
        return self._end - time.monotonic()

    def ask(self, asked: dict[str, Any], most: float, peer: bool = False) -> dict[str, Any]:
        """The answer of a measuring process."""
        script = HERE / ("device_peer.py" if peer else "device_measure.py")
        python = self._peer_python if peer else sys.executable
        given = json.dumps(asked | {"anywhere": self.tiny})
        code, out, log = self.start([python, str(script)], most, given)
        if code is None:
            return failed(f"no result in {most:.0f} s")
        with contextlib.suppress(json.JSONDecodeError, IndexError):
            return json.loads(out.splitlines()[-1])
        lines = [
            line for line in log.splitlines() if line.strip() and "simplicity, JAX" not in line
        ]
        errors = [line for line in lines if "Error" in line.split(":")[0]]
        last = (errors or lines or ["no output"])[-1]
        # Not the whole log: XLA also logs what it tried and found too large.
        if device_record.is_out_of_memory(last):
            return {"status": device_record.TOO_LARGE, "reason": last[:300]}
        return failed(f"exit code {code}: {last[:300]}")

    def start(
        self, command: Sequence[str], most: float, given: str = "", **environment: str
    ) -> tuple[int | None, str, str]:
        """(exit code, or None after `most` seconds; what it printed; what it logged).

        Raises: OutOfTime.
        """
        environment = {"XLA_PYTHON_CLIENT_MEM_FRACTION": MEMORY} | dict(os.environ) | environment
        with tempfile.TemporaryFile("w+") as log:
            process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True,
                env=environment, cwd=HERE.parent,
                start_new_session=True, preexec_fn=_end_with_parent,
            )  # fmt: skip
            try:
                out, _ = process.communicate(given, timeout=max(1.0, min(most, self.left)))
                code = process.returncode
            except subprocess.TimeoutExpired:
                if self.left <= 0:
                    raise OutOfTime from None
                out, code = "", None
            finally:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
            log.seek(0)
            return code, out, log.read()


def _end_with_parent() -> None:
    """Has Linux kill this process with its parent: a process left behind would hold the device."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(KILL_WITH_PARENT, signal.SIGKILL)


def failed(reason: str) -> dict[str, Any]:
    return {"status": device_record.FAILED, "reason": reason}
