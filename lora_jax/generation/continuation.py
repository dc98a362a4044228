"""Prefill and decode under one jit: token ids in, sampled continuations out."""

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Int, PRNGKeyArray

from lora_jax import errors, tokenizer
from lora_jax.generation import config as generation_config
from lora_jax.generation import sampling as samplers
from lora_jax.generation import weights as decode_weights
from lora_jax.kernels import platform
from lora_jax.lora.nnx import model_state
from lora_jax.parallel import mesh as sharding


def make(
    graphdef: nnx.GraphDef,
    sampling: generation_config.Sampling,
    eos_ids: Sequence[int],
    *,
    form: str | None = None,
) -> Callable[..., Int[Array, "B N"]]:
    """The jitted (lora, frozen, ids, mask, key) → new tokens [B, max_new_tokens].

    From EOS on, a sequence is filled with −1. The decode loop ends when every sequence has ended.
    form: a second form of the weights, derived once for all steps; see weights.choose.
    """
    eos = jnp.asarray(sorted(eos_ids), jnp.int32)

    @functools.partial(jax.jit, compiler_options=platform.compiler_options())
    def generate(trained: Any, frozen: model_state.Frozen, ids, mask, key):
        model = nnx.merge(graphdef, trained, frozen.dropout_keys, frozen.base)
        model.eval()
        rows, length = ids.shape
        mesh = jax.sharding.get_abstract_mesh()
        cache = model.empty_cache(rows, length + sampling.max_new_tokens)
        if not mesh.empty:
            where = sharding.cache(rows, cache.k.shape[3], mesh)
            cache = cache._replace(
                k=jax.lax.with_sharding_constraint(cache.k, where),
                v=jax.lax.with_sharding_constraint(cache.v, where),
            )
        logits, cache = model.extend(ids, cache, mask)

        own_rows = rows if mesh.empty or rows % mesh.size else rows // mesh.size
        forms = decode_weights.derive(model, form, own_rows) if form else None

        def unfinished(carry):
            index, _, _, _, ended = carry
            return (index < sampling.max_new_tokens) & ~ended.all()

        def step(carry):
            index, tokens, logits, cache, ended = carry
            token = samplers.sample(logits, jax.random.fold_in(key, index), sampling)
            ended = ended | jnp.isin(token, eos)
            tokens = tokens.at[:, index].set(jnp.where(ended, -1, token))
            logits, cache = model.extend(token[:, None], cache, forms=forms)
            return index + 1, tokens, logits, cache, ended

        tokens = jnp.full((rows, sampling.max_new_tokens), -1, jnp.int32)
        carry = (jnp.int32(0), tokens, logits, cache, jnp.zeros(rows, bool))
        return jax.lax.while_loop(unfinished, step, carry)[1]

    return generate


def continuations(
    continue_: Callable,
    trained: Any,
    frozen: model_state.Frozen,
    prompts: Sequence[Sequence[int]],
    reader: Any,
    *,
    key: PRNGKeyArray,
    mesh: Mesh,
    batch_size: int = 64,
) -> Iterator[str]:
    """Yields the text that follows each prompt, in batches of one shape.

    continue_: the function that `make` returns. reader: the tokenizer. A batch is split over the
    devices if their number divides it.
    """
    ids, mask = pad_left(prompts)
    for first in range(0, len(prompts), batch_size):
        # The last batch starts early enough to be full: one shape, one compilation.
        start = max(0, min(first, len(prompts) - batch_size))
        batch = ids[start : start + batch_size], mask[start : start + batch_size]
        batch = sharding.put(batch, sharding.rows(len(batch[0]), mesh))
        new = continue_(trained, frozen, *batch, jax.random.fold_in(key, first))
        new = sharding.gather(new)[first - start :]
        for prompt, tokens in zip(prompts[first:], new, strict=False):
            yield tokenizer.continuation(reader, prompt, tokens[tokens >= 0].tolist())


def pad_left(
    prompts: Sequence[Sequence[int]], multiple: int = 16
) -> tuple[Int[np.ndarray, "B T"], Int[np.ndarray, "B T"]]:
    """(ids, mask) of prompts of unequal length, padded on the left to one length.

    Rounding the length up to `multiple` keeps the number of compilations small.
    """
    length = -(-max(map(len, prompts)) // multiple) * multiple
    ids = np.zeros((len(prompts), length), np.int32)
    mask = np.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        if len(prompt):
            ids[row, length - len(prompt) :] = prompt
            mask[row, length - len(prompt) :] = 1
    return ids, mask


def check_length(
    num_prompt_tokens: int, sampling: generation_config.Sampling, context: int
) -> None:
    """Raises UserError if the prompt has no tokens, or leaves no room for the new ones."""
    if num_prompt_tokens == 0:
        raise errors.UserError(
            expected="a prompt of at least one token",
            found="an empty prompt, and a tokenizer that adds no BOS",
            where="--prompt",
        )
    if num_prompt_tokens + sampling.max_new_tokens > context:
        raise errors.UserError(
            expected=f"prompt + new tokens within the model's context of {context} tokens",
            found=f"a prompt of {num_prompt_tokens} tokens + {sampling.max_new_tokens} new ones",
            where="--prompt, --max-new-tokens",
            do=f"shorten the prompt, or --max-new-tokens {max(context - num_prompt_tokens, 1)}"
            if num_prompt_tokens < context
            else "shorten the prompt",
        )
