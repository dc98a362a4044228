"""The embedding and the head of a LLaMA under an adapter: tied or not, and of which size."""

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

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


def add(model: llama.LlamaForCausalLM, tokens: Sequence[int]) -> None:
    """Gives these tokens, of which the model may have no rows yet, the mean of all rows.

    So the logits of new tokens are the mean of all logits. (resize_token_embeddings of transformers
    adds noise to the mean, of 3e-5 times the standard deviation, which differs from run to run.)
    Raises: UserError if the mesh does not divide the new vocabulary.
    """
    size = max(model.config.vocab_size, max(tokens) + 1)
    for path, variable in _weights(model).items():
        axis = int(path == tied_head.HEAD)
        shape = tuple(size if n == axis else d for n, d in enumerate(variable.shape))
        where = variable[...].sharding
        _check_divides(path, shape, where)
        new = _with_means(variable[...], size, tuple(tokens), axis, where)
        variable.set_value(new)
    model.set_num_tokens(size)
    model.new_tokens = tuple(tokens)


@functools.partial(jax.jit, static_argnums=(1, 2, 3, 4))
def _with_means(
    table: Float[Array, "_ _"],
    size: int,
    tokens: tuple[int, ...],
    axis: int,
    where: jax.sharding.Sharding,
) -> Float[Array, "_ _"]:
    """The table with `size` rows, or columns, of which those of `tokens` are the mean of all."""
    mean = jnp.mean(table, axis, dtype=jnp.float32, keepdims=True).astype(table.dtype)
    more = [(0, size - table.shape[n] if n == axis else 0) for n in (0, 1)]
    is_new = np.zeros(size, bool)
    is_new[list(tokens)] = True
    whole = jnp.where(np.expand_dims(is_new, 1 - axis), mean, jnp.pad(table, more))
    return jax.lax.with_sharding_constraint(whole, where)


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
    for path in dict.fromkeys((*model.replaced, *_unknown(model, saved, config))):
        inside = path in factors or token_indices.of(path, config)
        inside = inside or (model.joined and token_indices.of(tied_head.EMBEDDING, config))
        name = f"{path}.base_layer.weight" if inside else f"{path}.weight"
        if name not in saved:
            own = path == tied_head.HEAD and not is_tied(model)
            saved[name] = np.asarray(
                model.lm_head.kernel[...].T if own else model.model.embed_tokens.embedding[...]
            )


def _unknown(model, saved: dict[str, np.ndarray], config: lora_config.LoRAConfig) -> list[str]:
    """The weights with rows of new tokens that are neither the base's nor in the file."""
    return [path for path in _weights(model) if f"{path}.weight" not in saved
            and not {*model.new_tokens} <= {*token_indices.of(path, config)}]  # fmt: skip


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
    size, given = model.config.vocab_size, dict(fitted.base)
    if fitted.num_tokens != size:
        saved = fitted.adapter.saved
        trained = {path: saved.get(f"{path}.weight") for path in _weights(model)}  # as a whole
        given = {path: array for path, array in trained.items() if array is not None} | given
        if given.keys() < _weights(model).keys():  # the others are trained by rows
            add(model, range(size, fitted.num_tokens))
    for path, variable in _weights(model).items():
        if path in given and _fill(variable, given[path], path):
            model.replaced = tuple(fitted.base)
    if fitted.num_tokens != size:
        model.set_num_tokens(fitted.num_tokens)


def _weights(model: llama.LlamaForCausalLM) -> dict[str, nnx.Variable]:
    """{path: variable} of the embedding [V, D] and of a head of its own [D, V]."""
    found = {tied_head.EMBEDDING: model.model.embed_tokens.embedding}
    if not model.config.tie_word_embeddings:
        found[tied_head.HEAD] = model.lm_head.kernel
    return found


def _fill(variable: nnx.Variable, array: np.ndarray, path: str) -> bool:
    """Gives the variable that value; returns whether it is another one."""
    before = variable[...]
    new = array.astype(before.dtype)
    new = new.T if path == tied_head.HEAD else new
    if new.shape == before.shape and bool(jnp.array_equal(before, new)):
        return False
    _check_divides(path, new.shape, before.sharding)
    variable.set_value(jax.device_put(new, before.sharding))
    return True


def _check_divides(path: str, shape: tuple[int, ...], where: jax.sharding.Sharding) -> None:
    """Raises: UserError if the mesh does not divide an array of this shape."""
    try:
        where.shard_shape(shape)
    except ValueError:
        raise errors.UserError(
            expected="a mesh that divides the vocabulary",
            found=f"{shape}, split as {getattr(where, 'spec', where)}",
            where=path,
            do="choose a smaller tensor size in --mesh, or add so many tokens that it divides them",
        ) from None
