"""Causal attention within a sequence, in memory that grows with its length, not its square.

The ambient mesh (jax.set_mesh) decides which implementation runs:

  TPU    splash attention, JAX's Pallas kernel
  GPU    tokamax's flash attention, where it is installed;
         else cuDNN's, if every sequence is one example with its padding at the end, and the logits
         have no soft cap
  else   blocks, in XLA's own operations
"""

import functools
import logging
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from lora_jax.kernels import choice, forward_mode, partitioning, platform
from lora_jax.kernels.attention import cudnn, tokamax_gpu, xla

_log = logging.getLogger(__name__)


def self_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    examples: Int[Array, "B T"] | None = None,
    *,
    windows: Sequence[int | None] = (None,),
    kind: Int[Array, ""] | None = None,
    soft_cap: float | None = None,
    partition: partitioning.Partition = partitioning.WHOLE,
) -> Float[Array, "B T N H"]:
    """softmax(q kᵀ / √H, over the visible keys) v; head n of q belongs to head n // (N/K) of k.

    A token sees itself and the tokens before it in its own example. examples: the number of each
    token's example, which ascends along a sequence, and 0 on padding, which is not within an
    example, is seen by no token, and whose output is arbitrary but finite; None: each sequence is
    one example. If windows[kind] is w, a token sees at most w tokens, including itself; kind may
    differ between the layers of a scan, and is required if there are several windows. soft_cap: the
    logits before the softmax become soft_cap · tanh(logits / soft_cap). Operands stay in their
    dtype; sums and softmax are in float32. partition: how the ambient mesh splits the sequences
    (`rows`) and heads (`n`).
    Source: Vaswani et al. 2017, https://arxiv.org/abs/1706.03762, eq. 1; Ainslie et al. 2023,
    https://arxiv.org/abs/2305.13245 (grouped heads).
    """
    attend = functools.partial(_attend, windows=tuple(windows), soft_cap=soft_cap)
    if not partition.splits():
        return attend(q, k, v, examples, kind)
    axes = partitioning.open_axes()
    over, (_, heads) = partition.computed(len(q)), partition.stored()
    if heads and q.shape[2] % axes[heads]:
        heads = None
    if heads and k.shape[2] % axes[heads]:
        k, v = (jnp.repeat(a, q.shape[2] // a.shape[2], axis=2) for a in (k, v))
    spec = PartitionSpec(over.rows, None, heads)
    specs = spec, spec, spec, PartitionSpec(over.rows), PartitionSpec()
    return partitioning.shard_map(attend, specs, spec)(q, k, v, examples, kind)


def _attend(q, k, v, examples, kind, windows, soft_cap):
    """On one device."""
    windows = [window if window and window < q.shape[1] else None for window in windows]
    form = _form(q, k, v, soft_cap)
    if form is not xla.attend:  # which has its own
        form = functools.partial(_with_forward_mode, form)
    if soft_cap is not None:  # cuDNN's has no such argument
        form = functools.partial(form, soft_cap=soft_cap)
    if len(set(windows)) == 1:
        return form(q, k, v, examples, windows[0])
    branches = [functools.partial(form, window=window) for window in windows]
    return lax.switch(kind, branches, q, k, v, examples)


def _form(q, k, v, soft_cap=None):
    kernel = kernel_of(q, k, v, soft_cap=soft_cap)
    if kernel == choice.ATTENTION_TPU:
        from lora_jax.kernels.attention import splash  # its imports take a second

        return splash.attend
    return _ON_GPU[kernel].attend if kernel in _ON_GPU else xla.attend


def _with_forward_mode(form, q, k, v, examples, window, **how):
    """form(…), whose forward mode is that of xla.attend."""
    own, plain = (functools.partial(each, window=window, **how) for each in (form, xla.attend))
    given = [] if examples is None else [examples]
    return forward_mode.call(own, plain, q, k, v, *given)


def kernel_of(
    q: jax.ShapeDtypeStruct | jax.Array,
    k: jax.ShapeDtypeStruct | jax.Array,
    v: jax.ShapeDtypeStruct | jax.Array,
    *,
    packed: bool = False,
    soft_cap: float | None = None,
) -> str:
    """The kernel, of choice.KERNELS, that self_attention uses on a device; choice.XLA if none.

    packed: whether a sequence has several examples. soft_cap: as in self_attention.
    """
    where = platform.platform_here()
    if where == "tpu" and not choice.refusal(choice.ATTENTION_TPU):
        return choice.ATTENTION_TPU
    if where == "gpu":
        # Not cuDNN's even for single examples: a program that chooses at run time saves for both.
        for kernel, form in _ON_GPU.items():
            reason = choice.refusal(kernel) or form.refusal(q, k, v)
            if soft_cap is not None and form is cudnn:
                reason = reason or "logits with a soft cap"
            if reason is None:
                # For packed sequences, cuDNN's leaves the work to XLA when the program runs.
                return choice.XLA if packed and form is cudnn else kernel
            _log.debug("not %s for q %s, k %s: %s", kernel, q.shape, k.shape, reason)
    return choice.XLA


_ON_GPU = {choice.ATTENTION_TOKAMAX: tokamax_gpu, choice.ATTENTION_CUDNN: cudnn}
