"""The classes of Flax Linen layers that multiply by a weight: which weight, and how."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
from flax import linen as nn

from lora_jax.layers import linear_map


class Registration(NamedTuple):
    """Of a layer class: the parameter that is the weight, and how a layer multiplies by it.

    linear_map_of: (layer, *arguments of a call) → its linear map. input: which argument is x.
    """

    linear_map_of: Callable[..., linear_map.LinearMap]
    weight: str = "kernel"
    input: int = 0


_REGISTRATIONS: dict[type, Registration] = {}


def register(
    cls: type[nn.Module],
    einsum: str | Callable[..., str],
    *,
    weight: str = "kernel",
    input: int = 0,
) -> None:
    """Makes layers of your own class adaptable.

    Args:
      cls: its __call__ returns einsum(x, W), plus a bias if it has a parameter `bias`.
      einsum: such as "...D,DNH->...NH", or a function that returns it for
        (layer, *arguments of __call__).
      weight: the name of the parameter W.
      input: which argument of __call__ is x.

    Raises: UserError if the einsum is not a product of x with a matrix.
    """
    if isinstance(einsum, str):
        linear_map.parse(einsum)

    def described(layer, *args, **kwargs):
        return linear_map.parse(
            einsum if isinstance(einsum, str) else einsum(layer, *args, **kwargs)
        )

    _REGISTRATIONS[cls] = Registration(described, weight, input)
    registration_of.cache_clear()


@functools.cache
def registration_of(cls: type) -> Registration | None:
    """The registration of a class or of its nearest base class; None if there is none."""
    return next((_REGISTRATIONS[base] for base in cls.__mro__ if base in _REGISTRATIONS), None)


def _tuple(sizes: int | tuple[int, ...]) -> tuple[int, ...]:
    return (sizes,) if isinstance(sizes, int) else tuple(sizes)


def _general(layer: nn.DenseGeneral, x: jax.Array) -> linear_map.Einsum:
    outputs = len(_tuple(layer.features))
    return linear_map.general(_tuple(layer.axis), outputs, _tuple(layer.batch_dims))


def _einsum(layer: nn.Einsum, x: jax.Array, einsum_str: str | None = None) -> linear_map.Einsum:
    return linear_map.parse(einsum_str or layer.einsum_str)


def _conv(layer: nn.Conv, x: jax.Array) -> linear_map.Conv:
    def slide(x, kernel):
        narrow = layer.clone(features=kernel.shape[-1], use_bias=False, parent=None, name=None)
        return narrow.apply({"params": {"kernel": kernel.astype(x.dtype)}}, x)

    return linear_map.Conv(slide, _tuple(layer.kernel_size))


_REGISTRATIONS |= {
    nn.Dense: Registration(lambda layer, x: linear_map.LINEAR),
    nn.DenseGeneral: Registration(_general),
    nn.Einsum: Registration(_einsum),
    nn.Embed: Registration(lambda layer, ids: linear_map.Embedding(), "embedding"),
    nn.Conv: Registration(_conv),
}
