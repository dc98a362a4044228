"""Causal attention by tokamax's flash attention, on NVIDIA GPUs from Hopper on."""

import functools

import jax
import jax.numpy as jnp
from jax import ad_checkpoint, lax
from jaxtyping import Array, Float, Int

from lora_jax import errors, extras
from lora_jax.kernels import matmul, platform

_TILE = 128  # tokens that a kernel reads at once, also past the end of a sequence
_WIDEST = 128  # heads of 256 do not fit in Blackwell's shared memory, and are slow on Hopper


def attend(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    examples: Int[Array, "B T"] | None = None,
    window: int | None = None,
    soft_cap: float | None = None,
) -> Float[Array, "B T N H"]:
    """softmax(q kᵀ / √H, over the visible keys) v, as self_attention defines it.

    Packed examples and windows need no mask: the keys that a query sees are those from first_keys
    to its own. So the tokens of an example must be side by side; a sequence in which they are not
    becomes NaN. The kernel skips keys of earlier examples, its derivative only masks them.
    """
    num, length = q.shape[:2]
    if examples is None:
        examples = jnp.ones((num, length), jnp.int32)
    q, k, v, padded = (
        jnp.pad(a, ((0, 0), (0, -length % _TILE), *[(0, 0)] * (a.ndim - 2)))
        for a in (q, k, v, examples)
    )
    out = _flash(q, k, v, first_keys(padded, window), soft_cap)[:, :length]
    return jnp.where(_scattered(examples)[:, None, None, None], jnp.nan, out)


def first_keys(examples: Int[Array, "B T"], window: int | None) -> Int[Array, "B T"]:
    """The slot of the first key that each query sees. Padding sees itself alone."""
    slots = jnp.arange(examples.shape[1], dtype=jnp.int32)[None]
    begins = (examples != _before(examples)) | (examples == 0)
    first = lax.cummax(jnp.where(begins, slots, 0), axis=1)
    return first if window is None else jnp.maximum(first, slots - (window - 1))


def _scattered(examples: jax.Array) -> jax.Array:
    """[B]: whether an example begins that is not numbered above those before it."""
    begins = (examples != _before(examples)) & (examples != 0)
    return (begins & (examples <= _before(lax.cummax(examples, axis=1)))).any(axis=1)


def _before(a: jax.Array) -> jax.Array:
    """The value in the slot before each; 0 for the first."""
    return jnp.pad(a, ((0, 0), (1, 0)))[:, :-1]


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _flash(q, k, v, first, soft_cap):
    """softmax(q kᵀ / √H, over the keys from first [B, T] to the query's own) v."""
    return _forward(q, k, v, first, soft_cap)[0]


def _forward(q, k, v, first, soft_cap):
    from tokamax import config

    call = _call(q, k, v, first, soft_cap)
    # tokamax would warn that it has not tuned this shape, and choose the same tiles.
    with config.ignore_autotuning_cache(True):
        out, residuals = call.op(*call.args, **call.kwargs | {"return_residuals": True})
    out, *residuals = (ad_checkpoint.checkpoint_name(a, matmul.PRODUCT) for a in (out, *residuals))
    return out, (q, k, v, first, out, tuple(residuals))


def _backward(soft_cap, saved, d_out):
    from tokamax import config

    q, k, v, first, out, residuals = saved
    call = _call(q, k, v, first, soft_cap)
    with config.ignore_autotuning_cache(True):
        found = call.op.vjp(residuals, out, d_out, *call.args, **call.kwargs)
    return found["q"], found["k"], found["v"], None


_flash.defvjp(_forward, _backward)


def _call(q, k, v, first, soft_cap):
    """tokamax's operation and its arguments. Its public function takes no range of keys, and falls
    back to XLA with a mask [T, T] where no kernel fits; this one raises NotImplementedError."""
    from tokamax._src.ops.attention import base, pallas_mosaic_gpu

    mask = base.Mask(k_start=first[:, None], is_causal=True)
    attention = pallas_mosaic_gpu.PallasMosaicGpuFlashAttention()
    return attention.bind(q, k, v, mask=mask, logits_soft_cap=soft_cap)


def refusal(q: jax.Array, k: jax.Array, v: jax.Array) -> str | None:
    """Why tokamax does not take these operands here, or None if it does."""
    if q.dtype not in (jnp.bfloat16, jnp.float16):
        return f"{q.dtype}"
    if q.shape[-1] > _WIDEST:
        return f"heads of width {q.shape[-1]}"
    capability = platform.compute_capability()
    if capability is None:
        return "the program is compiled where there is no NVIDIA GPU"
    # For 8.x tokamax has a forward kernel only.
    if not 9 <= capability < 11:
        return f"a GPU of compute capability {capability}"
    try:
        extras.require(extra="gpu-kernels")
    except errors.UserError as error:
        return error.on_one_line()
    return None
