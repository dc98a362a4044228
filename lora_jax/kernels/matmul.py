"""Dense matmul that accumulates in float32, forward and backward."""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def matmul(
    x: Float[Array, "*B K"], w: Float[Array, "K N"], out_dtype: jax.typing.DTypeLike | None = None
) -> Float[Array, "*B N"]:
    """y = x · w, operands in x's dtype, accumulated in float32, returned in out_dtype (None: x's).

    The derivative rule is spelt out because JAX's own does not carry `preferred_element_type` over
    to the backward products, which then run in mixed precision (half the speed on a CPU).
    """
    return _contract(x, w.astype(x.dtype), x.ndim - 1, 0, out_dtype or x.dtype)


def _contract(a: jax.Array, b: jax.Array, a_axis: int, b_axis: int, dtype) -> jax.Array:
    dims = (((a_axis,), (b_axis,)), ((), ()))
    return lax.dot_general(a, b, dims, preferred_element_type=jnp.float32).astype(dtype)


def _forward(x, w, out_dtype):
    return matmul(x, w, out_dtype), (x, w)


def _backward(out_dtype, saved, dy):
    x, w = saved
    dy = dy.astype(x.dtype)
    dx = _contract(dy, w.astype(x.dtype), dy.ndim - 1, 1, x.dtype)
    dw = _contract(x.reshape(-1, x.shape[-1]), dy.reshape(-1, dy.shape[-1]), 0, 0, w.dtype)
    return dx, dw


matmul.defvjp(_forward, _backward)
