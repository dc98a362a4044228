"""Restores the newest checkpoint to resume from it, and the best one to make the adapter of it."""

import json
from typing import Any

from lora_jax import errors
from lora_jax.console import say
from lora_jax.optim import step as train_step
from lora_jax.parallel import processes
from lora_jax.training import setup
from lora_jax.training.output import run_folder, snapshots
from lora_jax.training.settings import assemble, convert

_SETTING = {
    "base": "model",
    "train": "dataset",
    "held out": "eval_dataset",
    "adapter": "init_adapter",
}


def restore(
    job: setup.Job, state: train_step.State, kept: snapshots.Snapshots, record: run_folder.Record
) -> train_step.State:
    """The state of the newest readable checkpoint, or `state` if there is none yet."""
    before = job.folder.read_run()
    _check_same(job, before, record)
    if before.get("status", "").startswith("failed"):
        say("resume", f"the run had ended with: {before['status']}")
    if processes.broadcast(kept.latest()) is None:
        say("resume", "no finished checkpoint: starting over")
        return state
    record.samples, record.checks = before.get("samples", {}), before.get("checks", {})
    for name, earlier in before.get("seconds", {}).items():  # of the run before it was resumed
        job.watch.seconds[name] = job.watch.seconds.get(name, 0) + earlier
    record.compile_seconds = before.get("compile_seconds", 0)
    record.peak_bytes = before.get("peak_bytes", 0)
    state, damaged = kept.restore(state)
    _say_damaged(damaged)
    kept.drop(damaged)  # their steps are trained and saved again
    job.adapters.resumed(state)
    say("resume", f"from step {int(state.step)} of {job.num_steps}")
    if int(state.step) == job.num_steps:
        say("resume", "the run is finished: no step is left to train; to train for longer, start a "
            "new run with more --max-steps or --epochs")  # fmt: skip
    return state


def _check_same(job: setup.Job, before: run_folder.RunJson, record: run_folder.Record) -> None:
    """Tells which of them lie elsewhere now.

    Raises: UserError if the base model, the data or the ids of tokens that are trained are not
    those the run was started with.
    """
    version = before.get("versions", {}).get("lora-jax")
    base = {name: value for name, value in record.base.items() if name != "id"}  # id: where it is
    if None in (base["commit"], before.get("base", {}).get("commit")):
        del base["commit"]  # of a copy outside of the hub's cache
    changed, where = [], [str(job.folder.path / "run.json")]
    for what, now in (("base", base), ("data", record.data)):
        then = before.get(what, {})
        for part in (part for part, value in now.items() if then.get(part, "") != value):
            of = "" if part == "adapter" else f" of the {what}"
            changed.append(
                f"another {part}{of}"
                if part in then
                else f"no {part} of the {what}: another version of lora-jax ({version}) wrote it"
            )
            name = _SETTING[part if what == "data" else what]
            where.append(f"{convert.flag(name)}, now {record.settings.get(name)}")
    old, new = before.get("settings", {}), record.settings
    tokens = [json.dumps(each.get("trainable_token_indices")) for each in (old, new)]
    if tokens[0] != tokens[1]:
        changed.append(f"a tokenizer with which the trained tokens are {tokens[1]}, not "
                       f"{tokens[0]}")  # fmt: skip
        where.append(f"{convert.flag('model')}, now {new.get('model')}")
    if changed:
        raise errors.UserError(
            expected="the base model, the data and the adapter that the run was started with",
            found=changed,
            where=[*dict.fromkeys(where)],
            do="put them back, or start a new run",
        )
    for name in assemble.MOVABLE:
        if name in old and old[name] != new.get(name):
            say("resume", f"{name} with the same content at {new.get(name)}, was {old[name]}")


def chosen(state: train_step.State, kept: snapshots.Snapshots, record: run_folder.Record) -> Any:
    """A and B of the adapter: with keep_best those of the best step, else those of `state`."""
    if not kept.losses:
        return state.lora
    try:
        state, damaged = kept.best(state)
    except errors.UserError as error:
        say("best", f"the adapter is of the last step, the best is not readable: {error.found}")
        return state.lora
    _say_damaged(damaged)
    kept.drop(damaged)  # else they would still be kept as the best ones
    step = int(state.step)
    record.best = {"step": step, "eval_loss": kept.losses[step]}
    say("best", f"step {step}, held-out loss {kept.losses[step]:.4f}: "
        "the adapter is of this step")  # fmt: skip
    return state.lora


def _say_damaged(damaged: dict[int, str]) -> None:
    for step, what in damaged.items():
        say("resume", f"the checkpoint of step {step} is damaged and skipped: {what}")
