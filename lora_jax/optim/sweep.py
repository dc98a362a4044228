"""Several settings trained in one program: an adapter for each, on one base and the same data.

The arrays of all members have a leading axis [S, …]. Each member gets the batches, dropout masks
and initial values that it would get alone, so its adapter ends as that of a run of its own.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from lora_jax import lora
from lora_jax.kernels import platform
from lora_jax.lora import config as lora_config
from lora_jax.lora.nnx import inject, model_state
from lora_jax.optim import adamw
from lora_jax.optim import config as optim_config
from lora_jax.optim import loss as train_loss
from lora_jax.optim import step as train_step
from lora_jax.parallel import mesh as sharding

_OWN = ("lora_scaling", "lora_mask")  # frozen arrays that each member has its own of
_STACK = "layers"  # the part of a LLaMA whose arrays are [L, …]


class Member(NamedTuple):
    """One of the settings. Members differ in the learning rate or in the rank."""

    name: str
    lora: lora_config.LoRAConfig
    optim: optim_config.OptimConfig


class Moments(NamedTuple):
    """State.opt_state of a sweep.

    lost: for each member the step, from 1, at which its loss or gradient was not finite; 0: never.
    From that step on, the member keeps the values from before it.
    """

    moments: Any
    lost: Int[Array, " S"]


def join(parts: Sequence[tuple[Any, model_state.Frozen]]) -> tuple[Any, model_state.Frozen]:
    """(lora, frozen) of all members, from each member's `model_state.split` on the same base.

    Adapters of a smaller rank are padded with zero rows of B and zero columns of A, which have no
    gradient and stay zero. Use it with the graphdef of the largest rank.
    """
    trained = jax.tree.map(_stacked, *(trained for trained, _ in parts))
    first = parts[0][1]

    def own(path, *arrays):
        return _stacked(*arrays) if _name(path) in _OWN else arrays[0]

    base = jax.tree_util.tree_map_with_path(own, *(frozen.base for _, frozen in parts))
    return trained, first._replace(base=base)


def one(trained: Any, frozen: model_state.Frozen, index: int) -> tuple[Any, model_state.Frozen]:
    """(lora, frozen) of one member, for the graphdef of the largest rank."""

    def own(path, array):
        return array[index] if _name(path) in _OWN else array

    base = jax.tree_util.tree_map_with_path(own, frozen.base)
    reference = jax.tree.map(lambda array: array[index], frozen.reference)
    alone = frozen._replace(base=base, reference=reference)
    return jax.tree.map(lambda array: array[index], trained), alone


def cut(trained: Any, like: Any) -> Any:
    """A member's arrays without the padding of `join`. like: arrays of the member's own shapes."""
    return jax.tree.map(lambda array, own: array[tuple(map(slice, own.shape))], trained, like)


def start(members: Sequence[Member], trained: Any, num_steps: int) -> train_step.State:
    """The state before step 1. Call it eagerly; see step.start."""
    state = train_step.start(trained, adamw.make(members[0].optim, num_steps))
    count = len(members)
    # The moments have the axis [S] already; the step counts do not.
    moments = jax.tree.map(
        lambda array: array if array.ndim else jnp.zeros(count, array.dtype), state.opt_state
    )
    return state._replace(opt_state=Moments(moments, jnp.zeros(count, jnp.int32)))


def make_step(
    graphdef: nnx.GraphDef,
    members: Sequence[Member],
    num_steps: int,
    *,
    seed: int,
    remat: str,
    beta: float | None = None,
) -> Callable[
    [train_step.State, model_state.Frozen, train_loss.Batch],
    tuple[train_step.State, dict[str, jax.Array]],
]:
    """step.make_step for all members: the metrics are "loss/NAME" and so on, and num_tokens.

    graphdef: that of the largest rank.
    """
    of_model = _sums(graphdef, len(members), beta)
    peaks = np.array([member.optim.lr for member in members], np.float32)

    def sums(trained, frozen, key, micro_batch, numbers):
        keys = lora.reseed(frozen.dropout_keys, key, jnp.tile(numbers, len(members)))
        found = of_model(trained, frozen, keys, micro_batch, remat)
        return found.loss.sum(), found  # a member's arrays affect only its own loss

    def step(state: train_step.State, frozen: model_state.Frozen, batch: train_loss.Batch):
        zero = train_loss.zero_sums(beta, (len(members),))
        found, gradient = train_step.add_up(sums, zero, state, frozen, batch, seed)
        own = functools.partial(_update, members[0].optim, num_steps, state.step)
        every = state.lora, state.opt_state, peaks, found, gradient
        trained, moments, metrics = jax.vmap(own)(*every)
        metrics = _by_name(metrics, members) | {"num_tokens": (batch.attention_mask != 0).sum()}
        after = train_step.State(trained, moments, state.step + 1)
        return sharding.keep_placed(after), metrics

    return jax.jit(step, donate_argnums=0, compiler_options=platform.compiler_options())


def _update(config, num_steps, number, trained, opt_state, peak, sums, gradient):
    """One member's (lora, Moments, metrics) after the step."""
    how = {"num_steps": num_steps, "peak": peak}
    before = train_step.State(trained, opt_state.moments, number)
    optimizer, schedule = adamw.make(config, **how), adamw.schedule(config, **how)
    after, metrics = train_step.update(optimizer, schedule, before, sums, gradient)
    broken = ~jnp.isfinite(metrics["loss"] + metrics["grad_norm"])
    lost = jnp.where((opt_state.lost == 0) & broken, number + 1, opt_state.lost)
    after = jax.tree.map(lambda new, old: jnp.where(lost > 0, old, new), after, before)
    return after.lora, Moments(after.opt_state, lost), metrics


def make_eval_loss(
    graphdef: nnx.GraphDef, members: Sequence[Member], beta: float | None = None
) -> Callable:
    """step.make_eval_loss for all members: the sums are "eval_loss/NAME" and so on."""
    of_model = _sums(graphdef, len(members), beta)

    @functools.partial(jax.jit, compiler_options=platform.compiler_options())
    def eval_loss(trained, frozen, micro_batch):
        found = of_model(trained, frozen, None, micro_batch, "none")
        sums = {"loss": found.loss, **found.metrics}
        sums = {f"eval_{name}": each for name, each in sums.items()}
        return _by_name(sums, members), found.count[0]

    return eval_loss


def _sums(graphdef: nnx.GraphDef, count: int, beta: float | None) -> Callable[..., train_loss.Sums]:
    """(lora, frozen, dropout keys or None, micro-batch, remat) → Sums [S]."""

    def losses(trained, frozen, keys, batch, remat) -> Float[Array, "S B T"]:
        base = jax.tree_util.tree_map_with_path(
            lambda path, array: _placed(path, array) if _name(path) in _OWN else array, frozen.base
        )
        trained = jax.tree_util.tree_map_with_path(_placed, trained)
        model = nnx.merge(graphdef, trained, frozen.dropout_keys if keys is None else keys, base)
        inject.set_members(model, count)
        model.eval() if keys is None else model.train()
        repeated = jax.tree.map(lambda array: jnp.tile(array, (count, 1)), batch)
        return train_loss.losses(model, repeated, remat=remat).reshape(count, *batch.labels.shape)

    def sums(trained, frozen, keys, batch, remat):
        before = None
        if beta is not None:
            before = losses(frozen.reference, frozen, None, batch, remat)
            before = jax.lax.stop_gradient(before)
        now = losses(trained, frozen, keys, batch, remat)
        return jax.vmap(train_loss.objective(beta), (0, 0, None))(now, before, batch)

    return sums


def _by_name(metrics: dict[str, jax.Array], members: Sequence[Member]) -> dict[str, jax.Array]:
    return {
        f"{name}/{member.name}": values[index]
        for name, values in metrics.items()
        for index, member in enumerate(members)
    }


def _stacked(*arrays: jax.Array) -> jax.Array:
    largest = np.max([array.shape for array in arrays], axis=0)
    return jnp.stack([
        jnp.pad(array, [(0, most - size) for size, most in zip(array.shape, largest, strict=True)])
        for array in arrays
    ])  # fmt: skip


def _placed(path: Any, array: jax.Array) -> jax.Array:
    """The array with its axis [S] where inject.set_members has it: after that of the layers."""
    in_stack = any(getattr(part, "key", None) == _STACK for part in path)
    return jnp.moveaxis(array, 0, 1) if in_stack else array


def _name(path: Any) -> str:
    return str(getattr(path[-1], "key", ""))
