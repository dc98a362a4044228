"""Put adapters into a Flax NNX model: new ones by `inject`, trained ones by `attach`."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from lora_jax import errors
from lora_jax.layers import mixin, places, registry, undo
from lora_jax.lora import adapter as lora_adapter
from lora_jax.lora import algebra
from lora_jax.lora import config as lora_config
from lora_jax.lora import site as lora_site
from lora_jax.lora.nnx import layer as lora_layer
from lora_jax.lora.nnx import pissa, saved, second_uses, sites, vocabulary
from lora_jax.lora.nnx.layer import LoRALayer
from lora_jax.lora.nnx.model_state import DropoutKey, LoRAConstant, LoRAParam
from lora_jax.lora.nnx.saved import SavedLayer
from lora_jax.quant import linear as quant_linear


def inject(
    model: nnx.Module,
    config: lora_config.LoRAConfig,
    *,
    rngs: nnx.Rngs,
    principal: Mapping[str, Any] | None = None,
) -> dict[str, int]:
    """{dotted path: rank} of the targeted layers, each of which it makes a LoRALayer.

    Works on nnx.Linear, LinearGeneral, Einsum, Conv and Embed, on quantized layers and on
    registered classes, anywhere in `model`. A layer stacked by nnx.vmap has its index in its path
    (`model.layers.3.self_attn.q_proj`). The model's output does not change: A ~ U(−1/√K, 1/√K) and
    B = 0, as in PEFT; with PiSSA, A B is subtracted from the base. Parameters keep their paths, so
    a checkpoint of the base still fits. Load it before `inject` if A, B or a magnitude depend on
    the weights (PiSSA, DoRA).

    Dropout is active after `model.train()`. Its masks depend on keys in the model, which
    `optim.step.make_step` renews. In your own loop renew them in each step, or all steps have the
    same masks: `nnx.update(model, reseed(nnx.state(model, DropoutKey), key))`.

    principal: a Principal, whose A and B were subtracted from a base as it was loaded.
    Raises: UserError if a target matches nothing, with the names that exist, or matches something
    that cannot be adapted, or whose weight the model also reads itself; if the model has adapters
    already; for PiSSA on a quantized layer without `principal`. The model is then unchanged.
    """
    with undo.on_error(model):
        return _inject(model, config, rngs, principal)


def _inject(model, config, rngs, principal) -> dict[str, int]:
    _refuse_adapters(model)
    config = vocabulary.prepare(model, config)
    found = list(sites.find(model))
    wholes = saved.choose(model, found, config.modules_to_save)
    ranks = {}
    selected = lora_site.select(found, config, sites.others(model))
    chosen = [(site, own) for site, own in zip(found, selected, strict=True) if any(own)]
    if config.init_lora_weights != "default":
        pissa.check(chosen, principal)
    second_uses.refuse(model, [site for site, _ in chosen], wholes)
    where = places.find(model)
    for site, configs in chosen:
        ranks |= {name: own.rank for name, own in zip(site.names, configs, strict=True) if own}
        if config.init_lora_weights == "default" or site.kind != "linear":
            _adapt(site, configs, config, rngs, *lora_site.initial(site, configs, rngs.params()))
        else:
            site.separate(where)  # its weight changes
            start = pissa.take(site, configs, config, principal)
            _adapt(site, configs, config, rngs, *start)
            # `collect` needs them to compute the change of the original weight. Copies, because a
            # training step may reuse the memory of A and B.
            kept = (LoRAConstant(jnp.array(part)) for part in start)
            site.module.lora_initial_A, site.module.lora_initial_B = kept
    for whole in wholes:
        whole.begin()
    return ranks


def attach(
    model: nnx.Module,
    adapter: lora_adapter.Adapter,
    *,
    untrained: bool = False,
    where: str = "the adapter",
) -> None:
    """Puts `adapter`, from a model of any framework, into `model`, on any base of these shapes.

    untrained: accepts an adapter that has no effect, because it will be trained.
    Raises: UserError that lists everything that does not fit, see `Adapter.check`; if the adapter
    has no effect. The model is then unchanged.
    """
    with undo.on_error(model):
        _attach(model, adapter, untrained, where)


def _attach(model, adapter, untrained, where) -> None:
    _refuse_adapters(model)
    given, adapter = adapter, vocabulary.fit(model, adapter, where)
    found, config = list(sites.find(model)), adapter.config
    selected, wholes = _fitting(model, found, adapter, where)
    if not untrained:
        given.check_effect(where)
    chosen = [(site, own) for site, own in zip(found, selected, strict=True) if any(own)]
    second_uses.refuse(model, [site for site, _ in chosen], wholes)
    for site, configs in chosen:
        filled = lora_site.filled(site, configs, adapter.factors, config.use_dora)
        _adapt(site, configs, config, nnx.Rngs(0), *filled)
    for whole in wholes:
        whole.begin(adapter.saved)
    everywhere = places.find(model)
    for site in found:
        if (base := adapter.saved.get(f"{site.names[0]}.base_layer.weight")) is not None:
            site.separate(everywhere)
            weight = registry.weight_of(site.module)
            turned = base if site.kind == "embedding" else base.T
            weight.set_value(jnp.asarray(turned, weight.dtype))


def check(model: nnx.Module, adapter: lora_adapter.Adapter, *, where: str = "the adapter") -> None:
    """Raises: UserError that lists everything of `adapter` that does not fit `model`.

    The model may have adapters.
    """
    with undo.always(model):
        adapter = vocabulary.fit(model, adapter, where)
        _fitting(model, list(sites.find(model)), adapter, where)


def _fitting(
    model: nnx.Module, found: list[sites.Site], adapter: lora_adapter.Adapter, where: str
) -> tuple[list[lora_site.LayerConfigs], list[saved.Saved]]:
    """How each site is adapted, and which modules are fully trained. Raises: as `check`."""
    wholes = saved.choose(model, found, adapter.config.modules_to_save)
    selected = lora_site.select(found, adapter.config, strict=False)
    configs = {name: own for site, each in zip(found, selected, strict=True)
               for name, own in zip(site.names, each, strict=True) if own}  # fmt: skip
    layers = {name: site.layer for site in found for name in site.names}
    of_saved = {name: shape for whole in wholes for name, shape in whole.shapes()}
    adapter.check(configs, layers, of_saved, where)
    return selected, wholes


def _refuse_adapters(model: nnx.Module) -> None:
    """Raises: UserError if the model has an adapter already."""
    adapted = [site.names[0] for site in sites.find(model) if isinstance(site.module, LoRALayer)]
    adapted += [sites.dotted(whole.path) for whole in saved.find(model)]
    if adapted:
        raise errors.UserError(
            expected="a model without adapters",
            found=[f"{name} has one" for name in adapted],
            do="load the base model again, or lora.merge(model) first",
        )


def _adapt(site, configs, config, rngs, A, B, magnitude=None) -> None:
    """Makes the site's layer a LoRALayer with these arrays.

    magnitude: with DoRA, None for the one with which the layer computes W + s · A B.
    """
    layer, lead = site.module, site.lead
    has_switch = "deterministic" in vars(layer)
    mixin.become(layer, lora_layer.LoRAEmbedding if isinstance(layer, nnx.Embed) else LoRALayer)
    for name, array in zip(lora_layer.names_of_factors(layer), (A, B), strict=True):
        setattr(layer, name, LoRAParam(array))
    scaling = lora_site.scaling(site, configs)
    layer.lora_scaling = LoRAConstant(scaling)
    layer.lora_ranks = lora_site.ranks(configs)
    if (mask := lora_site.mask(site, configs)) is not None:
        layer.lora_mask = LoRAConstant(mask)
    if config.use_dora:
        if quant_linear.packed_of(layer):
            layer.lora_square = LoRAConstant(site.each(algebra.squares))
        length = site.each(algebra.lengths, *lora_layer.arrays(layer))
        if magnitude is not None:
            length = jnp.where(scaling[..., 0] == 0, length, magnitude)
        layer.lora_magnitude_vector = LoRAParam(length)
    drops = site.kind != "embedding"  # as in PEFT
    layer.lora_dropout = config.dropout if drops else 0.0
    if layer.lora_dropout:
        keys = jax.random.split(rngs.params(), lead) if lead else rngs.params()
        layer.lora_dropout_key = DropoutKey(jax.random.key_data(keys))
    layer.lora_had_switch = has_switch
    layer.deterministic = True  # model.train() and model.eval() set this


def set_members(model: nnx.Module, num_members: int) -> None:
    """Makes every adapted layer compute with that many adapters, see layer.per_member.

    The axis [S] of its arrays comes after the axes of stacked layers.
    """
    for _, layer in nnx.iter_graph(model):
        if isinstance(layer, LoRALayer | SavedLayer):
            layer.lora_members = num_members
