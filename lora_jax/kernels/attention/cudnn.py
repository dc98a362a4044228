"""Causal attention by cuDNN's flash attention, on NVIDIA GPUs."""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from lora_jax.kernels.attention import xla


def attend(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    rows: Int[Array, "B T"] | None = None,
    window: int | None = None,
) -> Float[Array, "B T N H"]:
    """softmax(q kᵀ / √H, over the visible keys) v, as self_attention defines it.

    cuDNN knows causality and windows, not rows: where a line is packed, or begins with padding,
    attention_xla's form runs instead, which is chosen on the device.
    """
    cudnn = functools.partial(_cudnn, window=window)
    if rows is None:
        return cudnn(q, k, v)
    # Padding after a row is never seen by it.
    after = rows[:, 1:]
    single = jnp.all((after == rows[:, :-1]) | (after == 0))
    blocks = functools.partial(xla.attend, rows=rows, window=window)
    return lax.cond(single, cudnn, blocks, q, k, v)


def _cudnn(q, k, v, window):
    return jax.nn.dot_product_attention(
        q, k, v, is_causal=True, implementation="cudnn",
        local_window_size=None if window is None else (window - 1, 0),
    )  # fmt: skip


def refusal(q: jax.Array, k: jax.Array, v: jax.Array) -> str | None:
    """Why cuDNN does not take these here, or None."""
    if q.dtype not in (jnp.bfloat16, jnp.float16):
        return f"{q.dtype}"
    if jax.default_backend() != "gpu":
        return "the program is compiled where there is no GPU"
    capability = str(jax.local_devices()[0].compute_capability)
    if not capability.replace(".", "").isdigit() or float(capability) < 8:
        return f"a GPU of compute capability {capability}"
    try:
        jax.eval_shape(functools.partial(_cudnn, window=None), q, k, v)
    except (RuntimeError, NotImplementedError, ValueError) as error:
        return str(error)
    return None
