"""The embedding and the head of a LLaMA under an adapter: tied or not, and of which size."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from lora_jax import errors
from lora_jax.lora import adapter as lora_adapter
from lora_jax.lora import config as lora_config
from lora_jax.lora import tied_head, token_indices
from lora_jax.lora.nnx import names
from lora_jax.models import llama


def is_tied(model: nnx.Module) -> bool:
    """Whether the model is a LLaMA whose head is tied to its embedding."""
    return isinstance(model, llama.LlamaForCausalLM) and model.config.tie_word_embeddings


def prepare(model: nnx.Module, config: lora_config.LoRAConfig) -> lora_config.LoRAConfig:
    """Unties the head, or joins it to the embedding's adapter, as `config` asks for.

    Returns the config for the modules that the model then has. Raises: as tied_head.plan_to_train.
    """
    config = names.of_config(model, config)
    return _follow(model, tied_head.plan_to_train(config)) if is_tied(model) else config


def fit(model: nnx.Module, adapter: lora_adapter.Adapter, where: str) -> lora_adapter.Adapter:
    """As `prepare`, for a trained adapter; the model takes the base weights that it brings along.

    Returns the adapter for the modules that the model then has. Raises: as tied_head.fitted.
    """
    adapter = names.of_model(model, adapter)
    if not isinstance(model, llama.LlamaForCausalLM):
        return adapter
    embedding, tied = model.model.embed_tokens.embedding, is_tied(model)
    fitted = tied_head.fitted(adapter, embedding.shape, tied=tied, where=where)
    if tied:
        _follow(model, fitted.plan)
    _set(model, fitted)
    return fitted.adapter


def reduced(model: nnx.Module, adapter: lora_adapter.Adapter, where: str) -> lora_adapter.Adapter:
    """The adapter without the base weights that the model has already."""
    adapter = names.of_model(model, adapter)
    if not isinstance(model, llama.LlamaForCausalLM):
        return adapter
    embedding = model.model.embed_tokens.embedding[...]
    own = {tied_head.EMBEDDING: embedding}
    own[tied_head.HEAD] = embedding if is_tied(model) else model.lm_head.kernel[...].T
    fitted = tied_head.fitted(adapter, embedding.shape, tied=is_tied(model), where=where)
    same = all(array.shape == own[path].shape and bool(jnp.array_equal(own[path], array))
               for path, array in fitted.base.items())  # fmt: skip
    kept = {name: array for name, array in adapter.saved.items() if name in fitted.adapter.saved}
    return dataclasses.replace(adapter, saved=kept) if same else adapter


def complete(
    model: nnx.Module, factors: dict, saved: dict[str, np.ndarray], config: lora_config.LoRAConfig
) -> None:
    """Adds to an adapter from the model what PEFT saves of embedding and head: inverse of `fit`."""
    if not isinstance(model, llama.LlamaForCausalLM):
        return
    if model.joined:
        tied_head.separate(factors, saved, config)
    for path in model.replaced:
        inside = path in factors or token_indices.of(path, config)
        inside = inside or (model.joined and token_indices.of(tied_head.EMBEDDING, config))
        name = f"{path}.base_layer.weight" if inside else f"{path}.weight"
        if name not in saved:
            own = path == tied_head.HEAD and not is_tied(model)
            saved[name] = np.asarray(
                model.lm_head.kernel[...].T if own else model.model.embed_tokens.embedding[...]
            )


def leave(model: nnx.Module, *, merged: bool) -> None:
    """The model without its adapter: a head that was untied for it is tied again, unless merged."""
    if not isinstance(model, llama.LlamaForCausalLM):
        return
    for name in ("joined", "replaced"):
        if name in vars(model):
            delattr(model, name)
    if model.untied:
        del model.untied
        if not merged:
            model.tie()


def _follow(model: llama.LlamaForCausalLM, plan: tied_head.Plan) -> lora_config.LoRAConfig:
    if plan.own_head:
        model.untie()
        model.untied = True
    if plan.joined:
        model.joined = True
    return plan.config


def _set(model: llama.LlamaForCausalLM, fitted: tied_head.Fitted) -> None:
    """Gives the model the base weights that an adapter brings along, where they are others."""
    variables = {tied_head.EMBEDDING: model.model.embed_tokens.embedding}
    if not model.config.tie_word_embeddings:
        variables[tied_head.HEAD] = model.lm_head.kernel
    other_size = fitted.num_tokens != model.config.vocab_size
    for path, variable in variables.items():
        array = fitted.base.get(path)
        if array is None and other_size:  # it is trained as a whole
            array = fitted.adapter.saved[f"{path}.weight"]
        if array is not None and _fill(variable, array, path):
            model.replaced = tuple(fitted.base)
    if other_size:
        model.set_num_tokens(fitted.num_tokens)


def _fill(variable: nnx.Variable, array: np.ndarray, path: str) -> bool:
    """Gives the variable that value; returns whether it is another one."""
    before = variable[...]
    new = array.astype(before.dtype)
    new = new.T if path == tied_head.HEAD else new
    if new.shape == before.shape and bool(jnp.array_equal(before, new)):
        return False
    try:
        variable.set_value(jax.device_put(new, before.sharding))
    except ValueError:
        raise errors.UserError(
            expected="a mesh that divides the vocabulary",
            found=f"{new.shape} on {before.sharding}",
            where=path,
            do="choose smaller tensor or fsdp sizes in --mesh",
        ) from None
    return True
