"""The layers of a Flax NNX model that LoRA can adapt: which they are, and what they are called."""

from collections.abc import Iterator
from typing import NamedTuple

import jax
import numpy as np
from flax import nnx

from lora_jax import errors
from lora_jax.layers import registry
from lora_jax.lora import site as places
from lora_jax.lora import targets
from lora_jax.quant import linear as quant_linear


class Site(NamedTuple):
    """A layer: its path, and the dotted paths of the layers that it stacks, or its one."""

    path: tuple[str | int, ...]
    module: nnx.Module
    names: tuple[str, ...]
    depths: tuple[int, ...] = ()  # where in the path the numbers of a stack stand

    @property
    def place(self) -> places.Place:
        how, shape = registry.layout_of(self.module), weight_shape(self.module)
        problem = places.problem(self.module, how)
        return places.Place(self.names, how.lead(shape), *how.sizes(shape), how, problem)


def weight_shape(layer: nnx.Module) -> tuple[int, ...]:
    """The shape of its weight; of a packed one, before it was packed."""
    if isinstance(layer, quant_linear.QuantLayer):
        return layer.quantized_shape
    if isinstance(layer, quant_linear.QuantLinear):
        return (*layer.q.shape[:-2], layer.in_features, layer.out_features)
    return registry.weight_of(layer).shape


def find(model: nnx.Module) -> Iterator[Site]:
    """Every layer that can be adapted, adapted ones included, in the order of their paths."""
    shapes = _Shapes(model)
    for path, node in sorted(nnx.iter_graph(model), key=lambda item: dotted(item[0])):
        inside = "modules_to_save" in path or "quantized" in path  # of what is found itself
        if inside or registry.kind_of(type(node)) is None or _misfit(node):
            continue
        shape, how = weight_shape(node), registry.layout_of(node)
        stacked = shape[: len(shape) - how.ndim]
        depths = _stack_depths(shapes, path, stacked)
        names = (numbered(path, depths, index) for index in np.ndindex(*how.lead(shape)))
        yield Site(path, node, tuple(names), depths)


def others(model: nnx.Module) -> dict[str, targets.Candidate]:
    """Layers that are not as their kind says, and modules of none with parameters of their own."""
    nodes = list(nnx.iter_graph(model))
    modules = {path: node for path, node in nodes if not isinstance(node, nnx.Variable)}
    known = {path for path, node in modules.items() if registry.kind_of(type(node))}
    owners = {path[:-1] for path, node in nodes if isinstance(node, nnx.Param)}
    return {
        dotted(path): places.unknown(type(modules[path]).__name__)
        for path in owners
        if path and not any(path[:n] in known for n in range(len(path) + 1))
    } | {
        dotted(path): targets.Candidate("linear", 0, misfit)
        for path in known
        if (misfit := _misfit(modules[path]))
    }


def _misfit(layer: nnx.Module) -> str:
    """In what a layer is not as its kind says; "" where it is."""
    name = registry.kind_of(type(layer)).weight
    if not isinstance(layer, quant_linear.QuantLayer) and not hasattr(layer, name):
        return f"has no {name!r}, where {type(layer).__name__} was registered to have its weight"
    try:
        return places.misfit(registry.layout_of(layer), weight_shape(layer))
    except errors.UserError as error:  # of an einsum that is no product with a matrix
        return f"has an einsum that is {error.found}"


def numbered(path: tuple, depths: tuple[int, ...], index: tuple[int, ...]) -> str:
    """The dotted path of one layer of a stack: numbers stand at `depths`, any further ones last."""
    parts = list(path)
    for depth, number in reversed(list(zip(depths, index, strict=False))):
        parts.insert(depth, number)
    return dotted((*parts, *index[len(depths) :]))


def dotted(path: tuple[str | int, ...]) -> str:
    return ".".join(map(str, path))


class _Shapes(dict):
    """The shapes of all arrays below each path of a model, read once."""

    def __init__(self, model: nnx.Module):
        self.model = model

    def __missing__(self, path: tuple) -> list[tuple[int, ...]]:
        module = self.model
        for part in path:
            module = getattr(module, part) if isinstance(part, str) else module[part]
        self[path] = [leaf.shape for leaf in jax.tree.leaves(nnx.state(module))]
        return self[path]


def _stack_depths(shapes: _Shapes, path: tuple, stacked: tuple[int, ...]) -> tuple[int, ...]:
    """For each axis, the length of the shortest part of `path` below which all arrays have it."""
    depths, depth = [], 0
    for axis, size in enumerate(stacked):
        while depth < len(path) and any(
            shape[axis : axis + 1] != (size,) for shape in shapes[path[:depth]]
        ):
            depth += 1
        depths.append(depth)
    return tuple(depths)
