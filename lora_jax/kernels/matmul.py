"""Dense matmul that accumulates in float32, forward and backward."""

import functools

import jax
import jax.numpy as jnp
from jax import custom_derivatives, lax
from jaxtyping import Array, Float

from lora_jax.kernels import linear

PRODUCT = "product"  # checkpoint_name of the results that the remat policy "dots" saves


@functools.partial(jax.custom_jvp, nondiff_argnums=(2,))
def matmul(
    x: Float[Array, "*B K"], w: Float[Array, "K N"], out_dtype: jax.typing.DTypeLike | None = None
) -> Float[Array, "*B N"]:
    """y = x · w, operands in x's dtype, accumulated in float32, returned in out_dtype (None: x's).

    The derivative is written out because JAX's own does not pass `preferred_element_type` on to the
    backward products, which then run in mixed precision (half the speed on a CPU).
    """
    return _product(x, w, out_dtype)


def _product(x, w, out_dtype):
    return contract(x, w.astype(x.dtype), -1, 0).astype(out_dtype or x.dtype)


def contract(a: jax.Array, b: jax.Array, a_axis: int, b_axis: int) -> jax.Array:
    """The product of a and b, contracted over one axis of each, in float32."""
    product = functools.partial(
        lax.dot_general,
        dimension_numbers=(((a_axis % a.ndim,), (b_axis,)), ((), ())),
        preferred_element_type=jnp.float32,
    )
    one_row = a_axis % a.ndim and a.size == a.shape[a_axis]
    if one_row and a.dtype != jnp.float32:
        # XLA's CPU backend takes 15 times as long for one row of bfloat16 as for two.
        return lax.platform_dependent(
            a, b, cpu=lambda a, b: product(jnp.concatenate([a, a]), b)[:1], default=product
        )
    return product(a, b)


def over_rows(a: jax.Array, b: jax.Array) -> jax.Array:
    """aᵀ b of two matrices, in float32.

    The narrower one is transposed first: XLA's CPU backend is slow if it sums over the rows of the
    left operand.
    """
    if a.shape[1] > b.shape[1]:
        return over_rows(b, a).T
    return contract(lax.optimization_barrier(a.T), b, 1, 0)


@functools.partial(matmul.defjvp, symbolic_zeros=True)
def _jvp(out_dtype, primals, tangents):
    (x, w), (dx, dw) = primals, tangents
    of_x, to_x, of_w, to_w = _parts(x.dtype, w.dtype, out_dtype)
    terms = []
    if not isinstance(dx, custom_derivatives.SymbolicZero):
        terms.append(linear.linear(of_x, to_x, w, dx))
    if not isinstance(dw, custom_derivatives.SymbolicZero):
        terms.append(linear.linear(of_w, to_w, x, dw))
    y = matmul(x, w, out_dtype)
    return y, sum(terms[1:], terms[0]) if terms else jnp.zeros_like(y)


@functools.cache
def _parts(x_dtype, w_dtype, out_dtype):
    """dx · w and its transpose, x · dw and its transpose."""

    def of_x(w, dx):
        return _product(dx, w, out_dtype)

    def to_x(w, dy):
        return contract(dy.astype(x_dtype), w.astype(x_dtype), -1, 1).astype(x_dtype)

    def of_w(x, dw):
        return _product(x, dw, out_dtype)

    def to_w(x, dy):
        dy = dy.astype(x_dtype)
        rows, columns = (a.reshape(-1, a.shape[-1]) for a in (x, dy))
        return over_rows(rows, columns).astype(w_dtype)

    return of_x, to_x, of_w, to_w
