"""Products with the A and B of many adapters, which lie in stacks of layers and are read in place.

Only on GPUs, where XLA's own products copy a layer's A and B out of their stacks first. partition:
how the ambient mesh splits the rows (`rows`), and A and B as the weight that they belong to: the K
of A over `k`, the N of B over `n`. They are not moved; where an axis splits the rows too, devices
exchange these.
"""

import logging
import math

import jax
from jax import lax
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from lora_jax.kernels import choice, partitioning, platform

_log = logging.getLogger(__name__)


def shrink(
    x: Float[Array, "M K"],
    A: Float[Array, "L K R"],
    layer: Int[Array, ""],
    partition: partitioning.Partition = partitioning.WHOLE,
) -> Float[Array, "M R"]:
    """x · A of a layer, in float32. For operands that kernel_of has a kernel for."""
    from lora_jax.kernels.low_rank import triton_gpu  # its imports take a second

    k, _ = partition.stored()
    rows = _rows(partition, len(x), k)

    def each(x, A, layer):
        out = triton_gpu.shrink(x, A, layer)
        return lax.psum(out, k) if k else out

    specs = PartitionSpec(rows, k), PartitionSpec(None, k), PartitionSpec()
    return _by_device(each, specs, PartitionSpec(rows))(x, A, layer)


def expand(
    y: Float[Array, "M N"],
    mixed: Float[Array, "M R"],
    B: Float[Array, "L R N"],
    weights: Float[Array, "M X"],
    stretch: Float[Array, "L X N"],
    bias: Float[Array, " N"] | None,
    layer: Int[Array, ""],
    partition: partitioning.Partition = partitioning.WHOLE,
) -> Float[Array, "M N"]:
    """y + mixed · B + (weights · stretch) ∘ (y − bias) of a layer; sums in float32, then y's dtype.

    For operands that kernel_of has a kernel for.
    """
    from lora_jax.kernels.low_rank import triton_gpu

    _, n = partition.stored()
    rows = PartitionSpec(_rows(partition, len(y), n))
    out, stack = PartitionSpec(*rows, n), PartitionSpec(None, None, n)
    specs = out, rows, stack, rows, stack, PartitionSpec(n), PartitionSpec()
    own = y, mixed, B, weights, stretch, bias, layer
    return _by_device(triton_gpu.expand, specs, out)(*own)


def _rows(partition: partitioning.Partition, num_rows: int, *others: str | None) -> tuple[str, ...]:
    """The mesh axes over which the rows are split, without the others."""
    return tuple(axis for axis in partition.computed(num_rows).rows if axis not in others)


def _by_device(function, in_specs, out_specs):
    if partitioning.num_devices() == 1:
        return function
    return partitioning.shard_map(function, in_specs, out_specs)


def kernel_of(
    x: jax.ShapeDtypeStruct | jax.Array,
    A: jax.ShapeDtypeStruct | jax.Array,
    B: jax.ShapeDtypeStruct | jax.Array,
    partition: partitioning.Partition = partitioning.WHOLE,
) -> str:
    """The kernel, of choice.KERNELS, of both products for x [M, K]; choice.XLA if there is none."""
    if platform.platform_here() != "gpu":
        return choice.XLA
    reason = choice.refusal(choice.LOW_RANK) or _refusal(x, A, B, partition)
    if reason is None:
        return choice.LOW_RANK
    _log.debug("no kernel for x %s, A %s, B %s: %s", x.shape, A.shape, B.shape, reason)
    return choice.XLA


def _refusal(x, A, B, partition) -> str | None:
    try:
        from lora_jax.kernels.low_rank import triton_gpu
    except ImportError as error:  # deprecated in jax 0.11
        return f"no Pallas backend for Triton: {error}"
    if partition == partitioning.WHOLE and partitioning.num_devices() > 1:
        return "arrays that XLA splits: it cannot split a kernel"
    axes, (k, n) = partitioning.open_axes(), partition.stored()
    parts_k, parts_n = axes.get(k, 1), axes.get(n, 1)
    if A.shape[1] % parts_k or B.shape[2] % parts_n:
        return f"a weight {A.shape[1], B.shape[2]} over {parts_k, parts_n} devices"
    rows = x.shape[0] // math.prod(axes[axis] for axis in _rows(partition, x.shape[0], k, n))
    return triton_gpu.refusal(
        jax.ShapeDtypeStruct((rows, x.shape[1] // parts_k), x.dtype),
        jax.ShapeDtypeStruct((A.shape[0], A.shape[1] // parts_k, A.shape[2]), A.dtype),
        jax.ShapeDtypeStruct((*B.shape[:2], B.shape[2] // parts_n), B.dtype),
    )
