"""Matmul with a frozen 4-bit weight: packed words in, products out, no weight gradient.

One public function over several implementations. Which of them runs is decided where the program
is lowered, by platform and shape:

  TPU    a fused kernel, forward and backward
  GPU    one or few rows: sums that write no dense weight;
         else dequantize, then a dense product
         (up to 64 rows on Hopper, whose words were turned over: from_k_minor, a fused kernel)
  CPU    few rows: dequantize block by block of rows, in cache;
         else dequantize, then a dense product
"""

import functools
import logging
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from lora_jax.kernels import packed as packing
from lora_jax.kernels import partition as dealing
from lora_jax.kernels import platform
from lora_jax.kernels.int4_matmul import xla as int4_xla
from lora_jax.kernels.int4_matmul import xla_gpu

IMPLEMENTATIONS = ("xla", "int8_activations", "pallas_tpu", "mosaic_gpu")
_BLOCKED_ROWS = 8  # of x, at most, for which a CPU takes int4_xla.blocked
_log = logging.getLogger(__name__)


def int4_matmul(
    x: Float[Array, "*B d_in"],
    packed: packing.Packed,
    *,
    codes: str = "int4",
    layer: Int[Array, ""] | None = None,
    partition: dealing.Partition = dealing.WHOLE,
    implementation: str | None = None,
) -> Float[Array, "*B N"]:
    """y = x · dequantize(packed), accumulated in float32, in x's dtype.

    x may be narrower than the padded K. With `layer` the weight is that layer of a stack [L, …],
    which is read in place. `partition`: how the ambient mesh (jax.set_mesh) splits the product;
    parts of a sum that are on several devices are added in x's dtype. Differentiable in x only;
    the derivative keeps the packed words and nothing else. `implementation`: None picks the best
    form for the platform; a name means that form or an error: "xla"; "int8_activations" (rounds x
    too, see int4_xla; the derivative is "xla"'s); "pallas_tpu" (interpreted where there is no TPU);
    "mosaic_gpu" (turns the words over first: from_k_minor is for who does that once and for many
    products; the derivative is "xla"'s).

    Raises: ValueError for unknown codes or implementation, shapes that do not fit, and a named
    implementation that does not take them, with its reason.
    """
    if codes not in packing.CODES:
        raise ValueError(f"expected codes among {packing.CODES}, found {codes!r}")
    if implementation not in (None, *IMPLEMENTATIONS):
        raise ValueError(f"expected implementation among {IMPLEMENTATIONS}, found {implementation}")
    padded, groups = packed.q.shape[-2] * 8, packed.scale.shape[-2]
    ndim = 2 if layer is None else 3
    if x.shape[-1] > padded or padded % groups or packed.q.ndim != ndim:
        raise ValueError(
            f"expected x [..., ≤ {padded}], groups that divide {padded} and words of {ndim} axes, "
            f"found x {x.shape}, q {packed.q.shape}, scale {packed.scale.shape}"
        )
    if packed.order is not None:
        order = packed.order if layer is None else packed.order[layer]
        x = x.at[..., order].get(unique_indices=True, mode="promise_in_bounds")
        packed = packed._replace(order=None)
    rows = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, padded - x.shape[-1])]).reshape(-1, padded)
    y = _matmul(rows, packed, layer, codes, partition, implementation)
    return y.reshape(*x.shape[:-1], y.shape[-1])


def from_k_minor(
    x: Float[Array, "*B d_in"],
    packed: packing.Packed,
    *,
    layer: Int[Array, ""],
    partition: dealing.Partition = dealing.WHOLE,
) -> Float[Array, "*B N"]:
    """int4_matmul by "mosaic_gpu" of a stack whose words are int4 [L, N, K], K minor, already.

    They come from int4_mosaic_gpu.k_minor. Not differentiable. Raises: ValueError as the kernel.
    """
    padded = packed.q.shape[-1]
    rows = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, padded - x.shape[-1])]).reshape(-1, padded)
    y = _Forms("int4", partition, transpose=False).from_k_minor(rows, packed, layer)
    return y.reshape(*x.shape[:-1], y.shape[-1])


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5))
def _matmul(x, packed, layer, codes, partition, implementation):
    forms = _Forms(codes, partition, transpose=False)
    return _run(forms, x, packed, layer, implementation)


def _forward(x, packed, layer, codes, partition, implementation):
    y = _matmul(x, packed, layer, codes, partition, implementation)
    return y, (packed, layer)


def _backward(codes, partition, implementation, saved, dy):
    packed, layer = saved
    # Without a barrier XLA merges this dequantization with the forward one and keeps the dense
    # weight alive in between: the memory that quantization is there to save. Of a stack it sees
    # another index; a barrier on the words would copy the layer out.
    if layer is None:
        packed, dy = lax.optimization_barrier((packed, dy))
    else:
        layer, dy = lax.optimization_barrier((layer, dy))
    forms = _Forms(codes, partition, transpose=True)
    dx = _run(forms, dy, packed, layer, implementation)
    return dx, *jax.tree.map(_no_gradient, saved)


def _no_gradient(frozen: jax.Array):
    if jnp.issubdtype(frozen.dtype, jnp.integer):
        return np.zeros(frozen.shape, jax.dtypes.float0)
    return jnp.zeros_like(frozen)


_matmul.defvjp(_forward, _backward)


def _run(forms, x, packed, layer, implementation):
    """x · W, or x · Wᵀ, in the form that is named or that suits the platform."""
    if packed.nested_scale is not None:
        # Unfolded first: they are in an order that no part of the weight has to itself.
        packed = packed if layer is None else packing.layer(packed, layer)
        packed = packing.Packed(packed.q, packing.scales(packed), group_bias=packed.group_bias)
        layer = None
    arguments = x, packed, layer
    if implementation in ("int8_activations", "mosaic_gpu") and forms.transpose:
        implementation = "xla"  # they are for decoding
    if implementation == "xla":
        return forms.xla(*arguments)
    if implementation == "int8_activations":
        _refuse(implementation, forms.unreadable())
        return forms.int8_activations(*arguments)
    if implementation == "pallas_tpu":
        _refuse(implementation, forms.tpu_refusal(x, packed))
        interpreted = functools.partial(forms.tpu, interpret=True)
        return lax.platform_dependent(*arguments, tpu=forms.tpu, default=interpreted)
    if implementation == "mosaic_gpu":
        _refuse(implementation, forms.mosaic_refusal(x, packed))
        return forms.mosaic(*arguments)
    gpu = cpu = forms.xla
    if not forms.transpose:
        if len(x) <= xla_gpu.MOST_ROWS[forms.codes]:
            gpu = forms.summed
        if len(x) <= _BLOCKED_ROWS:
            cpu = forms.blocked
    if platform.on_cpu():
        return cpu(*arguments)  # what follows would trace the kernels too, which takes time
    tpu = forms.tpu
    if reason := forms.tpu_refusal(x, packed):
        _log.debug("no Pallas kernel for x %s, q %s: %s", x.shape, packed.q.shape, reason)
        tpu = forms.xla
    return lax.platform_dependent(*arguments, tpu=tpu, cpu=cpu, default=gpu)


class _Forms(NamedTuple):
    """The product in each of its forms, all (x [M, C], packed, layer) → [M, O]."""

    codes: str
    partition: dealing.Partition
    transpose: bool

    def xla(self, x, packed, layer):
        product = functools.partial(int4_xla.matmul, codes=self.codes, transpose=self.transpose)
        return self._of_one_layer(product, x, packed, layer)

    def blocked(self, x, packed, layer):
        product = functools.partial(int4_xla.blocked, codes=self.codes)
        return self._of_one_layer(product, x, packed, layer)

    def summed(self, x, packed, layer):
        product = functools.partial(xla_gpu.matvec, codes=self.codes)
        return self._of_one_layer(product, x, packed, layer)

    def int8_activations(self, x, packed, layer):
        return self._of_one_layer(int4_xla.int8_activations, x, packed, layer)

    def _of_one_layer(self, product, x, packed, layer):
        def form(x, packed, layer):
            return product(x, packing.layer(packed, layer))

        return self._dealt_out(form, x, *_stacked(packed, layer))

    # What the two kernels import takes a second, so only who may need them does.

    def tpu(self, x, packed, layer, interpret=False):
        from lora_jax.kernels.int4_matmul import pallas_tpu

        def kernel(x, packed, layer):
            y = pallas_tpu.matmul(
                x, packed.q, packed.scale, packed.column_scale, layer,
                transpose=self.transpose, interpret=interpret,
            )  # fmt: skip
            return self._with_group_bias(y, x, packed, layer)

        return self._dealt_out(kernel, x, *_stacked(packed, layer))

    def mosaic(self, x, packed, layer):
        from lora_jax.kernels.int4_matmul import mosaic_gpu

        packed, layer = _stacked(packed, layer)
        packed = packed._replace(q=mosaic_gpu.k_minor(packed.q))
        return self.from_k_minor(x, packed, layer)

    def from_k_minor(self, x, packed, layer):
        from lora_jax.kernels.int4_matmul import mosaic_gpu

        def kernel(x, packed, layer):
            y = mosaic_gpu.matmul(x, packed.q, packed.scale, packed.column_scale, layer)
            return self._with_group_bias(y, x, packed, layer)

        return self._dealt_out(kernel, x, packed, layer)

    def tpu_refusal(self, x, packed) -> str | None:
        from lora_jax.kernels.int4_matmul import pallas_tpu

        return self.unreadable() or pallas_tpu.refusal(
            *self._sizes(x, packed), x.dtype, packed.scale.dtype, transpose=self.transpose
        )

    def mosaic_refusal(self, x, packed) -> str | None:
        from lora_jax.kernels.int4_matmul import mosaic_gpu

        return self.unreadable() or mosaic_gpu.refusal(
            *self._sizes(x, packed), x.dtype, packed.scale.dtype
        )

    def unreadable(self) -> str | None:
        """Why the kernels, which decode two's complement, cannot read the weight."""
        return None if self.codes == "int4" else f"codes {self.codes!r}"

    def _sizes(self, x, packed) -> tuple[int, int, int, int]:
        """(M, K, N, group) of a device's part."""
        axes = dealing.open_axes()
        over = self.partition.computed(len(x))
        k, n = packed.q.shape[-2] * 8, packed.q.shape[-1]
        group = k // packed.scale.shape[-2]
        rows = len(x) // math.prod(axes[axis] for axis in over.rows)
        return rows, k // axes.get(over.k, 1), n // axes.get(over.n, 1), group

    def _dealt_out(self, form, x, packed, layer):
        """form(x, packed, layer), each device doing its part."""
        if self.partition == dealing.WHOLE or dealing.num_devices() == 1:
            return form(x, packed, layer)
        over, (k, n) = self.partition.computed(len(x)), self.partition.stored()
        gathered = self.partition.gathered
        words = (k, n) if packed.q.dtype == jnp.uint32 else (n, k)
        specs = packing.Packed((None, *words), (None, k, n), (None, None, n), (None, k, n))
        specs = packing.Packed(
            *(None if a is None else PartitionSpec(*s) for a, s in zip(packed, specs, strict=True))
        )
        summed, kept = (over.n, over.k) if self.transpose else (over.k, over.n)

        def whole(part, spec):
            if gathered not in spec:
                return part
            return lax.all_gather(part, gathered, axis=spec.index(gathered), tiled=True)

        def each(x, packed, layer):
            if gathered and gathered in (k, n):
                packed, layer = _stacked(packing.layer(packed, layer), None)
                packed = jax.tree.map(whole, packed, specs)
            y = form(x, packed, layer)
            return lax.psum(y, summed) if summed else y

        return jax.shard_map(
            each,
            in_specs=(PartitionSpec(over.rows, summed), specs, PartitionSpec()),
            out_specs=PartitionSpec(over.rows, kept),
            axis_names=set(dealing.open_axes()),
            check_vma=False,
        )(x, packed, layer)

    def _with_group_bias(self, y, x, packed, layer):
        """Adds the asymmetric term: Σ over a group of x, times the group's bias."""
        if packed.group_bias is None:
            return y
        bias = lax.dynamic_index_in_dim(packed.group_bias, layer, keepdims=False)
        x, bias = x.astype(jnp.float32), bias.astype(jnp.float32)
        if self.transpose:
            each = jnp.dot(x, bias.T, precision="highest")
            extra = jnp.repeat(each, y.shape[1] // len(bias), axis=1)
        else:
            sums = x.reshape(len(x), len(bias), -1).sum(axis=2)
            extra = jnp.dot(sums, bias, precision="highest")
        return (y.astype(jnp.float32) + extra).astype(y.dtype)


def _refuse(implementation: str, reason: str | None) -> None:
    if reason:
        raise ValueError(f"expected what {implementation} takes, found {reason}")


def _stacked(packed: packing.Packed, layer: jax.Array | None):
    """(a stack [L, …], the index in it), whichever was given."""
    if layer is not None:
        return packed, layer
    return jax.tree.map(lambda a: a[None], packed), jnp.zeros((), jnp.int32)
