"""A call of a Flax Linen layer whose weight is quantized or adapted."""

import collections
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
from flax import linen as nn

from lora_jax.kernels import packed as packing
from lora_jax.layers import linear_map
from lora_jax.lora import algebra
from lora_jax.lora import site as lora_site
from lora_jax.lora.linen import bridged, products, registry, tracing
from lora_jax.lora.linen.sites import Site
from lora_jax.lora.linen.tracing import Path
from lora_jax.lora.linen.weights import PACKED, WAS
from lora_jax.quant import product as packed_product


class Product(NamedTuple):
    """A call of a layer that is a product with its weight, plus a bias.

    args, kwargs: of the call, by position where they can be. x: the input, which is args[input].
    own: the layer's parameters, and what lies beside them. bias: the name of the parameter.
    """

    how: linear_map.LinearMap
    cls: type[nn.Module]
    args: Sequence[Any]
    kwargs: Mapping[str, Any]
    input: int
    own: Mapping[str, Any]
    bias: str
    attends: bool = False

    @property
    def x(self) -> jax.Array:
        return self.args[self.input]


def product(
    site: Site, context: nn.module.InterceptorContext, args: tuple, kwargs: Mapping[str, Any]
) -> Product | None:
    """What the call is if it is declared to be a product with the site's weight; or None."""
    layer = context.module
    known, method = registry.registration_of(type(layer)), context.orig_method.func
    # With nn.share_scope, several modules have the same path.
    if type(layer).__name__ != site.cls or (site.at != site.path and layer.name != site.name):
        return None
    if bridged.is_bridge(layer):
        return None
    is_registered = known and site.weight in {own.name for own in known.weights}
    if site.raw or (is_registered and not known.multiplies):
        return None
    if not is_registered:  # it was seen to be a product
        known = registry.Registration(type(layer), (_inferred(site),))
    (weight,), own = known.weights, nn.meta.unbox(dict(layer.variables.get("params", {})))
    own |= own.get(site.beside[-1], {}) if site.beside != site.path else {}
    if isinstance(layer, nn.Embed) and method is tracing.function_of(nn.Embed, "attend"):
        given, named = registry.bound(method, layer, args, kwargs)
        return Product(site.linear_map, known.cls, given, named, 0, own, "", True)
    if method is not tracing.function_of(known.cls, "__call__"):
        return None
    given, named = registry.bound(method, layer, args, kwargs)
    input = weight.input if is_registered else products.input_of(given)
    if input is None or len(given) <= input:  # x is an argument by keyword only
        return None
    how = weight.linear_map_of(layer, *given, **named)
    if how != site.linear_map or not hasattr(given[input], "dtype"):
        return None
    return Product(how, known.cls, given, named, input, own, weight.bias)


def _inferred(site: Site) -> registry.Weight:
    return registry.Weight(lambda *_: site.linear_map, site.weight, site.bias)


def is_product(site: Site, layer: nn.Module, found: Product) -> bool:
    """Whether the layer's code does what `found` says. It is traced, not computed."""
    plain = {name: array for name, array in found.own.items() if hasattr(array, "shape")}
    bias = plain.get(found.bias)
    if bias is not None and bias.size != site.num_outputs:
        return False
    names = site.weight, found.bias
    call = found.args, found.input, found.kwargs
    return products.is_product(found.how, layer, found.cls, plain, names, *call)


def interceptor(sites: Sequence[Site], fmt: str, dropout: float) -> Callable:
    """A function for nn.intercept_methods, which computes with what lies beside a layer's weight.

    sites: those whose weight is read only by calls that are products with it. fmt: the format of
    packed weights. dropout: the rate.
    """
    by_path = of_paths(sites)

    def intercept(call, args, kwargs, context):
        layer = context.module
        at_path = by_path.get(layer.path, ()) if tracing.is_own(layer) else ()
        called = ((site, product(site, context, args, kwargs)) for site in at_path)
        site, found = next(((site, own) for site, own in called if own), (None, None))
        if not found or ("lora_A" not in found.own and PACKED not in found.own):
            return call(*args, **kwargs)
        if found.attends:
            factors = _factors(found.own)
            return algebra.attended(call, found.own[site.weight], found.x, factors)
        return _computed(call, args, kwargs, layer, site, found, fmt, dropout)

    return intercept


def of_paths(sites: Sequence[Site]) -> dict[Path, list[Site]]:
    """The sites at each path; modules that share a scope have several."""
    found: dict[Path, list[Site]] = collections.defaultdict(list)
    for site in sites:
        found[site.path].append(site)
    return found


def _computed(call, args, kwargs, layer, site, found, fmt, dropout):
    own, how, x = found.own, found.how, found.x
    bias = own.get(found.bias)
    if PACKED in own:
        arrays = own[PACKED]
        packed = packing.Packed(**{name: arrays.get(name) for name in packing.Packed._fields})
        weight = packed_product.multiplier(packed, fmt)
        dense = {name: own[name] for name in (found.bias,) if name in own}
        dense[site.weight] = jax.ShapeDtypeStruct(site.shape, arrays[WAS].dtype)
        call_of_layer = found.args, found.input, found.kwargs
        x = x.astype(products.result(layer, found.cls, dense, *call_of_layer).dtype)
        y = packed_product.multiply(how, x, weight, shape=site.shape, bias=bias)
    else:
        weight, y = own[site.weight], call(*args, **kwargs)
        if site.kind != "embedding":
            x = x.astype(y.dtype)
    if "lora_A" not in own:
        return y
    dropped = x
    if "lora_dropout_key" in own:
        dropped = lora_site.dropped(own["lora_dropout_key"], dropout, x)
    factors = _factors(own)
    y = algebra.output(
        how,
        site.shape,
        x,
        y,
        factors,
        dropped=dropped,
        weight=weight,
        square=own.get("lora_square"),
        bias=bias,
    )
    if "lora_bias" not in own:
        return y
    mask = own["lora_mask"].max(axis=-2) if "lora_mask" in own else 1
    return algebra.with_bias(how, site.shape, y, own["lora_bias"] * mask, factors[2])


def _factors(own: Mapping[str, Any]) -> tuple[jax.Array, ...]:
    """A, B, the scaling, and with DoRA the magnitude."""
    B = own["lora_B"] * own["lora_mask"] if "lora_mask" in own else own["lora_B"]
    magnitude = [own[name] for name in ("lora_magnitude_vector",) if name in own]
    return (own["lora_A"], B, own["lora_scaling"], *magnitude)
