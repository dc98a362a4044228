"""LLaMA and its relatives (Mistral, Qwen2, Qwen3) as a plain Flax NNX model.

Axes: B batch · T query tokens · S key tokens · D hidden · F ffn · N heads · K kv-heads ·
H head_dim · V vocab · L layers. Names are Hugging Face's. The decoder layers are one module whose
arrays are stacked [L, …] and run by `lax.scan`, so that compile time does not grow with depth;
whatever wraps a projection (LoRA, a quantized weight) is scanned with it. On a CPU the scan is
unrolled where that is faster; the platform follows from the ambient mesh (jax.set_mesh).
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, Float, Int, Shaped

from lora_jax.kernels import attention, matmul, partitioning, platform, swiglu
from lora_jax.layers import projections, registry, stack
from lora_jax.models import cache, modules, rope
from lora_jax.models import config as model_config

LOGICAL_AXES = {  # module → axes of its kernel or embedding, without the leading layer axis
    "embed_tokens": ("vocab", "embed"),
    "q_proj": ("embed", "heads"),
    "k_proj": ("embed", "heads"),
    "v_proj": ("embed", "heads"),
    "o_proj": ("heads", "embed"),
    "gate_proj": ("embed", "mlp"),
    "up_proj": ("embed", "mlp"),
    "down_proj": ("mlp", "embed"),
    "lm_head": ("embed", "vocab"),
}


class Forms(NamedTuple):
    """Functions x → x · W for a layer's frozen weights; None where the layer itself is called."""

    qkv: Callable | None = None
    o: Callable | None = None
    gate_up: Callable | None = None
    down: Callable | None = None


class LlamaForCausalLM(nnx.Module):
    """Token ids → next-token logits.

    joined: a tied head computes with what an adapter makes of the embedding, not with its weight.
    untied: the head was tied before an adapter gave it a weight of its own. replaced: the paths of
    the weights that an adapter brought along.
    """

    joined = untied = False
    replaced: tuple[str, ...] = ()

    def __init__(
        self,
        config: model_config.LlamaConfig,
        *,
        dtype: jax.typing.DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        self.config = config
        self.model = LlamaModel(config, dtype=dtype, rngs=rngs)
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
        forms: Sequence[Forms] | Callable[[jax.Array], Forms] | None = None,
    ) -> tuple[Float[Array, "G T D"], cache.KVCache]:
        """(the input of `logits` for these T tokens, the cache with them appended at `place`).

        forms: one for each layer, or a function from the layer's index.
        """
        return self.model(
            input_ids, place.positions(input_ids.shape[1]), kv=kv, place=place, forms=forms
        )

    def logits(self, hidden: Float[Array, "*B D"]) -> Float[Array, "*B V"]:
        """hidden · W_vocab, in float32."""
        if not self.config.tie_word_embeddings:
            return self.lm_head(hidden)
        embed_tokens = self.model.embed_tokens
        if self.joined:
            return embed_tokens.attend(hidden)
        return matmul.matmul(hidden, registry.weight_of(embed_tokens)[...].T, jnp.float32)

    def frozen_head(self) -> Float[Array, "D V"] | None:
        """W_vocab, which maps hidden states to logits; None if an adapter is part of it."""
        if self.config.tie_word_embeddings:
            table = registry.weight_of(self.model.embed_tokens)[...]
            return None if self.joined else table.T
        return self.lm_head.kernel[...] if type(self.lm_head) is nnx.Linear else None

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


class LlamaModel(nnx.Module):
    def __init__(self, config, *, dtype, rngs):
        self.config = config
        self.embed_tokens = modules.Embedding(
            config.vocab_size,
            config.hidden_size,
            dtype=dtype,
            param_dtype=dtype,
            embedding_init=nnx.initializers.normal(config.initializer_range),
            rngs=rngs,
        )

        @nnx.split_rngs(splits=config.num_hidden_layers)
        @nnx.vmap(in_axes=(0,), out_axes=0)
        def layers(rngs):
            return LlamaDecoderLayer(config, dtype=dtype, rngs=rngs)

        self.layers = layers(rngs)
        self.norm = modules.RMSNorm(config.hidden_size, config.rms_norm_eps, dtype=dtype)

    def __call__(
        self,
        input_ids,
        positions,
        examples=None,
        *,
        kv=None,
        place=None,
        remat="none",
        forms=None,
    ):
        """(normalized hidden [B, T, D], kv). Attention is within examples, or to the cache kv.

        examples [B, T]: the number of each token's example, 0 on padding; None: one a sequence.
        """
        c = self.config
        hidden = self.embed_tokens(input_ids)
        cos, sin = _cos_sin(positions, c, None if place is None else place.length)
        graphdef, whole, sliced = stack.split(self.layers)
        if kv is None:
            attend = _within(examples, c)
        else:
            attend = cache.attention_to(kv, place, input_ids.shape[1], *_windows(c))

        def layer(carry, xs, form=None):
            hidden, kv = carry
            state, index = xs
            block = nnx.merge(graphdef, whole, state)
            if form is None:
                form = forms(index) if callable(forms) else Forms()
            with stack.running(index):
                hidden, kv = block(hidden, cos, sin, functools.partial(attend, index, kv), form)
            return (hidden, kv), None

        xs = (sliced, jnp.arange(c.num_hidden_layers))
        carry = (hidden, kv)
        if isinstance(forms, Sequence):  # each has its own arrays, which a scan cannot slice
            for index, form in enumerate(forms):
                carry, _ = layer(carry, stack.at(xs, index), form)
        elif remat == "none" and platform.on_cpu():
            # XLA's CPU backend converts the whole stacks that a scan keeps to float32 and back.
            each = jax.jit(layer)  # traced once for all layers
            for index in range(c.num_hidden_layers):
                carry, _ = each(carry, stack.at(xs, index))
        else:
            carry, _ = lax.scan(_rematerialized(layer, remat), carry, xs)
        hidden, kv = carry
        return self.norm(hidden), kv


class LlamaDecoderLayer(nnx.Module):
    def __init__(self, config, *, dtype, rngs):
        width, eps = config.hidden_size, config.rms_norm_eps
        self.input_layernorm = modules.RMSNorm(width, eps, dtype=dtype)
        self.self_attn = LlamaAttention(config, dtype=dtype, rngs=rngs)
        self.post_attention_layernorm = modules.RMSNorm(width, eps, dtype=dtype)
        self.mlp = LlamaMLP(config, dtype=dtype, rngs=rngs)

    def __call__(self, hidden, cos, sin, attend, form):
        attended, kv = self.self_attn(self.input_layernorm(hidden), cos, sin, attend, form)
        hidden = hidden + attended
        return hidden + self.mlp(self.post_attention_layernorm(hidden), form), kv


class LlamaAttention(nnx.Module):
    """partition: how a mesh shards the sequences and the heads."""

    partition = partitioning.WHOLE

    def __init__(self, config, *, dtype, rngs):
        linear = functools.partial(modules.linear, config, dtype=dtype, rngs=rngs)
        self.config = config
        width = config.num_attention_heads * config.head_dim
        kv_width = config.num_key_value_heads * config.head_dim
        self.q_proj = linear(config.hidden_size, width, config.qkv_bias)
        self.k_proj = linear(config.hidden_size, kv_width, config.qkv_bias)
        self.v_proj = linear(config.hidden_size, kv_width, config.qkv_bias)
        self.o_proj = linear(width, config.hidden_size, config.o_bias)
        if config.qk_norm:
            self.q_norm = modules.RMSNorm(config.head_dim, config.rms_norm_eps, dtype=dtype)
            self.k_norm = modules.RMSNorm(config.head_dim, config.rms_norm_eps, dtype=dtype)

    def __call__(self, hidden, cos, sin, attend, form):
        heads = (*hidden.shape[:2], -1, self.config.head_dim)
        qkv = projections.project(hidden, self.q_proj, self.k_proj, self.v_proj, form=form.qkv)
        q, k, v = (projected.reshape(heads) for projected in qkv)
        if self.config.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = rope.apply(q, cos, sin), rope.apply(k, cos, sin)
        attended, kv = attend(q, k, v, self.partition)
        attended = attended.reshape(*hidden.shape[:2], -1)
        (attended,) = projections.project(attended, self.o_proj, form=form.o)
        return attended, kv


class LlamaMLP(nnx.Module):
    def __init__(self, config, *, dtype, rngs):
        linear = functools.partial(modules.linear, config, dtype=dtype, rngs=rngs)
        self.gate_proj = linear(config.hidden_size, config.intermediate_size, config.mlp_bias)
        self.up_proj = linear(config.hidden_size, config.intermediate_size, config.mlp_bias)
        self.down_proj = linear(config.intermediate_size, config.hidden_size, config.mlp_bias)

    def __call__(self, hidden, form):
        gate, up = projections.project(hidden, self.gate_proj, self.up_proj, form=form.gate_up)
        (down,) = projections.project(swiglu.swiglu(gate, up), self.down_proj, form=form.down)
        return down


def _positions(examples: jax.Array) -> jax.Array:
    """The index of each real token in its example; padding on the left gets 0.

    examples [B, T]: 1, 2, … on the tokens of each, 0 on padding.
    """
    index = jnp.cumsum(examples != 0, axis=1) - 1  # of each token in its sequence
    highest = lax.cummax(examples, axis=1)
    begins = highest > jnp.pad(highest, ((0, 0), (1, 0)))[:, :-1]
    first = lax.cummax(jnp.where(begins, index, 0), axis=1)  # of each token's example
    return jnp.maximum(index, 0) - first


def _within(examples: jax.Array | None, config: model_config.LlamaConfig) -> Callable:
    """Attention within examples: (layer index, kv, q, k, v, partition) → (attended, kv)."""
    windows, kinds = _windows(config)

    def attend(index, kv, q, k, v, partition):
        how = {"windows": windows, "kind": kinds[index], "partition": partition}
        return attention.self_attention(q, k, v, examples, **how), kv

    return attend


def _cos_sin(positions, config, lengths):
    """Of the rotary embedding. lengths: of the sequences, each of which is treated alone."""
    how = (config.head_dim, config.rope, config.max_position_embeddings)
    if lengths is None:
        return rope.cos_sin(positions, *how)
    each = jax.vmap(lambda own, length: rope.cos_sin(own[None], *how, length))
    cos, sin = each(positions, lengths)
    return cos[:, 0], sin[:, 0]


def _windows(config: model_config.LlamaConfig) -> tuple[tuple[int | None, ...], jax.Array]:
    """(the distinct sliding windows, the index of each layer's window [L])."""
    of_layers = config.sliding_windows or (None,) * config.num_hidden_layers
    windows = tuple(dict.fromkeys(of_layers))
    return windows, jnp.asarray([windows.index(window) for window in of_layers], jnp.int32)


def _rematerialized(layer, remat: str):
    if remat not in model_config.REMAT:
        raise ValueError(f"expected remat among {model_config.REMAT}, found {remat!r}")
    if remat == "none":
        return layer
    # By name: JAX's policies do not see into custom derivative rules.
    saved = jax.checkpoint_policies.save_only_these_names(matmul.PRODUCT)
    policy = saved if remat == "dots" else None
    return jax.checkpoint(layer, policy=policy, prevent_cse=False)
