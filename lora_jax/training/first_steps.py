"""Whether the first steps of a run reach every layer that is trained."""

import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from flax import nnx
from jaxtyping import Bool, Integer

from lora_jax.console import say
from lora_jax.layers import places
from lora_jax.lora.nnx import adapted, saved
from lora_jax.optim import step as train_step
from lora_jax.optim import sweep
from lora_jax.parallel import mesh as sharding
from lora_jax.training import digests
from lora_jax.training.output import run_folder

STEPS = 5  # with a warmup and B = 0, A begins to change at the third
_SHOWN = 4  # stacks in a warning

Path = tuple[Any, ...]


class Trained(NamedTuple):
    """A module whose arrays are trained, or a stack of them.

    path: in State.lora. num_axes: of the stack. names: of each layer in the stack, as PEFT has
    them; None for a layer that the settings leave out.
    """

    path: Path
    num_axes: int
    names: tuple[str | None, ...]


class Seen(NamedTuple):
    """What is known of each Trained, for every member of a sweep (or the one adapter) and layer.

    gradient: whether any of its arrays has had one. digests: of its arrays. lost: the members that
    are no longer trained.
    """

    gradient: list[Bool[np.ndarray, " S *L"]]
    digests: list[list[Integer[np.ndarray, " S *L"]]]
    lost: Bool[np.ndarray, " S"]


class FirstSteps:
    """Looks at the adapter after the first steps, until every layer has a gradient and changes."""

    def __init__(
        self,
        model: nnx.Module,
        state: train_step.State,
        folder: run_folder.RunFolder,
        record: run_folder.Record,
    ):
        """record: gets the result. A resumed run is past its first steps."""
        self._folder, self._record, self._trained = folder, record, find(model)
        self._before = None if int(state.step) else look(self._trained, state)

    def after(self, state: train_step.State, *, last: bool) -> None:
        """To be called after each step. Warns of layers without a gradient."""
        number = int(state.step)
        if self._before is None or (number == 1 and not last):  # then A has no gradient yet
            return
        now = look(self._trained, state)
        idle, still = compared(self._trained, self._before, now)
        if (idle or still) and number < STEPS and not last:
            return
        self._before = None
        count = sum(name is not None for each in self._trained for name in each.names)
        self._record.checks |= {"trained_layers": count, "without_gradient": idle}
        self._folder.write_run(self._record)
        if idle:
            say("warning", f"{len(idle)} of {count} trained layers have no gradient after {number} "
                f"steps and stay as they are: {ranges(idle)}")  # fmt: skip
        if still and number == STEPS:
            say("warning", f"{len(still)} of {count} trained layers have a gradient, but not all "
                f"of their arrays have changed after {number} steps: {ranges(still)}")  # fmt: skip
        if not idle:
            change = "" if still else " and change"
            say("check", f"all {count} trained layers have a gradient{change}")


def find(model: nnx.Module) -> tuple[Trained, ...]:
    """What is trained of an adapted model: the layers with an adapter, saved modules and tokens."""
    found = []
    for site in adapted.find(model):
        ranked = zip(site.names, site.module.lora_ranks, strict=True)
        names = tuple(name if rank else None for name, rank in ranked)
        found.append(Trained(site.path, len(site.lead), names))
    for whole in saved.find(model):
        found.append(Trained(whole.path, len(whole.depths), whole.names))
    return tuple(found)


def look(trained: Sequence[Trained], state: train_step.State) -> Seen:
    """What is known now. All processes must call this.

    The host looks at the arrays: programs for that would take longer to compile.
    """
    swept = isinstance(state.opt_state, sweep.Moments)
    # AdamW's first moments are sums of the clipped gradients.
    moments = [mu for _, mu in optax.tree.get_all_with_path(state.opt_state, "mu")]
    arrays, moments = sharding.gather((state.lora, moments))
    lost = sharding.gather(state.opt_state.lost) if swept else np.zeros(1)
    if not swept:
        arrays, moments = jax.tree.map(lambda array: array[None], (arrays, moments))
    seen = Seen([], [], lost > 0)
    for path, num_axes, _ in trained:
        kept = 1 + num_axes
        summed = jax.tree.leaves([places.at(tree, path) for tree in moments])
        each = [(array != 0).any(tuple(range(kept, array.ndim))) for array in summed]
        seen.gradient.append(np.any(each, axis=0))
        own = jax.tree.leaves(places.at(arrays, path))
        seen.digests.append([digests.of_host(array, kept) for array in own])
    return seen


def compared(trained: Sequence[Trained], before: Seen, now: Seen) -> tuple[list[str], list[str]]:
    """The names of (layers without a gradient, those with one of which an array is as before).

    A layer is named if this is so for any member of a sweep that is not lost.
    """
    idle, still = [], []
    each = zip(trained, now.gradient, before.digests, now.digests, strict=True)
    for of, gradient, old, new in each:
        changed = np.all([a != b for a, b in zip(old, new, strict=True)], axis=0)
        reached, changed = (found[~now.lost].all(0).reshape(-1) for found in (gradient, changed))
        for name, has_gradient, has_changed in zip(of.names, reached, changed, strict=True):
            if name is not None and not has_gradient:
                idle.append(name)
            elif name is not None and not has_changed:
                still.append(name)
    return idle, still


def ranges(names: Sequence[str]) -> str:
    """The names, with those of a stack as one: model.layers.0-3,7.self_attn.q_proj."""
    stacks: dict[tuple[str, str], list[int]] = {}
    for name in names:
        head, number, tail = re.fullmatch(r"(.*?)(?:\.(\d+)\.(.*))?", name).groups()
        stacks.setdefault((head, tail or ""), []).extend([int(number)] if number else [])
    shown = [
        f"{head}.{_runs(numbers)}.{tail}" if numbers else head
        for (head, tail), numbers in stacks.items()
    ]
    more = [f"… and {len(shown) - _SHOWN} more"] if len(shown) > _SHOWN else []
    return ", ".join(shown[:_SHOWN] + more)


def _runs(numbers: Sequence[int]) -> str:
    """0-3,7 for 0, 1, 2, 3, 7."""
    runs = []
    for number in sorted(numbers):
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)
