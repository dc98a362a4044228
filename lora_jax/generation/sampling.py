"""How the next token is drawn from the logits; the place to add a sampler.

A filter is a function from logits to a mask of the tokens that may be drawn; `sample` applies
those that its settings turn on. Their fields and defaults are in config.Sampling, which the flags
of the command line are made from.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from lora_jax.generation import config

_EXCLUDED = -1e30  # logit of a token that a filter removed


def sample(
    logits: Float[Array, "B V"], key: PRNGKeyArray, sampling: config.Sampling
) -> Int[Array, " B"]:
    """The next token of each sequence: argmax, or a draw after temperature, top-k, top-p, min-p."""
    if sampling.temperature == 0:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    logits = logits / sampling.temperature
    if sampling.top_k:
        logits = jnp.where(top_k(logits, sampling.top_k), logits, _EXCLUDED)
    if sampling.top_p < 1:
        logits = jnp.where(top_p(logits, sampling.top_p), logits, _EXCLUDED)
    if sampling.min_p:
        logits = jnp.where(min_p(logits, sampling.min_p), logits, _EXCLUDED)
    return jax.random.categorical(key, logits, axis=-1).astype(jnp.int32)


def top_k(logits: Float[Array, "B V"], k: int) -> Bool[Array, "B V"]:
    """Whether a token is among the k most likely of its sequence; ties with the k-th are kept."""
    kth = jax.lax.top_k(logits, min(k, logits.shape[-1]))[0][:, -1:]
    return logits >= kth


def top_p(logits: Float[Array, "B V"], p: float) -> Bool[Array, "B V"]:
    """Whether the probabilities of all more likely tokens sum to less than p.

    The most likely token is always kept.
    Source: Holtzman et al. 2020, https://arxiv.org/abs/1904.09751, §3.1.
    """
    order = jnp.argsort(-logits, axis=-1)
    probability = jnp.take_along_axis(jax.nn.softmax(logits, axis=-1), order, axis=-1)
    kept = jnp.cumsum(probability, axis=-1) - probability < p
    return jnp.zeros_like(kept).at[jnp.arange(len(logits))[:, None], order].set(kept)


def min_p(logits: Float[Array, "B V"], p: float) -> Bool[Array, "B V"]:
    """Whether a token is at least p times as likely as the most likely one of its sequence.

    Source: Nguyen et al. 2024, https://arxiv.org/abs/2407.01082, §3.
    """
    return logits >= logits.max(axis=-1, keepdims=True) + np.log(p)
