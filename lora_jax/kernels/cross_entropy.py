"""Cross-entropy of a frozen vocabulary projection that never holds all its logits."""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from lora_jax.kernels import matmul, partition

_CHUNK = 512  # tokens, about, whose logits a device holds at a time


@jax.custom_vjp
def cross_entropy(
    hidden: Float[Array, "B T D"], head: Float[Array, "D V"], targets: Int[Array, "B T"]
) -> Float[Array, "B T"]:
    """−log softmax(hidden · head)[target], 0 where the target is negative, float32.

    Differentiable in hidden alone, whose gradient the forward pass computes chunk by chunk, so
    that the logits are neither kept nor computed again. It is rounded to hidden's dtype.

    Raises: ValueError when asked for the gradient of `head`.
    """
    return _scan(hidden, head, targets, with_gradient=False)[0]


def of_logits(logits: Float[Array, "*B V"], targets: Int[Array, "*B"]) -> Float[Array, "*B"]:
    """−log softmax(logits)[target], 0 where the target is negative, differentiable."""
    return _each(logits, targets)[0][..., 0]


def _each(logits, targets):
    """(−log p of each target, 0 where it is negative; log Σ exp; which logit is the target's)."""
    normaliser = jax.nn.logsumexp(logits, axis=-1, keepdims=True)
    # Not a gather: of a vocabulary that is dealt out XLA's partitioner makes a sum anyway, and
    # within a shard_map over some axes it cannot (jaxlib 0.10.2 aborts).
    vocabulary = lax.broadcasted_iota(jnp.int32, logits.shape, logits.ndim - 1)
    at_target = vocabulary == targets[..., None]
    chosen = jnp.where(at_target, logits, 0).sum(axis=-1, keepdims=True)
    each = jnp.where((targets >= 0)[..., None], normaliser - chosen, 0)
    return each, normaliser, at_target


def chunk_size(num_rows: int, length: int) -> int:
    """Tokens a row whose logits a device with so many rows of this length holds at a time."""
    return min(length, max(1, _CHUNK // num_rows))


def _scan(hidden, head, targets, with_gradient):
    """(losses, gradient of their sum or None), in chunks of the sequence: rows may lie anywhere."""
    rows, length, _ = hidden.shape
    devices = partition.num_devices()
    size = chunk_size(rows if rows % devices else rows // devices, length)
    padding = -length % size
    hidden = jnp.pad(hidden, ((0, 0), (0, padding), (0, 0)))
    targets = jnp.pad(targets, ((0, 0), (0, padding)), constant_values=-1)

    def chunks(a):
        return a.reshape(rows, -1, size, *a.shape[2:]).swapaxes(0, 1)

    def whole(a):
        return a.swapaxes(0, 1).reshape(rows, -1, *a.shape[3:])[:, :length]

    def take(_, chunk):
        x, target = chunk
        logits = matmul.contract(x, head, -1, 0)
        each, normaliser, at_target = _each(logits, target)
        if not with_gradient:
            return None, (each[..., 0], None)
        d_logits = jnp.exp(logits - normaliser) - at_target
        d_logits = jnp.where((target >= 0)[..., None], d_logits, 0).astype(x.dtype)
        # head on the left: on the right XLA's CPU backend would turn it over first, all of it.
        d_logits = lax.optimization_barrier(d_logits.reshape(-1, logits.shape[-1]))
        d_x = matmul.contract(head, d_logits, 1, 1).T.reshape(x.shape)
        return None, (each[..., 0], d_x.astype(x.dtype))

    _, found = lax.scan(take, None, (chunks(hidden), chunks(targets)))
    return jax.tree.map(whole, found)


def _forward(hidden, head, targets):
    if head.perturbed:
        raise ValueError("expected a frozen vocabulary projection, found one that is trained")
    return _scan(hidden.value, head.value, targets.value, with_gradient=True)


def _backward(gradient, d_each):
    wide = gradient.astype(jnp.float32) * d_each[..., None]
    return wide.astype(gradient.dtype), None, None


cross_entropy.defvjp(_forward, _backward, symbolic_zeros=True)
