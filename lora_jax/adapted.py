"""What an adapted layer computes, in a model of any framework."""

from collections.abc import Callable, Sequence

import jax
from jax import lax

from lora_jax import layout, low_rank


def output(
    how: layout.Layout,
    shape: Sequence[int],
    x: jax.Array,
    y: jax.Array,
    factors: Sequence[jax.Array],
    *,
    dropped: jax.Array,
    layer: Callable[[jax.Array], jax.Array],
    norm: Callable[[], tuple[jax.Array, jax.Array]],
    bias: jax.Array | None,
) -> jax.Array:
    """y + s · x' A B; with a magnitude m: y + (r − 1) · x' W + r · s · x' A B, r = m / ‖W + s A B‖.

    Args:
      how, shape: how the layer multiplies, and the shape of its weight.
      x, y: its input and output.
      factors: A, B, the scaling s, and with DoRA the magnitude; of one layer of a stack.
      dropped: x' = dropout(x), or x itself.
      layer: x → y, which DoRA wants of x' too (PEFT drops inputs of the base there as well).
      norm: ‖W‖² of each column, and Aᵀ W.
      bias: of the layer.
    """
    A, B, scaling, *magnitude = factors
    extra = how.multiply(dropped, A, B * scaling, shape=shape).astype(y.dtype)
    if not magnitude:
        return y + extra
    length = lax.stop_gradient(low_rank.norm(*norm(), A, B, scaling))
    stretch = how.spread(low_rank.stretch(*magnitude, length, scaling), y.ndim, shape)
    plain = y if dropped is x else layer(dropped)
    if bias is not None:
        plain = plain - how.spread(bias.reshape(-1), y.ndim, shape).astype(y.dtype)
    return (y + (stretch - 1) * plain + stretch * extra).astype(y.dtype)
