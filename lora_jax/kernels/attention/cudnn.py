"""Causal attention by cuDNN's flash attention, on NVIDIA GPUs."""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from lora_jax.kernels import platform
from lora_jax.kernels.attention import xla


def attend(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    examples: Int[Array, "B T"] | None = None,
    window: int | None = None,
) -> Float[Array, "B T N H"]:
    """softmax(q kᵀ / √H, over the visible keys) v, as self_attention defines it.

    cuDNN supports causal masks and windows, but not packed examples. If a sequence is packed or
    begins with padding, xla.attend runs instead; the device decides that at run time.
    """
    cudnn = functools.partial(_cudnn, window=window)
    if examples is None:
        return cudnn(q, k, v)
    # An example never sees the padding after it.
    after = examples[:, 1:]
    single = jnp.all((after == examples[:, :-1]) | (after == 0))
    blocks = functools.partial(xla.attend, examples=examples, window=window)
    return lax.cond(single, cudnn, blocks, q, k, v)


def _cudnn(q, k, v, window):
    return jax.nn.dot_product_attention(
        q, k, v, is_causal=True, implementation="cudnn",
        local_window_size=None if window is None else (window - 1, 0),
    )  # fmt: skip


def refusal(q: jax.Array, k: jax.Array, v: jax.Array) -> str | None:
    """Why cuDNN does not take these operands here, or None if it does."""
    if q.dtype not in (jnp.bfloat16, jnp.float16):
        return f"{q.dtype}"
    capability = platform.compute_capability()
    if capability is None:
        return "the program is compiled where there is no NVIDIA GPU"
    if capability < 8:
        return f"a GPU of compute capability {capability}"
    try:
        jax.eval_shape(functools.partial(_cudnn, window=None), q, k, v)
    except (RuntimeError, NotImplementedError, ValueError) as error:
        return str(error)
    return None
