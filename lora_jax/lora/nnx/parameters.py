"""Adapters on parameters that a module of any class holds itself, such as `self.wq`.

Nothing is known of how the module computes with such a parameter. So where the module reads it, it
gets W + scaling · A B. What belongs to the adapter is in a module of its own beside the parameter,
`wq_lora`. PEFT calls such targets target_parameters.
"""

import dataclasses
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
from flax import nnx

from lora_jax import errors
from lora_jax.layers import linear_map, mixin, places, registry, weight, wrappers
from lora_jax.layers import parameters as layers
from lora_jax.lora import config as lora_config
from lora_jax.lora import targets
from lora_jax.lora.nnx import layer as lora_layer
from lora_jax.lora.nnx import sites


class Companion(lora_layer.LoRALayer):
    """The arrays of an adapter on a parameter of another module, which holds this. Never called.

    inner: the path of the parameter in that module.
    """

    def __init__(self, inner: layers.Path, how: linear_map.LinearMap):
        self.inner, self.linear_map = inner, how

    __reduce__ = object.__reduce__  # unlike the classes of `become`, pickle finds this one

    @classmethod
    def mixin_attributes(cls, original: type[nnx.Module]) -> dict[str, Any]:
        return {}

    def changed(self, stored: nnx.Variable) -> weight.Computed:
        """W + scaling · A B, in place of the parameter."""

        def compute():
            lora_layer.check_readable(self, "parameter")
            own = lora_layer.arrays(self)
            return lora_layer.merged_tensor(self.linear_map, stored[...], own)

        return weight.Computed(stored.shape, stored.dtype, compute)


class Owner(mixin.Mixin):
    """A module that reads W + scaling · A B in place of each adapted parameter of its own."""

    def __getattribute__(self, name: str) -> Any:
        value = super().__getattribute__(name)
        if isinstance(value, nnx.Variable):
            companion = vars(self).get(_beside(name))
            if companion is not None and weight.is_read_as_changed(self):
                return companion.changed(value)
        return value


class Bridge(mixin.Mixin):
    """A Linen module in nnx.bridge.ToNNX, which is applied to W + scaling · A B."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        stored = []
        try:
            for companion in list(vars(self).values()):
                if isinstance(companion, Companion):
                    holder, name = _holder(self, companion.inner)
                    stored.append((holder, name, holder[name]))
                    holder[name] = holder[name].replace(companion.changed(holder[name]).value)
            return super().__call__(*args, **kwargs)
        finally:
            for holder, name, variable in stored:
                holder[name] = variable


@dataclasses.dataclass(frozen=True, kw_only=True)
class ParameterSite(sites.Site):
    """A parameter with or without an adapter. `module` is its Companion, at `path`."""

    owner: nnx.Pytree

    @property
    def weight(self) -> nnx.Variable:
        holder, name = _holder(self.owner, self.module.inner)
        return holder[name]

    def _hold(self, weight: nnx.Variable) -> None:
        holder, name = _holder(self.owner, self.module.inner)
        holder[name] = weight

    def begin(self, kind: type[mixin.Mixin]) -> nnx.Module:
        setattr(self.owner, str(self.path[-1]), self.module)
        if not isinstance(self.owner, Owner | Bridge):
            mixin.become(self.owner, Bridge if layers.is_bridge(self.owner) else Owner)
        return self.module

    def end(self, kind: type[mixin.Mixin], *added: str) -> None:
        delattr(self.owner, str(self.path[-1]))
        if not any(isinstance(own, Companion) for own in vars(self.owner).values()):
            mixin.leave(self.owner, Bridge if layers.is_bridge(self.owner) else Owner)


def find(model: nnx.Module, config: lora_config.LoRAConfig) -> Iterator[ParameterSite]:
    """The parameters that `config` targets by name, and the kernels of Linen modules."""
    for site in _all(model):
        is_kernel = site.module.inner[-1] == "kernel" and site.weight.ndim == 2
        bridged = layers.is_bridge(site.owner) and is_kernel
        named = not isinstance(config.targets, str)  # patterns are of modules, as in PEFT
        if (named or bridged) and any(targets.is_chosen(name, config) for name in site.names):
            if config.lora_bias:
                site = dataclasses.replace(site, problem="is no layer, to add lora_bias to")
            yield site


def adapted(model: nnx.Module) -> Iterator[ParameterSite]:
    """The parameters that have an adapter."""
    return (site for site in _all(model) if lora_layer.is_adapted(site.module))


def others(model: nnx.Module, found: Iterable[sites.Site]) -> dict[str, targets.Layer]:
    """{path: layer} of the parameters that are not `found`: those that could be targeted."""
    taken = {name for site in found for name in site.names}
    return {
        name: targets.Layer("parameter", site.in_features, site.out_features)
        for site in _all(model) for name in site.names if name not in taken
    }  # fmt: skip


def _all(model: nnx.Module) -> Iterator[ParameterSite]:
    shapes, scaled = sites.Shapes(model), wrappers.scaled(model)
    for parameter in layers.find(model):
        is_attribute = [type(key) for key in parameter.inner] == [str]  # and not part of a list
        if is_attribute or parameter.is_bridged:
            yield _site(parameter, shapes, scaled.get(id(parameter.owner), ""))


def _site(parameter: layers.Parameter, shapes: sites.Shapes, problem: str) -> ParameterSite:
    path, variable, owner, at = parameter
    inner, shape = parameter.inner, variable.shape
    how = registry.parameters_of(type(owner)).get(inner[-1]) or _own_einsum(owner, shape)
    name, beside = path, _beside(str(inner[-1]))
    if parameter.is_bridged:
        beside = f"to_nnx__lora_{'_'.join(map(str, inner))}"
        name = path[:-1] if inner[-1] in ("kernel", "embedding") else path
        if len(shape) > 2 and inner[-1] == "kernel":
            how = linear_map.Conv(linear_map.unknown, tuple(shape[:-2]))
    found, lead = vars(owner).get(beside), how.lead(shape)
    depths = sites.stack_depths(shapes, name, shape[: len(shape) - how.ndim], 0)
    in_features, out_features = how.sizes(shape)
    return ParameterSite(
        path=(*at, beside),
        module=Companion(inner, how) if found is None else found,
        depths=depths,
        names=tuple(sites.numbered(name, depths, index) for index in np.ndindex(*lead)),
        lead=lead,
        linear_map=how,
        in_features=in_features,
        out_features=out_features,
        problem=problem,
        owner=owner,
    )


def _holder(owner: nnx.Pytree, inner: layers.Path) -> tuple[dict[str, Any], str]:
    """(the dict, the key) where the owner holds the parameter of that path."""
    *outer, name = inner
    return (places.at(vars(owner), tuple(outer)) if outer else vars(owner)), name


def _own_einsum(owner: nnx.Pytree, shape: tuple[int, ...]) -> linear_map.LinearMap:
    """How the einsum multiplies that the owner names as nnx.Einsum does; x · W if there is none.

    It says only which axes are K and N, and holds for whatever the owner computes.
    """
    equation = getattr(owner, "einsum_str", None)
    try:
        how = linear_map.parse(equation) if isinstance(equation, str) else linear_map.LINEAR
    except errors.UserError:  # not a product with a matrix
        return linear_map.LINEAR
    return how if len(shape) == how.ndim else linear_map.LINEAR


def _beside(name: str) -> str:
    return f"{name}_lora"
