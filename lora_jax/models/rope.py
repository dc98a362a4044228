"""Rotary position embedding in Hugging Face's rotate-half layout, with its scaling rules."""

import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from lora_jax.models import rope_config


def cos_sin(
    positions: Int[Array, "B T"],
    head_dim: int,
    rope: rope_config.RopeConfig,
    context: int,
    length: Int[Array, ""] | None = None,
) -> tuple[Float[Array, "B T half"], Float[Array, "B T half"]]:
    """cos and sin of positions · inv_freq, times the attention factor; float32.

    half: pairs of rotated dimensions. context: max_position_embeddings, beyond which "dynamic"
    scales its base. length: of the sequence that these positions are part of, on which dynamic and
    longrope depend; None: they are all.
    Source: Su et al. 2021, https://arxiv.org/abs/2104.09864, eq. 34.
    """
    inv_freq, attention_factor = _inv_freq(
        positions.max() + 1 if length is None else length, rope.rotary_dim(head_dim), rope, context
    )
    angles = positions[..., None].astype(jnp.float32) * inv_freq[None, None]
    return jnp.cos(angles) * attention_factor, jnp.sin(angles) * attention_factor


def of_layers(
    positions: Int[Array, "B T"],
    head_dim: int,
    ropes: Sequence[rope_config.RopeConfig | None],
    context: int,
    lengths: Int[Array, " B"] | None = None,
) -> Callable[[jax.Array], tuple[Float[Array, "B T half"], Float[Array, "B T half"]]]:
    """Layer index → cos and sin of its rotary embedding; 1 and 0 for a layer without (None).

    lengths: of the sequences, each of which is treated alone; None: they are all there.
    """
    kinds = tuple(dict.fromkeys(ropes))
    each = [_of_kind(positions, head_dim, kind, context, lengths) for kind in kinds]
    if len(kinds) == 1:
        return lambda index: each[0]
    of_layer = jnp.asarray([kinds.index(kind) for kind in ropes], jnp.int32)
    cos, sin = (jnp.stack(parts) for parts in zip(*each, strict=True))
    return lambda index: (cos[of_layer[index]], sin[of_layer[index]])


def _of_kind(positions, head_dim, rope, context, lengths):
    if rope is None:
        shape = (*positions.shape, head_dim // 2)
        return jnp.ones(shape, jnp.float32), jnp.zeros(shape, jnp.float32)
    if lengths is None:
        return cos_sin(positions, head_dim, rope, context)
    each = jax.vmap(lambda own, length: cos_sin(own[None], head_dim, rope, context, length))
    cos, sin = each(positions, lengths)
    return cos[:, 0], sin[:, 0]


def apply(
    x: Float[Array, "B T heads head_dim"],
    cos: Float[Array, "B T half"],
    sin: Float[Array, "B T half"],
) -> Float[Array, "B T heads head_dim"]:
    """x · cos + rotate_half(x) · sin, computed in float32 and returned in x's dtype.

    Of a head with more than 2 · half dimensions, the others stay as they are.
    """
    rotated = 2 * cos.shape[-1]
    if rotated < x.shape[-1]:
        return jnp.concatenate([apply(x[..., :rotated], cos, sin), x[..., rotated:]], axis=-1)
    wide = x.astype(jnp.float32)
    # A roll swaps the halves; on a CPU it is several times faster than a concatenation.
    swapped = jnp.roll(wide, x.shape[-1] // 2, axis=-1)
    cos, sin = jnp.concatenate([cos, cos], axis=-1), jnp.concatenate([-sin, sin], axis=-1)
    return (wide * cos[:, :, None] + swapped * sin[:, :, None]).astype(x.dtype)


def query_scale(
    positions: Int[Array, "B T"], rope: rope_config.RopeConfig
) -> Float[Array, "B T"] | None:
    """1 + β · log(1 + ⌊position / L⌋), by which each query is multiplied, in float32.

    L: the length before scaling. None where the model has no β.
    Source: Llama 4's scaling of the temperature of attention, as in Ministral 3 of transformers.
    """
    if not rope.llama_4_scaling_beta:
        return None
    turns = positions // rope.original_max_position_embeddings
    return 1 + rope.llama_4_scaling_beta * jnp.log1p(turns.astype(jnp.float32))


def _inv_freq(
    length: jax.Array, dim: int, rope: rope_config.RopeConfig, context: int
) -> tuple[jax.Array, float]:
    exponents = np.arange(0, dim, 2, dtype=np.float32) / np.float32(dim)
    inv_freq = jnp.asarray(1.0 / (np.float32(rope.rope_theta) ** exponents))
    if rope.rope_type == "linear":
        return inv_freq / rope.factor, 1.0
    if rope.rope_type == "dynamic":
        # NTK-aware: the base grows with the longest position once it exceeds the context.
        length = jnp.maximum(length, context).astype(jnp.float32)
        stretch = (rope.factor * length / context) - (rope.factor - 1)
        base = rope.rope_theta * stretch ** (dim / (dim - 2))
        return 1.0 / (base**exponents), 1.0
    if rope.rope_type == "llama3":
        return _llama3(inv_freq, rope), 1.0
    if rope.rope_type == "yarn":
        return _yarn(inv_freq, dim, rope)
    if rope.rope_type == "longrope":
        return _longrope(length, exponents, rope)
    return inv_freq, 1.0


def _llama3(inv_freq: jax.Array, rope: rope_config.RopeConfig) -> jax.Array:
    """inv_freq / factor for long waves, inv_freq for short ones, interpolated in between."""
    wavelength = 2 * math.pi / inv_freq
    original = rope.original_max_position_embeddings
    low, high = rope.low_freq_factor, rope.high_freq_factor
    smooth = jnp.clip((original / wavelength - low) / (high - low), 0.0, 1.0)
    return (1 - smooth) * inv_freq / rope.factor + smooth * inv_freq


def _longrope(
    length: jax.Array, exponents: np.ndarray, rope: rope_config.RopeConfig
) -> tuple[jax.Array, float]:
    """Ding et al. 2024, https://arxiv.org/abs/2402.13753: factors for short and long sequences."""
    original = rope.original_max_position_embeddings
    attention_factor = rope.attention_factor
    if attention_factor is None:
        stretch = max(1.0, rope.factor)
        attention_factor = math.sqrt(1 + math.log(stretch) / math.log(original))
    waves = np.float32(rope.rope_theta) ** exponents
    short, long = (1 / (np.float32(each) * waves) for each in (rope.short_factor, rope.long_factor))
    return jnp.where(length > original, long, short), attention_factor


def _yarn(inv_freq: jax.Array, dim: int, rope: rope_config.RopeConfig) -> tuple[jax.Array, float]:
    """Peng et al. 2023, https://arxiv.org/abs/2309.00071, §3.2 (by parts) and §3.4 (mscale)."""

    def mscale(weight: float) -> float:
        return 1.0 if rope.factor <= 1 else 0.1 * weight * math.log(rope.factor) + 1.0

    def dimension(rotations: float) -> float:  # at which a wave makes this many rotations
        original = rope.original_max_position_embeddings
        return (dim * math.log(original / (rotations * 2 * math.pi))) / (
            2 * math.log(rope.rope_theta)
        )

    attention_factor = rope.attention_factor
    if attention_factor is None:
        attention_factor = (
            mscale(rope.mscale) / mscale(rope.mscale_all_dim)
            if rope.mscale and rope.mscale_all_dim
            else mscale(1.0)
        )
    low, high = dimension(rope.beta_fast or 32), dimension(rope.beta_slow or 1)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    if low == high:
        high += 0.001
    keep = 1 - np.clip((np.arange(dim // 2, dtype=np.float32) - low) / (high - low), 0, 1)
    return (1 - keep) * inv_freq / rope.factor + keep * inv_freq, attention_factor
