"""Causal attention block by block: the logits of one block of queries and one of keys at a time."""

import functools
import math

import jax
import jax.numpy as jnp
from jax import ad_checkpoint, lax
from jaxtyping import Array, Float, Int

from lora_jax.kernels import capping, forward_mode, matmul, platform

_HIDDEN = -1e30  # logit of a key that a query does not see


def attend(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    examples: Int[Array, "B T"] | None = None,
    window: int | None = None,
    soft_cap: float | None = None,
) -> Float[Array, "B T N H"]:
    """softmax(q kᵀ / √H, over the visible keys) v, as self_attention defines it.

    A query that sees no key gets zero. For a block of queries, blocks of keys that hold none of its
    examples or lie beyond the window are skipped. The derivative recomputes the logits from q, k
    and log Σ exp.
    Source: Dao 2023, https://arxiv.org/abs/2307.08691, algorithms 1 and 2.
    """
    num, length, heads, width = q.shape
    groups = k.shape[2]
    size = block_size(length)
    padding = -length % size

    def blocks(a):
        """[T/size, B, size, …]"""
        a = jnp.pad(a, ((0, 0), (0, padding), *[(0, 0)] * (a.ndim - 2)))
        return a.reshape(num, -1, size, *a.shape[2:]).swapaxes(0, 1)

    # q is scaled because it is the smallest.
    q = (q * jnp.asarray(1 / math.sqrt(width), q.dtype)).reshape(num, length, groups, -1, width)
    # One product for a group of heads: [T/size, B, K, (N/K)·size, H].
    q = blocks(q).transpose(0, 1, 3, 4, 2, 5)
    q = q.reshape(-1, num, groups, heads // groups * size, width)
    k, v = (blocks(a).swapaxes(2, 3) for a in (k, v))
    examples = blocks(jnp.ones((num, length), jnp.int32) if examples is None else examples)
    # Without these barriers, here and below, XLA's CPU backend drops the rounding to bfloat16 and
    # multiplies in float32, at half the speed.
    q, k, v = lax.optimization_barrier((q, k, v))
    how = {"window": window or length, "soft_cap": soft_cap}
    blocked, plain = (functools.partial(f, **how) for f in (_attend, _plain))
    out = forward_mode.call(blocked, plain, q, k, v, examples)
    out = out.reshape(-1, num, groups, heads // groups, size, width).transpose(1, 0, 4, 2, 3, 5)
    return out.reshape(num, -1, heads, width)[:, :length]


def block_size(length: int) -> int:
    """The number of queries in a block, and of keys."""
    return min(128 if platform.on_cpu() else 512, length)


def _first(examples, window):
    """[blocks]: the first block of keys that a block of queries may see, or the block after it."""
    numbered = jnp.where(examples == 0, jnp.iinfo(examples.dtype).max, examples)
    lowest, highest = numbered.min(axis=2), examples.max(axis=2)
    meet = (lowest[:, None] <= highest[None]) & (lowest[None] <= highest[:, None])
    meet = meet.any(axis=2)
    blocks, size = examples.shape[0], examples.shape[2]
    index = jnp.arange(blocks)
    # The distance from the last key of a block to the first query of another.
    meet &= (index[:, None] - index[None]) * size - (size - 1) < window
    return jnp.where(meet, index[None], index[:, None] + 1).min(axis=1)


def _over_keys(first, index, blocks, take, carry):
    """take(j, carry) for the blocks of keys j that block `index` of the queries may see."""
    if blocks == 1:  # without a loop, XLA fuses more
        return take(0, carry)
    return lax.fori_loop(first[index], index + 1, take, carry)


def _plain(q, k, v, examples, window, soft_cap):
    return _forward(q, k, v, examples, window, soft_cap)[0]


_attend = jax.custom_vjp(_plain, nondiff_argnums=(4, 5))


def _forward(q, k, v, examples, window, soft_cap):
    first = _first(examples, window)

    def block(_, index):
        own = _at(q, index)

        def take(j, carry):
            top, total, out = carry
            logits = _logits(own, k, examples, window, soft_cap, index, j)
            new = jnp.maximum(top, logits.max(axis=-1, keepdims=True))
            p, keep = jnp.exp(logits - new), jnp.exp(top - new)
            total = total * keep + p.sum(axis=-1, keepdims=True)
            p = lax.optimization_barrier(p.astype(v.dtype))
            return new, total, out * keep + _product(p, _at(v, j), 2)

        none = jnp.zeros((*own.shape[:3], 1), jnp.float32)
        # The initial maximum is above hidden logits, so that their exponential is 0.
        carry = none + _HIDDEN / 2, none, jnp.zeros(own.shape, jnp.float32)
        top, total, out = _over_keys(first, index, len(q), take, carry)
        total = jnp.where(total == 0, 1, total)
        return None, ((out / total).astype(v.dtype), top + jnp.log(total))

    _, found = lax.scan(block, None, jnp.arange(len(q)))
    out, normalizer = (ad_checkpoint.checkpoint_name(a, matmul.PRODUCT) for a in found)
    return out, (q, k, v, examples, out, normalizer)


def _backward(window, soft_cap, saved, d_out):
    # The barrier keeps XLA from saving the forward pass's float32 copies of these instead.
    (q, k, v, examples, out, normalizer), d_out = lax.optimization_barrier((saved, d_out))
    first = _first(examples, window)
    # Σ over keys of p · dp, computed from the side with fewer terms.
    mean = jnp.sum(d_out.astype(jnp.float32) * out.astype(jnp.float32), axis=-1, keepdims=True)

    def block(carry, index):
        own, d_own, own_normalizer, own_mean = (_at(a, index) for a in (q, d_out, normalizer, mean))
        # XLA's CPU backend is slow if it sums over the rows of the left operand.
        own_t, d_own_t = lax.optimization_barrier((own.swapaxes(2, 3), d_own.swapaxes(2, 3)))

        def take(j, carry):
            d_q, d_k, d_v = carry
            logits = _logits(own, k, examples, window, soft_cap, index, j)
            p = jnp.exp(logits - own_normalizer)
            d_logits = p * (_product(d_own, _at(v, j), 3) - own_mean)
            if soft_cap is not None:  # hidden logits, where p is 0, lie far below −cap
                logits = jnp.maximum(logits, -soft_cap)
                d_logits = capping.through(d_logits, logits, soft_cap)
            p, d_logits = lax.optimization_barrier((p.astype(v.dtype), d_logits.astype(q.dtype)))
            d_q += _product(d_logits, _at(k, j), 2)
            d_k = _add(d_k, _product(own_t, d_logits, 2), j)
            return d_q, d_k, _add(d_v, _product(d_own_t, p, 2), j)

        d_q = jnp.zeros(own.shape, jnp.float32)
        d_q, *carry = _over_keys(first, index, len(q), take, (d_q, *carry))
        return tuple(carry), d_q.astype(q.dtype)

    d_kv = (jnp.zeros(a.swapaxes(3, 4).shape, jnp.float32) for a in (k, v))  # transposed too
    (d_k, d_v), d_q = lax.scan(block, tuple(d_kv), jnp.arange(len(q)))
    d_k, d_v = d_k.swapaxes(3, 4).astype(k.dtype), d_v.swapaxes(3, 4).astype(v.dtype)
    return d_q, d_k, d_v, None


_attend.defvjp(_forward, _backward)


def _logits(own, k, examples, window, soft_cap, index, j):
    """The logits of one block of queries and one of keys, float32 [B, K, (N/K)·size, size]."""
    size = examples.shape[2]
    queries, keys = _at(examples, index), _at(examples, j)
    slots = jnp.arange(size)
    distance = (index - j) * size + slots[:, None] - slots[None]
    visible = (queries[:, :, None] == keys[:, None]) & (keys != 0)[:, None]
    visible &= ((distance >= 0) & (distance < window))[None]
    logits = capping.capped(_product(own, _at(k, j), 3), soft_cap)
    by_query = logits.reshape(*logits.shape[:2], -1, size, size)
    return jnp.where(visible[:, None, None], by_query, _HIDDEN).reshape(logits.shape)


def _product(a: jax.Array, b: jax.Array, axis: int) -> jax.Array:
    """For each sequence and group, the sum over a's last axis and b's `axis`, in float32."""
    dims = (((3,), (axis,)), ((0, 1), (0, 1)))
    return lax.dot_general(a, b, dims, preferred_element_type=jnp.float32)


def _at(a: jax.Array, index) -> jax.Array:
    return lax.dynamic_index_in_dim(a, index, keepdims=False)


def _add(a: jax.Array, part: jax.Array, index) -> jax.Array:
    return lax.dynamic_update_index_in_dim(a, _at(a, index) + part, index, 0)
