"""What a run leaves in its output folder: run.json, metrics.jsonl, adapter/, checkpoints/, …"""

import dataclasses
import datetime
import fcntl
import json
import math
import os
import pathlib
import shutil
from collections.abc import Mapping
from typing import Any

from lora_jax import errors
from lora_jax.parallel import processes
from lora_jax.training.settings import files, groups

_SPACE = 64 * 2**20  # bytes that must be free before anything is known of the model
_TRACES = (".lock", "run.new")  # of a run that was killed before it had begun
_FULL = ("No space left on device", "Disk quota exceeded")

Metrics = dict[str, Any]  # a line of metrics.jsonl: {name: number, or None if not finite}
RunJson = Mapping[str, Any]  # run.json as read back; another version may have written it


@dataclasses.dataclass
class Record:
    """What run.json holds: the settings, where and on what a run was computed, and how it ended.

    None: not known yet, and not written.
    """

    status: str
    settings: groups.Flat
    num_steps: int
    versions: dict[str, str]
    device: str
    mesh: dict[str, int]
    memory: dict[str, int]
    base: dict[str, str | None]
    data: dict[str, str | None]
    samples: dict[str, list[dict[str, str]]] = dataclasses.field(default_factory=dict)
    best: dict[str, float] | None = None
    sweep: dict[str, Any] | None = None
    seconds: dict[str, float] | None = None
    compile_seconds: float | None = None
    peak_bytes: int | None = None

    def as_json(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if value is not None}


class RunFolder:
    """An output folder that belongs to this process until it ends."""

    def __init__(self, path: pathlib.Path, *, resume: bool):
        """Makes the folder, or opens one to go on in it.

        Raises: UserError when it is not empty (without `resume`), not writable, in use by another
        run, or its disk is full.
        """
        self.path = path
        self.adapter = path / "adapter"
        self.checkpoints = path / "checkpoints"
        self.streams = path / "streams"
        self._metrics = path / "metrics.jsonl"
        self._run = path / "run.json"
        if path.is_dir() and not resume and any(p.name not in _TRACES for p in path.iterdir()):
            raise errors.UserError(
                expected="a new or empty output folder",
                found="a folder with files in it",
                where=str(path),
                do="--resume to go on with the run in it, or another --output-dir",
            )
        try:
            path.mkdir(parents=True, exist_ok=True)
            self._lock = (path / ".lock").open("a")
        except OSError as error:
            raise errors.UserError(
                expected="an output folder that can be written",
                found=error.strerror or str(error),
                where=str(path),
                do="choose another --output-dir, or change its permissions",
            ) from None
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._lock.close()
            raise errors.UserError(
                expected="an output folder of its own for each run",
                found="another run is writing to it",
                where=str(path),
                do="wait for that run, or choose another --output-dir",
            ) from None
        try:
            self.check_space(_SPACE)
        except errors.UserError:
            self._give_up()
            raise

    def __enter__(self) -> "RunFolder":
        return self

    def __exit__(self, _, error: BaseException | None, __) -> None:
        self._give_up()
        if error is not None and any(sign in str(error) for sign in _FULL):
            raise errors.UserError(
                expected="space on the disk",
                found=str(error).splitlines()[0],
                where=str(self.path),
                do="free some space, then --resume goes on from the newest checkpoint",
            ) from error

    def _give_up(self) -> None:
        """Ends the lock; a folder that nothing was written to is removed again."""
        if os.listdir(self.path) == [".lock"]:
            (self.path / ".lock").unlink()
            self.path.rmdir()
        self._lock.close()

    def check_space(self, num_bytes: int) -> None:
        """Raises: UserError when fewer bytes are free."""
        free = shutil.disk_usage(self.path).free
        if free < num_bytes:
            raise errors.UserError(
                expected=f"at least {-(-num_bytes >> 20)} MiB free for adapters and checkpoints",
                found=f"{free >> 20} MiB free",
                where=str(self.path),
                do="free some space, or choose an --output-dir on another disk",
            )

    def read_run(self) -> dict[str, Any]:
        """What run.json holds. Raises: UserError when there is none."""
        try:
            return json.loads(self._run.read_text())
        except FileNotFoundError:
            raise errors.UserError(
                expected="a folder that a run was started in, with run.json",
                found="no run.json",
                where=str(self.path),
                do="check --output-dir, or start anew without --resume",
            ) from None
        except ValueError as error:
            raise errors.UserError(
                expected="a JSON object",
                found=str(error),
                where=str(self._run),
                do="start anew in another --output-dir",
            ) from None

    def write_run(self, record: Record) -> None:
        """Replaces run.json in one step, so that it is whole at every moment."""
        new = self._run.with_suffix(".new")
        new.write_text(json.dumps(record.as_json(), indent=2) + "\n")
        os.replace(new, self._run)

    def write_config(self, settings: groups.TrainSettings) -> None:
        """Writes config.yaml, which `train --config` takes to repeat the run."""
        files.save(settings, self.path / "config.yaml")

    def log(self, metrics: Metrics) -> None:
        """Adds a line to metrics.jsonl; it is in the file when this returns.

        NaN and infinity become null: they are not JSON.
        """
        whole = {k: None if v != v or v in (math.inf, -math.inf) else v for k, v in metrics.items()}
        with self._metrics.open("a") as file:
            file.write(json.dumps(whole) + "\n")

    def metrics(self, step: int) -> list[Metrics]:
        """What metrics.jsonl tells of the steps up to `step`, without a line cut off by a kill."""
        return [json.loads(line) for line in self._told(step)]

    def cut_back(self, step: int) -> None:
        """Drops what metrics.jsonl tells of steps after `step`, and a line cut off by a kill."""
        if not self._metrics.exists():
            return
        new = self._metrics.with_suffix(".new")
        new.write_text("".join(line + "\n" for line in self._told(step)))
        os.replace(new, self._metrics)

    def _told(self, step: int) -> list[str]:
        kept = []
        for line in self._metrics.read_text().splitlines() if self._metrics.exists() else ():
            try:
                if json.loads(line)["step"] > step:
                    break
            except ValueError:
                break
            kept.append(line)
        return kept


class Followed(RunFolder):
    """The folder as the processes besides the first see it: they read it, and write nothing."""

    def __init__(self, path: pathlib.Path):
        """Raises: UserError where process 0's folder is not to be seen."""
        if not (path / ".lock").exists():
            raise errors.UserError(
                expected="an output folder that all processes share",
                found="not what process 0 has made",
                where=str(path),
                do="choose an --output-dir on a file system that all hosts have",
            )
        self.path = path
        self.adapter = path / "adapter"
        self.checkpoints = path / "checkpoints"
        self.streams = path / "streams"
        self._run = path / "run.json"
        self._metrics = path / "metrics.jsonl"

    def __exit__(self, *_) -> None:
        pass

    def check_space(self, num_bytes: int) -> None:
        pass

    def write_run(self, record: Record) -> None:
        pass

    def write_config(self, settings: groups.TrainSettings) -> None:
        pass

    def log(self, metrics: Metrics) -> None:
        pass

    def cut_back(self, step: int) -> None:
        pass


def default_path() -> pathlib.Path:
    """runs/DATE-TIME, with a number behind it when another run took the name this second."""
    name = datetime.datetime.now().strftime("%Y-%m-%d-%H%M%S")
    path, number = pathlib.Path("runs") / name, 1
    while path.exists():
        number += 1
        path = pathlib.Path("runs") / f"{name}-{number}"
    return path


def opened(path: pathlib.Path, *, resume: bool) -> RunFolder:
    """The output folder: process 0's, or as the others see it once process 0 has it.

    They end with process 0 if it is refused the folder.
    """
    if not processes.leads():
        processes.told(None)
        return Followed(path)
    folder = RunFolder(path, resume=resume)
    processes.told(None)
    return folder
