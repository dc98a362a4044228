"""What an adapter trains in a Flax NNX model, and what it leaves as it is."""

import math

import jax
from flax import nnx

from lora_jax.layers import mixin, parameters, places, registry, taken
from lora_jax.lora import config as lora_config
from lora_jax.lora import site as lora_site
from lora_jax.lora import targets
from lora_jax.lora.nnx import adapted, base, collect, saved, sites
from lora_jax.lora.nnx import parameters as parameter_sites
from lora_jax.quant import linear as quant_linear


def summary(model: nnx.Module) -> str:
    """The number of trainable parameters, the adapted layers, and the weights that were left."""
    trainable = collect.num_params(model)
    params = jax.tree.leaves(nnx.filter_state(base.base_state(model), nnx.Param))
    packed = (site for site in sites.find(model) if quant_linear.packed_of(site.module))
    dense = (sites.weight_shape(site.module) for site in packed)  # however it is stored
    total = trainable + sum(map(math.prod, [*(array.shape for array in params), *dense]))
    ranks = {name: f"rank {site.module.lora_ranks[index]}"
             for name, (site, index) in adapted.by_name(model).items()}  # fmt: skip
    ranks |= {name: whole.extent for whole in saved.find(model) for name in whole.names if name}
    first = (f"trainable params: {trainable:,} || all params: {total:,} || "
             f"trainable%: {100 * trainable / total:.4f}")  # fmt: skip
    return f"{first}\n{taken.Taken(ranks, left(model))}"


def left(model: nnx.Module, config: lora_config.LoRAConfig | None = None) -> dict[str, str]:
    """{dotted path: why} of the weights of two axes or more that have no adapter.

    config: what was asked for, to tell why.
    """
    have = adapted.by_name(model).keys()
    whole = [name for one in saved.find(model) for name in one.names if name]
    found = {}
    known = list(sites.find(model))
    for site in known:
        for name in site.names:
            if name not in have and not any(f"{name}.".startswith(f"{one}.") for one in whole):
                found[name] = _why(site, name, config)
    stacks = {site.path[: site.depths[0]] for site in known if site.depths}
    adapted_ones = {id(site.weight) for site in parameter_sites.adapted(model)}
    for own in parameters.find(model):
        stacked = any(own.path[: len(path)] == path for path in stacks)
        if id(own.variable) not in adapted_ones and len(own.variable.shape) - stacked >= 2:
            cls, why = mixin.original(own.owner), "is not registered"
            if own.is_bridged:
                why = "holds a Linen module: name it in the targets"
            elif registry.registration_of(cls):
                why = registry.problem(own.owner)
            found[places.dotted(own.path)] = f"a parameter of {cls.__name__}, which {why}"
    return found


def _why(site: sites.Site, name: str, config: lora_config.LoRAConfig | None) -> str:
    if site.problem:
        return site.problem
    if config is not None and targets.matches(name, config.exclude):
        return "excluded"
    if site.kind in lora_site.KINDS:
        return lora_site.KINDS[site.kind]
    return "the head" if name.split(".")[-1] == "lm_head" else "not targeted"
