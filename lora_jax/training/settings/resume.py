"""The settings of a resumed run: those of its run.json, some of which may be changed."""

import math
from collections.abc import Mapping

from lora_jax import errors
from lora_jax.training.settings import assemble, checks, convert, groups

# What a resumed run may change: reporting, prompts, the mesh, and how a step is split.
_MAY_CHANGE = ("output_dir", "prompt", "chat", "max_new_tokens", "temperature", "mesh", "max_time",
         "log_every", "report_to", "profile")  # fmt: skip
_SPLIT = ("batch_size", "grad_accum")


def resumed(
    record: Mapping[str, groups.Value], given: groups.Flat, where: str
) -> groups.TrainSettings:
    """The settings in run.json, with `given` in place of those that may change.

    These are reporting, prompts, the mesh, and how a step is split: batch_size and grad_accum, if
    their product stays the same. where: the path of run.json.
    Raises: UserError if another setting is given and differs.
    """
    before = assemble.from_record(record, frozenset(given))
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
    checks.check_ranges(settings)
    return settings


def _shown(value: groups.Value) -> str:
    return ",".join(map(str, value)) if isinstance(value, list) else str(value)
