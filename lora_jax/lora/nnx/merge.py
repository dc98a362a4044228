"""Take the adapters of a Flax NNX model into its weights (`merge`), or out of it (`strip`)."""

from flax import nnx

from lora_jax import errors
from lora_jax.layers import mixin, places
from lora_jax.lora import algebra
from lora_jax.lora.nnx import collect, saved, vocabulary
from lora_jax.lora.nnx import layer as lora_layer
from lora_jax.lora.nnx.layer import LoRALayer
from lora_jax.lora.nnx.saved import SavedLayer
from lora_jax.models import llama
from lora_jax.quant import linear as quant_linear


def merge(model: nnx.Module) -> None:
    """W ← W + scaling · A B in every LoRALayer, which becomes an ordinary layer again.

    A quantized W becomes dense. A fully trained module takes the values of its copy. If the
    embedding changes, a LLaMA whose head is tied to it gets a head of its own first, unless the
    head changes with it. A variable that others hold, too, stays theirs; the layer gets a new one.

    Raises: UserError if the model has no adapter.
    """
    found, wholes = lora_layer.adapted(model), saved.find(model)
    collect.check_adapted(model, wholes)
    if isinstance(model, llama.LlamaForCausalLM):
        changes = isinstance(model.model.embed_tokens, LoRALayer | SavedLayer)
        if changes and model.config.tie_word_embeddings and not model.joined:
            model.untie()
    where = places.find(model)
    for site in found:
        layer = site.module
        site.separate(where)
        merged = site.each(algebra.merged, *lora_layer.arrays(layer))
        if isinstance(layer, quant_linear.QuantLinear):
            quant_linear.replace(model, site.path, quant_linear.as_linear(layer, merged))
        elif isinstance(layer, quant_linear.QuantLayer):
            weight = site.linear_map.tensor(merged, layer.quantized_shape)
            _restore(layer)
            quant_linear.make_dense(layer, weight)
        else:
            site.set_matrix(merged)
            _restore(layer)
    for whole in wholes:
        whole.merge(where)
    vocabulary.leave(model, merged=True)


def strip(model: nnx.Module) -> None:
    """Removes the adapters, which leaves the model as it was before `inject` or `attach`.

    Raises: UserError if PiSSA's initial A B cannot be added to a packed weight again. The adapters
    then stay.
    """
    found = [site for site in lora_layer.adapted(model) if site.module.lora_initial_A is not None]
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
    for _, layer in list(nnx.iter_graph(model)):
        if isinstance(layer, LoRALayer):
            _restore(layer)
    vocabulary.leave(model, merged=False)


def _restore(layer: nnx.Module) -> None:
    """Makes the layer what it was before it was adapted."""
    added = [name for name in vars(layer) if name.startswith("lora_")]
    added += [] if layer.lora_had_switch else ["deterministic"]
    mixin.leave(layer, *added)
