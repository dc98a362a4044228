"""The training step, and the loop that yields after each step."""

import collections
import functools
import itertools
import math
import time
from collections.abc import Callable, Iterator
from concurrent import futures
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jaxtyping import Array, Int

from lora_jax import lora
from lora_jax.kernels import platform
from lora_jax.lora.nnx import model_state
from lora_jax.optim import loss as train_loss
from lora_jax.parallel import mesh as sharding

_LOADERS, _AHEAD = 2, 3  # threads that make batches, and the batches that they prepare in advance


class State(NamedTuple):
    """What training changes: adapters, optimizer moments, and the number of steps done."""

    lora: Any
    opt_state: Any
    step: Int[Array, ""]


def start(trained: Any, optimizer: optax.GradientTransformation) -> State:
    """The state before step 1. Call it eagerly: under jit the moments would lose A's sharding."""
    return State(trained, optimizer.init(trained), jnp.zeros((), jnp.int32))


def make_step(
    graphdef: nnx.GraphDef,
    optimizer: optax.GradientTransformation,
    schedule: optax.Schedule,
    *,
    seed: int,
    remat: str,
    beta: float | None = None,
) -> Callable[[State, model_state.Frozen, train_loss.Batch], tuple[State, dict[str, jax.Array]]]:
    """The jitted step (state, frozen, batch) → (state, metrics); it reuses the memory of `state`.

    The loss is the mean over all trained tokens of the batch; with beta, the mean of `dpo.loss`
    over all pairs, for which `frozen` holds the reference. On a mesh, the gradient is summed over
    the axis "data" once, after all micro-batches. If the loss or the gradient is not finite, only
    the step count of the state changes. Metrics: loss, grad_norm, lr, num_tokens, dpo.METRICS.
    """
    of_model = train_loss.of_model(graphdef, beta)

    def sums(trained, frozen, key, micro_batch, numbers):
        keys = lora.reseed(frozen.dropout_keys, key, numbers)
        model = nnx.merge(graphdef, trained, keys, frozen.base)
        model.train()
        found = of_model(model, frozen, micro_batch, remat)
        return found.loss, found

    def step(state: State, frozen: model_state.Frozen, batch: train_loss.Batch):
        found, gradient = add_up(sums, train_loss.zero_sums(beta), state, frozen, batch, seed)
        state, metrics = update(optimizer, schedule, state, found, gradient)
        return state, metrics | {"num_tokens": (batch.attention_mask != 0).sum()}

    return jax.jit(step, donate_argnums=0, compiler_options=platform.compiler_options())


def add_up(
    sums: Callable,
    zero: train_loss.Sums,
    state: State,
    frozen: model_state.Frozen,
    batch: train_loss.Batch,
    seed: int,
) -> tuple[train_loss.Sums, Any]:
    """(Sums, gradient of their loss) over all micro-batches and all devices.

    sums: (lora, frozen, key, micro-batch, numbers of its sequences) → (Σ loss, Sums).
    """
    key = jax.random.fold_in(jax.random.key(seed), state.step)
    shape = batch.input_ids.shape[:2]
    numbers = jnp.arange(math.prod(shape)).reshape(shape)

    def accumulated(trained, frozen, key, batch, numbers):
        of = jax.grad(sums, has_aux=True)

        def accumulate(total, xs):
            return jax.tree.map(jnp.add, total, of(trained, frozen, key, *xs)), None

        start = jax.tree.map(jnp.zeros_like, trained), zero
        return jax.lax.scan(accumulate, start, (batch, numbers))[0]

    summed = sharding.sum_over_data(accumulated, num_whole=3)
    gradient, found = summed(state.lora, frozen, key, batch, numbers)
    return found, gradient


def update(
    optimizer: optax.GradientTransformation,
    schedule: optax.Schedule,
    state: State,
    sums: train_loss.Sums,
    gradient: Any,
) -> tuple[State, dict[str, jax.Array]]:
    """(the state after a step with the mean of `gradient`, the step's metrics)."""
    mean = jax.tree.map(lambda g: g / sums.count, gradient)
    grad_norm = optax.tree.norm(mean)
    updates, opt_state = optimizer.update(mean, state.opt_state, state.lora)
    trained = optax.apply_updates(state.lora, updates)
    finite = jnp.isfinite(sums.loss) & jnp.isfinite(grad_norm)
    trained, opt_state = jax.tree.map(
        lambda new, old: jnp.where(finite, new, old),
        (trained, opt_state),
        (state.lora, state.opt_state),
    )
    metrics = {
        "loss": sums.loss / sums.count,
        "grad_norm": grad_norm,
        "lr": schedule(state.step),
        **{name: total / sums.count for name, total in sums.metrics.items()},
    }
    return sharding.keep_placed(State(trained, opt_state, state.step + 1)), metrics


def make_eval_loss(graphdef: nnx.GraphDef, beta: float | None = None) -> Callable:
    """The jitted (lora, frozen, micro-batch) → (sums {"eval_loss": …}, count), without dropout.

    beta: see make_step; the names of dpo.METRICS get the prefix "eval_" too.
    """
    of_model = train_loss.of_model(graphdef, beta)

    @functools.partial(jax.jit, compiler_options=platform.compiler_options())
    def eval_loss(trained, frozen, micro_batch):
        model = nnx.merge(graphdef, trained, frozen.dropout_keys, frozen.base)
        model.eval()
        found = of_model(model, frozen, micro_batch, "none")
        sums = {"loss": found.loss, **found.metrics}
        return {f"eval_{name}": total for name, total in sums.items()}, found.count

    return eval_loss


def steps(
    step: Callable,
    state: State,
    frozen: model_state.Frozen,
    batch_at: Callable[[int], train_loss.Batch],
    num_steps: int,
) -> Iterator[tuple[State, dict[str, float]]]:
    """Yields (state, metrics) after each step, from the step count of `state` to num_steps.

    `state` is valid until the next iteration. Threads make the next batches while the device
    computes. metrics["waited"] is the seconds that the step waited for its batch.
    """
    done = int(state.step)
    numbers = iter(range(done, num_steps))
    with futures.ThreadPoolExecutor(_LOADERS, thread_name_prefix="loader") as loaders:
        load = functools.partial(loaders.submit, batch_at)
        coming = collections.deque(map(load, itertools.islice(numbers, _AHEAD)))
        try:
            while coming:
                begun = time.monotonic()
                batch = coming.popleft().result()
                waited = time.monotonic() - begun
                coming.extend(map(load, itertools.islice(numbers, 1)))
                state, metrics = step(state, frozen, batch)
                done += 1
                values = {name: value.item() for name, value in metrics.items()}
                yield state, {"step": done, **values, "waited": waited}
        finally:
            loaders.shutdown(cancel_futures=True)
