"""The stages of a run, from its settings to its adapter: read, load, train, save."""

import contextlib
import dataclasses
import pathlib
import time

import jax
from jax.sharding import Mesh

from lora_jax import console, tokenizer
from lora_jax.console import say
from lora_jax.models import config as model_config
from lora_jax.optim import step as train_step
from lora_jax.parallel import devices, processes
from lora_jax.training import (
    frozen_base,
    loop,
    monitor,
    outcome,
    planned,
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
        settings = planned.choose_remat(settings, base.architecture, mesh, data)
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
    keep, best = settings.run.keep_checkpoints, settings.eval.keep_best
    # For the checkpoints that are kept, the one being written, and the adapter.
    folder.check_space((keep + best + 2) * sum(a.nbytes for a in jax.tree.leaves(state)))
    record = records.make(job)
    if not resuming:
        _write_settings(job, record)
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
        patience = _patience(job, first)
        record.status = "running"
        folder.write_run(record)
        evaluator, evaluation = scoring.Evaluator(job, log, patience), scoring.Evaluation()
        if first == 0:
            try:
                evaluation = _score_before(job, record, evaluator, state)
            except KeyboardInterrupt:
                processes.end(130, "stopped")
                return _stopped(job, 0, 130)
        with stop.Stop() as stopper:
            base = frozen_base.FrozenBase(job.adapters.frozen, job.mesh, folder, record)
            try:
                if evaluation.metrics:
                    yield evaluation.metrics
                state = yield from loop.train(
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


def _write_settings(job: setup.Job, record: run_folder.Record) -> None:
    """Writes what a run is resumed from, before any other file."""
    record.status = "running"
    job.folder.write_run(record)
    job.folder.write_config(job.settings)
    _keep_tokenizer(job, again=True)


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


def _patience(job: setup.Job, first: int) -> monitor.Patience:
    """What is left of it after the evaluations of a run that goes on at step `first`."""
    patience = monitor.Patience(job.settings.eval.patience)
    for metrics in job.folder.metrics(first):
        if "eval_loss" in metrics:
            patience.note(metrics["eval_loss"])
    return patience


def _score_before(
    job: setup.Job, record: run_folder.Record, evaluator: scoring.Evaluator, state: train_step.State
) -> scoring.Evaluation:
    """The evaluation before the first step. Raises: KeyboardInterrupt after Ctrl-C."""
    with stop.interruptible():  # there is a run to resume now
        evaluation = evaluator.evaluate(0, state.lora, score=True)
        record.samples = {"before": evaluation.samples}
        job.folder.write_run(record)
    return evaluation


def _stopped(job: setup.Job, done: int, code: int) -> outcome.Outcome:
    return outcome.Outcome(
        job.settings, job.folder.path, job.folder.adapter, job.num_steps, done,
        finished=False, code=code,
    )  # fmt: skip
