"""Read the adapters of a Flax NNX model: their arrays, sizes and effects."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from lora_jax import errors
from lora_jax.lora import adapter as lora_adapter
from lora_jax.lora import algebra, targets
from lora_jax.lora import config as lora_config
from lora_jax.lora import site as lora_site
from lora_jax.lora.nnx import adapted, names, saved, vocabulary
from lora_jax.lora.nnx import layer as lora_layer
from lora_jax.lora.nnx.model_state import LoRAParam


def collect(
    model: nnx.Module, config: lora_config.LoRAConfig, *, base_model: str | None = None
) -> lora_adapter.Adapter:
    """The model's adapters as arrays on the host, for a file or another model.

    The result's config is equivalent to `config`, but may differ from it: PiSSA and adapters on
    parts of an output become plain LoRA of the original weights.

    Raises: UserError if the model has no adapter.
    """
    wholes = saved.find(model)
    check_adapted(model, wholes)
    config, found = names.of_config(model, config), {}
    for name, (site, index) in adapted.by_name(model).items():
        layer = site.module
        A, B, _, *magnitude = lora_layer.arrays(layer)
        start = None
        if layer.lora_initial_A is not None:
            start = layer.lora_initial_A[...], layer.lora_initial_B[...]
        own = layer.lora_ranks[index], A, B, *(magnitude or [None]), start
        found[name] = lora_site.collected(site, index, *own, lora_layer.bias_of_b(layer))
    whole = {name: array for one in wholes for name, array in one.files()}
    for name, (site, _) in adapted.by_name(model).items():
        if targets.saves_base(name, config):
            base = np.asarray(site.matrix())
            turned = base if site.kind == "embedding" else base.T
            whole[f"{name}.base_layer.weight"] = turned
    vocabulary.complete(model, found, whole, config)
    ranks = {name: own.B.shape[0] for name, own in found.items()}
    return lora_adapter.Adapter(targets.with_ranks(config, ranks), found, whole, base_model)


def check_adapted(model: nnx.Module, wholes: list[saved.Part]) -> None:
    """Raises: UserError if the model has no adapter. wholes: its fully trained modules."""
    if not wholes and not adapted.by_name(model):
        raise errors.UserError(
            expected="a model with adapters", found="none", do="lora.inject or peft.load"
        )


def num_params(model: nnx.Module) -> int:
    """The number of trainable parameters.

    K · R + R · N of each adapted layer, the magnitudes, biases of B, fully trained modules, and
    rows of tokens.
    """
    total = 0
    for site, index in adapted.by_name(model).values():
        layer, k, n = site.module, site.in_features, site.out_features
        at, rank = np.unravel_index(index, site.lead), layer.lora_ranks[index]
        mask = layer.lora_mask
        total += rank * k + (rank * n if mask is None else int(mask[...][at].sum()))
        total += n if layer.lora_magnitude_vector is not None else 0
        if layer.lora_bias is not None:
            total += n if mask is None else int(mask[...][at].max(axis=0).sum())
    for whole in saved.find(model):
        total += sum(math.prod(shape) for _, shape in whole.shapes())
    return total


def effects(model: nnx.Module) -> dict[str, float]:
    """{dotted path: ‖ΔW‖ / ‖W‖} of every adapted layer, Frobenius norms."""
    found = {}
    for site in adapted.find(model):
        ratios = site.each(algebra.effect, *lora_layer.arrays(site.module))
        rated = zip(site.names, site.module.lora_ranks, ratios.reshape(-1), strict=True)
        found |= {name: ratio.item() for name, rank, ratio in rated if rank}
    return found


def filled(model: nnx.Module, adapter: lora_adapter.Adapter) -> Any:
    """The adapter state of `model` with the values of an adapter of the same shapes.

    For nnx.update, or as an argument of a compiled function. See adapter.aligned.
    """
    state, found = dict(nnx.to_flat_state(nnx.state(model, LoRAParam))), adapted.find(model)
    for site, configs in zip(found, lora_site.select(found, adapter.config), strict=True):
        own = lora_site.filled(site, configs, adapter.factors, adapter.config)
        names = (*lora_layer.names_of_factors(site.module), "lora_magnitude_vector", "lora_bias")
        for name, array in zip(names, own, strict=True):
            if array is not None:
                variable = state[(*site.path, name)]
                where = variable[...].sharding
                array = jax.device_put(jnp.moveaxis(array, 0, site.axis), where)
                state[(*site.path, name)] = variable.replace(array)
    return nnx.from_flat_state(state.items())


def idle(model: nnx.Module) -> Any:
    """The adapter state that leaves the model's output unchanged."""
    state = dict(nnx.to_flat_state(nnx.state(model, LoRAParam)))
    for site in adapted.find(model):
        layer = site.module
        A, B, scaling, *magnitude = lora_layer.arrays(layer)
        if layer.lora_initial_A is None:
            A, B = 0 * A, 0 * B
        else:  # what PiSSA subtracted from the weight
            A, B = layer.lora_initial_A[...], layer.lora_initial_B[...]
        own = dict(zip(lora_layer.names_of_factors(layer), (A, B), strict=True))
        if magnitude:
            own["lora_magnitude_vector"] = site.each(algebra.lengths, A, B, scaling)
        if layer.lora_bias is not None:
            own["lora_bias"] = 0 * lora_layer.bias_of_b(layer)
        for name, array in own.items():
            array = jnp.moveaxis(array, 0, site.axis)
            state[(*site.path, name)] = state[(*site.path, name)].replace(array)
    return nnx.from_flat_state(state.items())
