"""Monitoring of a run: loss spikes, early stopping, MFU, compilations, profiles, dashboards."""

import collections
import functools
import hashlib
import math
import pathlib
import statistics
from collections.abc import Callable
from typing import Any

import jax

from lora_jax import errors
from lora_jax.parallel import processes
from lora_jax.planning import chips, operations
from lora_jax.planning import job as jobs
from lora_jax.training import setup
from lora_jax.training.output import run_folder
from lora_jax.training.settings import groups


class Patience:
    """Early stopping: `spent` after `limit` evaluations without a lower loss; None: never."""

    def __init__(self, limit: int | None):
        self.limit, self.since, self.least = limit, 0, math.inf

    def note(self, loss: float | None) -> None:
        """Takes the loss of an evaluation; None if it is not finite."""
        better = loss is not None and loss < self.least
        self.since = 0 if better else self.since + 1
        self.least = loss if better else self.least

    @property
    def spent(self) -> bool:
        return self.limit is not None and self.since >= self.limit


class Spikes:
    """Finds losses that are far above the previous ones."""

    def __init__(self):
        self._before: collections.deque[float] = collections.deque(maxlen=50)

    def note(self, loss: float) -> str:
        """A warning if the loss of a step is a spike, else ""."""
        warning = ""
        if len(self._before) >= 20:
            mean, spread = statistics.mean(self._before), statistics.stdev(self._before)
            if loss > mean + max(6 * spread, 0.5 * mean):
                warning = (f"loss {loss:.3g}, after {mean:.3g} on average; check its examples, "
                           "or lower --lr")  # fmt: skip
        self._before.append(loss)
        return warning


class Utilization:
    """MFU: the useful operations of a step over what its devices could do in the same time."""

    def __init__(self, job: jobs.Job, target: chips.Target):
        self._peak = target.count * target.peaks.flops if target.peaks else None
        self._useful = functools.cache(lambda tokens: operations.useful(job.of_length(tokens)))

    def share(self, tokens: int, seconds: float) -> float | None:
        """The MFU of a step with sequences of `tokens`; None if the devices' peak is unknown."""
        return round(self._useful(tokens) / (seconds * self._peak), 4) if self._peak else None


class Compilations:
    """Listens to compilations, and warns if a function is compiled again for the same shape."""

    EVENT = "/jax/core/compile/backend_compile_duration"

    def __init__(self):
        self.seconds = 0.0  # spent compiling all programs
        # {function: seconds} since `done` was last called for it
        self._own: dict[str, float] = collections.defaultdict(float)
        self._shapes: set[tuple[int, ...]] = set()

    def __enter__(self) -> "Compilations":
        jax.monitoring.register_event_duration_secs_listener(self._hear)
        return self

    def __exit__(self, *_) -> None:
        jax.monitoring.unregister_event_duration_listener(self._hear)

    def _hear(self, event: str, seconds: float, **about: Any) -> None:
        if event == self.EVENT:
            self.seconds += seconds
            self._own[about.get("fun_name", "")] += seconds

    def done(self, step: int, function: Callable, shape: tuple[int, ...]) -> str:
        """A warning if this step compiled `function` again, else "". Call it after every step."""
        seconds = self._own.pop(f"jit({function.__name__})", None)
        before = shape in self._shapes
        self._shapes.add(shape)
        if seconds is None or not before:
            return ""
        sizes = " × ".join(map(str, shape))
        return f"step {step} was compiled again ({seconds:.1f} s), for a batch of {sizes} as before"


class Profile:
    """Traces three steps with jax.profiler, from the third step of a run on."""

    def __init__(self, folder: str | None, first: int):
        self._folder, self._first = folder, first + 2  # the first steps compile
        try:
            if folder is not None:
                pathlib.Path(folder).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise errors.UserError(
                expected="a folder that can be written",
                found=error.strerror or str(error),
                where=f"--profile {folder}",
                do="name another folder",
            ) from None

    def done(self, step: int, last: bool) -> str:
        """A message if the trace was written after this step, else "". Call it after every step."""
        if self._folder is None or step < self._first:
            return ""
        if step == self._first and not last:
            jax.profiler.start_trace(self._folder)
        elif self._first < step and (last or step == self._first + 3):
            jax.profiler.stop_trace()
            message, self._folder = f"steps {self._first + 1} to {step}: {self._folder}", None
            return message
        return ""


class Dashboard:
    """A dashboard that gets the same numbers as metrics.jsonl."""

    def __init__(self, to: str, folder: pathlib.Path, settings: groups.Flat, first: int):
        """first: the step the run is resumed from; what was logged of later steps is dropped."""
        if to == "tensorboard":
            import tensorboardX

            self._writer = tensorboardX.SummaryWriter(
                str(folder / "tensorboard"), purge_step=first + 1 if first else None
            )
            self.close = self._writer.close
        else:
            import wandb

            # The id stays the same when the run is resumed.
            own = hashlib.sha256(str(folder.absolute()).encode()).hexdigest()[:12]
            self._run = wandb.init(
                project="lora_jax", name=folder.name, id=own, resume="allow", dir=str(folder),
                config=dict(settings),
            )  # fmt: skip
            self.close = self._run.finish
        self._to = to

    def log(self, metrics: run_folder.Metrics) -> None:
        numbers = {name: value for name, value in metrics.items() if name != "step"}
        if self._to == "tensorboard":
            for name, value in numbers.items():
                self._writer.add_scalar(name, value, metrics["step"])
        else:
            self._run.log(numbers, step=metrics["step"])


class Log:
    """Writes metrics to metrics.jsonl, and to a dashboard if the settings name one."""

    def __init__(self, job: setup.Job, first: int):
        """first: the step the run is resumed from, or 0."""
        self._job, self._dashboard = job, None
        if job.settings.run.report_to and processes.leads():
            self._dashboard = Dashboard(
                job.settings.run.report_to, job.folder.path, job.settings.flat(), first
            )

    def __enter__(self) -> "Log":
        return self

    def __exit__(self, *_) -> None:
        if self._dashboard:
            self._dashboard.close()

    def add(self, metrics: run_folder.Metrics) -> run_folder.Metrics:
        """Logs the metrics; returns those that were logged."""
        logged = self._job.adapters.to_log(metrics)
        self._job.folder.log(logged)
        if self._dashboard:
            self._dashboard.log(logged)
        return logged
