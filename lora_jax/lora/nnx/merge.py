"""Take the adapters of a Flax NNX model into its weights (`merge`), or out of it (`strip`)."""

from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from lora_jax import errors
from lora_jax.kernels import explicit
from lora_jax.layers import places, registry, undo
from lora_jax.lora import adapter as host
from lora_jax.lora import algebra
from lora_jax.lora.nnx import adapted, collect, saved, sites, vocabulary
from lora_jax.lora.nnx import layer as lora_layer
from lora_jax.lora.nnx.layer import LoRALayer
from lora_jax.lora.nnx.saved import SavedLayer
from lora_jax.lora.nnx.tokens import TokenLayer
from lora_jax.models import llama
from lora_jax.quant import conversion
from lora_jax.quant import linear as quant_linear


def merge(model: nnx.Module, *args: Any, **kwargs: Any) -> None:
    """W ← W + scaling · A B in every LoRALayer, which becomes an ordinary layer again.

    With lora_bias, the layer's own bias changes by scaling · lora_bias. Quantized weights become
    dense, those without an adapter too. A fully trained module takes the values of its copy, and an
    embedding its trained rows. If the embedding changes, a LLaMA whose
    head is tied to it gets a head of its own first, unless the head changes with it. A variable
    that others hold, too, stays theirs; the layer gets a new one.

    args, kwargs: of a call of the model, to compare its output before and after the merge. The call
    must give the same twice, so without dropout.
    Raises: UserError if the model has no adapter; for lora_bias, if a layer has no bias; if the
    output changes by more than rounding. The model is then unchanged.
    """
    if not args and not kwargs:
        return _merge(model)
    before, limit = model(*args, **kwargs), _max_change(model)
    with undo.on_error(model):
        _merge(model)
        _compare(before, model(*args, **kwargs), limit)


def _max_change(model: nnx.Module) -> float:
    """How much a merge may change the outputs, relative to their root mean square.

    Rounding changed those of a LLaMA of 135M parameters, with adapters on all linear layers, by
    1e-5 in float32 and 0.04 in bfloat16.
    """
    dtypes = (getattr(node, "dtype", None) for _, node in nnx.iter_graph(model))
    floats = (jnp.dtype(own) for own in dtypes if own and jnp.issubdtype(own, jnp.floating))
    return 0.1 if any(own.itemsize < 4 for own in floats) else 1e-3


def _compare(before: Any, after: Any, limit: float) -> None:
    """Raises: UserError if outputs before and after a merge differ by more than rounding."""
    for old, new in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True):
        if not jnp.issubdtype(jnp.result_type(old), jnp.floating) or not jnp.size(old):
            continue
        old, new = (jnp.asarray(array, jnp.float32) for array in (old, new))
        size, change = (float(jnp.sqrt(jnp.square(a).mean())) for a in (old, new - old))
        if not change <= limit * size:
            raise errors.UserError(
                expected="a merged model that computes what the adapted one does",
                found=f"an output that changes by {change:.3g}, of {size:.3g} (root mean square)",
                do="lora.summary(model) lists the adapted layers; in a function of your own call "
                "layers, and do not read their weights",
            )


def _merge(model: nnx.Module) -> None:
    found, wholes = adapted.find(model), saved.find(model)
    collect.check_adapted(model, wholes)
    host.check_mergeable(_without_bias(found))
    if isinstance(model, llama.LlamaForCausalLM):
        changes = isinstance(model.model.embed_tokens, LoRALayer | SavedLayer | TokenLayer)
        if changes and model.config.tie_word_embeddings and not model.joined:
            model.untie()
    where = places.find(model)
    for site in found:
        layer = site.module
        merged = site.each(algebra.merged, *lora_layer.arrays(layer))
        if layer.lora_bias is not None:
            _merge_bias(site)
        if isinstance(layer, quant_linear.QuantLinear):
            conversion.become(layer, conversion.as_linear(layer, merged))
        elif isinstance(layer, quant_linear.QuantLayer):
            _restore(site)
            conversion.make_dense(layer, merged)
        else:
            site.set_matrix(merged)
            _restore(site)
    for whole in wholes:
        whole.merge(where)
    vocabulary.leave(model, merged=True)
    conversion.dequantize_model(model)


def _without_bias(found: Iterable[sites.Site]) -> list[str]:
    """The layers with a bias of B that have no bias themselves."""
    biased = (site for site in found if site.module.lora_bias is not None)
    return [site.names[0] for site in biased if registry.bias_of(site.module) is None]


def _merge_bias(site: sites.Site) -> None:
    """Adds the bias of B to the layer's own, for which the layer gets a new variable."""
    layer, name = site.module, registry.registration_of(type(site.module)).bias
    new = getattr(layer, name).copy()
    own = jnp.moveaxis(new[...], site.axis, 0)
    change = lora_layer.bias_of_b(layer) * lora_layer.arrays(layer)[2][..., 0]
    whole = explicit.like(own, _sum, own, change)
    new.set_value(jnp.moveaxis(whole, 0, site.axis).astype(new.dtype))
    setattr(layer, name, new)


def _sum(bias, change):
    return bias.astype(jnp.float32) + change.reshape(bias.shape)


def strip(model: nnx.Module) -> None:
    """Removes the adapters, which leaves the model as it was before `inject` or `attach`.

    Raises: UserError if PiSSA's initial A B cannot be added to a packed weight again. The adapters
    then stay.
    """
    found = [site for site in adapted.find(model) if site.module.lora_initial_A is not None]
    packed = [(site, layer) for site in found if (layer := quant_linear.packed_of(site.module))]
    if packed:
        raise errors.UserError(
            expected="weights that can take back PiSSA's initial A B",
            found=[f"{site.names[0]} is in {layer.fmt}" for site, layer in packed],
            do="load the base model again",
        )
    for site in found:
        layer = site.module
        A, B = layer.lora_initial_A[...], layer.lora_initial_B[...]
        site.set_matrix(site.each(algebra.merged, A, B, layer.lora_scaling[...]))
    for whole in saved.find(model):
        whole.end()
    for site in adapted.find(model):
        _restore(site)
    vocabulary.leave(model, merged=False)


def _restore(site: sites.Site) -> None:
    """Makes the layer what it was before it was adapted."""
    added = [name for name in vars(site.module) if name.startswith("lora_")]
    added += [] if site.module.lora_had_switch else ["deterministic"]
    site.end(LoRALayer, *added)
