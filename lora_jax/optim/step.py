"""The training step, and the loop that yields after each one."""

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
from jaxtyping import Array, Float, Int

from lora_jax import lora
from lora_jax.data import encoding
from lora_jax.kernels import cross_entropy, platform
from lora_jax.lora.nnx import model_state
from lora_jax.optim import dpo
from lora_jax.parallel import mesh as sharding

HEAD_CHUNK = 128  # tokens of each line whose logits are held at a time where the head is trained
_LOADERS, _AHEAD = 2, 3  # threads that make batches, and how many batches are made ahead


class Batch(NamedTuple):
    """One optimizer step's rows, in micro-batches: A micro-batches of B lines of T tokens.

    labels are input_ids where a token is trained, else −100; attention_mask is 0 on padding, and
    numbers the rows of a line from 1.
    """

    input_ids: Int[Array, "A B T"]
    labels: Int[Array, "A B T"]
    attention_mask: Int[Array, "A B T"]


class State(NamedTuple):
    """What training changes: A and B, the optimizer's moments, and the number of steps done."""

    lora: Any
    opt_state: Any
    step: Int[Array, ""]


def start(trained: Any, optimizer: optax.GradientTransformation) -> State:
    """The state before step 1. Called eagerly: under jit the moments would lose A's sharding."""
    return State(trained, optimizer.init(trained), jnp.zeros((), jnp.int32))


def losses(model: nnx.Module, batch: Batch, *, remat: str = "none") -> Float[Array, "B T"]:
    """−log p(next token) after each token of one micro-batch whose next one is trained, else 0."""
    targets = jnp.pad(batch.labels[:, 1:], ((0, 0), (0, 1)), constant_values=encoding.IGNORED)
    hidden = model.hidden_states(batch.input_ids, batch.attention_mask, remat=remat)
    head = model.frozen_head()
    if head is None:
        return _of_trained_head(model, hidden, targets)
    return cross_entropy.cross_entropy(hidden, head, targets, sharding.partition(("lm_head",)))


def _of_trained_head(model, hidden, targets):
    """Chunk by chunk of the lines, whose logits the backward pass computes again."""
    lines, length, width = hidden.shape
    size = min(HEAD_CHUNK, length)
    padding = -length % size
    hidden = jnp.pad(hidden, ((0, 0), (0, padding), (0, 0))).reshape(lines, -1, size, width)
    targets = jnp.pad(targets, ((0, 0), (0, padding)), constant_values=encoding.IGNORED)
    targets = targets.reshape(lines, -1, size)
    graphdef, keys, rest = nnx.split(model, lora.DropoutKey, ...)

    @jax.checkpoint
    def of_chunk(number, hidden, targets):
        own = lora.reseed_by(keys, number)  # a chunk's dropout mask is its own
        logits = nnx.merge(graphdef, own, rest).logits(hidden)
        return cross_entropy.of_logits(logits, targets)

    chunks = jnp.arange(hidden.shape[1]), hidden.swapaxes(0, 1), targets.swapaxes(0, 1)
    _, found = jax.lax.scan(lambda _, chunk: (None, of_chunk(*chunk)), None, chunks)
    return found.swapaxes(0, 1).reshape(lines, -1)[:, :length]


def loss(
    model: nnx.Module, batch: Batch, *, remat: str = "none"
) -> tuple[Float[Array, ""], Int[Array, ""]]:
    """(Σ −log p(next token), count) over the trained tokens of one micro-batch [B, T].

    A sum and a count, so that a mean is taken once, over all tokens of all micro-batches.
    """
    found = objective(None)(losses(model, batch, remat=remat), None, batch)
    return found.loss, found.count


class Sums(NamedTuple):
    """Over a batch: Σ loss, the count of what it is a mean of, and sums to tell."""

    loss: Float[Array, "*S"]
    count: Int[Array, "*S"]
    told: dict[str, Float[Array, "*S"]]


def objective(beta: float | None) -> Callable[[jax.Array, jax.Array | None, Batch], Sums]:
    """(losses of a micro-batch, those of the reference, the micro-batch) → Sums.

    beta: of DPO, of which each line is a pair; None for the tokens' loss, without a reference.
    """

    def tokens(now, before, batch):
        return Sums(now.sum(), (batch.labels[:, 1:] != encoding.IGNORED).sum(), {})

    def pairs(now, before, batch):
        return Sums(*dpo.loss(now, before, batch.attention_mask, beta))

    return tokens if beta is None else pairs


def _sums(graphdef: nnx.GraphDef, beta: float | None) -> Callable[..., Sums]:
    """(model, frozen, micro-batch, remat) → Sums."""

    def sums(model, frozen, batch, remat):
        before = None
        if beta is not None:
            reference = nnx.merge(graphdef, frozen.reference, frozen.dropout_keys, frozen.base)
            reference.eval()
            # In the same form as below, so that both are rounded alike: the first loss is log 2.
            before = jax.lax.stop_gradient(losses(reference, batch, remat=remat))
        return objective(beta)(losses(model, batch, remat=remat), before, batch)

    return sums


def make_step(
    graphdef: nnx.GraphDef,
    optimizer: optax.GradientTransformation,
    schedule: optax.Schedule,
    *,
    seed: int,
    remat: str,
    beta: float | None = None,
) -> Callable[[State, model_state.Frozen, Batch], tuple[State, dict[str, jax.Array]]]:
    """The jitted step (state, frozen, batch) → (state, metrics); it takes over state's memory.

    The gradient is that of the mean over all trained tokens of the batch; with beta, that of the
    mean of `dpo.loss` over all pairs, for which `frozen` has the reference. On a mesh it is summed
    over the axis "data" once, after all micro-batches. When it is not finite the state stays as it
    was, but for the step count. Metrics: loss, grad_norm, lr, num_tokens, and what dpo.loss tells.
    """
    of_model = _sums(graphdef, beta)

    def sums(trained, frozen, key, micro_batch, rows):
        keys = lora.reseed(frozen.dropout_keys, key, rows)
        model = nnx.merge(graphdef, trained, keys, frozen.base)
        model.train()
        found = of_model(model, frozen, micro_batch, remat)
        return found.loss, found

    def step(state: State, frozen: model_state.Frozen, batch: Batch):
        found, gradient = add_up(sums, zero_sums(beta), state, frozen, batch, seed)
        state, metrics = update(optimizer, schedule, state, found, gradient)
        return state, metrics | {"num_tokens": (batch.attention_mask != 0).sum()}

    return jax.jit(step, donate_argnums=0, compiler_options=platform.compiler_options())


def zero_sums(beta: float | None, shape: tuple[int, ...] = ()) -> Sums:
    """Sums over nothing."""
    told = () if beta is None else dpo.TOLD
    zero = jnp.zeros(shape)
    return Sums(zero, jnp.zeros(shape, jnp.int32), dict.fromkeys(told, zero))


def add_up(
    sums: Callable, zero: Sums, state: State, frozen: model_state.Frozen, batch: Batch, seed: int
) -> tuple[Sums, Any]:
    """(Sums, gradient of their loss) over all micro-batches and all devices.

    sums: (lora, frozen, key, micro-batch, numbers of its rows) → (Σ loss, Sums).
    """
    key = jax.random.fold_in(jax.random.key(seed), state.step)
    shape = batch.input_ids.shape[:2]
    rows = jnp.arange(math.prod(shape)).reshape(shape)

    def accumulated(trained, frozen, key, batch, rows):
        of = jax.grad(sums, has_aux=True)

        def accumulate(total, xs):
            return jax.tree.map(jnp.add, total, of(trained, frozen, key, *xs)), None

        start = jax.tree.map(jnp.zeros_like, trained), zero
        return jax.lax.scan(accumulate, start, (batch, rows))[0]

    summed = sharding.sum_over_data(accumulated, num_whole=3)
    gradient, found = summed(state.lora, frozen, key, batch, rows)
    return found, gradient


def update(
    optimizer: optax.GradientTransformation,
    schedule: optax.Schedule,
    state: State,
    sums: Sums,
    gradient: Any,
) -> tuple[State, dict[str, jax.Array]]:
    """(the state after a step with the mean of `gradient`, its metrics)."""
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
        **{name: total / sums.count for name, total in sums.told.items()},
    }
    return State(trained, opt_state, state.step + 1), metrics


def make_eval_loss(graphdef: nnx.GraphDef, beta: float | None = None) -> Callable:
    """The jitted (lora, frozen, micro-batch) → (sums {"eval_loss": …}, count), without dropout.

    beta: see make_step; what dpo.loss tells has "eval_" before its names.
    """
    of_model = _sums(graphdef, beta)

    @functools.partial(jax.jit, compiler_options=platform.compiler_options())
    def eval_loss(trained, frozen, micro_batch):
        model = nnx.merge(graphdef, trained, frozen.dropout_keys, frozen.base)
        model.eval()
        found = of_model(model, frozen, micro_batch, "none")
        told = {"loss": found.loss, **found.told}
        return {f"eval_{name}": total for name, total in told.items()}, found.count

    return eval_loss


def steps(
    step: Callable,
    state: State,
    frozen: model_state.Frozen,
    batch_at: Callable[[int], Batch],
    num_steps: int,
) -> Iterator[tuple[State, dict[str, float]]]:
    """Yields (state, metrics) after each step until num_steps are done, from where `state` stands.

    `state` is valid until the next iteration. Threads make the next batches while the device
    computes; metrics' `waited` is the seconds for which it had none.
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
