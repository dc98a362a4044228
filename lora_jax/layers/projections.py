"""Linear layers with the same input, such as q, k and v: one product instead of several."""

import itertools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax import ad_checkpoint
from jaxtyping import Array, Float

from lora_jax.kernels import matmul


def project(
    x: Float[Array, "*B d_in"],
    *linears: Callable,
    form: Callable[[jax.Array], Sequence[jax.Array]] | None = None,
) -> list[Float[Array, "*B _"]]:
    """[linear(x) for linear in linears].

    form: x → the products with the frozen weights, without biases and adapters. Each layer adds its
    own bias and adapter to its product.
    """
    if form is None:
        return [ad_checkpoint.checkpoint_name(linear(x), matmul.PRODUCT) for linear in linears]
    return [
        linear.with_product(x, product)
        if hasattr(linear, "with_product")
        else with_bias(linear, product)
        for linear, product in zip(linears, form(x), strict=True)
    ]


def parts(
    projected: Sequence[Float[Array, "*B _"]], widths: Sequence[int]
) -> Sequence[Float[Array, "*B _"]]:
    """Arrays of these widths: the outputs of as many layers, or of one whose output they are."""
    if len(projected) == len(widths):
        return projected
    (fused,) = projected
    return jnp.split(fused, [*itertools.accumulate(widths)][:-1], axis=-1)


def with_bias(linear, product: Float[Array, "*B N"]) -> Float[Array, "*B N"]:
    """product + the layer's bias, if it has one."""
    if linear.bias is None:
        return product
    bias = linear.bias[...].astype(product.dtype)
    return product + jnp.expand_dims(bias, tuple(range(product.ndim - 1)))
