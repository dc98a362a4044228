"""The layers of a Flax NNX model that LoRA can adapt: which they are, and their dotted paths."""

import dataclasses
from collections.abc import Callable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from lora_jax.layers import mixin, placement, places, registry, wrappers
from lora_jax.lora import config as lora_config
from lora_jax.lora import site as lora_site
from lora_jax.lora import targets
from lora_jax.quant import formats
from lora_jax.quant import linear as quant_linear


@dataclasses.dataclass(frozen=True, kw_only=True)
class Site(lora_site.Site):
    """Where an adapter can go in an NNX model: the module, and its path in the model.

    depths: where in the path the numbers of stacked layers are inserted to make their names.
    axis: of the stack in each parameter.
    """

    path: tuple[str | int, ...]
    module: nnx.Module
    depths: tuple[int, ...] = ()
    axis: int = 0

    @property
    def weight(self) -> nnx.Variable:
        """The variable that holds the dense weight."""
        return registry.weight_of(self.module)

    def matrix(self) -> jax.Array:
        """The dense weight as matrices [*lead, K, N]."""
        return placement.matrix(self.linear_map, jnp.moveaxis(self.weight[...], self.axis, 0))

    def begin(self, kind: type[mixin.Mixin]) -> nnx.Module:
        """Makes the layer an instance of `kind`, too, and returns it."""
        mixin.become(self.module, kind, registry.registration_of(type(self.module)).cls)
        return self.module

    def end(self, kind: type[mixin.Mixin], *added: str) -> None:
        """The inverse of `begin`; also deletes the attributes `added`."""
        mixin.leave(self.module, kind, *added)

    def each(self, function: Callable, *arrays: jax.Array) -> jax.Array:
        """function(W, *arrays) for every layer of the site, one at a time; W [K, N] is dense."""
        if quantized := quant_linear.packed_of(self.module):
            how = {"function": function, "fmt": quantized.fmt, "rows": quantized.in_features}
            return lora_site.each(_of_packed, self.lead, quantized.packed, *arrays, **how)
        return lora_site.each(function, self.lead, self.matrix(), *arrays)

    def set_matrix(self, matrix: jax.Array) -> None:
        """Gives the layer a new variable, which holds the dense weight with that matrix.

        Other layers, and other models that nnx.merge made from a split of this one, may hold the
        old one.
        """
        weight, how = self.weight.copy(), self.linear_map
        new = placement.tensor(how, matrix, jnp.moveaxis(weight[...], self.axis, 0))
        weight.set_value(jnp.moveaxis(new, 0, self.axis).astype(weight.dtype))
        self._hold(weight)

    def _hold(self, weight: nnx.Variable) -> None:
        setattr(self.module, registry.registration_of(type(self.module)).weight, weight)


def _of_packed(packed, *arrays, function, fmt, rows):
    return function(formats.dequantize(packed, fmt, rows), *arrays)


def weight_shape(layer: nnx.Module) -> tuple[int, ...]:
    """The shape of the layer's weight when dense, with the axis of a stack first."""
    if isinstance(layer, quant_linear.QuantLayer):
        return layer.quantized_shape
    if isinstance(layer, quant_linear.QuantLinear):
        return (*layer.q.shape[:-2], layer.in_features, layer.out_features)
    shape, axis = registry.weight_of(layer).shape, axis_of(layer)
    return (shape[axis], *shape[:axis], *shape[axis + 1 :]) if axis else shape


def axis_of(layer: nnx.Module) -> int:
    """The axis of the stack in each parameter of the layer."""
    if packed := quant_linear.packed_of(layer):
        return packed.axis
    return registry.stack_axis(layer, registry.weight_of(layer))


def find(model: nnx.Module) -> Iterator[Site]:
    """Every site of the model, with or without an adapter, in the order of their paths."""
    shapes, scaled = Shapes(model), wrappers.scaled(model)
    for path, node in sorted(nnx.iter_graph(model), key=lambda item: places.dotted(item[0])):
        inside = "modules_to_save" in path or "quantized" in path  # part of another module found
        known = registry.registration_of(type(node))
        if inside or known is None or registry.problem(node) or _misfit(node):
            continue
        shape, how = weight_shape(node), registry.linear_map_of(node)
        axis, stacked = axis_of(node), shape[: len(shape) - how.ndim]
        depths, lead = stack_depths(shapes, path, stacked, axis), how.lead(shape)
        in_features, out_features = how.sizes(shape)
        yield Site(
            path=path,
            module=node,
            depths=depths,
            axis=axis,
            names=tuple(numbered(path, depths, index) or known.reads or known.weight
                        for index in np.ndindex(*lead)),
            lead=lead,
            linear_map=how,
            in_features=in_features,
            out_features=out_features,
            problem=scaled.get(id(node), ""),
        )  # fmt: skip


def with_aliases(model: nnx.Module) -> Iterator[tuple[Site, list[tuple[str, ...]]]]:
    """(site, its other names) of every site: a module may be in several places of the model."""
    everywhere = places.find(model)
    outer = [(path, place.path) for path, node in nnx.iter_graph(model)
             for place in everywhere[id(node)]
             if isinstance(node, nnx.Module) and place.path != path]  # fmt: skip
    for site in find(model):
        aliases = []
        for path, other in outer:
            if site.path[: len(path)] == path:
                longer = len(other) - len(path)
                depths = tuple(d + longer if d >= len(path) else d for d in site.depths)
                moved = (*other, *site.path[len(path) :])
                indices = np.ndindex(*site.lead)
                aliases.append(tuple(numbered(moved, depths, index) for index in indices))
        yield site, aliases


def renamed(site: Site, aliases: Sequence[tuple[str, ...]], config: lora_config.LoRAConfig) -> Site:
    """The site by the first of its names that `config` targets."""
    for names in (site.names, *aliases):
        if any(targets.is_chosen(name, config) for name in names):
            return dataclasses.replace(site, names=names)
    return site


def others(model: nnx.Module) -> dict[str, targets.Layer]:
    """{path: layer} of the layers unlike their registration, and of modules that are no layers.

    Only modules that have parameters of their own.
    """
    nodes = list(nnx.iter_graph(model))
    modules = {path: node for path, node in nodes if isinstance(node, nnx.Pytree)}
    known = {path for path, node in modules.items()
             if registry.registration_of(type(node)) and not registry.problem(node)}  # fmt: skip
    owners = {path[:-1] for path, node in nodes if isinstance(node, nnx.Param)} & modules.keys()
    return {
        places.dotted(path): _unregistered(path, modules[path])
        for path in owners
        if path and not any(path[:n] in known for n in range(len(path) + 1))
    } | {
        places.dotted(path): targets.Layer("linear", problem=misfit)
        for path in known
        if (misfit := _misfit(modules[path]))
    }


def _unregistered(path: tuple[str | int, ...], module: nnx.Pytree) -> targets.Layer:
    """A module that is no layer, and its parameters that may be targeted instead."""
    found = lora_site.unregistered(type(module).__name__)
    if registry.registration_of(type(module)):
        found = found._replace(problem=registry.problem(module))
    parts = {} if isinstance(module, nnx.List) else vars(module)
    own = [places.dotted((path[-1], name)) for name, part in parts.items()
           if registry.is_base_param(part) and part.ndim > 1]  # fmt: skip
    return found._replace(problem=f"{found.problem}; target {', '.join(own)}") if own else found


def _misfit(layer: nnx.Module) -> str:
    """How a layer differs from its registration; "" if it does not."""
    name = registry.registration_of(type(layer)).weight
    if not isinstance(layer, quant_linear.QuantLayer) and name not in vars(layer):
        return f"has no {name!r}, which {type(layer).__name__} is registered to hold its weight in"
    return lora_site.misfit(registry.linear_map_of(layer), weight_shape(layer))


def numbered(path: tuple, depths: tuple[int, ...], index: tuple[int, ...]) -> str:
    """The dotted path of one layer of a stack: numbers at `depths`, any further numbers last."""
    parts = list(path)
    for depth, number in reversed(list(zip(depths, index, strict=False))):
        parts.insert(depth, number)
    return places.dotted((*parts, *index[len(depths) :]))


class Shapes(dict):
    """The shapes of all parameters below each path of a model, read once."""

    def __init__(self, model: nnx.Module):
        self.model = model

    def __missing__(self, path: tuple) -> list[tuple[int, ...]]:
        module = places.at(self.model, path)
        if isinstance(module, nnx.Variable):
            return [module.shape]
        # Not packed words, whose stack is on the first axis whatever that of the parameters is.
        params = jax.tree.leaves(nnx.state(module, nnx.Param))
        self[path] = [leaf.shape for leaf in params]
        return self[path]


def stack_depths(
    shapes: Shapes, path: tuple, stacked: tuple[int, ...], axis: int
) -> tuple[int, ...]:
    """For each axis of a stack, the length of the part of `path` that is the stack.

    It is the shortest part below which all arrays have the axis. A module with a single child is no
    stack itself, so that it does not matter what else is in the model.
    """
    depths, depth = [], 0
    for number, size in enumerate(stacked, axis):
        while depth < len(path) and (
            any(shape[number : number + 1] != (size,) for shape in shapes[path[:depth]])
            or len(shapes[path[:depth]]) == len(shapes[path[: depth + 1]])
        ):
            depth += 1
        depths.append(depth)
    return tuple(depths)
