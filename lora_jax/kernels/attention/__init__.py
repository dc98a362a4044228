"""Causal attention within a sequence, in memory that grows with its length, not its square.

The ambient mesh (jax.set_mesh) decides which implementation runs:

  TPU    splash attention, JAX's Pallas kernel
  GPU    cuDNN's flash attention, if every sequence is one example with its padding at the end
  else   blocks, in XLA's own operations
"""

import functools
import logging
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from lora_jax.kernels import partition as dealing
from lora_jax.kernels import platform
from lora_jax.kernels.attention import cudnn, xla

_log = logging.getLogger(__name__)


def self_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    examples: Int[Array, "B T"] | None = None,
    *,
    windows: Sequence[int | None] = (None,),
    kind: Int[Array, ""] | None = None,
    partition: dealing.Partition = dealing.WHOLE,
) -> Float[Array, "B T N H"]:
    """softmax(q kᵀ / √H, over the visible keys) v; head n of q belongs to head n // (N/K) of k.

    A token sees itself and the tokens before it in its own example. examples: the number of each
    token's example, 0 on padding, which no token sees and whose output is arbitrary but finite;
    None: each sequence is one example. If windows[kind] is w, a token sees at most w tokens,
    including itself; kind may differ between the layers of a scan, and is required if there are
    several windows. Operands stay in their dtype; sums and softmax are in float32. partition: how
    the ambient mesh splits the sequences (`rows`) and heads (`n`).
    Source: Vaswani et al. 2017, https://arxiv.org/abs/1706.03762, eq. 1; Ainslie et al. 2023,
    https://arxiv.org/abs/2305.13245 (grouped heads).
    """
    attend = functools.partial(_attend, windows=tuple(windows))
    axes = dealing.open_axes()
    if partition == dealing.WHOLE or dealing.num_devices() == 1:
        return attend(q, k, v, examples, kind)
    over, (_, heads) = partition.computed(len(q)), partition.stored()
    if heads and q.shape[2] % axes[heads]:
        heads = None
    if heads and k.shape[2] % axes[heads]:
        k, v = (jnp.repeat(a, q.shape[2] // a.shape[2], axis=2) for a in (k, v))
    spec = PartitionSpec(over.rows, None, heads)
    return jax.shard_map(
        attend,
        in_specs=(spec, spec, spec, PartitionSpec(over.rows), PartitionSpec()),
        out_specs=spec,
        axis_names=set(axes),
        check_vma=False,
    )(q, k, v, examples, kind)


def chosen(q: Any, k: Any, v: Any, *, packed: bool) -> str:
    """The module that computes self_attention on the ambient mesh: "splash", "cudnn" or "xla".

    q, k, v may be jax.ShapeDtypeStruct. packed: whether a sequence has several examples.
    """
    form = _form(q, k, v)
    if packed and form is cudnn.attend:  # it finds that out when it runs
        form = xla.attend
    return form.__module__.rpartition(".")[2]


def _attend(q, k, v, examples, kind, windows):
    """On one device."""
    windows = [window if window and window < q.shape[1] else None for window in windows]
    form = _form(q, k, v)
    if len(set(windows)) == 1:
        return form(q, k, v, examples, windows[0])
    branches = [functools.partial(form, window=window) for window in windows]
    return lax.switch(kind, branches, q, k, v, examples)


def _form(q, k, v):
    where = platform.platform_here()
    if where == "tpu":
        from lora_jax.kernels.attention import splash  # its imports take a second

        return splash.attend
    if where == "gpu":
        reason = cudnn.refusal(q, k, v)
        if reason is None:
            return cudnn.attend
        _log.debug("no cuDNN attention for q %s, k %s: %s", q.shape, k.shape, reason)
    return xla.attend
