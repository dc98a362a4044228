"""The classes of Flax NNX layers that multiply by a weight: which weight, and how."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

from flax import nnx

from lora_jax.layers import linear_map


class Registration(NamedTuple):
    """Of a layer class: the attribute that holds the weight, and how a layer multiplies by it."""

    weight: str
    linear_map_of: Callable[[Any], linear_map.LinearMap]


REGISTRATIONS: dict[type, Registration] = {}


def register(
    cls: type[nnx.Module], einsum: str | Callable[[Any], str], *, weight: str = "kernel"
) -> None:
    """Makes layers of your own class adaptable and quantizable.

    Args:
      cls: its `__call__(x)` returns einsum(x, W), plus a bias if it has an attribute `bias`.
      einsum: such as "...D,DNH->...NH", or a function that returns it for a layer.
      weight: the attribute that holds W.

    Raises: UserError if the einsum is not a product of x with a matrix.
    """
    if isinstance(einsum, str):
        linear_map.parse(einsum)

    def described(layer):
        return linear_map.parse(einsum if isinstance(einsum, str) else einsum(layer))

    REGISTRATIONS[cls] = Registration(weight, described)
    registration_of.cache_clear()


def linear_map_of(layer: nnx.Module) -> linear_map.LinearMap:
    """How the layer multiplies."""
    return registration_of(type(layer)).linear_map_of(layer)


def weight_of(layer: nnx.Module) -> nnx.Variable:
    """The variable that holds the layer's weight; of a packed weight, its words."""
    return getattr(layer, registration_of(type(layer)).weight)


@functools.cache
def registration_of(cls: type) -> Registration | None:
    """The registration of a class or of its nearest base class; None if there is none."""
    return next((REGISTRATIONS[base] for base in cls.__mro__ if base in REGISTRATIONS), None)


def _general(layer: nnx.LinearGeneral) -> linear_map.Einsum:
    return linear_map.general(layer.axis, len(layer.out_features), tuple(layer.batch_axis))


def _conv(layer: nnx.Conv) -> linear_map.Conv:
    def slide(x, kernel):
        own = {name: getattr(layer, name) for name in _CONV}
        sizes = (layer.in_features, kernel.shape[-1], layer.kernel_size)
        conv = nnx.eval_shape(lambda: nnx.Conv(*sizes, use_bias=False, **own, rngs=nnx.Rngs(0)))
        conv.kernel = nnx.Param(kernel)
        return conv(x)

    return linear_map.Conv(slide, tuple(layer.kernel_size))


_CONV = (
    *("strides", "padding", "input_dilation", "kernel_dilation", "dtype", "param_dtype"),
    *("precision", "conv_general_dilated", "promote_dtype", "preferred_element_type"),
)
REGISTRATIONS |= {
    nnx.Linear: Registration("kernel", lambda _: linear_map.LINEAR),
    nnx.LinearGeneral: Registration("kernel", _general),
    nnx.Einsum: Registration("kernel", lambda layer: linear_map.parse(layer.einsum_str)),
    nnx.Embed: Registration("embedding", lambda _: linear_map.Embedding()),
    nnx.Conv: Registration("kernel", _conv),
}
