"""LLaMA and its relatives (see model_types.py) as a plain Flax NNX model: decoder and head.

Axes: B batch · T tokens · D hidden · V vocab. Names are Hugging Face's.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, Float, Int, Shaped

from lora_jax.kernels import capping, matmul
from lora_jax.layers import registry
from lora_jax.models import cache, decoder, modules
from lora_jax.models import config as model_config

LOGICAL_AXES = {  # module → axes of its kernel or embedding, without the leading layer axis
    "embed_tokens": ("vocab", "embed"),
    "q_proj": ("embed", "heads"),
    "k_proj": ("embed", "heads"),
    "v_proj": ("embed", "heads"),
    "qkv_proj": ("embed", "heads"),
    "o_proj": ("heads", "embed"),
    "gate_proj": ("embed", "mlp"),
    "up_proj": ("embed", "mlp"),
    "gate_up_proj": ("embed", "mlp"),
    "down_proj": ("mlp", "embed"),
    "lm_head": ("embed", "vocab"),
}


class FrozenHead(NamedTuple):
    """logits = hidden · factor · weight [D, V], or weightᵀ [V, D] where it is transposed.

    soft_cap: they become soft_cap · tanh(logits / soft_cap) then; None: they stay.
    """

    weight: Float[Array, "_ _"]
    transposed: bool
    factor: float
    soft_cap: float | None


class LlamaForCausalLM(nnx.Module):
    """Token ids → next-token logits.

    joined: a tied head computes with what an adapter makes of the embedding, not with its weight.
    untied: the head was tied before an adapter gave it a weight of its own. replaced: the paths of
    the weights that an adapter brought along. new_tokens: those whose rows are not the base's.
    """

    joined = untied = False
    replaced: tuple[str, ...] = ()
    new_tokens: tuple[int, ...] = ()

    def __init__(
        self,
        config: model_config.LlamaConfig,
        *,
        dtype: jax.typing.DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        self.config = config
        self.model = decoder.LlamaModel(config, dtype=dtype, rngs=rngs)
        if not config.tie_word_embeddings:
            self.lm_head = modules.head(config, dtype=dtype, rngs=rngs)

    def __call__(
        self,
        input_ids: Int[Array, "B T"],
        attention_mask: Shaped[Array, "B T"] | None = None,
        *,
        remat: str = "none",
    ) -> Float[Array, "B T V"]:
        """Logits in float32. attention_mask [B, T]: 0 on padding, on any side, 1 on real tokens.

        In a sequence of packed examples it is 1, 2, 3, … on their tokens: attention stays within an
        example, whose positions start at 0.
        """
        return self.logits(self.hidden_states(input_ids, attention_mask, remat=remat))

    def hidden_states(
        self,
        input_ids: Int[Array, "B T"],
        attention_mask: Shaped[Array, "B T"] | None = None,
        *,
        remat: str = "none",
    ) -> Float[Array, "B T D"]:
        """The normalized output of the last layer, the input of `logits`."""
        examples = None if attention_mask is None else attention_mask.astype(jnp.int32)
        if examples is None:
            positions = jnp.broadcast_to(jnp.arange(input_ids.shape[1]), input_ids.shape)
        else:
            positions = _positions(examples)
        hidden, _ = self.model(input_ids, positions, examples, remat=remat)
        return hidden

    def extend(
        self,
        input_ids: Int[Array, "G T"],
        kv: cache.KVCache,
        place: cache.Place,
        *,
        forms: Sequence[decoder.Forms] | Callable[[jax.Array], decoder.Forms] | None = None,
    ) -> tuple[Float[Array, "G T D"], cache.KVCache]:
        """(the input of `logits` for these T tokens, the cache with them appended at `place`).

        forms: one for each layer, or a function from the layer's index.
        """
        return self.model(
            input_ids, place.positions(input_ids.shape[1]), kv=kv, place=place, forms=forms
        )

    def logits(self, hidden: Float[Array, "*B D"]) -> Float[Array, "*B V"]:
        """hidden · W_vocab / logits_scaling, with final_logit_softcapping, in float32."""
        logits = decoder.scaled(self._head(hidden), 1 / self.config.logits_scaling)
        return capping.capped(logits, self.config.final_logit_softcapping)

    def _head(self, hidden: jax.Array) -> jax.Array:
        if not self.config.tie_word_embeddings:
            return self.lm_head(hidden)
        embed_tokens = self.model.embed_tokens
        if self.joined:
            return embed_tokens.attend(hidden)
        return matmul.matmul(hidden, registry.weight_of(embed_tokens)[...].T, jnp.float32)

    def frozen_head(self) -> FrozenHead | None:
        """The head as a weight; None if an adapter is part of it."""
        how = 1 / self.config.logits_scaling, self.config.final_logit_softcapping
        if self.config.tie_word_embeddings:
            table = registry.weight_of(self.model.embed_tokens)[...]
            return None if self.joined else FrozenHead(table, True, *how)
        if type(self.lm_head) is not nnx.Linear:
            return None
        return FrozenHead(self.lm_head.kernel[...], False, *how)

    def untie(self) -> None:
        """Replaces the tied vocabulary projection by one of its own with the same values."""
        embedding = registry.weight_of(self.model.embed_tokens)[...]
        head = nnx.eval_shape(
            lambda: modules.head(self.config, dtype=embedding.dtype, rngs=nnx.Rngs(0))
        )
        head.kernel = nnx.Param(embedding.T)
        self.lm_head = head
        self.config = dataclasses.replace(self.config, tie_word_embeddings=False)

    def tie(self) -> None:
        """The inverse of `untie`: the head's own weight is dropped."""
        del self.lm_head
        self.config = dataclasses.replace(self.config, tie_word_embeddings=True)

    def set_num_tokens(self, num_tokens: int) -> None:
        """Takes note that the embedding and the head were replaced by ones of another size."""
        self.config = dataclasses.replace(self.config, vocab_size=num_tokens)
        self.model.embed_tokens.num_embeddings = num_tokens
        if not self.config.tie_word_embeddings:
            self.lm_head.out_features = num_tokens

    def empty_cache(
        self, batch_size: int, max_length: int, kv_dtype: str | None = None
    ) -> cache.KVCache:
        """A cache with room for max_length tokens of each sequence. kv_dtype: see cache.empty."""
        c = self.config
        shape = (c.num_hidden_layers, batch_size, c.num_key_value_heads, max_length, c.head_dim)
        return cache.empty(shape, self.model.embed_tokens.embedding.dtype, kv_dtype)


def _positions(examples: jax.Array) -> jax.Array:
    """The index of each real token in its example; padding on the left gets 0.

    examples [B, T]: 1, 2, … on the tokens of each, 0 on padding.
    """
    index = jnp.cumsum(examples != 0, axis=1) - 1  # of each token in its sequence
    highest = lax.cummax(examples, axis=1)
    begins = highest > jnp.pad(highest, ((0, 0), (1, 0)))[:, :-1]
    first = lax.cummax(jnp.where(begins, index, 0), axis=1)  # of each token's example
    return jnp.maximum(index, 0) - first
