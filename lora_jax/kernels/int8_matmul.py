"""Matmul with a frozen int8 weight and one scale per output column."""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int8

from lora_jax.kernels import matmul


@jax.custom_vjp
def int8_matmul(
    x: Float[Array, "*B K"], q: Int8[Array, "K N"], column_scale: Float[Array, "1 N"]
) -> Float[Array, "*B N"]:
    """y = (x · q) · column_scale, accumulated in float32, in x's dtype; differentiable in x only.

    An int8 is exact in bfloat16, so only the scale rounds in addition to the product.
    """
    return (_contract(x, q, 0) * _across(column_scale, x)).astype(x.dtype)


def _contract(x: jax.Array, q: jax.Array, axis: int) -> jax.Array:
    return matmul.contract(x, q.astype(x.dtype), -1, axis)


def _across(column_scale: jax.Array, x: jax.Array) -> jax.Array:
    return column_scale.reshape((1,) * (x.ndim - 1) + (-1,))


def _forward(x, q, column_scale):
    return int8_matmul(x, q, column_scale), (q, column_scale)


def _backward(saved, dy):
    # The barrier keeps XLA from sharing one dense copy of q between forward and backward.
    q, column_scale, dy = lax.optimization_barrier((*saved, dy))
    dx = _contract((dy * _across(column_scale, dy)).astype(dy.dtype), q, 1).astype(dy.dtype)
    return dx, np.zeros(q.shape, jax.dtypes.float0), jnp.zeros_like(column_scale)


int8_matmul.defvjp(_forward, _backward)
