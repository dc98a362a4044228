"""Dense attention to a KV cache, for decoding: operands in their dtype, sums in float32."""

import math

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float

from lora_jax.kernels import capping, platform

_HIDDEN = -1e30  # logit of a key that a query does not see


def attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B K S H"],
    v: Float[Array, "B K S H"],
    visible: Bool[Array, "#B T S"],
    soft_cap: float | None = None,
) -> Float[Array, "B T N H"]:
    """softmax(q kᵀ / √H, over the visible keys) v; head n of q belongs to head n // (N/K) of k.

    A query that sees no key gets the mean of all values. soft_cap: the logits before the softmax
    become soft_cap · tanh(logits / soft_cap).
    Source: Vaswani et al. 2017, https://arxiv.org/abs/1706.03762, eq. 1; Ainslie et al. 2023,
    https://arxiv.org/abs/2305.13245 (grouped heads).
    """
    sequences, num_queries, heads, width = q.shape
    groups = k.shape[1]
    # [B, K, (N/K)·T, H]: one product for a group of heads. q is scaled because it is the smallest.
    q = (q * jnp.asarray(1 / math.sqrt(width), q.dtype)).reshape(
        sequences, num_queries, groups, -1, width
    )
    q = q.transpose(0, 2, 3, 1, 4).reshape(sequences, groups, -1, width)
    q, k, v = _rounded((q, k, v))
    logits = capping.capped(_product(q, k, 3), soft_cap)
    by_query = (*logits.shape[:2], -1, *visible.shape[1:])
    logits = jnp.where(visible[:, None, None], logits.reshape(by_query), _HIDDEN)
    probabilities = jax.nn.softmax(logits, axis=-1).astype(q.dtype)
    probabilities = _rounded(probabilities.reshape(*q.shape[:3], -1))
    out = _product(probabilities, v, 2).astype(v.dtype)
    out = out.reshape(sequences, groups, -1, num_queries, width).transpose(0, 3, 1, 2, 4)
    return out.reshape(sequences, num_queries, heads, width)


def _rounded(arrays):
    """The same. XLA's CPU backend drops the rounding to bfloat16 otherwise, and multiplies in
    float32, at half the speed. Elsewhere it would write a copy of the keys and values."""
    if platform.platform_here() in ("gpu", "tpu"):
        return arrays
    return lax.optimization_barrier(arrays)


def _product(a: jax.Array, b: jax.Array, axis: int) -> jax.Array:
    """For each sequence and group, the sum over a's last axis and b's `axis`, in float32."""

    def product(a, b):
        dims = (((3,), (axis,)), ((0, 1), (0, 1)))
        return lax.dot_general(a, b, dims, preferred_element_type=jnp.float32)

    def twice(a, b):
        return product(jnp.concatenate([a, a], axis=2), b)[:, :, :1]

    if a.shape[2] == 1 and a.dtype != jnp.float32:  # as in kernels/matmul.py
        return lax.platform_dependent(a, b, cpu=twice, default=product)
    return product(a, b)
