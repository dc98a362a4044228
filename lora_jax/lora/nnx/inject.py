"""Put adapters into a Flax NNX model: new ones by `inject`, trained ones by `attach`."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from lora_jax import errors
from lora_jax.layers import abstract, stack, taken, undo
from lora_jax.lora import adapter as lora_adapter
from lora_jax.lora import algebra
from lora_jax.lora import config as lora_config
from lora_jax.lora import site as lora_site
from lora_jax.lora.nnx import (
    adapted,
    parameters,
    pissa,
    saved,
    sharding,
    sites,
    summary,
    vocabulary,
)
from lora_jax.lora.nnx import layer as lora_layer
from lora_jax.lora.nnx.layer import LoRALayer
from lora_jax.lora.nnx.model_state import DropoutKey, LoRAConstant
from lora_jax.lora.nnx.saved import SavedLayer
from lora_jax.lora.nnx.tokens import TokenLayer
from lora_jax.quant import linear as quant_linear


def inject(
    model: nnx.Module,
    config: lora_config.LoRAConfig,
    *,
    rngs: nnx.Rngs,
    principal: Mapping[str, Any] | None = None,
) -> taken.Taken:
    """{dotted path: rank} of the targeted layers, each of which it makes a LoRALayer.

    The result also tells what was left, and why: print it. Works on nnx.Linear, LinearGeneral,
    Einsum, Conv, ConvTranspose and Embed, on quantized layers, on registered classes, and on
    parameters of other modules that a target names, anywhere in `model`. A layer stacked by
    nnx.vmap has its index in its path (`model.layers.3.self_attn.q_proj`). The model's output does
    not change: A ~ U(−1/√K, 1/√K) and B = 0, as in PEFT; with PiSSA, A B is subtracted from the
    base. Parameters keep their paths, so a checkpoint of the base fits `base_state(model)`. Load it
    before `inject` if A, B or a magnitude depend on the weights (PiSSA, DoRA).

    Dropout is active after `model.train()` or `nnx.view(model, deterministic=False)`. A model that
    has nnx.Rngs of its own draws new masks in each call. Otherwise they depend on keys in the
    model, which `optim.step.make_step` renews; in your own loop renew them in each step, or all
    steps have the same masks: `nnx.update(model, reseed(nnx.state(model, DropoutKey), key))`.

    principal: a Principal, whose A and B were subtracted from a base as it was loaded.
    Raises: UserError if a target matches nothing, with the names that exist, or matches something
    that cannot be adapted; if the model has adapters already, or no arrays; for PiSSA on a
    quantized layer without `principal`. The model is then unchanged.
    """
    abstract.refuse(model)
    with undo.on_error(model):
        ranks = _inject(model, config, rngs, principal)
        return taken.Taken(ranks, summary.left(model, config))


def _inject(model, config, rngs, principal) -> dict[str, int]:
    adapted.refuse(model)
    config = vocabulary.prepare(model, config)
    found = _sites(model, config)
    wholes = saved.choose(model, found, config)
    ranks = {}
    others = sites.others(model) | parameters.others(model, found)
    selected = lora_site.select(found, config, others)
    chosen = [(site, own) for site, own in zip(found, selected, strict=True) if any(own)]
    if config.init_lora_weights != "default":
        pissa.check(chosen, principal)
    has_streams = _has_streams(model)
    for site, configs in chosen:
        ranks |= {name: own.rank for name, own in zip(site.names, configs, strict=True) if own}
        if config.init_lora_weights == "default" or site.kind != "linear":
            start = lora_site.initial(site, configs, rngs.params())
            _adapt(site, configs, config, rngs, *start, has_streams=has_streams)
        else:
            start = pissa.take(site, configs, config, principal)
            _adapt(site, configs, config, rngs, *start, has_streams=has_streams)
            _keep(site, start)
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
    One with init_lora_weights pissa or olora takes the initial A B from the base, as PEFT does.
    Raises: UserError that lists everything that does not fit, see `Adapter.check`; if the adapter
    has no effect. The model is then unchanged.
    """
    abstract.refuse(model)
    with undo.on_error(model):
        _attach(model, adapter, untrained, where)


def _attach(model, adapter, untrained, where) -> None:
    adapted.refuse(model)
    given, adapter = adapter, vocabulary.fit(model, adapter, where)
    found, config = _sites(model, adapter.config), adapter.config
    selected, wholes = _fitting(model, found, adapter, where)
    if not untrained:
        given.check_effect(where)
    chosen = [(site, own) for site, own in zip(found, selected, strict=True) if any(own)]
    changes_base, has_streams = config.init_lora_weights != "default", _has_streams(model)
    if changes_base:
        pissa.check(chosen, None)
    for site, configs in chosen:
        is_changed = changes_base and site.kind == "linear"
        start = pissa.take(site, configs, config, None) if is_changed else None
        filled = lora_site.filled(site, configs, adapter.factors, config)
        _adapt(site, configs, config, nnx.Rngs(0), *filled, has_streams=has_streams)
        if start is not None:
            _keep(site, start)
    for whole in wholes:
        whole.begin(adapter.saved)
    for site in found:
        _set_base(site, adapter, where)


def _keep(site: sites.Site, start: tuple[jax.Array, jax.Array]) -> None:
    """Keeps the initial A and B, for `collect` to compute the change of the original weight."""
    # Copies, because a training step may reuse the memory of A and B.
    A, B = (LoRAConstant(jnp.array(part)) for part in start)
    site.module.lora_initial_A, site.module.lora_initial_B = A, B


def _set_base(site: sites.Site, adapter: lora_adapter.Adapter, where: str) -> None:
    """Gives the layers of a site the weights of the base that the adapter has for them."""
    given = {n: base for n, name in enumerate(site.names)
             if (base := adapter.saved.get(f"{name}.base_layer.weight")) is not None}  # fmt: skip
    if not given:
        return
    if quant_linear.packed_of(site.module):
        raise errors.UserError(
            expected="an adapter without weights of the base, or a base that is not quantized",
            found=[f"{site.names[n]}.base_layer.weight" for n in given],
            where=where,
            do="load the base with --quant none",
        )
    matrix = site.matrix()
    for n, base in given.items():
        index = np.unravel_index(n, site.lead)
        matrix = matrix.at[index].set(base if site.kind == "embedding" else base.T)
    site.set_matrix(matrix)


def check(model: nnx.Module, adapter: lora_adapter.Adapter, *, where: str = "the adapter") -> None:
    """Raises: UserError that lists everything of `adapter` that does not fit `model`.

    The model may have adapters.
    """
    with undo.always(model):
        adapter = vocabulary.fit(model, adapter, where)
        _fitting(model, _sites(model, adapter.config), adapter, where)


def _fitting(
    model: nnx.Module, found: list[sites.Site], adapter: lora_adapter.Adapter, where: str
) -> tuple[list[lora_site.LayerConfigs], list[saved.Part]]:
    """How each site is adapted, and which modules are fully trained. Raises: as `check`."""
    wholes = saved.choose(model, found, adapter.config)
    selected = lora_site.select(found, adapter.config, strict=False)
    configs = {name: own for site, each in zip(found, selected, strict=True)
               for name, own in zip(site.names, each, strict=True) if own}  # fmt: skip
    layers = {name: site.layer for site in found for name in site.names}
    of_saved = {name: shape for whole in wholes for name, shape in whole.shapes()}
    adapter.check(configs, layers, of_saved, where)
    return selected, wholes


def _sites(model: nnx.Module, config: lora_config.LoRAConfig) -> list[sites.Site]:
    """The layers of known classes, and the parameters that are targeted by name."""
    known = [sites.renamed(site, others, config) for site, others in sites.with_aliases(model)]
    return [*known, *parameters.find(model, config)]


def _has_streams(model: nnx.Module) -> bool:
    """Whether the model draws random numbers itself, anew in each call."""
    return any(isinstance(node, nnx.RngStream) for _, node in nnx.iter_graph(model))


def _adapt(
    site, configs, config, rngs, A, B, magnitude=None, bias=None, *, has_streams=False
) -> None:
    """Makes the site's layer a LoRALayer with these arrays.

    magnitude: with DoRA, None for the one with which the layer computes W + s · A B. bias: with
    lora_bias, None for zeros. has_streams: dropout draws a new mask in each call.
    """
    lead = site.lead
    has_switch = "deterministic" in vars(site.module)
    is_embedding = isinstance(site.module, nnx.Embed)
    layer = site.begin(lora_layer.LoRAEmbedding if is_embedding else LoRALayer)
    layer.lora_axis, layer.lora_num_axes = site.axis, len(lead)
    layer.lora_had_switch = has_switch
    layer.deterministic = True  # model.train() and model.eval() set this
    names = lora_layer.names_of_factors(layer)
    for name, param in zip(names, sharding.params(site, A, B), strict=True):
        setattr(layer, name, param)
    scaling = lora_site.scaling(site, configs)
    layer.lora_scaling = LoRAConstant(scaling)
    layer.lora_ranks = lora_site.ranks(configs)
    layer.lora_names = site.names
    if (mask := lora_site.mask(site, configs)) is not None:
        layer.lora_mask = LoRAConstant(mask)
    if config.use_dora:
        if quant_linear.packed_of(layer):
            layer.lora_square = LoRAConstant(site.each(algebra.squares))
        length = site.each(algebra.lengths, *lora_layer.arrays(layer))
        if magnitude is not None:
            length = jnp.where(scaling[..., 0] == 0, length, magnitude)
        layer.lora_magnitude_vector = sharding.outputs(site, length)
    if config.lora_bias:
        bias = jnp.zeros((*lead, site.out_features)) if bias is None else bias
        layer.lora_bias = sharding.outputs(site, bias)
    drops = site.kind != "embedding"  # as in PEFT
    layer.lora_dropout = config.dropout if drops else 0.0
    if layer.lora_dropout:
        layer.lora_dropout_key = DropoutKey(jax.random.key_data(_keys(rngs, lead)))
        if has_streams:
            stacked = lead[: len(site.depths)]
            layer.lora_dropout_stream = nnx.RngStream(_keys(rngs, stacked), tag="dropout")
    alike = len(set(configs)) == 1 and layer.lora_square is None and not layer.lora_dropout
    if site.depths and not alike:
        layer.lora_index = stack.index(lead[0], site.axis)


def _keys(rngs: nnx.Rngs, shape: tuple[int, ...]) -> jax.Array:
    key = rngs.params()
    return jax.random.split(key, shape) if shape else key


def set_members(model: nnx.Module, num_members: int) -> None:
    """Makes every adapted layer compute with that many adapters, see layer.per_member.

    The axis [S] of its arrays comes after the axes of stacked layers.
    """
    for _, layer in nnx.iter_graph(model):
        if isinstance(layer, LoRALayer | SavedLayer | TokenLayer):
            layer.lora_members = num_members
