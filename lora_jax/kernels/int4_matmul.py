"""Matmul with a frozen 4-bit weight: packed words in, products out, no weight gradient.

Layout of a weight W [K, N] (K = d_in, N = d_out), K padded to a multiple of the group G:
  q             uint32 [K/8, N]   nibble i of word j is row 8j+i
  scale         [K/G, N]          int8 for "int4", float32 for "nf4"
  column_scale  float32 [1, N]    "int4" only
and w = code(q) · scale · column_scale, where code is the nibble in two's complement ("int4") or
an index into the NormalFloat table ("nf4", Dettmers et al. 2023, https://arxiv.org/abs/2305.14314).
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Num, UInt32

NF4_CODE = np.array(
    [
        *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
        *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
        *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
        *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
    ],
    np.float32,
)
FORMATS = ("int4", "nf4")
IMPLEMENTATIONS = ("xla",)


def int4_matmul(
    x: Float[Array, "*B d_in"],
    q: UInt32[Array, "words N"],
    scale: Num[Array, "groups N"],
    column_scale: Float[Array, "1 N"] | None = None,
    *,
    fmt: str = "int4",
    implementation: str | None = None,
) -> Float[Array, "*B N"]:
    """y = x · dequantise(q, scale, column_scale), accumulated in float32, in x's dtype.

    x may be narrower than the padded K. Differentiable in x only; the derivative keeps the packed
    words and nothing else. `implementation`: None picks the best form for the backend; a name
    means that form or an error.

    Raises: ValueError for an unknown format or implementation, or shapes that do not fit.
    """
    if fmt not in FORMATS:
        raise ValueError(f"expected fmt among {FORMATS}, found {fmt!r}")
    if implementation not in (None, *IMPLEMENTATIONS):
        raise ValueError(f"expected implementation among {IMPLEMENTATIONS}, found {implementation}")
    padded = q.shape[0] * 8
    if not x.shape[-1] <= padded or padded % scale.shape[0]:
        raise ValueError(
            f"expected x [..., ≤ {padded}] and groups that divide {padded}, "
            f"found x {x.shape}, q {q.shape}, scale {scale.shape}"
        )
    x = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, padded - x.shape[-1])])
    return _matmul(x, q, scale, column_scale, fmt)


def dequantise(
    q: UInt32[Array, "words N"],
    scale: Num[Array, "groups N"],
    column_scale: Float[Array, "1 N"] | None = None,
    *,
    fmt: str = "int4",
    dtype: jax.typing.DTypeLike = jnp.float32,
) -> Float[Array, "K N"]:
    """w = code(q) · scale · column_scale in float32, rounded once to dtype; K = 8 · words."""
    words, columns = q.shape
    shift = 4 * lax.broadcasted_iota(jnp.uint32, (1, 8, 1), 1)
    if fmt == "int4":
        # Shift the nibble to the top, then arithmetically down: that extends its sign.
        signed = lax.bitcast_convert_type(q[:, None] << (28 - shift), jnp.int32) >> 28
        codes = signed.astype(jnp.float32)
    else:
        codes = jnp.asarray(NF4_CODE)[(q[:, None] >> shift) & 15]
    scales = scale.astype(jnp.float32)
    if column_scale is not None:
        scales = scales * column_scale
    weight = codes.reshape(scale.shape[0], -1, columns) * scales[:, None]
    return weight.reshape(words * 8, columns).astype(dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _matmul(x, q, scale, column_scale, fmt):
    weight = dequantise(q, scale, column_scale, fmt=fmt, dtype=x.dtype)
    return _contract(x, weight, 0)


def _contract(x: jax.Array, weight: jax.Array, axis: int) -> jax.Array:
    dims = (((x.ndim - 1,), (axis,)), ((), ()))
    return lax.dot_general(x, weight, dims, preferred_element_type=jnp.float32).astype(x.dtype)


def _forward(x, q, scale, column_scale, fmt):
    return _matmul(x, q, scale, column_scale, fmt), (q, scale, column_scale)


def _backward(fmt, saved, dy):
    # Without the barrier XLA merges this dequantisation with the forward one and keeps the dense
    # weight alive in between: the memory that quantisation is there to save.
    q, scale, column_scale, dy = lax.optimization_barrier((*saved, dy))
    weight = dequantise(q, scale, column_scale, fmt=fmt, dtype=dy.dtype)
    return _contract(dy, weight, 1), *jax.tree.map(_no_gradient, saved)


def _no_gradient(frozen: jax.Array):
    if jnp.issubdtype(frozen.dtype, jnp.integer):
        return np.zeros(frozen.shape, jax.dtypes.float0)
    return jnp.zeros_like(frozen)


_matmul.defvjp(_forward, _backward)
