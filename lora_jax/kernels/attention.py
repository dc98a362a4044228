"""Attention of grouped heads, dense: operands in their dtype, sums and softmax in float32."""

import math

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float

_HIDDEN = -1e30  # logit of a key that a query must not see
_LEAST = 128  # queries taken together, at least, where later keys are left out
_MOST_PARTS = 8


def attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    visible: Bool[Array, "#B T S"],
    *,
    causal: bool,
) -> Float[Array, "B T N H"]:
    """softmax(q kᵀ / √H, over the visible keys) v; head n of q belongs to head n // (N/K) of k.

    causal: `visible` hides the keys after each query; so queries are taken in parts, each with the
    keys up to its end. A query that sees no key gets the mean of those.
    Source: Vaswani et al. 2017, https://arxiv.org/abs/1706.03762, eq. 1; Ainslie et al. 2023,
    https://arxiv.org/abs/2305.13245 (grouped heads).
    """
    outs = []
    for start, end in parts(q.shape[1], causal=causal):
        keys = slice(0, end if causal else None)
        outs.append(_grouped(q[:, start:end], k[:, keys], v[:, keys], visible[:, start:end, keys]))
    return outs[0] if len(outs) == 1 else jnp.concatenate(outs, axis=1)


def parts(num_queries: int, *, causal: bool) -> list[tuple[int, int]]:
    """(start, end) of the queries that are taken together."""
    part = max(_LEAST, -(-num_queries // _MOST_PARTS)) if causal else num_queries
    return [(start, min(start + part, num_queries)) for start in range(0, num_queries, part)]


def _grouped(q, k, v, visible):
    rows, num_queries, heads, width = q.shape
    groups = k.shape[2]
    # [B, K, (N/K)·T, H]: one product for a group of heads. Scaled here, where there is least of it.
    q = (q * jnp.asarray(1 / math.sqrt(width), q.dtype)).reshape(
        rows, num_queries, groups, -1, width
    )
    q = q.transpose(0, 2, 3, 1, 4).reshape(rows, groups, -1, width)
    k, v = k.transpose(0, 2, 1, 3), v.transpose(0, 2, 1, 3)
    # Without these barriers, here and below, XLA's CPU backend drops the rounding to bfloat16 and
    # takes the products in float32, at half the speed.
    out = _attention(*lax.optimization_barrier((q, k, v)), visible)
    out = out.reshape(rows, groups, -1, num_queries, width).transpose(0, 3, 1, 2, 4)
    return out.reshape(rows, num_queries, heads, width)


# The derivative rule is spelt out because JAX's own takes its products in mixed precision, as for
# kernels/matmul.py.
@jax.custom_vjp
def _attention(q, k, v, visible):
    return _product(_probabilities(q, k, visible), v, 2).astype(v.dtype)


def _probabilities(q, k, visible):
    logits = _product(q, k, 3)
    by_query = (*logits.shape[:2], -1, *visible.shape[1:])
    logits = jnp.where(visible[:, None, None], logits.reshape(by_query), _HIDDEN)
    probabilities = jax.nn.softmax(logits, axis=-1).astype(q.dtype)
    return lax.optimization_barrier(probabilities.reshape(*q.shape[:3], -1))


def _forward(q, k, v, visible):
    probabilities = _probabilities(q, k, visible)
    out = _product(probabilities, v, 2).astype(v.dtype)
    return out, (q, k, v, visible, probabilities, out)


def _backward(saved, d_out):
    # Behind a barrier XLA cannot keep the forward pass's float32 copies of these instead.
    (q, k, v, visible, probabilities, out), d_out = lax.optimization_barrier((saved, d_out))
    # Σ over keys of p · dp, from the side on which there is less to sum.
    mean = jnp.sum(d_out.astype(jnp.float32) * out.astype(jnp.float32), axis=-1, keepdims=True)
    mean = lax.optimization_barrier(mean)
    d_logits = probabilities.astype(jnp.float32) * (_product(d_out, v, 3) - mean)
    # Where a query sees nothing, its probabilities depend on nothing.
    by_query = d_logits.reshape(*d_logits.shape[:2], -1, *visible.shape[1:])
    by_query = jnp.where(visible[:, None, None], by_query, 0).astype(q.dtype)
    d_logits = lax.optimization_barrier(by_query.reshape(d_logits.shape))
    d_q = _product(d_logits, k, 2)
    d_k, d_v = _over_queries(d_logits, q), _over_queries(probabilities, d_out)
    return d_q.astype(q.dtype), d_k.astype(k.dtype), d_v.astype(v.dtype), None


_attention.defvjp(_forward, _backward)


def _product(a: jax.Array, b: jax.Array, axis: int) -> jax.Array:
    """For each row and group, the sum over a's last axis and b's `axis`, in float32."""

    def product(a, b):
        dims = (((3,), (axis,)), ((0, 1), (0, 1)))
        return lax.dot_general(a, b, dims, preferred_element_type=jnp.float32)

    def twice(a, b):
        return product(jnp.concatenate([a, a], axis=2), b)[:, :, :1]

    if a.shape[2] == 1 and a.dtype != jnp.float32:  # as in kernels/matmul.py
        return lax.platform_dependent(a, b, cpu=twice, default=product)
    return product(a, b)


def _over_queries(a: jax.Array, b: jax.Array) -> jax.Array:
    """aᵀ b. Turned over beforehand: XLA's CPU backend is slow to sum over the left one's rows."""
    return _product(lax.optimization_barrier(a.swapaxes(2, 3)), b, 2)
