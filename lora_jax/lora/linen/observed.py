"""What calls of a Linen model show of its parameters: shapes, and how layers multiply by them."""

from typing import NamedTuple

from flax import linen as nn
from flax import traverse_util

from lora_jax import errors
from lora_jax.layers import linear_map
from lora_jax.lora import site as lora_site
from lora_jax.lora.linen import bridged, products, registry, tracing


class Seen(NamedTuple):
    """A parameter in a call: its shape there, and how a layer multiplies by it."""

    shape: tuple[int, ...]
    cls: str
    how: linear_map.LinearMap | None = None
    sure: bool = False  # the call that was seen is the one that is registered
    alone: bool = True  # it is the only weight that its class has
    bias: str = ""
    name: str | None = None  # of the layer


def record(seen, problems, call, args, kwargs, context):
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
        key, new = (*layer.path, name), Seen(() if name in biases else array.shape, cls)
        weight = known and next((own for own in known.weights if own.name == name), None)
        if weight:
            how, sure = _how(known, weight, context, args, kwargs)
            if how is None and sure:
                problems[layer.path] = "has an einsum that is not a product with a matrix"
            elif how is not None and len(array.shape) >= how.ndim:
                alone = len(known.weights) == 1
                new = Seen(array.shape, cls, how, sure, alone, weight.bias, layer.name)
        elif own := inferred.get(name):
            new = Seen(array.shape, cls, own.how, True, True, own.bias, layer.name)
        _note(seen, key, new)
    return y


def _note(seen, key, new: Seen) -> None:
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
        _note(seen, (*layer.path, *path), Seen(shape, own.cls, own.how, bias=own.bias))


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
