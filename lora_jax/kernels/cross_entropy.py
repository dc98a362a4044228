"""Cross-entropy of a frozen vocabulary projection, for the trained tokens only, in chunks."""

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from lora_jax.kernels import capping, forward_mode, matmul, partitioning

_CHUNK = 512  # tokens whose logits a device holds at the same time


def cross_entropy(
    hidden: Float[Array, "B T D"],
    head: Float[Array, "_ _"],
    targets: Int[Array, "B T"],
    partition: partitioning.Partition = partitioning.WHOLE,
    transposed: bool = False,
    soft_cap: float | None = None,
) -> Float[Array, "B T"]:
    """−log softmax(hidden · head)[target], 0 where the target is negative, float32.

    The logits of tokens with a target are computed in chunks, those of other tokens never.
    Differentiable in hidden only. The forward pass already computes this gradient, rounded to
    hidden's dtype, so that logits are neither saved nor recomputed. partition: how the ambient mesh
    (jax.set_mesh) splits the sequences (`rows`) and the vocabulary (`n`). head: [D, V], or [V, D]
    if it is `transposed`, as an embedding is: outside of the chunks' loop, XLA would write its
    transpose to memory. soft_cap: the logits become soft_cap · tanh(logits / soft_cap) first.

    Raises: ValueError if asked for the gradient of `head`.
    """
    how = {"partition": partition, "transposed": transposed, "soft_cap": soft_cap}
    own, plain = (functools.partial(form, **how) for form in (_cross_entropy, _plain))
    return forward_mode.call(own, plain, hidden, head, targets)


def of_logits(logits: Float[Array, "*B V"], targets: Int[Array, "*B"]) -> Float[Array, "*B"]:
    """−log softmax(logits)[target], 0 where the target is negative, differentiable."""
    return _each(logits, targets)[0][..., 0]


def _each(logits, targets, axis=None):
    """(−log p of each target, 0 where it is negative; log Σ exp; which logit is the target's).

    axis: the mesh axis that splits the vocabulary.
    """
    vocabulary = lax.broadcasted_iota(jnp.int32, logits.shape, logits.ndim - 1)
    if axis is None:
        normalizer = jax.nn.logsumexp(logits, axis=-1, keepdims=True)
    else:
        vocabulary += lax.axis_index(axis) * logits.shape[-1]
        top = lax.pmax(lax.stop_gradient(logits.max(axis=-1, keepdims=True)), axis)
        total = jnp.exp(logits - top).sum(axis=-1, keepdims=True)
        normalizer = top + jnp.log(lax.psum(total, axis))
    # Not a gather: for a sharded vocabulary, XLA's partitioner turns that into a sum anyway, and
    # within a shard_map over some axes it cannot (jaxlib 0.10.2 aborts).
    at_target = vocabulary == targets[..., None]
    chosen = jnp.where(at_target, logits, 0).sum(axis=-1, keepdims=True)
    if axis is not None:
        chosen = lax.psum(chosen, axis)
    each = jnp.where((targets >= 0)[..., None], normalizer - chosen, 0)
    return each, normalizer, at_target


def chunk_size(num_tokens: int) -> int:
    """The number of tokens in a chunk, for num_tokens on a device."""
    return min(_CHUNK, num_tokens)


def _by_device(hidden, head, targets, partition, transposed, soft_cap, with_gradient):
    """(losses, gradient of their sum or None), with each device computing its part."""
    how = {"transposed": transposed, "soft_cap": soft_cap, "with_gradient": with_gradient}
    compute = functools.partial(_compute, **how)
    if not partition.splits():
        return compute(hidden, head, targets)
    sequences = PartitionSpec(partition.computed(len(hidden)).rows)
    vocabulary = partition.stored()[1]
    each = functools.partial(compute, axis=vocabulary)
    axes = (vocabulary, None) if transposed else (None, vocabulary)
    specs = sequences, PartitionSpec(*axes), sequences
    return partitioning.shard_map(each, specs, sequences)(hidden, head, targets)


def _compute(hidden, head, targets, *, transposed, soft_cap, with_gradient, axis=None):
    """On one device. axis: the mesh axis that splits the vocabulary."""
    shape = targets.shape
    hidden, targets = hidden.reshape(-1, hidden.shape[-1]), targets.reshape(-1)
    trained = targets >= 0
    size = chunk_size(len(targets))
    most = math.ceil(len(targets) / size)
    # Trained tokens come first. The padding repeats a token, and its results are not used.
    order = jnp.pad(jnp.argsort(~trained, stable=True), (0, most * size - len(targets)))

    def take(chunk, found):
        tokens = lax.dynamic_slice_in_dim(order, chunk * size, size)
        x, target = hidden[tokens], targets[tokens]
        logits = capping.capped(matmul.contract(x, head, -1, int(transposed)), soft_cap)
        each, normalizer, at_target = _each(logits, target, axis)
        new = (each[..., 0],)
        if with_gradient:
            d_logits = capping.through(jnp.exp(logits - normalizer) - at_target, logits, soft_cap)
            d_logits = jnp.where((target >= 0)[..., None], d_logits, 0).astype(x.dtype)
            d_logits = lax.optimization_barrier(d_logits)
            # Of a head [D, V] on the right, XLA's CPU backend would transpose all first.
            d_x = (matmul.contract(d_logits, head, 1, 0) if transposed
                   else matmul.contract(head, d_logits, 1, 1).T)  # fmt: skip
            new = (*new, (d_x if axis is None else lax.psum(d_x, axis)).astype(x.dtype))
        start = chunk * size
        return [lax.dynamic_update_slice_in_dim(a, b, start, 0)
                for a, b in zip(found, new, strict=True)]  # fmt: skip

    found = [jnp.zeros(most * size, jnp.float32)]
    if with_gradient:
        found.append(jnp.zeros((most * size, hidden.shape[1]), hidden.dtype))
    if most == 1:
        found = take(0, found)
    else:
        found = lax.fori_loop(0, -(-trained.sum() // size), take, found)
    index = jnp.cumsum(trained) - 1  # of each trained token among all trained ones
    losses = jnp.where(trained, found[0][index], 0).reshape(shape)
    if not with_gradient:
        return losses, None
    gradient = jnp.where(trained[:, None], found[1][index], 0)
    return losses, gradient.reshape(*shape, -1)


def _plain(hidden, head, targets, partition, transposed, soft_cap):
    how = partition, transposed, soft_cap
    return _by_device(hidden, head, targets, *how, with_gradient=False)[0]


_cross_entropy = jax.custom_vjp(_plain, nondiff_argnums=(3, 4, 5))


def _forward(hidden, head, targets, partition, transposed, soft_cap):
    if head.perturbed:
        raise ValueError("expected a frozen vocabulary projection, found one that is trained")
    values = hidden.value, head.value, targets.value
    return _by_device(*values, partition, transposed, soft_cap, with_gradient=True)


def _backward(partition, transposed, soft_cap, gradient, d_each):
    wide = gradient.astype(jnp.float32) * d_each[..., None]
    return wide.astype(gradient.dtype), None, None


_cross_entropy.defvjp(_forward, _backward, symbolic_zeros=True)
