"""Attention of new tokens to a KV cache that holds all layers, without a copy of a layer's part.

Only on GPUs, where XLA's own products copy the keys and values of a layer out of the stack first.
"""

import functools
import logging

import jax
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int, Num

from lora_jax.kernels import choice, partitioning, platform

_log = logging.getLogger(__name__)


def attend(
    q: Float[Array, "B T N H"],
    k: Num[Array, "L B K S H"],
    v: Num[Array, "L B K S H"],
    k_scale: Float[Array, "L B K S"] | None = None,
    v_scale: Float[Array, "L B K S"] | None = None,
    *,
    layer: Int[Array, ""],
    start: Int[Array, " B"],
    num_real: Int[Array, " B"],
    window: Int[Array, ""],
    soft_cap: float | None = None,
    partition: partitioning.Partition = partitioning.WHOLE,
) -> Float[Array, "B T N H"]:
    """softmax(q kᵀ / √H, over the visible keys) v; head n of q belongs to head n // (N/K) of k.

    The T new tokens of a sequence have the positions from `start` on; the first num_real of them
    are in the cache, and the output of the others is arbitrary but finite. The token at position p
    is in place p mod S. A token sees at most `window` tokens, including itself. Keys and values in
    int8 are multiplied by a scale of their token and head. soft_cap: the logits before the softmax
    become soft_cap · tanh(logits / soft_cap). For operands that kernel_of has a kernel for.
    partition: how the ambient mesh splits the sequences (`rows`) and heads (`n`).
    """
    from lora_jax.kernels.attention import flash_decoding  # its imports take a second

    operands = q, k, v, k_scale, v_scale, layer, start, num_real, window
    attend = functools.partial(flash_decoding.attend, soft_cap=soft_cap)
    if not partition.splits():
        return attend(*operands)
    over, (_, heads) = partition.computed(len(q)), partition.stored()
    queries, stack = PartitionSpec(over.rows, None, heads), PartitionSpec(None, over.rows, heads)
    each, whole = PartitionSpec(over.rows), PartitionSpec()
    specs = queries, stack, stack, stack, stack, whole, each, each, whole
    return partitioning.shard_map(attend, specs, queries)(*operands)


def kernel_of(
    q: jax.ShapeDtypeStruct | jax.Array,
    k: jax.ShapeDtypeStruct | jax.Array,
    partition: partitioning.Partition = partitioning.WHOLE,
) -> str:
    """The kernel, of choice.KERNELS, that `attend` uses on a device; choice.XLA if there is none.

    q [B, T, N, H], k [L, B, K, S, H]: as in `attend`.
    """
    if platform.platform_here() != "gpu":
        return choice.XLA
    reason = choice.refusal(choice.ATTENTION_CACHED) or _refusal(q, k, partition)
    if reason is None:
        return choice.ATTENTION_CACHED
    _log.debug("no kernel for q %s, cache %s: %s", q.shape, k.shape, reason)
    return choice.XLA


def _refusal(q, k, partition) -> str | None:
    try:
        from lora_jax.kernels.attention import flash_decoding
    except ImportError as error:  # deprecated in jax 0.11
        return f"no Pallas backend for Triton: {error}"
    _, heads = partition.stored()
    if heads and k.shape[2] % partitioning.open_axes()[heads]:
        return f"{k.shape[2]} heads of keys over {partitioning.open_axes()[heads]} devices"
    return flash_decoding.refusal(q, k)
