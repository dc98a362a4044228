"""A training run from its settings to its adapter: load, train, evaluate, save."""

import contextlib
import dataclasses
import functools
import math
import pathlib
import time
from collections.abc import Callable, Generator

import jax
from jax.sharding import Mesh

from lora_jax import console, errors, tokenizer
from lora_jax.console import say
from lora_jax.models import config as model_config
from lora_jax.optim import loss as train_loss
from lora_jax.optim import step as train_step
from lora_jax.parallel import devices, processes
from lora_jax.parallel import mesh as sharding
from lora_jax.training import (
    first_steps,
    frozen_base,
    monitor,
    outcome,
    run_data,
    scoring,
    setup,
    single_tokens,
    starting,
    stop,
    untrained_tokens,
)
from lora_jax.training.output import record as records
from lora_jax.training.output import resuming as checkpoint
from lora_jax.training.output import run_folder, snapshots
from lora_jax.training.settings import groups


def load_and_run(
    settings: groups.TrainSettings, folder: run_folder.RunFolder, *, resuming: bool
) -> outcome.Steps:
    """Yields the metrics of a run, and returns its Outcome; see entry.run."""
    if warning := devices.unused_accelerator():
        say("warning", warning)
    devices.keep_freed_memory()
    devices.keep_compiled()
    begun = time.monotonic()
    trains = settings.loop.max_steps != 0
    found = run_data.read(settings) if trains else None  # fails before a model is downloaded
    settings, start = starting.find(settings, resuming=resuming)
    base_folder, architecture = setup.find(settings.model)
    settings, mesh = setup.fit(settings, base_folder, architecture, resume=resuming)
    axes = " ".join(f"{axis}={size}" for axis, size in mesh.shape.items())
    say("devices", f"{devices.describe()}, mesh {axes}")
    where = console.quoted(str(folder.path))
    processes.when_lost(f"start all of them again with --resume --output-dir {where}")
    steps = _on_mesh(
        settings, folder, base_folder, architecture, mesh, found, begun, resuming, start
    )
    return (yield from _with_mesh(mesh, steps))


def _with_mesh(mesh: Mesh, steps: outcome.Steps) -> outcome.Steps:
    """`steps` with `mesh` as the ambient mesh; it is not set while the caller handles a step."""
    try:
        while True:
            with jax.set_mesh(mesh):
                try:
                    metrics = next(steps)
                except StopIteration as end:
                    return end.value
            yield metrics
    finally:
        with jax.set_mesh(mesh):
            steps.close()


def _on_mesh(
    settings: groups.TrainSettings,
    folder: run_folder.RunFolder,
    base_folder: pathlib.Path,
    architecture: model_config.LlamaConfig,
    mesh: Mesh,
    found: run_data.Read | None,
    begun: float,
    resuming: bool,
    start: starting.Start | None,
) -> outcome.Steps:
    model = settings.model
    if model.chat_template and (folder.path / "chat_template.jinja").is_file():  # of a resumed run
        model = dataclasses.replace(model, chat_template=str(folder.path))
    base = setup.base(base_folder, architecture, model, start)
    single_tokens.check_mesh(base, mesh.shape)
    context, watch = architecture.context, setup.Stopwatch()
    data = None
    settings = single_tokens.with_ids(settings, base.tokenizer)
    settings = single_tokens.with_new(settings, architecture, base.new_tokens)
    if found is not None:
        settings = settings.replace(seq_len=settings.data.resolve_seq_len(context))
        settings = setup.with_chat_time(settings, base.tokenizer)
        data = run_data.RunData(
            settings, found, base.tokenizer, base.eos_ids[0], context, base.num_tokens
        )
        settings = setup.choose_remat(settings, base.architecture, mesh, data)
    prompts = scoring.encoded_prompts(settings, base)
    loading, held = time.time(), devices.held_bytes()
    shape = None if data is None else (settings.loop.batch_size, data.batches.length)
    generates = bool(prompts or settings.eval.exact_match)
    adapters = setup.load(settings, base, mesh, shape, scoring.SLOTS if generates else 0, start)
    watch.add("load", loading)
    if data is None:
        texts = scoring.continuations(settings, base, mesh, adapters, prompts,
                               adapters.trained, adapters.frozen)  # fmt: skip
        return outcome.Outcome(settings, folder.path, folder.adapter, 0, 0, finished=True,
                       continuations=texts)  # fmt: skip
    if text := untrained_tokens.note(adapters.model, data.used, settings.lora, base.tokenizer):
        say("tokens", text)
    job = setup.Job(settings, folder, base, mesh, data, adapters, begun, held, watch, start)
    return (yield from _fit(job, prompts, resuming))


def _fit(job: setup.Job, prompts: list[list[int]], resuming: bool) -> outcome.Steps:
    """Trains from the first step or from the newest checkpoint, and saves the adapter."""
    settings, folder = job.settings, job.folder
    state, step = job.adapters.begin(job.num_steps)
    # For the checkpoints that are kept, the one being written, and the adapter.
    keep, best = settings.run.keep_checkpoints, settings.eval.keep_best
    folder.check_space((keep + best + 2) * sum(a.nbytes for a in jax.tree.leaves(state)))
    record = records.make(job)
    if not resuming:  # written first, so that a folder with any other file can be resumed
        record.status = "running"
        folder.write_run(record)
        folder.write_config(settings)
        _keep_tokenizer(job, again=True)
    kept = snapshots.Snapshots(folder.checkpoints, keep, keep_best=best)
    with contextlib.ExitStack() as ending:
        ending.enter_context(records.failure_recorded(job, record))
        ending.enter_context(kept)
        compilations = ending.enter_context(monitor.Compilations())
        if resuming:
            state = checkpoint.restore(job, state, kept, record)
            _keep_tokenizer(job, again=False)  # if somebody deleted it
        job.data.keep(folder.streams, write=processes.leads())
        first = int(state.step)
        folder.cut_back(first or -1)
        log = ending.enter_context(monitor.Log(job, first))
        patience = monitor.Patience(settings.eval.patience)
        for metrics in folder.metrics(first):
            if "eval_loss" in metrics:
                patience.note(metrics["eval_loss"])
        record.status = "running"
        folder.write_run(record)
        evaluator, evaluation = scoring.Evaluator(job, log, patience), scoring.Evaluation()
        if first == 0:
            try:
                with stop.interruptible():  # there is a run to resume now
                    evaluation = evaluator.evaluate(0, state.lora, score=True)
                    record.samples = {"before": evaluation.samples}
                    folder.write_run(record)
            except KeyboardInterrupt:
                processes.end(130, "stopped")
                return _stopped(job, 0, 130)
        with stop.Stop() as stopper:
            base = frozen_base.FrozenBase(job.adapters.frozen, job.mesh, folder, record)
            try:
                if evaluation.metrics:
                    yield evaluation.metrics
                state = yield from _train(
                    job, step, state, kept, record, stopper, log, evaluator, compilations
                )
            except GeneratorExit:
                kept.wait()
                base.check()
                records.note_end(job, record, compilations, finished=False, step=kept.latest() or 0)
                records.report(folder)
                raise
            kept.wait()
            base.check()
            trained, done = checkpoint.chosen(state, kept, record), int(state.step)
            if record.best and record.best["eval_loss"] > patience.least:
                say("warning", f"the held-out loss was {patience.least:.4f} before the first step: "
                    "a lower --lr may help")  # fmt: skip
            saved = job.adapters.save(folder, trained, job.base.folder, job.num_steps, record)
            finished = done == job.num_steps or patience.spent
            records.note_end(job, record, compilations, finished=finished, step=done)
    reported = records.report(folder)
    if not finished:
        say("report", reported)
        return _stopped(job, done, stopper.code)
    texts = scoring.continuations(settings, job.base, job.mesh, job.adapters, prompts,
                           saved.trained, saved.frozen)  # fmt: skip
    return outcome.Outcome(
        settings, folder.path, saved.path, job.num_steps, done, finished=True,
        samples=record.samples, table=job.adapters.table(folder, job.num_steps), report=reported,
        continuations=texts, has_chats=job.data.has_chats,
    )  # fmt: skip


def _keep_tokenizer(job: setup.Job, *, again: bool) -> None:
    """Writes into the run's folder what of the tokenizer is not the base's, for its adapters.

    again: over what is there.
    """
    if not processes.leads():
        return

    def is_due(name: str) -> bool:
        return again or not (job.folder.path / name).is_file()

    if job.base.new_tokens and is_due("tokenizer.json"):
        tokenizer.save(job.base.tokenizer, job.base.folder, job.folder.path)
    template = job.settings.model.chat_template  # which may change until the run resumes
    if template and is_due("chat_template.jinja"):
        tokenizer.copy_chat_template(template, job.folder.path)


def _train(
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
    settings, patience = job.settings, evaluator.patience
    every = _steps(settings.eval.eval_every or job.num_steps, job.num_steps)
    save_every = _steps(settings.run.save_every, job.num_steps)
    start = clock = time.time()
    until = 0 if patience.spent else job.num_steps  # it may have run out before the run stopped
    steps = train_step.steps(
        step, state, job.adapters.frozen, functools.partial(_batch, job), until
    )
    spikes, profile = monitor.Spikes(), monitor.Profile(settings.run.profile, int(state.step))
    early = first_steps.FirstSteps(job.adapters.model, state, job.folder, record)
    utilization = monitor.Utilization(*setup.to_plan(settings, job.base.architecture, job.mesh))
    try:
        with console.Progress(int(state.step), job.num_steps, settings.run.log_every) as progress:
            while True:
                try:
                    state, metrics = next(steps)
                except StopIteration:
                    break
                except errors.UserError:  # a row of a stream is bad, and the steps before are good
                    if int(state.step):
                        kept.save(state)
                        kept.wait()
                    raise
                took, number = time.time() - clock, metrics["step"]
                shape = job.data.batches.shape(number - 1)
                metrics["tokens_per_second"] = round(metrics.pop("num_tokens") / took, 1)
                metrics["data_wait"] = round(metrics.pop("waited") / took, 4)
                share = utilization.share(shape[-1], took)
                known = {"mfu": share, "peak_bytes": devices.device_peak_bytes()}
                metrics |= {name: value for name, value in known.items() if value is not None}
                metrics = log.add(metrics)
                loss = job.adapters.loss(metrics)
                if loss is None:
                    raise _not_finite(job, number, kept.latest())
                if again := compilations.done(number, step, shape):
                    say("warning", again)
                progress.show(number, metrics | {"loss": loss})
                if spike := spikes.note(loss):
                    say("spike", f"step {number}: {spike}")
                last, evaluation = number == job.num_steps, scoring.Evaluation()
                if last or number % every == 0:
                    evaluation = evaluator.evaluate(number, state.lora, score=last)
                    if patience.spent and not last:
                        say("patience", f"no better held-out loss in {patience.limit} "
                            "evaluations: ending here")  # fmt: skip
                    last = last or patience.spent
                    if last:  # before the checkpoint, for a run that is resumed from it
                        record.samples["after"] = evaluation.samples
                        job.folder.write_run(record)
                # Asked once, so that the step that ends the loop is also the one that is saved.
                late = time.monotonic() - job.begun > (settings.run.max_time or math.inf)
                stopping = processes.anyone(stopper.asked or late)
                early.after(state, last=last or stopping)
                if traced := profile.done(number, last or stopping):
                    say("profile", traced)
                due = number % save_every == 0
                due |= evaluation.loss is not None and settings.eval.keep_best
                due |= last or stopping
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
                if stopping or last:
                    break
                clock = time.time()
    finally:
        job.watch.add("train", start)
    return state


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


def _stopped(job: setup.Job, done: int, code: int) -> outcome.Outcome:
    return outcome.Outcome(
        job.settings, job.folder.path, job.folder.adapter, job.num_steps, done,
        finished=False, code=code,
    )  # fmt: skip


def _not_finite(job: setup.Job, number: int, good: int | None) -> errors.UserError:
    return errors.UserError(
        expected="a finite loss and gradient",
        found=f"NaN or infinity at step {number}",
        where=str(job.folder.path / "metrics.jsonl"),
        do="start a new run with a lower --lr, a longer --warmup, or --dtype float32; "
        + (f"the checkpoint of step {good} is good" if good else "no checkpoint was due yet"),
    )
