"""Matmul with a frozen int8 weight and one scale per output column."""

import jax
from jax import lax
from jaxtyping import Array, Float, Int8

from lora_jax.kernels import linear, matmul


def int8_matmul(
    x: Float[Array, "*B K"], q: Int8[Array, "K N"], column_scale: Float[Array, "1 N"]
) -> Float[Array, "*B N"]:
    """y = (x · q) · column_scale, accumulated in float32, in x's dtype; differentiable in x only.

    An int8 is exact in bfloat16, so only the scale rounds in addition to the product.
    """
    return linear.linear(_product, _transposed, *lax.stop_gradient((q, column_scale)), x)


def _product(q, column_scale, x):
    return (_contract(x, q, 0) * _across(column_scale, x)).astype(x.dtype)


def _transposed(q, column_scale, dy):
    # The barrier keeps XLA from sharing one dense copy of q between forward and backward.
    q, column_scale, dy = lax.optimization_barrier((q, column_scale, dy))
    return _contract((dy * _across(column_scale, dy)).astype(dy.dtype), q, 1).astype(dy.dtype)


def _contract(x: jax.Array, q: jax.Array, axis: int) -> jax.Array:
    return matmul.contract(x, q.astype(x.dtype), -1, axis)


def _across(column_scale: jax.Array, x: jax.Array) -> jax.Array:
    return column_scale.reshape((1,) * (x.ndim - 1) + (-1,))
