"""What an adapted layer computes, in a model of any framework."""

from collections.abc import Sequence

import jax
from jax import lax

from lora_jax.layers import linear_map
from lora_jax.lora import algebra


def output(
    how: linear_map.Layout,
    shape: Sequence[int],
    x: jax.Array,
    y: jax.Array,
    factors: Sequence[jax.Array],
    *,
    dropped: jax.Array,
    weight: linear_map.Factor,
    square: jax.Array | None,
    bias: jax.Array | None,
) -> jax.Array:
    """y + s · x' A B; with a magnitude m: y + (r − 1) · x' W + r · s · x' A B, r = m / ‖W + s A B‖.

    Args:
      how, shape: how the layer multiplies, and the shape of its weight.
      x, y: its input and output.
      factors: A, B, the scaling s, and with DoRA the magnitude; of one layer of a stack.
      dropped: x' = dropout(x), or x itself. PEFT's DoRA takes the base's change of it, too.
      weight, square: W as a matrix and None; or the product with a packed W, and its ‖W‖².
      bias: of the layer.
    """
    A, B, scaling, *magnitude = factors
    extra = how.multiply(dropped, A, B * scaling, shape=shape).astype(y.dtype)
    if not magnitude:
        return y + extra
    if square is None:
        square, crossed = algebra.squares(weight), algebra.crossed(A, weight)
    else:
        crossed = weight(A.T.astype(y.dtype))
    length = lax.stop_gradient(algebra.norm(square, crossed, A, B, scaling))
    stretch = how.spread(algebra.stretch(*magnitude, length, scaling), y.ndim, shape)
    if bias is not None:
        bias = how.spread(bias.reshape(-1), y.ndim, shape).astype(y.dtype)
    if dropped is not x:
        plain = how.multiply(dropped, weight, shape=shape).astype(y.dtype)
        return (y + (stretch - 1) * plain + stretch * extra).astype(y.dtype)
    whole = y + extra if bias is None else y - bias + extra
    whole = (stretch * whole).astype(y.dtype)
    return whole if bias is None else whole + bias
