"""The steps of a run: what follows each of them, and which one is the last."""

import functools
import math
import time
from collections.abc import Callable, Generator, Iterator

import jax

from lora_jax import console, errors
from lora_jax.console import say
from lora_jax.optim import loss as train_loss
from lora_jax.optim import step as train_step
from lora_jax.parallel import devices, processes
from lora_jax.parallel import mesh as sharding
from lora_jax.training import first_steps, monitor, planned, scoring, setup, stop
from lora_jax.training.output import run_folder, snapshots


def train(
    job: setup.Job,
    step: Callable,
    state: train_step.State,
    kept: snapshots.Snapshots,
    record: run_folder.Record,
    stopper: stop.Stop,
    log: monitor.Log,
    evaluator: scoring.Evaluator,
    compilations: monitor.Compilations,
) -> Generator[run_folder.Metrics, None, train_step.State]:
    """Yields metrics; returns the state after the last step, or after the step it stopped at."""
    settings, first = job.settings, int(state.step)
    save_every = _steps(settings.run.save_every, job.num_steps)
    start = clock = time.time()
    profile = monitor.Profile(settings.run.profile, first)
    early = first_steps.FirstSteps(job.adapters.model, state, job.folder, record)
    try:
        with console.Progress(first, job.num_steps, settings.run.log_every) as progress:
            watch = _Watch(job, step, kept, log, compilations, progress)
            for taken in _steps_of(job, step, state, kept, evaluator.patience):
                state, metrics = taken
                number = metrics["step"]
                metrics = watch.logged(metrics, time.time() - clock)
                evaluation, last = _evaluate(job, record, evaluator, number, state)
                # Asked once, so that the step that ends the loop is also the one that is saved.
                late = time.monotonic() - job.begun > (settings.run.max_time or math.inf)
                ending = processes.anyone(stopper.asked or late) or last
                early.after(state, last=ending)
                if traced := profile.done(number, ending):
                    say("profile", traced)
                due = ending or number % save_every == 0
                due |= evaluation.loss is not None and settings.eval.keep_best
                if due:
                    kept.save(state, evaluation.loss)
                try:
                    yield metrics
                    if evaluation.metrics:
                        yield evaluation.metrics
                except GeneratorExit:
                    if not due:
                        kept.save(state, evaluation.loss)
                    raise
                if ending:
                    break
                clock = time.time()
    finally:
        job.watch.add("train", start)
    return state


class _Watch:
    """Measures the steps of a run, logs them, and says what is odd about one."""

    def __init__(
        self,
        job: setup.Job,
        step: Callable,
        kept: snapshots.Snapshots,
        log: monitor.Log,
        compilations: monitor.Compilations,
        progress: console.Progress,
    ):
        self._job, self._step, self._kept, self._log = job, step, kept, log
        self._compilations, self._progress = compilations, progress
        self._spikes = monitor.Spikes()
        plan = planned.job_and_target(job.settings, job.base.architecture, job.mesh)
        self._utilization = monitor.Utilization(*plan)

    def logged(self, metrics: run_folder.Metrics, seconds: float) -> run_folder.Metrics:
        """The metrics of a step that took so many seconds, as they are logged.

        Raises: UserError if the loss is not finite.
        """
        number, job = metrics["step"], self._job
        shape = job.data.batches.shape(number - 1)
        metrics["tokens_per_second"] = round(metrics.pop("num_tokens") / seconds, 1)
        metrics["data_wait"] = round(metrics.pop("waited") / seconds, 4)
        share = self._utilization.share(shape[-1], seconds)
        known = {"mfu": share, "peak_bytes": devices.device_peak_bytes()}
        metrics |= {name: value for name, value in known.items() if value is not None}
        metrics = self._log.add(metrics)
        loss = job.adapters.loss(metrics)
        if loss is None:
            raise _not_finite(job, number, self._kept.latest())
        if again := self._compilations.done(number, self._step, shape):
            say("warning", again)
        self._progress.show(number, metrics | {"loss": loss})
        if spike := self._spikes.note(loss):
            say("spike", f"step {number}: {spike}")
        return metrics


def _steps_of(
    job: setup.Job,
    step: Callable,
    state: train_step.State,
    kept: snapshots.Snapshots,
    patience: monitor.Patience,
) -> Iterator[tuple[train_step.State, run_folder.Metrics]]:
    """Yields (state, metrics) after each step that is left."""
    until = 0 if patience.spent else job.num_steps  # it may have run out before the run stopped
    batch_at = functools.partial(_batch, job)
    try:
        for taken in train_step.steps(step, state, job.adapters.frozen, batch_at, until):
            state = taken[0]
            yield taken
    except errors.UserError:  # a row of a stream is bad, and the steps before are good
        if int(state.step):
            kept.save(state)
            kept.wait()
        raise


def _evaluate(
    job: setup.Job,
    record: run_folder.Record,
    evaluator: scoring.Evaluator,
    number: int,
    state: train_step.State,
) -> tuple[scoring.Evaluation, bool]:
    """(the evaluation after a step, if there is one, whether the step is the run's last one)."""
    patience, last = evaluator.patience, number == job.num_steps
    every = _steps(job.settings.eval.eval_every or job.num_steps, job.num_steps)
    if not last and number % every:
        return scoring.Evaluation(), False
    evaluation = evaluator.evaluate(number, state.lora, score=last)
    if patience.spent and not last:
        say("patience", f"no better held-out loss in {patience.limit} evaluations: ending here")
    last = last or patience.spent
    if last:  # before the checkpoint, for a run that is resumed from it
        record.samples["after"] = evaluation.samples
        job.folder.write_run(record)
    return evaluation, last


def _steps(every: float, num_steps: int) -> int:
    """A number of steps; below 1 it is their share of all."""
    return max(1, round(every if every >= 1 else every * num_steps))


def _batch(job: setup.Job, index: int) -> train_loss.Batch:
    """The batch of a step; each process makes the parts for its own devices."""
    where, shape = sharding.batch(job.mesh), job.data.batches.shape(index)
    parts = functools.cache(lambda *bounds: job.data.batches.batch(index, slice(*bounds)))

    def array(name):
        return jax.make_array_from_callback(
            shape, where, lambda at: parts(at[1].start, at[1].stop)[name]
        )

    return train_loss.Batch(*map(array, train_loss.Batch._fields))


def _not_finite(job: setup.Job, number: int, good: int | None) -> errors.UserError:
    return errors.UserError(
        expected="a finite loss and gradient",
        found=f"NaN or infinity at step {number}",
        where=str(job.folder.path / "metrics.jsonl"),
        do="start a new run with a lower --lr, a longer --warmup, or --dtype float32; "
        + (f"the checkpoint of step {good} is good" if good else "no checkpoint was due yet"),
    )
