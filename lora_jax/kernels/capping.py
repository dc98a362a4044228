"""Logits that are kept between −cap and cap, as Gemma 2 keeps those of attention and of the head.

Source: Gemma team 2024, https://arxiv.org/abs/2408.00118, §2.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float


def capped(x: Float[Array, "*B"], cap: float | None) -> Float[Array, "*B"]:
    """y = cap · tanh(x / cap); x where cap is None."""
    return x if cap is None else cap * jnp.tanh(x / cap)


def through(dy: Float[Array, "*B"], y: Float[Array, "*B"], cap: float | None) -> Float[Array, "*B"]:
    """The gradient by x: dy · (1 − (y / cap)²); dy where cap is None."""
    return dy if cap is None else dy * (1 - jnp.square(y / cap))
