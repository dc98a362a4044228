"""The 4-bit product in each of its implementations, each device computing its part on a mesh."""

import functools
import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec

from lora_jax.kernels import packed as packing
from lora_jax.kernels import partitioning
from lora_jax.kernels.int4_matmul import xla, xla_gpu


class Forms(NamedTuple):
    """The product in each of its forms, all (x [M, C], packed, layer) → [M, O]."""

    codes: str
    partition: partitioning.Partition
    transpose: bool

    def xla(self, x, packed, layer):
        product = functools.partial(xla.matmul, codes=self.codes, transpose=self.transpose)
        return self._of_one_layer(product, x, packed, layer)

    def blocked(self, x, packed, layer):
        product = functools.partial(xla.blocked, codes=self.codes)
        return self._of_one_layer(product, x, packed, layer)

    def summed(self, x, packed, layer):
        product = functools.partial(xla_gpu.matvec, codes=self.codes)
        return self._of_one_layer(product, x, packed, layer)

    def int8_activations(self, x, packed, layer):
        return self._of_one_layer(xla.int8_activations, x, packed, layer)

    def _of_one_layer(self, product, x, packed, layer):
        def form(x, packed, layer):
            return product(x, packing.layer(packed, layer))

        return self._by_device(form, x, *_stacked(packed, layer))

    # The imports of the kernels take a second, so each method does them itself.

    def tpu(self, x, packed, layer, interpret=False):
        from lora_jax.kernels.int4_matmul import pallas_tpu

        def kernel(x, packed, layer):
            y = pallas_tpu.matmul(
                x, packed.q, packed.scale, packed.column_scale, layer,
                transpose=self.transpose, interpret=interpret,
            )  # fmt: skip
            if packed.group_bias is None:
                return y
            return _added(y, self._group_bias_term(x, packed, layer))

        return self._by_device(kernel, x, *_stacked(packed, layer))

    def triton(self, x, packed, layer, interpret=False):
        from lora_jax.kernels.int4_matmul import triton_gpu

        kernel = functools.partial(triton_gpu.matmul, interpret=interpret)
        return self._by_device(kernel, x, *_stacked(packed, layer))

    def joins(self, weights) -> bool:
        """Whether `triton_joined` takes the weights, of which `triton` takes each."""
        from lora_jax.kernels.int4_matmul import triton_gpu

        return triton_gpu.alike(weights) and self.partition.stored() == (None, None)

    def triton_joined(self, x, weights, layer):
        """The products with several weights, in one kernel."""
        from lora_jax.kernels.int4_matmul import triton_gpu

        if not self.partition.splits():
            return triton_gpu.matmuls(x, tuple(weights), layer)
        rows, whole = PartitionSpec(self.partition.computed(len(x)).rows), PartitionSpec()
        matmuls = partitioning.shard_map(triton_gpu.matmuls, (rows, whole, whole), rows)
        return matmuls(x, tuple(weights), layer)

    def mosaic(self, x, packed, layer):
        from lora_jax.kernels.int4_matmul import mosaic_gpu

        packed, layer = _stacked(packed, layer)
        packed = packed._replace(q=mosaic_gpu.k_minor(packed.q))
        (y,) = self.from_k_minor(x, packed, layer, packed.q.shape[1:2])
        return y

    def from_k_minor(self, x, packed, layer, widths):
        from lora_jax.kernels.int4_matmul import mosaic_gpu

        _, n = self.partition.stored()

        def kernel(x, packed, layer):
            parts = packed.q.shape[1:2] if n else widths  # a device has parts of all of them
            arrays = packed.q, packed.scale, packed.column_scale
            found = mosaic_gpu.matmuls(x, *arrays, layer, parts)
            if packed.group_bias is None:
                return found
            extra = _split(self._group_bias_term(x, packed, layer), parts)
            return [_added(y, own) for y, own in zip(found, extra, strict=True)]

        found = self._by_device(kernel, x, packed, layer)
        return _split(*found, widths) if n else found

    def tpu_refusal(self, x, packed) -> str | None:
        from lora_jax.kernels.int4_matmul import pallas_tpu

        return self.unreadable() or pallas_tpu.refusal(
            *self._sizes(x, packed), x.dtype, packed.scale.dtype, transpose=self.transpose
        )

    def triton_refusal(self, x, packed) -> str | None:
        try:
            from lora_jax.kernels.int4_matmul import triton_gpu
        except ImportError:
            return "this version of jax, which has no Triton in Pallas"
        if packed.group_bias is not None and packed.column_scale is not None:
            return "a bias of groups beside a scale of columns"
        if packed.scale.size >= 2**31:
            return "a stack with 2³¹ scales or more: Triton's indices have 32 bits"
        if self.partition == partitioning.WHOLE and partitioning.num_devices() > 1:
            return "arrays that XLA splits: it cannot split a kernel"
        return self.unreadable() or triton_gpu.refusal(
            *self._sizes(x, packed), x.dtype, packed.scale.dtype
        )

    def mosaic_refusal(self, x, packed) -> str | None:
        from lora_jax.kernels.int4_matmul import mosaic_gpu

        return self.unreadable() or mosaic_gpu.refusal(
            *self._sizes(x, packed), x.dtype, packed.scale.dtype
        )

    def unreadable(self) -> str | None:
        """Why the kernels, which decode two's complement, cannot read the weight, or None."""
        return None if self.codes == "int4" else f"codes {self.codes!r}"

    def _sizes(self, x, packed) -> tuple[int, int, int, int]:
        """(M, K, N, group) of one device's part."""
        axes = partitioning.open_axes()
        k, n = packed.q.shape[-2] * 8, packed.q.shape[-1]
        over = self.partition.for_rows(len(x), k).computed(len(x))
        group = k // packed.scale.shape[-2]
        rows = len(x) // math.prod(axes[axis] for axis in over.rows)
        return rows, k // axes.get(over.k, 1), n // axes.get(over.n, 1), group

    def _by_device(self, form, x, packed, layer):
        """form(x, packed, layer), with each device computing its part."""
        if not self.partition.splits():
            return form(x, packed, layer)
        padded = packed.q.shape[-2] * 8 if packed.q.dtype == jnp.uint32 else packed.q.shape[-1]
        partition = self.partition.for_rows(len(x), padded)
        over, (k, n) = partition.computed(len(x)), partition.stored()
        gathered = partition.gathered
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

        operands = PartitionSpec(over.rows, summed), specs, PartitionSpec()
        out = PartitionSpec(over.rows, kept)
        return partitioning.shard_map(each, operands, out)(x, packed, layer)

    def _group_bias_term(self, x, packed, layer):
        """The asymmetric term of y: the sum of x over each group, times the group's bias."""
        bias = lax.dynamic_index_in_dim(packed.group_bias, layer, keepdims=False)
        x, bias = x.astype(jnp.float32), bias.astype(jnp.float32)
        if self.transpose:
            each = jnp.dot(x, bias.T, precision="highest")
            return jnp.repeat(each, 8 * packed.q.shape[-2] // len(bias), axis=1)
        sums = x.reshape(len(x), len(bias), -1).sum(axis=2)
        return jnp.dot(sums, bias, precision="highest")


def _added(y: jax.Array, extra: jax.Array) -> jax.Array:
    """y + extra, in float32, rounded once to y's dtype."""
    return (y.astype(jnp.float32) + extra).astype(y.dtype)


def _split(y: jax.Array, widths: Sequence[int]) -> list[jax.Array]:
    """The parts of y [M, N] that have so many columns each."""
    return jnp.split(y, [*itertools.accumulate(widths)][:-1], axis=1)


def _stacked(packed: packing.Packed, layer: jax.Array | None):
    """(a stack [L, …], the index in it), from a stack or from a single weight."""
    if layer is not None:
        return packed, layer
    return jax.tree.map(lambda a: a[None], packed), jnp.zeros((), jnp.int32)
