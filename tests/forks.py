"""Runs of scripts that may be killed: forks of a process that has imported everything.

Importing takes longer than such a run. The parent has opened no device, so that each fork has its
own, and as many as it is asked for.
"""

import contextlib
import dataclasses
import faulthandler
import json
import os
import pathlib
import random
import signal
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Iterator, Mapping
from typing import Any

import cli
import thrift


@dataclasses.dataclass
class Ended:
    """Exit codes (or −signal) and what was printed, by process."""

    codes: list[int]
    out: list[str]
    err: list[str]


class Parent:
    """A process that has imported jax, datasets, … and forks runs for each request."""

    def __init__(self, process: subprocess.Popen, folder: pathlib.Path):
        self._process, self._folder = process, folder

    def train(
        self, *flags: object, devices: int = 8, kill: dict[str, Any] | None = None
    ) -> tuple[int, str]:
        """(exit code, or −signal; what was printed) of `train.py FLAGS`.

        kill: when to send SIGKILL: `delay` seconds after the run has shown `steps` steps, at the
        latest when it has shown 2 more.
        """
        log = str(self._folder / "log.txt")
        run = {"script": "train", "flags": flags, "logs": [log, log]}
        (code,) = self._fork([run], devices, kill)
        return code, _read(log)

    def together(
        self,
        script: str,
        *flags: object,
        processes: int,
        devices: int,
        signals: Mapping[int, tuple[int, int]] | None = None,
    ) -> Ended:
        """How processes ended that ran `SCRIPT.py FLAGS` as one, each with so many devices.

        signals: {process: (step, signal)}, which it sends itself when it has shown that step.
        """
        many = ("--coordinator", f"localhost:{free_port()}", "--num-processes", processes)
        runs = [
            {
                "script": script,
                "flags": (*flags, *many, "--process-id", number) if processes > 1 else flags,
                "logs": [str(self._folder / f"{stream}{number}.txt") for stream in ("out", "err")],
                "signal": (signals or {}).get(number),
            }
            for number in range(processes)
        ]
        codes = self._fork(runs, devices)
        logs = zip(*(run["logs"] for run in runs), strict=True)
        return Ended(codes, *([_read(log) for log in each] for each in logs))

    def _fork(self, runs: list[dict[str, Any]], devices: int, kill: Any = None) -> list[int]:
        request = {"runs": runs, "devices": devices, "kill": kill}
        print(json.dumps(request, default=str), file=self._process.stdin, flush=True)
        return json.loads(self._process.stdout.readline())


def _read(log: str) -> str:
    """The text of a log, without what jaxlib 0.10.1 and older say of programs from the cache."""
    lines = pathlib.Path(log).read_text().splitlines(keepends=True)
    return "".join(line for line in lines if "cpu_aot_loader.cc" not in line)


def free_port() -> int:
    with socket.create_server(("", 0)) as server:
        return server.getsockname()[1]


@contextlib.contextmanager
def parent(folder: pathlib.Path) -> Iterator[Parent]:
    """Starts one; it writes its logs in `folder`."""
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

    import datasets  # noqa: F401
    import transformers  # noqa: F401

    from lora_jax import console
    from lora_jax.cli import (
        generate,  # noqa: F401
        runner,
        train,  # noqa: F401
    )
    from lora_jax.training import stages  # noqa: F401

    thrift.begin()
    console.PLAIN_LINES = 1000  # show every step
    warnings.simplefilter("ignore")  # jax warns of forks
    for line in sys.stdin:
        request, children = json.loads(line), []
        for run in request["runs"]:
            for log in run["logs"]:
                pathlib.Path(log).write_text("")
            child = os.fork()
            if not child:
                _run(run, request["devices"], runner, console)
            children.append(child)
        log = pathlib.Path(request["runs"][0]["logs"][0])
        if request["kill"]:
            _kill(children[0], request["kill"], log)
        ended = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
        print(json.dumps(ended), flush=True)


def _run(run: dict[str, Any], devices: int, runner: Any, console: Any) -> None:
    """Runs a script in this fork, and ends it."""
    import jax

    with contextlib.ExitStack() as files:
        streams = [files.enter_context(open(log, "a")) for log in run["logs"]]
        nothing = files.enter_context(open(os.devnull))
        for number, file in enumerate((nothing, *streams)):
            os.dup2(file.fileno(), number)
    faulthandler.dump_traceback_later(120, exit=True)  # waiting for ever tells where
    if run.get("signal"):
        _send_itself(console.Progress, *run["signal"])
    jax.config.update("jax_num_cpu_devices", devices)
    sys.argv = [f"scripts/{run['script']}.py", *map(str, run["flags"])]
    code: Any = 1
    try:
        runner.run(sys.modules[f"lora_jax.cli.{run['script']}"].main)
    except SystemExit as ended:
        code = ended.code
    except Exception:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(code or 0)


def _send_itself(progress: Any, step: int, number: int) -> None:
    """Has this process send itself a signal when it has shown `step`."""
    show = progress.show

    def shown(self, done, metrics):
        show(self, done, metrics)
        if done == step:
            os.kill(os.getpid(), number)

    progress.show = shown


def _kill(child: int, kill: dict[str, Any], log: pathlib.Path) -> None:
    """Kills it when it is due, unless it ends before."""
    due = None
    while not os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT):
        shown = log.read_text().count(": loss ")
        if due is None and shown >= kill["steps"]:
            due = time.monotonic() + kill["delay"]
        if due is not None and (time.monotonic() >= due or shown >= kill["steps"] + 2 > 2):
            os.kill(child, signal.SIGKILL)
            break
        time.sleep(0.002)


if __name__ == "__main__":
    flags = os.environ["XLA_FLAGS"].split()
    os.environ["XLA_FLAGS"] = " ".join(f for f in flags if "device_count" not in f)
    os.environ["TF_CPP_MIN_LOG_LEVEL"] = "2"  # as a script does before it imports jax
    _serve()
