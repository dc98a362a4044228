"""The layers of a Flax NNX model that LoRA can adapt: which they are, and their dotted paths."""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from flax import nnx

from lora_jax import errors
from lora_jax.layers import places, registry
from lora_jax.lora import site as lora_site
from lora_jax.lora import targets
from lora_jax.quant import formats
from lora_jax.quant import linear as quant_linear


@dataclasses.dataclass(frozen=True, kw_only=True)
class Site(lora_site.Site):
    """Where an adapter can go in an NNX model: the module, and its path in the model.

    depths: where in the path the numbers of stacked layers are inserted to make their names.
    """

    path: tuple[str | int, ...]
    module: nnx.Module
    depths: tuple[int, ...] = ()

    def each(self, function: Callable, *arrays: jax.Array) -> jax.Array:
        """function(W, *arrays) for every layer of the site, one at a time; W [K, N] is dense."""
        if quantized := quant_linear.packed_of(self.module):
            how = {"function": function, "fmt": quantized.fmt, "rows": quantized.in_features}
            return lora_site.each(_of_packed, self.lead, quantized.packed, *arrays, **how)
        weight = registry.weight_of(self.module)[...]
        return lora_site.each(function, self.lead, self.linear_map.matrix(weight), *arrays)

    def separate(self, where: places.Places) -> None:
        """Gives the layer a weight of its own, if others hold the same variable."""
        if quant_linear.packed_of(self.module) is None:
            weight = registry.weight_of(self.module)
            if len(where[id(weight)]) > 1:
                name = registry.registration_of(type(self.module)).weight
                setattr(self.module, name, weight.copy())

    def set_matrix(self, matrix: jax.Array) -> None:
        """Replaces the dense weight by the one with that matrix."""
        weight = registry.weight_of(self.module)
        weight.set_value(self.linear_map.tensor(matrix, weight.shape).astype(weight.dtype))


def _of_packed(packed, *arrays, function, fmt, rows):
    return function(formats.dequantize(packed, fmt, rows), *arrays)


def weight_shape(layer: nnx.Module) -> tuple[int, ...]:
    """The shape of the layer's weight; of a packed weight, its shape when dense."""
    if isinstance(layer, quant_linear.QuantLayer):
        return layer.quantized_shape
    if isinstance(layer, quant_linear.QuantLinear):
        return (*layer.q.shape[:-2], layer.in_features, layer.out_features)
    return registry.weight_of(layer).shape


def find(model: nnx.Module) -> Iterator[Site]:
    """Every site of the model, with or without an adapter, in the order of their paths."""
    shapes = _Shapes(model)
    for path, node in sorted(nnx.iter_graph(model), key=lambda item: dotted(item[0])):
        inside = "modules_to_save" in path or "quantized" in path  # part of another module found
        if inside or registry.registration_of(type(node)) is None or _misfit(node):
            continue
        shape, how = weight_shape(node), registry.linear_map_of(node)
        depths, lead = _stack_depths(shapes, path, shape[: len(shape) - how.ndim]), how.lead(shape)
        in_features, out_features = how.sizes(shape)
        yield Site(
            path=path,
            module=node,
            depths=depths,
            names=tuple(numbered(path, depths, index) for index in np.ndindex(*lead)),
            lead=lead,
            linear_map=how,
            in_features=in_features,
            out_features=out_features,
            problem=lora_site.problem(node, how),
        )


def others(model: nnx.Module) -> dict[str, targets.Layer]:
    """{path: layer} of the layers unlike their registration, and of unregistered modules.

    Only modules that have parameters of their own.
    """
    nodes = list(nnx.iter_graph(model))
    modules = {path: node for path, node in nodes if not isinstance(node, nnx.Variable)}
    known = {path for path, node in modules.items() if registry.registration_of(type(node))}
    owners = {path[:-1] for path, node in nodes if isinstance(node, nnx.Param)}
    return {
        dotted(path): lora_site.unregistered(type(modules[path]).__name__)
        for path in owners
        if path and not any(path[:n] in known for n in range(len(path) + 1))
    } | {
        dotted(path): targets.Layer("linear", problem=misfit)
        for path in known
        if (misfit := _misfit(modules[path]))
    }


def _misfit(layer: nnx.Module) -> str:
    """How a layer differs from its registration; "" if it does not."""
    name = registry.registration_of(type(layer)).weight
    if not isinstance(layer, quant_linear.QuantLayer) and not hasattr(layer, name):
        return f"has no {name!r}, which {type(layer).__name__} is registered to hold its weight in"
    try:
        return lora_site.misfit(registry.linear_map_of(layer), weight_shape(layer))
    except errors.UserError as error:  # the einsum is not a product with a matrix
        return f"has an einsum that is {error.found}"


def numbered(path: tuple, depths: tuple[int, ...], index: tuple[int, ...]) -> str:
    """The dotted path of one layer of a stack: numbers at `depths`, any further numbers last."""
    parts = list(path)
    for depth, number in reversed(list(zip(depths, index, strict=False))):
        parts.insert(depth, number)
    return dotted((*parts, *index[len(depths) :]))


def dotted(path: tuple[Any, ...]) -> str:
    return ".".join(map(str, path))


class _Shapes(dict):
    """The shapes of all arrays below each path of a model, read once."""

    def __init__(self, model: nnx.Module):
        self.model = model

    def __missing__(self, path: tuple) -> list[tuple[int, ...]]:
        module = places.at(self.model, path)
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
