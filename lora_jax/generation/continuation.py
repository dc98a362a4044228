"""Prefill and decode under one jit: token ids in, sampled continuations out."""

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from lora_jax import errors, tokenizer
from lora_jax.generation import config as generation_config
from lora_jax.generation import weights as decode_weights
from lora_jax.kernels import platform
from lora_jax.lora.nnx import model_state
from lora_jax.parallel import mesh as sharding

_HIDDEN = -1e30  # logit of a token that a filter took out


def make(
    graphdef: nnx.GraphDef,
    sampling: generation_config.Sampling,
    eos_ids: Sequence[int],
    *,
    form: str | None = None,
) -> Callable[..., Int[Array, "B N"]]:
    """The jitted (lora, frozen, ids, mask, key) → new tokens [B, max_new_tokens].

    A row is filled with −1 after its EOS, which is not part of the result. The decode loop ends
    when every row has ended. form: of the weights, derived once for all steps; see decode.choose.
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
            token = sample(logits, jax.random.fold_in(key, index), sampling)
            ended = ended | jnp.isin(token, eos)
            tokens = tokens.at[:, index].set(jnp.where(ended, -1, token))
            logits, cache = model.extend(token[:, None], cache, forms=forms)
            return index + 1, tokens, logits, cache, ended

        tokens = jnp.full((rows, sampling.max_new_tokens), -1, jnp.int32)
        carry = (jnp.int32(0), tokens, logits, cache, jnp.zeros(rows, bool))
        return jax.lax.while_loop(unfinished, step, carry)[1]

    return generate


def sample(
    logits: Float[Array, "B V"], key: PRNGKeyArray, sampling: generation_config.Sampling
) -> Int[Array, " B"]:
    """The next token of each row: argmax, or a draw after temperature, top-k, top-p, min-p."""
    if sampling.temperature == 0:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    logits = logits / sampling.temperature
    if sampling.top_k:
        logits = jnp.where(top_k(logits, sampling.top_k), logits, _HIDDEN)
    if sampling.top_p < 1:
        logits = jnp.where(top_p(logits, sampling.top_p), logits, _HIDDEN)
    if sampling.min_p:
        logits = jnp.where(min_p(logits, sampling.min_p), logits, _HIDDEN)
    return jax.random.categorical(key, logits, axis=-1).astype(jnp.int32)


def top_k(logits: Float[Array, "B V"], k: int) -> Bool[Array, "B V"]:
    """Whether a token is among the row's k likeliest (ties with the k-th are kept)."""
    kth = jax.lax.top_k(logits, min(k, logits.shape[-1]))[0][:, -1:]
    return logits >= kth


def top_p(logits: Float[Array, "B V"], p: float) -> Bool[Array, "B V"]:
    """Whether the likelier tokens of the row sum to less than p; the likeliest is always kept.

    Source: Holtzman et al. 2020, https://arxiv.org/abs/1904.09751, §3.1.
    """
    order = jnp.argsort(-logits, axis=-1)
    probability = jnp.take_along_axis(jax.nn.softmax(logits, axis=-1), order, axis=-1)
    kept = jnp.cumsum(probability, axis=-1) - probability < p
    return jnp.zeros_like(kept).at[jnp.arange(len(logits))[:, None], order].set(kept)


def min_p(logits: Float[Array, "B V"], p: float) -> Bool[Array, "B V"]:
    """Whether a token is at least p times as likely as the row's likeliest.

    Source: Nguyen et al. 2024, https://arxiv.org/abs/2407.01082, §3.
    """
    return logits >= logits.max(axis=-1, keepdims=True) + np.log(p)


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
    """Yields the text that follows each prompt, from what `make` gave, in batches of one shape.

    reader: the tokenizer. The rows of a batch are dealt out over the devices where that is even.
    """
    ids, mask = pad_left(prompts)
    for first in range(0, len(prompts), batch_size):
        # The last batch starts early enough to be full: one shape, one compilation.
        start = max(0, min(first, len(prompts) - batch_size))
        rows = ids[start : start + batch_size], mask[start : start + batch_size]
        rows = sharding.put(rows, sharding.rows(len(rows[0]), mesh))
        new = continue_(trained, frozen, *rows, jax.random.fold_in(key, first))
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
    """Raises UserError for a prompt without tokens, or without room for what is to follow."""
    if num_prompt_tokens == 0:
        raise errors.UserError(
            expected="a prompt of at least one token",
            found="an empty one, and a tokenizer that puts no BOS in front",
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
