"""Runs of scripts/train.py that may be killed: forks of a process that has imported everything.

Importing takes longer than such a run. The parent has opened no device, so that each fork has its
own, and as many as it is asked for.
"""

import contextlib
import json
import os
import pathlib
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

import cli


class Parent:
    """A process that has imported jax, datasets, … and forks a run for each request."""

    def __init__(self, process: subprocess.Popen, folder: pathlib.Path):
        self._process, self._log = process, folder / "log.txt"

    def train(
        self, *flags: object, devices: int = 8, kill: dict[str, Any] | None = None
    ) -> tuple[int, str]:
        """(exit code, or −signal; what was printed) of `train.py FLAGS`.

        kill: when to send SIGKILL: `delay` seconds after the run has shown `steps` steps, at the
        latest when it has shown 2 more.
        """
        request = {"flags": list(map(str, flags)), "devices": devices, "kill": kill}
        print(json.dumps(request | {"log": str(self._log)}), file=self._process.stdin, flush=True)
        return int(self._process.stdout.readline()), self._log.read_text()


@contextlib.contextmanager
def parent(folder: pathlib.Path) -> Iterator[Parent]:
    """Starts one; it writes its log in `folder`."""
    process = subprocess.Popen(
        [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        env=os.environ | {"PYTHONPATH": str(cli.ROOT)},
    )  # fmt: skip
    with process:
        yield Parent(process, folder)
        process.stdin.close()


def some_time(draws: random.Random) -> dict[str, Any]:
    """A moment to kill a run: while it starts, or within the time of a few steps."""
    if draws.random() < 0.2:
        return {"steps": 0, "delay": round(draws.uniform(0, 2), 3)}
    return {"steps": draws.randint(1, 4), "delay": round(draws.uniform(0, 0.15), 3)}


def _serve() -> None:
    import warnings

    import arguments
    import console
    import datasets  # noqa: F401
    import jax
    import job  # noqa: F401
    import train
    import transformers  # noqa: F401

    console.PLAIN_LINES = 1000  # show every step
    warnings.simplefilter("ignore")  # jax warns of forks
    for line in sys.stdin:
        request = json.loads(line)
        pathlib.Path(request["log"]).write_text("")
        if child := os.fork():
            status = _wait(child, request["kill"], pathlib.Path(request["log"]))
            print(status, flush=True)
            continue
        with open(request["log"], "w") as log, open(os.devnull) as nothing:
            for number, file in enumerate((nothing, log, log)):
                os.dup2(file.fileno(), number)
        jax.config.update("jax_num_cpu_devices", request["devices"])
        sys.argv = ["train.py", *request["flags"]]
        code: Any = 1
        try:
            arguments.run(train.main)
        except SystemExit as ended:
            code = ended.code
        finally:
            sys.stdout.flush()
            os._exit(code or 0)


def _wait(child: int, kill: dict[str, Any] | None, log: pathlib.Path) -> int:
    """Kills it when it is due; waits for its end."""
    due = None
    while kill and not os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT):
        shown = log.read_text().count(": loss ")
        if due is None and shown >= kill["steps"]:
            due = time.monotonic() + kill["delay"]
        if due is not None and (time.monotonic() >= due or shown >= kill["steps"] + 2 > 2):
            os.kill(child, signal.SIGKILL)
            break
        time.sleep(0.002)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


if __name__ == "__main__":
    flags = os.environ["XLA_FLAGS"].split()
    os.environ["XLA_FLAGS"] = " ".join(f for f in flags if "device_count" not in f)
    _serve()
