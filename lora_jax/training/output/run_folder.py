"""The output folder of a run: run.json, config.yaml, metrics.jsonl, adapter/, checkpoints/."""

import contextlib
import dataclasses
import datetime
import fcntl
import json
import math
import os
import pathlib
from collections.abc import Mapping
from typing import Any

from lora_jax import errors
from lora_jax.checkpoints import free_space
from lora_jax.parallel import processes
from lora_jax.training.settings import files, groups

_SPACE = 64 * 2**20  # bytes that must be free, before the size of the model is known
_TRACES = {".lock", "run.new"}  # left by a run that was killed before it started
_FULL = ("No space left on device", "Disk quota exceeded")

Metrics = dict[str, float]  # of a step or an evaluation: {name: value}, with its "step"
Scores = dict[str, dict[str, float | None]]  # {member of a sweep: {score: value}}
# Files as read back. Another version may have written them, so their values are not checked.
RunJson = Mapping[str, Any]
MetricsLine = Mapping[str, Any]  # of metrics.jsonl: as Metrics, but None for NaN and infinity


@dataclasses.dataclass
class Record:
    """The content of run.json: settings, versions, devices, base model, data, and results.

    What is None is not known yet, and is not written.
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
    checks: dict[str, Any] = dataclasses.field(default_factory=dict)  # of adapter and base
    best: dict[str, float] | None = None
    sweep: dict[str, str | Scores] | None = None
    seconds: dict[str, float] | None = None
    compile_seconds: float | None = None
    peak_bytes: int | None = None

    def as_json(self) -> RunJson:
        return {name: value for name, value in vars(self).items() if value is not None}


class RunFolder:
    """An output folder, locked by this process until the run ends."""

    def __init__(self, path: pathlib.Path, *, resume: bool):
        """Creates the folder, or with `resume` opens the folder of a run.

        Raises: UserError if it is not empty (without `resume`), not writable, in use by another
        run, on a full disk, or has a bracket in its path.
        """
        if "[" in str(path.resolve()):
            # Orbax takes it for a pattern, and does not find the parts of a checkpoint that it
            # puts together, so that none could be read.
            raise errors.UserError(
                expected="an output folder without brackets in its path",
                found=str(path.resolve()),
                do="choose another --output-dir",
            )
        self._name_files(path)
        if not resume and os.path.isdir(path) and set(os.listdir(path)) - _TRACES:
            raise errors.UserError(
                expected="a new or empty output folder",
                found="a folder with files in it",
                where=str(path),
                do="--resume to continue the run in it, or another --output-dir",
            )
        try:
            path.mkdir(parents=True, exist_ok=True)
            self._lock = (path / ".lock").open("a")
        except OSError as error:
            raise errors.UserError(
                expected="a writable output folder",
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

    def _name_files(self, path: pathlib.Path) -> None:
        self.path = path
        self.adapter = path / "adapter"
        self.checkpoints = path / "checkpoints"
        self.streams = path / "streams"
        self._metrics = path / "metrics.jsonl"
        self._run = path / "run.json"

    def __enter__(self) -> "RunFolder":
        return self

    def __exit__(self, _, error: BaseException | None, __) -> None:
        self._give_up()
        if error is not None and any(sign in str(error) for sign in _FULL):
            raise errors.UserError(
                expected="space on the disk",
                found=str(error).splitlines()[0],
                where=str(self.path),
                do="free some space, then --resume continues from the newest checkpoint",
            ) from error
        if isinstance(error, OSError) and self._is_inside(error.filename):
            raise errors.UserError(
                expected="an output folder that can be read and written",
                found=error.strerror or str(error),
                where=str(error.filename),
                do="change the permissions, then --resume continues from the newest checkpoint",
            ) from error

    def _is_inside(self, file: object) -> bool:
        """Whether the file of an OSError is one of the run's."""
        return isinstance(file, str | os.PathLike) and self.path in pathlib.Path(file).parents

    def _give_up(self) -> None:
        """Releases the lock; removes the folder if nothing was written to it."""
        if os.listdir(self.path) == [".lock"]:
            (self.path / ".lock").unlink()
            self.path.rmdir()
        self._lock.close()

    def check_space(self, num_bytes: int) -> None:
        """Raises: UserError if fewer bytes are free."""
        free_space.check(self.path, num_bytes, "adapters and checkpoints")

    def read_run(self) -> RunJson:
        """The content of run.json. Raises: UserError if there is none that can be read."""
        return read_run(self.path)

    def write_run(self, record: Record) -> None:
        """Replaces run.json atomically, so that it is complete at any time."""
        new = self._run.with_suffix(".new")
        new.write_text(json.dumps(record.as_json(), indent=2) + "\n")
        os.replace(new, self._run)

    def write_config(self, settings: groups.TrainSettings) -> None:
        """Writes config.yaml, with which `train --config` repeats the run."""
        files.save(settings, self.path / "config.yaml")

    def log(self, metrics: Metrics) -> None:
        """Appends a line to metrics.jsonl; it is in the file when this returns.

        NaN and infinity become null, because JSON does not have them.
        """
        whole = {name: v if math.isfinite(v) else None for name, v in metrics.items()}
        with self._metrics.open("a") as file:
            file.write(json.dumps(whole) + "\n")

    def metrics(self, step: int) -> list[MetricsLine]:
        """The metrics of the steps up to `step`, without an incomplete line of a killed run."""
        return [json.loads(line) for line in self._lines(step)]

    def cut_back(self, step: int) -> None:
        """Removes from metrics.jsonl the steps after `step` and an incomplete line."""
        if not self._metrics.exists():
            return
        new = self._metrics.with_suffix(".new")
        new.write_text("".join(line + "\n" for line in self._lines(step)))
        os.replace(new, self._metrics)

    def _lines(self, step: int) -> list[str]:
        """The complete lines of metrics.jsonl up to `step`."""
        kept = []
        text = self._metrics.read_text(errors="replace") if self._metrics.exists() else ""
        for line in text.splitlines():
            try:
                if json.loads(line)["step"] > step:
                    break
            except (ValueError, TypeError, KeyError, RecursionError):
                break
            kept.append(line)
        return kept


class Followed(RunFolder):
    """The folder of process 0 in the other processes, which read it and write nothing."""

    def __init__(self, path: pathlib.Path):
        """Raises: UserError if this process does not see the folder that process 0 has made."""
        if not (path / ".lock").exists():
            raise errors.UserError(
                expected="an output folder that all processes share",
                found="a folder without the files of process 0",
                where=str(path),
                do="choose an --output-dir on a file system that all hosts share",
            )
        self._name_files(path)

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


def read_run(folder: pathlib.Path) -> RunJson:
    """The content of run.json in a run's folder. Raises: UserError if none can be read."""
    path, record = folder / "run.json", None
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        found = "no JSON object with settings"
    except FileNotFoundError:
        found = "no run.json"
    except (OSError, ValueError, RecursionError) as error:
        found = getattr(error, "strerror", None) or str(error)
    if not isinstance(record, dict) or not isinstance(record.get("settings"), dict):
        raise errors.UserError(
            expected="the folder of a run, with its run.json",
            found=found,
            where=str(folder if found == "no run.json" else path),
            do=errors.similar_path(folder) or "check the folder, or start a new run in another",
        )
    return record


def quantization_of(adapter: pathlib.Path) -> str | None:
    """The format of the base that the adapter of a run was trained on; None if it is not known."""
    for folder in adapter.absolute().parents[:2]:  # that of a sweep is one folder deeper
        with contextlib.suppress(errors.UserError):
            return read_run(folder)["settings"].get("quant")
    return None


def default_path() -> pathlib.Path:
    """runs/DATE-TIME, with a number appended if that folder exists."""
    name = datetime.datetime.now().strftime("%Y-%m-%d-%H%M%S")
    path, number = pathlib.Path("runs") / name, 1
    while path.exists():
        number += 1
        path = pathlib.Path("runs") / f"{name}-{number}"
    return path


def opened(path: pathlib.Path, *, resume: bool) -> RunFolder:
    """The output folder; process 0 opens it first, and the other processes follow.

    All processes end if process 0 cannot open the folder.
    """
    if not processes.leads():
        processes.broadcast(None)
        return Followed(path)
    folder = RunFolder(path, resume=resume)
    processes.broadcast(None)
    return folder
