"""The layers of a Flax NNX model that LoRA can adapt: which they are, and what they are called."""

import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx

from lora_jax import layout, quant
from lora_jax import place as places
from lora_jax.models import llama


class Site(NamedTuple):
    """A layer: its path, and the dotted paths of the layers that it stacks, or its one."""

    path: tuple[str | int, ...]
    module: nnx.Module
    names: tuple[str, ...]
    depths: tuple[int, ...] = ()  # where in the path the numbers of a stack stand

    @property
    def place(self) -> places.Place:
        how, shape = layout_of(self.module), weight_shape(self.module)
        return places.Place(self.names, how.lead(shape), *how.sizes(shape), how)


class _Kind(NamedTuple):
    """The attribute that holds a layer's weight, and how the layer multiplies by it."""

    weight: str
    layout: Callable[[Any], layout.Layout]


_KINDS: dict[type, _Kind] = {}


def register(
    cls: type[nnx.Module], einsum: str | Callable[[Any], str], *, weight: str = "kernel"
) -> None:
    """Has layers of a class of your own adapted.

    Args:
      cls: its `__call__(x)` returns einsum(x, W), plus a bias if it has an attribute `bias`.
      einsum: such as "...D,DNH->...NH", or a function from the layer to that.
      weight: the attribute that holds W.
    """

    def described(layer):
        return layout.parse(einsum if isinstance(einsum, str) else einsum(layer))

    _KINDS[cls] = _Kind(weight, described)
    _kind.cache_clear()


def layout_of(layer: nnx.Module) -> layout.Layout:
    """How the layer multiplies."""
    return _kind(type(layer)).layout(layer)


def weight_of(layer: nnx.Module) -> nnx.Variable:
    """The variable that holds its weight, or a packed weight's words."""
    return getattr(layer, _kind(type(layer)).weight)


def weight_shape(layer: nnx.Module) -> tuple[int, ...]:
    """The shape of its weight; of a packed one, before it was packed."""
    if isinstance(layer, quant.QuantLinear):
        return (*layer.q.shape[:-2], layer.in_features, layer.out_features)
    return weight_of(layer).shape


def find(model: nnx.Module) -> Iterator[Site]:
    """Every layer that can be adapted, adapted ones included, in the order of their paths."""
    seen = set()
    for path, node in sorted(nnx.iter_graph(model), key=lambda item: dotted(item[0])):
        if "modules_to_save" in path or id(node) in seen or _kind(type(node)) is None:
            continue
        seen.add(id(node))
        shape, how = weight_shape(node), layout_of(node)
        stacked = shape[: len(shape) - how.ndim]
        depths = _stack_depths(model, path, stacked)
        names = (numbered(path, depths, index) for index in np.ndindex(*how.lead(shape)))
        yield Site(path, node, tuple(names), depths)


def numbered(path: tuple, depths: tuple[int, ...], index: tuple[int, ...]) -> str:
    """The dotted path of one layer of a stack: numbers stand at `depths`, any further ones last."""
    parts = list(path)
    for depth, number in reversed(list(zip(depths, index, strict=False))):
        parts.insert(depth, number)
    return dotted((*parts, *index[len(depths) :]))


def dotted(path: tuple[str | int, ...]) -> str:
    return ".".join(map(str, path))


def _stack_depths(model: nnx.Module, path: tuple, stacked: tuple[int, ...]) -> tuple[int, ...]:
    """For each axis, the length of the shortest part of `path` below which all arrays have it."""
    depths, depth, module = [], 0, model
    for axis, size in enumerate(stacked):
        while depth < len(path):
            leaves = jax.tree.leaves(nnx.state(module))
            if all(leaf.ndim > axis and leaf.shape[axis] == size for leaf in leaves):
                break
            part = path[depth]
            module = getattr(module, part) if isinstance(part, str) else module[part]
            depth += 1
        depths.append(depth)
    return tuple(depths)


@functools.cache
def _kind(cls: type) -> _Kind | None:
    return next((_KINDS[base] for base in cls.__mro__ if base in _KINDS), None)


def _general(layer: nnx.LinearGeneral) -> layout.Einsum:
    return layout.general(layer.axis, len(layer.out_features), tuple(layer.batch_axis))


def _conv(layer: nnx.Conv) -> layout.Conv:
    def slide(x, kernel):
        own = {name: getattr(layer, name) for name in _CONV}
        sizes = (layer.in_features, kernel.shape[-1], layer.kernel_size)
        conv = nnx.eval_shape(lambda: nnx.Conv(*sizes, use_bias=False, **own, rngs=nnx.Rngs(0)))
        conv.kernel = nnx.Param(kernel)
        return conv(x)

    return layout.Conv(slide, tuple(layer.kernel_size))


_CONV = (
    *("strides", "padding", "input_dilation", "kernel_dilation", "dtype", "param_dtype"),
    *("precision", "conv_general_dilated", "promote_dtype", "preferred_element_type"),
)
_KINDS |= {
    nnx.Linear: _Kind("kernel", lambda _: layout.LINEAR),
    quant.QuantLinear: _Kind("q", lambda _: layout.LINEAR),
    nnx.LinearGeneral: _Kind("kernel", _general),
    nnx.Einsum: _Kind("kernel", lambda layer: layout.parse(layer.einsum_str)),
    nnx.Embed: _Kind("embedding", lambda _: layout.Embedding()),
    llama.Embedding: _Kind("embedding", lambda layer: layout.Embedding(layer.lookup)),
    nnx.Conv: _Kind("kernel", _conv),
}
