"""The classes of Flax Linen layers that multiply by a weight: which weight, and how."""

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from flax import linen as nn

from lora_jax import errors
from lora_jax.layers import linear_map


class Weight(NamedTuple):
    """Of a layer class: one of its parameters, and how a layer multiplies by it.

    linear_map_of: (layer, *arguments of a call) → the linear map. bias: the parameter that is
    added. input: which argument of the call is x.
    """

    linear_map_of: Callable[..., linear_map.LinearMap]
    name: str = "kernel"
    bias: str = "bias"
    input: int = 0


class Registration(NamedTuple):
    """The weights of a layer class.

    cls: the registered class, perhaps a base class of the layer's. multiplies: whether its __call__
    may be nothing but a product with its only weight, plus a bias.
    """

    cls: type[nn.Module]
    weights: tuple[Weight, ...]
    multiplies: bool = True


_REGISTRATIONS: dict[type, Registration] = {}


def register(
    cls: type[nn.Module],
    einsum: str | Callable[..., str] | Mapping[str, str | Callable[..., str]],
    *,
    weight: str = "kernel",
    bias: str | None = "bias",
    input: int = 0,
) -> None:
    """Makes layers of your own class adaptable and quantizable.

    Args:
      cls: its __call__ computes einsum(x, W), plus a bias if it has that parameter. If it computes
        anything else with W, it does so with W + scaling · A B.
      einsum: such as "...D,DNH->...NH", or a function that returns it for
        (layer, *arguments of __call__). A class with several weights: {weight: its einsum}.
      weight: the name of the parameter W, if there is one.
      bias: the name of the parameter that is added; None if there is none.
      input: which argument of __call__ is x.

    Raises: UserError if an einsum is not a product of x with a matrix, or if there is none.
    """
    several = einsum if isinstance(einsum, Mapping) else {weight: einsum}
    if not several:
        raise errors.UserError(
            expected="a weight and its einsum", found="none", where=f"the class {cls.__name__}"
        )
    for own in several.values():
        if isinstance(own, str):
            linear_map.parse(own)

    def described(einsum, layer, *args, **kwargs):
        return linear_map.parse(
            einsum if isinstance(einsum, str) else einsum(layer, *args, **kwargs)
        )

    weights = tuple(Weight(functools.partial(described, own), name, bias or "", input)
                    for name, own in several.items())  # fmt: skip
    _REGISTRATIONS[cls] = Registration(cls, weights, multiplies=len(weights) == 1)
    registration_of.cache_clear()


@functools.cache
def registration_of(cls: type) -> Registration | None:
    """The registration of a class or of its nearest base class; None if there is none."""
    return next((_REGISTRATIONS[base] for base in cls.__mro__ if base in _REGISTRATIONS), None)


def bound(method: Callable, layer: nn.Module, args: tuple, kwargs: Mapping) -> tuple[list, dict]:
    """The arguments of layer.method(*args, **kwargs), by position if they can be."""
    found = inspect.signature(method).bind(layer, *args, **kwargs)
    return list(found.args[1:]), dict(found.kwargs)


def _tuple(sizes: int | tuple[int, ...]) -> tuple[int, ...]:
    return (sizes,) if isinstance(sizes, int) else tuple(sizes)


def _general(layer: nn.DenseGeneral, *_: Any) -> linear_map.Einsum:
    outputs = len(_tuple(layer.features))
    return linear_map.general(_tuple(layer.axis), outputs, _tuple(layer.batch_dims))


def _einsum(layer: nn.Einsum, x: Any, einsum_str: str | None = None) -> linear_map.Einsum:
    return linear_map.parse(einsum_str or layer.einsum_str)


def _conv(layer: nn.Conv, *_: Any) -> linear_map.Conv:
    def slide(x, kernel):
        narrow = layer.clone(features=kernel.shape[-1], use_bias=False, parent=None, name=None)
        return narrow.apply({"params": {"kernel": kernel.astype(x.dtype)}}, x)

    return linear_map.Conv(slide, _tuple(layer.kernel_size))


def _transposed(layer: nn.ConvTranspose, *_: Any) -> linear_map.Conv:
    return linear_map.Conv(linear_map.unknown, _tuple(layer.kernel_size))


for _cls, _weight, _multiplies in (
    (nn.Dense, Weight(lambda *_: linear_map.LINEAR), True),
    (nn.DenseGeneral, Weight(_general), True),
    (nn.Einsum, Weight(_einsum), True),
    (nn.Embed, Weight(lambda *_: linear_map.Embedding(), "embedding"), True),
    (nn.Conv, Weight(_conv), True),
    (nn.ConvTranspose, Weight(_transposed), False),
):
    _REGISTRATIONS[_cls] = Registration(_cls, (_weight,), _multiplies)
