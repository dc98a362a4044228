"""The decoder of LLaMA and its relatives (see model_types.py): embedding, layers and last norm.

Axes: B batch · T query tokens · S key tokens · D hidden · F ffn · N heads · K kv-heads ·
H head_dim · V vocab · L layers. Names are Hugging Face's. The decoder layers are one module whose
arrays are stacked [L, …] and run by `lax.scan`, so that compile time does not grow with depth;
whatever wraps a projection (LoRA, a quantized weight) is scanned with it. On a CPU the scan is
unrolled where that is faster; the platform follows from the ambient mesh (jax.set_mesh).
"""

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from lora_jax.kernels import attention, glu, matmul, partitioning, platform
from lora_jax.layers import projections, stack
from lora_jax.models import cache, modules, rope
from lora_jax.models import config as model_config


class Forms(NamedTuple):
    """Functions x → x · W for a layer's frozen weights; None where the layer itself is called."""

    qkv: Callable | None = None
    o: Callable | None = None
    gate_up: Callable | None = None
    down: Callable | None = None


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
        self.norm = modules.norm(config, config.hidden_size, dtype=dtype)

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
        if c.embedding_multiplier != 1:  # rounded to the dtype first, as in Gemma
            hidden = hidden * jnp.asarray(c.embedding_multiplier, hidden.dtype)
        lengths = None if place is None else place.length
        ropes = c.ropes or (c.rope,) * c.num_hidden_layers
        rotation = rope.of_layers(positions, c.head_dim, ropes, c.max_position_embeddings, lengths)
        graphdef, whole, sliced = stack.split(self.layers)
        if kv is None:
            attend = _within(examples, c)
        else:
            soft_cap = c.attn_logit_softcapping
            attend = cache.attention_to(kv, place, input_ids.shape[1], *_windows(c), soft_cap)
        attend = _scaling_queries(attend, rope.query_scale(positions, c.rope))

        def layer(carry, xs, form=None):
            hidden, kv = carry
            state, index = xs
            block = nnx.merge(graphdef, whole, state)
            if form is None:
                form = forms(index) if callable(forms) else Forms()
            with stack.running(index):
                attend_to = functools.partial(attend, index, kv)
                hidden, kv = block(hidden, *rotation(index), attend_to, form)
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
        norm = functools.partial(modules.norm, config, config.hidden_size, dtype=dtype)
        self.config = config
        if config.norms != "post":
            self.input_layernorm = norm()
        self.self_attn = LlamaAttention(config, dtype=dtype, rngs=rngs)
        self.post_attention_layernorm = norm()
        self.mlp = LlamaMLP(config, dtype=dtype, rngs=rngs)
        if config.norms == "both":
            self.pre_feedforward_layernorm = norm()
        if config.norms != "pre":
            self.post_feedforward_layernorm = norm()

    def __call__(self, hidden, cos, sin, attend, form):
        c = self.config
        x = hidden if c.norms == "post" else self.input_layernorm(hidden)
        attended, kv = self.self_attn(x, cos, sin, attend, form)
        if c.norms != "pre":
            attended = self.post_attention_layernorm(attended)
        x = hidden = hidden + scaled(attended, c.residual_multiplier)
        if c.norms == "pre":  # LLaMA's name is misleading: this norm is of the MLP's input
            x = self.post_attention_layernorm(hidden)
        elif c.norms == "both":
            x = self.pre_feedforward_layernorm(hidden)
        output = self.mlp(x, form)
        if c.norms != "pre":
            output = self.post_feedforward_layernorm(output)
        return hidden + scaled(output, c.residual_multiplier), kv


class LlamaAttention(nnx.Module):
    """partition: how a mesh shards the sequences and the heads."""

    partition = partitioning.WHOLE

    def __init__(self, config, *, dtype, rngs):
        linear = functools.partial(modules.linear, config, dtype=dtype, rngs=rngs)
        self.config = config
        width = config.num_attention_heads * config.head_dim
        kv_width = config.num_key_value_heads * config.head_dim
        self.widths = (width, kv_width, kv_width)  # of q, k and v
        if config.fused_projections:
            self.qkv_proj = linear(config.hidden_size, sum(self.widths), config.qkv_bias)
        else:
            self.q_proj = linear(config.hidden_size, width, config.qkv_bias)
            self.k_proj = linear(config.hidden_size, kv_width, config.qkv_bias)
            self.v_proj = linear(config.hidden_size, kv_width, config.qkv_bias)
        self.o_proj = linear(width, config.hidden_size, config.o_bias)
        if config.qk_norm:
            normed = 2 * (config.head_dim,) if config.qk_norm == "head" else (width, kv_width)
            self.q_norm, self.k_norm = (modules.norm(config, n, dtype=dtype) for n in normed)

    @property
    def qkv(self):
        """The layers that make q, k and v: three or one."""
        if self.config.fused_projections:
            return (self.qkv_proj,)
        return self.q_proj, self.k_proj, self.v_proj

    def __call__(self, hidden, cos, sin, attend, form):
        c = self.config
        heads = (*hidden.shape[:2], -1, c.head_dim)
        qkv = projections.project(hidden, *self.qkv, form=form.qkv)
        q, k, v = projections.parts(qkv, self.widths)
        if c.qk_norm == "projection":
            q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = (each.reshape(heads) for each in (q, k, v))
        if c.qk_norm == "head":
            q, k = self.q_norm(q), self.k_norm(k)
        k = rope.apply(k, cos, sin)
        if c.attention_multiplier is not None:  # attention itself multiplies by head_dim^-1/2
            factor = c.attention_multiplier * c.head_dim**0.5
            cos, sin = factor * cos, factor * sin
        q = rope.apply(q, cos, sin)
        attended, kv = attend(q, k, v, self.partition)
        attended = attended.reshape(*hidden.shape[:2], -1)
        (attended,) = projections.project(attended, self.o_proj, form=form.o)
        return attended, kv


class LlamaMLP(nnx.Module):
    def __init__(self, config, *, dtype, rngs):
        linear = functools.partial(modules.linear, config, dtype=dtype, rngs=rngs)
        self.config = config
        if config.fused_projections:
            both = 2 * config.intermediate_size
            self.gate_up_proj = linear(config.hidden_size, both, config.mlp_bias)
        else:
            self.gate_proj = linear(config.hidden_size, config.intermediate_size, config.mlp_bias)
            self.up_proj = linear(config.hidden_size, config.intermediate_size, config.mlp_bias)
        self.down_proj = linear(config.intermediate_size, config.hidden_size, config.mlp_bias)

    @property
    def gate_up(self):
        """The layers that make gate and up: two or one."""
        if self.config.fused_projections:
            return (self.gate_up_proj,)
        return self.gate_proj, self.up_proj

    def __call__(self, hidden, form):
        both = projections.project(hidden, *self.gate_up, form=form.gate_up)
        gate, up = projections.parts(both, 2 * (self.config.intermediate_size,))
        activated = glu.ACTIVATIONS[self.config.hidden_act](gate, up)
        (down,) = projections.project(activated, self.down_proj, form=form.down)
        return down


def _within(examples: jax.Array | None, config: model_config.LlamaConfig) -> Callable:
    """Attention within examples: (layer index, kv, q, k, v, partition) → (attended, kv)."""
    windows, kinds = _windows(config)
    how = {"windows": windows, "soft_cap": config.attn_logit_softcapping}

    def attend(index, kv, q, k, v, partition):
        own = {"kind": kinds[index], "partition": partition}
        return attention.self_attention(q, k, v, examples, **how, **own), kv

    return attend


def _scaling_queries(attend: Callable, scale: jax.Array | None) -> Callable:
    """`attend`, with each query multiplied by scale [B, T]; None: as it is."""
    if scale is None:
        return attend

    def scaled_attend(index, kv, q, *others):
        q = (q.astype(jnp.float32) * scale[:, :, None, None]).astype(q.dtype)
        return attend(index, kv, q, *others)

    return scaled_attend


def scaled(x: jax.Array, factor: float) -> jax.Array:
    """factor · x, computed in float32: the factor is not rounded to x's dtype."""
    return x if factor == 1 else (factor * x.astype(jnp.float32)).astype(x.dtype)


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
