"""The settings of a resumed run: those of its run.json, some of which may be changed."""

import math
import os
import pathlib
from collections.abc import Mapping

from lora_jax import assets, errors
from lora_jax.training.settings import assemble, checks, convert, groups

# What a resumed run may change: reporting, prompts, the mesh, kernels, how a step is split, how
# many bad rows are skipped, and where the model and the data lie. Their contents are compared when
# the checkpoint is read.
_MAY_CHANGE = ("output_dir", "skip_bad_rows", "prompt", "chat", "max_new_tokens", "temperature",
         "mesh", "kernels", "max_time", "log_every", "report_to", "profile",
         *assemble.MOVABLE)  # fmt: skip
_SPLIT = ("batch_size", "grad_accum")


def resumed(
    record: Mapping[str, groups.Value], given: groups.Flat, where: str
) -> groups.TrainSettings:
    """The settings in run.json, with `given` in place of those that may change.

    These are reporting, prompts, the mesh, kernels, skip_bad_rows, where the model and the data
    lie, and how a step is split: batch_size and grad_accum, if their product stays the same. where:
    the path of run.json.
    Raises: UserError if another setting is given and differs.
    """
    before = assemble.from_record(_with_demo_here(record), frozenset(given))
    given = assemble.absolute(given)
    if given.get("remat") == "auto":  # as it was resolved for the run
        given = {**given, "remat": before.loop.remat}
    settings = before.replace(**given)
    examples, now = ((each.loop.batch_size, each.loop.grad_accum) for each in (before, settings))
    may_change = _MAY_CHANGE
    if math.prod(examples) == math.prod(now):
        may_change += _SPLIT
    elif any(name in given for name in _SPLIT):
        raise errors.UserError(
            expected=f"{math.prod(examples)} sequences a step, as in this run: "
            f"--batch-size {examples[0]} × --grad-accum {examples[1]}",
            found=f"{now[0]} × {now[1]}",
            where=where,
            do="choose two numbers with this product, or start a new run",
        )
    old, new = before.flat(), settings.flat()
    contradicting = [
        f"{convert.flag(name)} {_shown(new.get(name))}, but the run has {_shown(old.get(name))}"
        for name in given
        if name not in may_change and old.get(name) != new.get(name)
    ]
    if contradicting:
        raise errors.UserError(
            expected="--resume with the settings of the run",
            found=contradicting,
            where=where,
            do="leave these flags out, or start a new run",
        )
    _check_paths(settings, given, where)
    problems = [*checks.out_of_range(settings.flat()), *checks.mixture(settings.data)]
    if problems:
        raise errors.UserError.together(problems)
    return settings


def _check_paths(settings: groups.TrainSettings, given: groups.Flat, where: str) -> None:
    """Raises: UserError if files of the run are not where they were, and no new path is given."""
    flat = settings.flat()
    paths = {name: [flat[name]] if isinstance(flat[name], str) else flat[name]
             for name in assemble.MOVABLE if name in flat and name not in given}  # fmt: skip
    missing = {
        name: [
            each for each in those if pathlib.Path(each).is_absolute() and not assemble.exists(each)
        ]
        for name, those in paths.items()
    }
    if lost := {name: those for name, those in missing.items() if those}:
        flags = (f"{convert.flag(name)} NEW_PATH{' …' * (len(paths[name]) > 1)}" for name in lost)
        raise errors.UserError(
            expected="the model and the data where they were when the run started",
            found=[f"no {each}" for those in lost.values() for each in those],
            where=where,
            do=f"if they have moved, say where they are now: {' '.join(flags)}",
        )


def _with_demo_here(record: Mapping[str, groups.Value]) -> groups.Flat:
    """The record with the demo's files where this installation has them."""

    def here(value: groups.Value) -> groups.Value:
        if isinstance(value, list):
            return [here(each) for each in value]
        for own in (assets.FOLDER, assets.TRAIN, assets.EVAL):
            inside = own.relative_to(assets.FOLDER.parents[1])  # lora_jax/assets/demo/…
            if str(value).endswith(f"lora_jax/{inside}") and not os.path.exists(str(value)):
                return str(own)
        return value

    return {name: here(value) if name in assemble.MOVABLE else value
            for name, value in record.items()}  # fmt: skip


def _shown(value: groups.Value) -> str:
    return ",".join(map(str, value)) if isinstance(value, list) else str(value)
