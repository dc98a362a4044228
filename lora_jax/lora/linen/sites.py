"""The weights of a Flax Linen model that LoRA can adapt: found by tracing calls of it."""

import collections
import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import core, traverse_util
from flax import linen as nn
from jaxtyping import Array, Num

from lora_jax.layers import linear_map, places
from lora_jax.lora import site as lora_site
from lora_jax.lora import targets
from lora_jax.lora.linen import observed, stacks, tracing
from lora_jax.lora.linen.tracing import Params, Path

_KERNEL = "kernel"  # a layer's weight, as Flax calls it


@dataclasses.dataclass(frozen=True, kw_only=True)
class Site(lora_site.Site):
    """Where an adapter can go in a Linen model: a weight, or a stack of them, in one parameter.

    path: of the module in params. weight, shape: the name of the weight, and its shape in a call.
    at: where the adapter's arrays are: at the path of a layer, or below it at the name of a weight
    that is not a layer's only one. axes: the axes of the stack in the parameter; the first ones,
    unless nn.scan uses others. depth: where in `at` the number of a stacked layer is inserted.
    stack: the sizes of the stack's axes. raw: whether how it is used is not known, so that it is
    seen as [*lead, K, N]. bias: the parameter that the layer adds. cls, name: of the layer; modules
    that share a scope have one path.
    """

    path: Path
    at: Path
    weight: str
    shape: tuple[int, ...]
    axes: tuple[int, ...]
    depth: int | None
    stack: tuple[int, ...]
    raw: bool
    bias: str
    cls: str
    name: str | None

    @property
    def key(self) -> Path:
        """The path of the parameter."""
        return (*self.path, self.weight)

    @property
    def beside(self) -> Path:
        """Where the adapter's arrays are in params when the model runs."""
        return self.path if self.at == self.path else (*self.path, f"{self.weight}_lora")

    @property
    def of_bias(self) -> Path:
        """The path of the bias that the layer adds, if it has one."""
        return (*self.path, self.bias)

    @property
    def whole(self) -> tuple[int, ...]:
        """The shape of the parameter."""
        stacked = jax.ShapeDtypeStruct((*self.stack, *self.shape), jnp.float32)
        return jax.eval_shape(self.in_params, stacked).shape

    @property
    def is_slice(self) -> bool:
        """Whether any array [*stack, …] beside the weight is sliced as the weight is."""
        return max(self.axes, default=0) <= len(self.axes)

    @property
    def num_outputs(self) -> int:
        """N, of all the matrices of one layer."""
        return int(np.prod(self.linear_map.lead(self.shape))) * self.out_features

    def in_params(self, array: Num[Array, "..."]) -> Num[Array, "..."]:
        """An array whose first axes are the stack's, with its axes ordered as in params."""
        return jnp.moveaxis(array, range(len(self.axes)), self.axes) if any(self.axes) else array

    def out_of_params(self, array: Num[Array, "..."]) -> Num[Array, "..."]:
        """The inverse of `in_params`."""
        return jnp.moveaxis(array, self.axes, range(len(self.axes))) if any(self.axes) else array


class Survey(NamedTuple):
    """What is in a model.

    others: the modules that have parameters and are no layers, by path. variables: the shapes of
    its variables, with their boxes.
    """

    sites: tuple[Site, ...]
    others: dict[str, targets.Layer]
    variables: Mapping[str, Any]


def find(module: nn.Module, *args: Any, **kwargs: Any) -> tuple[Site, ...]:
    """Every site of `module`, as it is called by `module(*args, **kwargs)`; see `adapt`.

    args: arrays, or their shapes; nothing is computed.
    """
    return survey(module, tracing.calls_of(args, kwargs)).sites


def survey(module: nn.Module, calls: Sequence[tracing.Call]) -> Survey:
    """The sites, the other modules and the shapes of a model that is called in these ways."""
    seen: dict[Path, observed.Seen] = {}
    problems: dict[Path, str] = {}
    variables: Params = {}
    for call in calls:
        own = tracing.shapes(module, call, functools.partial(observed.record, seen, problems))
        variables = _united(variables, core.unfreeze(own))
    flat = traverse_util.flatten_dict(tracing.unboxed(variables.get("params", {})))
    num_layers = collections.Counter(key[:-1] for key, own in seen.items() if own.how)
    sites = []
    for key, parameter in sorted(flat.items()):
        path, found = key[:-1], seen.get(key) or observed.Seen(parameter.shape, "unknown")
        if found.how is None and len(found.shape) < 2:
            continue
        axes = stacks.axes(module, calls, variables, key, found.shape)
        if axes is None:  # it has another shape in each call
            found, axes = observed.Seen(parameter.shape, found.cls), ()
        is_layer = found.how or (path and key[-1] == _KERNEL)
        at = path if is_layer and found.alone and num_layers[path] <= 1 else key
        sites.append(_site(key, at, found, parameter.shape, axes, flat))
    layers = {site.path for site in sites if not site.raw or site.at == site.path}
    owners = {path[:-1] for path in flat} - {()}
    others = {}
    for path in owners - layers:
        own = sorted(places.dotted(site.key) for site in sites if site.path == path)
        why = problems.get(path, lora_site.unregistered("unknown").problem)
        layer = targets.Layer(
            "", problem=f"{why}; its weights are {', '.join(own)}" if own else why
        )
        others[places.dotted(path)] = layer
    return Survey(tuple(sites), others, variables)


def _site(key, at, found: observed.Seen, whole, axes, flat) -> Site:
    how = found.how or linear_map.LINEAR
    lead, inner = tuple(whole[axis] for axis in axes), how.lead(found.shape)
    depth = stacks.depth(flat, at, lead, axes)
    k, n = how.sizes(found.shape)
    names = tuple(stacks.numbered(at, depth, index[: len(lead)], index[len(lead) :]) or key[-1]
                  for index in np.ndindex(*lead, *inner))  # fmt: skip
    return Site(
        names=names,
        lead=(*lead, *inner),
        linear_map=how,
        in_features=k,
        out_features=n,
        path=key[:-1],
        at=at,
        weight=key[-1],
        shape=found.shape,
        axes=axes,
        depth=depth,
        stack=lead,
        raw=found.how is None,
        bias=found.bias,
        cls=found.cls,
        name=found.name,
    )


def _united(one: Params, other: Params) -> Params:
    """Both trees in one."""
    both = {**traverse_util.flatten_dict(one), **traverse_util.flatten_dict(other)}
    return traverse_util.unflatten_dict(both)
