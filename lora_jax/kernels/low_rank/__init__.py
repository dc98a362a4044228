"""Products with the A and B of many adapters, which lie in stacks of layers and are read in place.

Only on one GPU, where XLA's own products copy a layer's A and B out of their stacks first.
"""

import logging

import jax
from jaxtyping import Array, Float, Int

from lora_jax.kernels import choice, platform
from lora_jax.kernels import partition as dealing

_log = logging.getLogger(__name__)


def shrink(
    x: Float[Array, "M K"], A: Float[Array, "L K R"], layer: Int[Array, ""]
) -> Float[Array, "M R"]:
    """x · A of a layer, in float32. For operands that kernel_of has a kernel for."""
    from lora_jax.kernels.low_rank import triton_gpu  # its imports take a second

    return triton_gpu.shrink(x, A, layer)


def expand(
    y: Float[Array, "M N"],
    mixed: Float[Array, "M R"],
    B: Float[Array, "L R N"],
    weights: Float[Array, "M X"],
    stretch: Float[Array, "L X N"],
    bias: Float[Array, " N"] | None,
    layer: Int[Array, ""],
) -> Float[Array, "M N"]:
    """y + mixed · B + (weights · stretch) ∘ (y − bias) of a layer; sums in float32, then y's dtype.

    For operands that kernel_of has a kernel for.
    """
    from lora_jax.kernels.low_rank import triton_gpu

    return triton_gpu.expand(y, mixed, B, weights, stretch, bias, layer)


def kernel_of(
    x: jax.ShapeDtypeStruct | jax.Array,
    A: jax.ShapeDtypeStruct | jax.Array,
    B: jax.ShapeDtypeStruct | jax.Array,
) -> str:
    """The kernel, of choice.KERNELS, of both products for x [M, K]; choice.XLA if there is none."""
    if platform.platform_here() != "gpu":
        return choice.XLA
    reason = choice.refusal(choice.LOW_RANK) or _refusal(x, A, B)
    if reason is None:
        return choice.LOW_RANK
    _log.debug("no kernel for x %s, A %s, B %s: %s", x.shape, A.shape, B.shape, reason)
    return choice.XLA


def _refusal(x, A, B) -> str | None:
    try:
        from lora_jax.kernels.low_rank import triton_gpu
    except ImportError as error:  # deprecated in jax 0.11
        return f"no Pallas backend for Triton: {error}"
    if dealing.num_devices() > 1:
        return f"{dealing.num_devices()} devices"
    return triton_gpu.refusal(x, A, B)
