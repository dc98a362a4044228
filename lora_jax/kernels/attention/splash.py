"""Causal attention by splash attention, JAX's Pallas kernel for TPUs."""

import math

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks
from jaxtyping import Array, Float, Int

from lora_jax.kernels import matmul

_LANES = 128  # block sizes are multiples of it
_BLOCK = 512


def attend(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    examples: Int[Array, "B T"] | None = None,
    window: int | None = None,
    soft_cap: float | None = None,
    *,
    interpret: bool = False,
) -> Float[Array, "B T N H"]:
    """softmax(q kᵀ / √H, over the visible keys) v, as self_attention defines it.

    interpret: run without a TPU, in Pallas's interpreter.
    """
    length, heads, width = q.shape[1:]
    size = min(_BLOCK, math.ceil(length / _LANES) * _LANES)
    padding = -length % size

    def by_head(a):
        return jnp.pad(a, ((0, 0), (0, padding), (0, 0), (0, 0))).swapaxes(1, 2)

    kernel = _kernel(length + padding, heads, window, soft_cap, size, interpret)
    q = by_head(q * jnp.asarray(1 / math.sqrt(width), q.dtype))
    if examples is not None:
        examples = jnp.pad(examples, ((0, 0), (0, padding)))
        examples = splash.SegmentIds(examples, examples)
    out = jax.vmap(kernel)(q, by_head(k), by_head(v), examples)
    return out.swapaxes(1, 2)[:, :length]


def _kernel(length, heads, window, soft_cap, size, interpret):
    shape = length, length
    mask = masks.CausalMask(shape)
    if window is not None:
        mask = masks.LocalMask(shape, (window - 1, 0), offset=0)
    sizes = ("block_q", "block_kv", "block_kv_compute", "block_q_dkv", "block_kv_dkv",
             "block_kv_dkv_compute", "block_q_dq", "block_kv_dq")  # fmt: skip
    return splash.make_splash_mha(
        masks.MultiHeadMask([mask] * heads),
        block_sizes=splash.BlockSizes(**dict.fromkeys(sizes, size)),
        head_shards=1,
        q_seq_shards=1,
        residual_checkpoint_name=matmul.PRODUCT,
        attn_logits_soft_cap=soft_cap,
        interpret=interpret,
    )
