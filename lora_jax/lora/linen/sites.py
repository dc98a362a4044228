"""The weights of a Flax Linen model that LoRA can adapt: found by tracing calls of it."""

import collections
import dataclasses
import functools
import itertools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import core, traverse_util
from flax import linen as nn
from jaxtyping import Array, Num

from lora_jax import errors
from lora_jax.layers import linear_map, places
from lora_jax.lora import site as lora_site
from lora_jax.lora import targets
from lora_jax.lora.linen import bridged, products, registry, tracing

Path = tuple[str | int, ...]  # with numbers in an NNX module
KERNEL = "kernel"  # a layer's weight, as Flax calls it
Params = Mapping[str, Any]  # nested, as the collections of a Linen model are


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
    return survey(module, calls_of(args, kwargs)).sites


def calls_of(args: tuple, kwargs: Mapping[str, Any]) -> tuple[tracing.Call, ...]:
    """The example calls: `args` if they are Calls, otherwise the one with these arguments."""
    several = [isinstance(arg, tracing.Call) for arg in args]
    if any(several) and not (all(several) and not kwargs):
        raise errors.UserError(
            expected="the arguments of one call of the model, or a Call for each",
            found="both",
            do='linen.Call(x, method="encode"), linen.Call(z, method="decode")',
        )
    return args if any(several) else (tracing.Call(*args, **kwargs),)


class _Seen(NamedTuple):
    """A parameter in a call: its shape there, and how a layer multiplies by it."""

    shape: tuple[int, ...]
    cls: str
    how: linear_map.LinearMap | None = None
    sure: bool = False  # the call that was seen is the one that is registered
    alone: bool = True  # it is the only weight that its class has
    bias: str = ""
    name: str | None = None  # of the layer


def survey(module: nn.Module, calls: Sequence[tracing.Call]) -> Survey:
    """The sites, the other modules and the shapes of a model that is called in these ways."""
    seen: dict[Path, _Seen] = {}
    problems: dict[Path, str] = {}
    variables: Params = {}
    for call in calls:
        own = tracing.shapes(module, call, functools.partial(_record, seen, problems))
        variables = _united(variables, core.unfreeze(own))
    flat = traverse_util.flatten_dict(tracing.unboxed(variables.get("params", {})))
    num_layers = collections.Counter(key[:-1] for key, own in seen.items() if own.how)
    sites = []
    for key, parameter in sorted(flat.items()):
        path, found = key[:-1], seen.get(key) or _Seen(parameter.shape, "unknown")
        if found.how is None and len(found.shape) < 2:
            continue
        axes = _axes(module, calls, variables, key, found.shape)
        if axes is None:  # it has another shape in each call
            found, axes = _Seen(parameter.shape, found.cls), ()
        is_layer = found.how or (path and key[-1] == KERNEL)
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


def _record(seen, problems, call, args, kwargs, context):
    """Notes the parameters that the called module has, as an interceptor."""
    y, layer = call(*args, **kwargs), context.module
    if not tracing.is_own(layer):
        return y
    known, cls = registry.registration_of(type(layer)), type(layer).__name__
    params = nn.meta.unbox(dict(layer.variables.get("params", {})))
    if bridged.is_bridge(layer):
        _record_bridged(seen, layer, params)
        return y
    if context.method_name == "__call__":
        missing = [own.name for own in known.weights if own.name not in params] if known else []
        lacks = f"holds a {cls} without its registered parameter {', '.join(map(repr, missing))}"
        own = lacks if missing else lora_site.unregistered(cls).problem
        problems.setdefault(layer.path, own)
    registered = {own.name for own in known.weights} if known else set()
    inferred = {}
    if context.method_name == "__call__":
        inferred = _inferred(layer, params, registered, args, kwargs)
    biases = {own.bias for own in (*(known.weights if known else ()), *inferred.values())}
    for name, array in params.items():
        if not hasattr(array, "shape"):
            continue
        key, new = (*layer.path, name), _Seen(() if name in biases else array.shape, cls)
        weight = known and next((own for own in known.weights if own.name == name), None)
        if weight:
            how, sure = _how(known, weight, context, args, kwargs)
            if how is None and sure:
                problems[layer.path] = "has an einsum that is not a product with a matrix"
            elif how is not None and len(array.shape) >= how.ndim:
                alone = len(known.weights) == 1
                new = _Seen(array.shape, cls, how, sure, alone, weight.bias, layer.name)
        elif own := inferred.get(name):
            new = _Seen(array.shape, cls, own.how, True, True, own.bias, layer.name)
        _note(seen, key, new)
    return y


def _note(seen, key, new: _Seen) -> None:
    old = seen.get(key)
    # What surrounds a stack sees the whole of it.
    if old is None or (-len(new.shape), new.sure, new.how is not None) > (
        -len(old.shape), old.sure, old.how is not None,
    ):  # fmt: skip
        seen[key] = new


def _record_bridged(seen, layer, params):
    """Notes the parameters of an NNX module. Its layers' calls are not seen."""
    found = bridged.weights(layer)
    biases = {(*path[:-1], own.bias) for path, own in found.items()}
    for path, array in traverse_util.flatten_dict(params).items():
        own = found.get(path, bridged.Weight(type(layer).__name__))
        shape = () if path in biases else array.shape
        _note(seen, (*layer.path, *path), _Seen(shape, own.cls, own.how, bias=own.bias))


def _inferred(layer, params, registered, args, kwargs) -> dict[str, products.Inferred]:
    """The weights of a layer that are not registered, and with which its call is a product."""
    params = {name: array for name, array in params.items() if hasattr(array, "shape")}
    weights = [name for name, array in params.items()
               if name not in registered and array.ndim > 1]  # fmt: skip
    if not weights:
        return {}
    method = tracing.function_of(type(layer), "__call__")
    args, kwargs = registry.bound(method, layer, args, kwargs)
    found = {name: products.inferred(layer, params, name, args, kwargs) for name in weights}
    return {name: own for name, own in found.items() if own is not None}


def _how(known, weight, context, args, kwargs):
    """(the linear map of a layer in this call or None, whether the call is the registered one)."""
    sure = context.orig_method.func is tracing.function_of(known.cls, "__call__")
    try:
        if sure:
            args, kwargs = registry.bound(context.orig_method.func, context.module, args, kwargs)
        return weight.linear_map_of(context.module, *args, **kwargs), sure
    except errors.UserError:  # the einsum is not a product with a matrix
        return None, sure
    except (TypeError, AttributeError):
        if sure:
            raise
        return None, False  # a subclass or another method, with other arguments


def _site(key, at, found: _Seen, whole, axes, flat) -> Site:
    how = found.how or linear_map.LINEAR
    lead, inner = tuple(whole[axis] for axis in axes), how.lead(found.shape)
    depth = _depth(flat, at, lead, axes)
    k, n = how.sizes(found.shape)
    names = tuple(numbered(at, depth, index[: len(lead)], index[len(lead) :]) or key[-1]
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


def _axes(module, calls, variables, key, shape) -> tuple[int, ...] | None:
    """The axes of the stack in a parameter, by its shape in a call.

    Where the sizes do not tell, an array of other sizes is put beside it. The model slices that as
    it slices the parameter, and fails at any other axis.
    """
    flat = traverse_util.flatten_dict(tracing.unboxed(variables["params"]))
    stack = flat[key].shape
    candidates = [
        axes for axes in itertools.combinations(range(len(stack)), max(len(stack) - len(shape), 0))
        if tuple(size for axis, size in enumerate(stack) if axis not in axes) == shape
    ]  # fmt: skip
    if len(candidates) == 1:
        return candidates[0]
    probe = (*key[:-1], "lora_probe")
    for axes in candidates:
        sizes = iter(size + max(stack) for size in shape)
        own = tuple(stack[i] if i in axes else next(sizes) for i in range(len(stack)))
        given = {**flat, probe: jax.ShapeDtypeStruct(own, jnp.float32)}
        expected = tuple(size for i, size in enumerate(own) if i not in axes)
        found: set[tuple[int, ...]] = set()

        def look(run, args, kwargs, context, found=found):
            layer = context.module
            if tracing.is_own(layer) and layer.path == key[:-1]:
                found |= {leaf.shape for name, leaf in layer.variables["params"].items()
                          if name == "lora_probe"}  # fmt: skip
            return run(*args, **kwargs)

        for call in calls:
            try:
                tracing.program(module, given, variables, call, look)
            except Exception:  # of Flax or JAX: the sizes do not fit
                found.clear()
        if found == {expected}:
            return axes
    return None


def _depth(flat: Mapping[Path, Any], at: Path, lead, axes) -> int | None:
    """The length of the shortest part of `at` below which all parameters are stacked."""
    if not lead:
        return None

    def stacked(shape):
        return len(shape) > max(axes) and tuple(shape[axis] for axis in axes) == lead

    for depth in range(len(at)):
        if all(stacked(p.shape) for path, p in flat.items() if path[:depth] == at[:depth]):
            return depth
    return len(at)


def numbered(path: Path, depth: int | None, lead: tuple[int, ...], batch: tuple[int, ...]) -> str:
    """The dotted path of one layer: its number in the stack at `depth`, that in the batch last."""
    parts = path if depth is None else (*path[:depth], *map(str, lead), *path[depth:])
    return places.dotted((*parts, *batch))


def _united(one: Params, other: Params) -> Params:
    """Both trees in one."""
    both = {**traverse_util.flatten_dict(one), **traverse_util.flatten_dict(other)}
    return traverse_util.unflatten_dict(both)
