"""Kinds of Flax NNX layers that multiply by a weight: by which, and how."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

from flax import nnx

from lora_jax.layers import linear_map


class Kind(NamedTuple):
    """The attribute that holds a layer's weight, and how the layer multiplies by it."""

    weight: str
    layout: Callable[[Any], linear_map.Layout]


KINDS: dict[type, Kind] = {}


def register(
    cls: type[nnx.Module], einsum: str | Callable[[Any], str], *, weight: str = "kernel"
) -> None:
    """Has layers of a class of your own adapted and quantized.

    Args:
      cls: its `__call__(x)` returns einsum(x, W), plus a bias if it has an attribute `bias`.
      einsum: such as "...D,DNH->...NH", or a function from the layer to that.
      weight: the attribute that holds W.

    Raises: UserError for an einsum that is no product of x with a matrix.
    """
    if isinstance(einsum, str):
        linear_map.parse(einsum)

    def described(layer):
        return linear_map.parse(einsum if isinstance(einsum, str) else einsum(layer))

    KINDS[cls] = Kind(weight, described)
    kind_of.cache_clear()


def layout_of(layer: nnx.Module) -> linear_map.Layout:
    """How the layer multiplies."""
    return kind_of(type(layer)).layout(layer)


def weight_of(layer: nnx.Module) -> nnx.Variable:
    """The variable that holds its weight, or a packed weight's words."""
    return getattr(layer, kind_of(type(layer)).weight)


@functools.cache
def kind_of(cls: type) -> Kind | None:
    """Of a class or of the nearest that it inherits from; None: it is not registered."""
    return next((KINDS[base] for base in cls.__mro__ if base in KINDS), None)


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
KINDS |= {
    nnx.Linear: Kind("kernel", lambda _: linear_map.LINEAR),
    nnx.LinearGeneral: Kind("kernel", _general),
    nnx.Einsum: Kind("kernel", lambda layer: linear_map.parse(layer.einsum_str)),
    nnx.Embed: Kind("embedding", lambda _: linear_map.Embedding()),
    nnx.Conv: Kind("kernel", _conv),
}
