"""Weights that a Flax Linen model reads itself, beside the calls of the layers that hold them.

An adapter changes what a call computes, and a merge changes the weight. They agree only if nothing
else reads the weight.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import traverse_util
from jax.interpreters import partial_eval

from lora_jax import errors
from lora_jax.lora.linen import calls
from lora_jax.lora.linen import sites as linen_sites
from lora_jax.lora.linen.sites import Site


def refuse(
    module: nn.Module, changed: Sequence[Site], args: tuple, kwargs: Mapping[str, Any]
) -> None:
    """Raises: UserError that names the weights of these sites that the output of
    `module(*args, **kwargs)` depends on even if all calls of their layers return zeros."""
    paths = {site.path for site in changed}
    methods: dict[tuple[str, ...], set[str]] = {}
    around: list[str] = []  # the wrappers that are being called
    scaled: dict[tuple[str, ...], str] = {}

    def without(call, args, kwargs, context):
        layer = context.module
        if isinstance(layer, nn.WeightNorm | nn.SpectralNorm):
            around.append(type(layer).__name__)
            try:
                return call(*args, **kwargs)
            finally:
                around.pop()
        if layer.path not in paths:
            return call(*args, **kwargs)
        if around:
            scaled[layer.path] = around[-1]
        if not calls.handles(layer, context.method_name):
            methods.setdefault(layer.path, set()).add(context.method_name)
            return call(*args, **kwargs)
        result = call(*args, **kwargs)
        return jax.tree.map(lambda array: jnp.zeros(array.shape, array.dtype), result)

    read = _read(module, changed, args, kwargs, without)
    found = [f"{'.'.join(path)} is in a {name}, which scales it"
             for path, name in sorted(scaled.items())]  # fmt: skip
    if read or found:
        for site in read:
            name = ".".join((*site.path, site.weight))
            own = sorted(methods.get(site.path, set()) - {"setup", "__call__"})
            by = f"its layer's {', '.join(own)}" if own else f"the code of {type(module).__name__}"
            found.append(f"{name} is also read by {by}, beside calls of {'.'.join(site.path)}")
        raise errors.UserError(
            expected="layers whose weights nothing else reads, so that merging changes nothing",
            found=found,
            do="leave these layers out of the targets, or call the layer where its weight is read, "
            "an embedding with its method attend",
        )


def _read(module, changed, args, kwargs, interceptor) -> list[Site]:
    """The sites whose weight the output depends on."""
    if not changed:
        return []
    arrays, filled = linen_sites.split_arrays(args, kwargs)
    rngs = {name: jax.random.key(0) for name in ("params", "dropout")}

    def init(*arrays):
        args, kwargs = filled(arrays)
        return module.init(rngs, *args, **kwargs)

    flat = traverse_util.flatten_dict(nn.meta.unbox(jax.eval_shape(init, *arrays)))
    weights = [("params", *site.path, site.weight) for site in changed]
    rest = [key for key in flat if key not in weights]

    def output(given, others, arrays):
        flat = dict(zip(weights, given, strict=True)) | dict(zip(rest, others, strict=True))
        variables, (args, kwargs) = traverse_util.unflatten_dict(flat), filled(arrays)
        more = {"rngs": rngs, "mutable": [name for name in variables if name != "params"]}
        with linen_sites.intercepted(interceptor, interceptor):
            found = module.apply(variables, *args, **more, **kwargs)
        return [leaf for leaf in jax.tree.leaves(found) if hasattr(leaf, "shape")]

    shapes = [flat[key] for key in weights], [flat[key] for key in rest]
    jaxpr = jax.make_jaxpr(output)(*shapes, arrays).jaxpr
    _, used = partial_eval.dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))
    return [site for site, own in zip(changed, used, strict=False) if own]
