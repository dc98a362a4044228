"""Tokens of the data that a base has never learned, such as those of a chat template.

Base models keep tokens for their chat variants, whose embeddings are zero: they look all the same,
and the head never predicts one.
"""

import functools
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from lora_jax.layers import registry
from lora_jax.lora import config as lora_config
from lora_jax.lora import targets, tied_head, token_indices
from lora_jax.models import llama
from lora_jax.parallel import mesh as sharding

if TYPE_CHECKING:
    import transformers

_LEAST = 1e-16  # a row without a larger number is zero but for rounding
_SHOWN = 8


def note(
    model: llama.LlamaForCausalLM,
    used: Bool[np.ndarray, " V"],
    config: lora_config.LoRAConfig,
    reader: "transformers.PreTrainedTokenizerBase",
) -> str:
    """Which tokens of the data have rows of zeros that are not trained; "" for none.

    used: which tokens the data have. All processes must call this.
    """
    layers = {tied_head.EMBEDDING: (model.model.embed_tokens, 1)}  # and the axis of its width
    if not model.config.tie_word_embeddings:
        layers[tied_head.HEAD] = model.lm_head, 0
    found = np.zeros_like(used)
    for path, (layer, axis) in layers.items():
        if targets.is_chosen(path, config) or targets.saves(path, config):
            continue
        zero = np.array(sharding.gather(_is_zero(registry.weight_of(layer)[...], axis)))
        zero[list(token_indices.of(path, config))] = False
        found |= zero & used
    ids = np.flatnonzero(found).tolist()
    if not ids:
        return ""
    texts = [f'"{text}"' for text in reader.convert_ids_to_tokens(ids[:_SHOWN])]
    more = f" and {len(ids) - _SHOWN} more" if len(ids) > _SHOWN else ""
    return (
        f"the base has never learned {', '.join(texts)}{more}: their embeddings are zero, and stay "
        f"so; to train them: --trainable-token-indices {' '.join(texts)}"
    )


@functools.partial(jax.jit, static_argnums=1)
def _is_zero(weight: Float[Array, "_ _"], axis: int) -> Bool[Array, " V"]:
    return jnp.max(jnp.abs(weight), axis=axis) <= _LEAST
