"""A call of a Flax Linen layer whose weight is quantized or adapted."""

import inspect
from collections.abc import Callable, Sequence

import jax.numpy as jnp
from flax import linen as nn

from lora_jax.kernels import packed as packing
from lora_jax.lora import algebra
from lora_jax.lora import site as lora_site
from lora_jax.lora.linen import registry
from lora_jax.lora.linen.sites import Site
from lora_jax.lora.linen.weights import PACKED
from lora_jax.quant import product


def interceptor(sites: Sequence[Site], fmt: str, dropout: float) -> Callable:
    """A function for nn.intercept_methods, which computes with what lies beside a layer's weight.

    sites: the model's. fmt: the format of its packed weights. dropout: the rate.
    """

    def intercept(call, args, kwargs, context):
        layer = context.module
        if not handles(layer, context.method_name):
            return call(*args, **kwargs)
        known, own = registry.registration_of(type(layer)), layer.variables.get("params", {})
        if "lora_A" not in own and PACKED not in own:
            return call(*args, **kwargs)
        if context.method_name == "attend":
            return _attended(call, args, kwargs, own)
        how = known.linear_map_of(layer, *args, **kwargs)
        bound = inspect.signature(type(layer).__call__).bind(layer, *args, **kwargs)
        x = list(bound.arguments.values())[1 + known.input]
        bias = own.get("bias")
        site = next(site for site in sites if site.path == layer.path)
        if PACKED in own:
            packed = packing.Packed(
                **{name: own[PACKED].get(name) for name in packing.Packed._fields}
            )
            weight = product.multiplier(packed, fmt)
            dtype = getattr(layer, "dtype", None) or jnp.result_type(x)
            y = product.multiply(how, x.astype(dtype), weight, shape=site.shape, bias=bias)
        else:
            weight, y = own[known.weight], call(*args, **kwargs)
        if "lora_A" not in own:
            return y
        B = own["lora_B"] * own["lora_mask"] if "lora_mask" in own else own["lora_B"]
        magnitude = [own[name] for name in ("lora_magnitude_vector",) if name in own]
        dropped = x
        if "lora_dropout_key" in own:
            dropped = lora_site.dropped(own["lora_dropout_key"], dropout, x)
        return algebra.output(
            how,
            site.shape,
            x,
            y,
            (own["lora_A"], B, own["lora_scaling"], *magnitude),
            dropped=dropped,
            weight=weight,
            square=own.get("lora_square"),
            bias=bias,
        )

    return intercept


def handles(layer: nn.Module, method: str) -> bool:
    """Whether a call of this method computes with the adapter, too."""
    if registry.registration_of(type(layer)) is None or layer.scope is None:
        return False
    return method == "__call__" or (method == "attend" and isinstance(layer, nn.Embed))


def _attended(call, args, kwargs, own):
    """nn.Embed.attend(query) with the weight that a merge gives."""
    query = args[0] if args else kwargs["query"]
    magnitude = [own[name] for name in ("lora_magnitude_vector",) if name in own]
    factors = own["lora_A"], own["lora_B"], own["lora_scaling"], *magnitude
    return algebra.attended(call, own["embedding"], query, factors)
