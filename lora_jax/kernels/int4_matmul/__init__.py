"""Matmul with a frozen 4-bit weight: packed words in, products out, no weight gradient.

One public function over several implementations. The platform that the program is lowered for and
the shapes decide which of them runs:

  TPU    a fused kernel, forward and backward
  GPU    up to 128 rows of x: a fused kernel (`joined`: one for several weights); for few rows that
         it does not take, sums that write no dense weight; else dequantize, then a dense product
         (on Hopper, up to 64 rows and with transposed words: from_k_minor, another fused kernel)
  CPU    few rows of x: dequantize block by block, in cache;
         else dequantize, then a dense product
"""

import functools
import logging
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from lora_jax.kernels import choice, linear, partitioning, platform, varying
from lora_jax.kernels import packed as packing
from lora_jax.kernels.int4_matmul import forms, xla_gpu

IMPLEMENTATIONS = ("xla", "int8_activations", "pallas_tpu", "triton_gpu", "mosaic_gpu")
_BLOCKED_ROWS = 8  # the most rows of x for which a CPU uses xla.blocked
_log = logging.getLogger(__name__)


def int4_matmul(
    x: Float[Array, "*B d_in"],
    packed: packing.Packed,
    *,
    codes: str = "int4",
    layer: Int[Array, ""] | None = None,
    partition: partitioning.Partition = partitioning.WHOLE,
    implementation: str | None = None,
) -> Float[Array, "*B N"]:
    """y = x · dequantize(packed), accumulated in float32, in x's dtype.

    x may be narrower than the padded K. With `layer`, the weight is that layer of a stack [L, …],
    which is read in place. `partition`: how the ambient mesh (jax.set_mesh) splits the product;
    partial sums of several devices are added in x's dtype. Differentiable in x only; the derivative
    saves only the packed words. `implementation`: None picks the best one for the platform; a name
    means that one or an error:

      "xla"               dequantize, then a dense product
      "int8_activations"  rounds x as well, see xla.py; its derivative is that of "xla"
      "pallas_tpu"        interpreted where there is no TPU
      "triton_gpu"        interpreted on a CPU; its derivative is that of "xla"
      "mosaic_gpu"        transposes the words first (use from_k_minor to do that once for many
                          products); its derivative is that of "xla"

    Raises: ValueError for unknown codes or implementation, for shapes that do not match, and for
    operands that the named implementation does not take, with its reason.
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
    if x.size == 0:
        return jnp.zeros((*x.shape[:-1], packed.q.shape[-1]), x.dtype)
    if packed.order is not None:
        order = packed.order if layer is None else packed.order[layer]
        x = x.at[..., order].get(unique_indices=True, mode="promise_in_bounds")
        packed = packed._replace(order=None)
    product = forms.Forms(codes, partition, transpose=False)
    y = _matmul(_rows(x, padded), packed, layer, product, implementation)
    return y.reshape(*x.shape[:-1], y.shape[-1])


def from_k_minor(
    x: Float[Array, "*B d_in"],
    packed: packing.Packed,
    *,
    layer: Int[Array, ""],
    widths: Sequence[int] | None = None,
    partition: partitioning.Partition = partitioning.WHOLE,
) -> list[Float[Array, "*B _"]]:
    """int4_matmul by "mosaic_gpu" with a stack whose words are int4 [L, N, K], with K minor.

    mosaic_gpu.k_minor makes them. widths: of the parts of N, each of which is one of the results;
    None: one part. Not differentiable. Raises: ValueError as the kernel does.
    """
    product = forms.Forms("int4", partition, transpose=False)
    widths = widths or packed.q.shape[1:2]
    found = product.from_k_minor(_rows(x, packed.q.shape[-1]), packed, layer, widths)
    return [y.reshape(*x.shape[:-1], y.shape[-1]) for y in found]


def joined(
    x: Float[Array, "*B d_in"],
    weights: Sequence[packing.Packed],
    *,
    layer: Int[Array, ""],
    partition: partitioning.Partition = partitioning.WHOLE,
) -> list[Float[Array, "*B _"]]:
    """[int4_matmul(x, packed, layer=layer) for packed in weights], in int4, of stacks.

    On a GPU they are one kernel, "triton_gpu", where it takes all of them and no device has only a
    part of one. Not differentiable.
    """
    rows = _rows(x, weights[0].q.shape[-2] * 8)
    product, where = forms.Forms("int4", partition, transpose=False), platform.platform_here()
    kernels = {_kernel(product, where, rows, packed) for packed in weights}
    if kernels != {choice.INT4_TENSOR_CORES} or not product.joins(weights):
        return [int4_matmul(x, packed, layer=layer, partition=partition) for packed in weights]
    found = product.triton_joined(rows, weights, layer)
    return [y.reshape(*x.shape[:-1], y.shape[-1]) for y in found]


def _rows(x, padded: int) -> jax.Array:
    """x [M, padded]"""
    return jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, padded - x.shape[-1])]).reshape(-1, padded)


def _matmul(x, packed, layer, product, implementation):
    """x · W, or x · Wᵀ; the derivative saves only the packed words and the layer's number."""
    constants, tree = jax.tree.flatten((packed, layer))

    def multiply(*arrays):
        *constants, x = arrays
        return _run(product, x, *tree.unflatten(constants), implementation)

    def transposed(*arrays):
        *constants, dy = arrays
        packed, layer = tree.unflatten(constants)
        # Without a barrier, XLA merges this dequantization with the forward one and keeps the dense
        # weight alive in between, which would cost the memory that quantization saves. For a stack,
        # a barrier on the index is enough; one on the words would copy the layer out.
        if layer is None:
            packed, dy = lax.optimization_barrier((packed, dy))
        else:
            layer, dy = lax.optimization_barrier((layer, dy))
        other = product._replace(transpose=not product.transpose)
        return _run(other, dy, packed, layer, implementation)

    return linear.linear(multiply, transposed, *lax.stop_gradient(constants), x)


def _run(product, x, packed, layer, implementation):
    """x · W, or x · Wᵀ, by the named implementation or the one that suits the platform."""
    if packed.nested_scale is not None:
        # Expand the scales first: their blocks cut across any part of the weight.
        packed = packed if layer is None else packing.layer(packed, layer)
        packed = packing.Packed(packed.q, packing.scales(packed), group_bias=packed.group_bias)
        layer = None
    arguments = x, packed, layer
    if implementation in ("int8_activations", "triton_gpu", "mosaic_gpu") and product.transpose:
        implementation = "xla"  # they are for decoding
    if implementation == "xla":
        return product.xla(*arguments)
    if implementation == "int8_activations":
        _refuse(implementation, product.unreadable())
        return product.int8_activations(*arguments)
    if implementation == "pallas_tpu":
        _refuse(implementation, product.tpu_refusal(x, packed))
        interpreted = functools.partial(product.tpu, interpret=True)
        return lax.platform_dependent(*arguments, tpu=product.tpu, default=interpreted)
    if implementation == "triton_gpu":
        _refuse(implementation, product.triton_refusal(x, packed))
        interpreted = functools.partial(product.triton, interpret=True)
        return lax.platform_dependent(*arguments, cpu=interpreted, default=product.triton)
    if implementation == "mosaic_gpu":
        _refuse(implementation, product.mosaic_refusal(x, packed))
        return product.mosaic(*arguments)
    where = platform.platform_here()
    if where:  # tracing all of the forms takes time
        return _form(product, where, x, packed)(*arguments)
    cpu, gpu, tpu = (_form(product, each, x, packed) for each in ("cpu", "gpu", "tpu"))
    return lax.platform_dependent(*arguments, tpu=tpu, cpu=cpu, default=gpu)


def kernel_of(
    x: jax.ShapeDtypeStruct | jax.Array,
    packed: packing.Packed,
    *,
    codes: str = "int4",
    partition: partitioning.Partition = partitioning.WHOLE,
    transpose: bool = False,
) -> str:
    """The kernel, of choice.KERNELS, that computes x · W here, or x · Wᵀ; choice.XLA if none.

    x [M, …]; the platform is that of the ambient mesh.
    """
    product = forms.Forms(codes, partition, transpose)
    return _kernel(product, platform.platform_here(), x, packed)


def _kernel(product, where, x, packed) -> str:
    if where == "tpu":
        reason = choice.refusal(choice.INT4_TPU) or product.tpu_refusal(x, packed)
        if reason is None:
            return choice.INT4_TPU
        _log.debug("no Pallas kernel for x %s, q %s: %s", x.shape, packed.q.shape, reason)
    elif where == "gpu" and not product.transpose:
        reason = choice.refusal(choice.INT4_TENSOR_CORES) or product.triton_refusal(x, packed)
        if reason is None:
            return choice.INT4_TENSOR_CORES
        _log.debug("no Triton kernel for x %s, q %s: %s", x.shape, packed.q.shape, reason)
        few = x.shape[0] <= xla_gpu.MOST_ROWS[product.codes]
        if few and not choice.refusal(choice.INT4_FEW_ROWS):
            return choice.INT4_FEW_ROWS
    return choice.XLA


def _form(product, where, x, packed):
    """The form of the product that suits the platform."""
    symbolic = not isinstance(x.shape[0], int)  # a size, as jax.export knows them
    if symbolic or varying.axes_of(x, packed):  # a kernel's results have no such types
        return product.xla
    kernel = _kernel(product, where, x, packed)
    if kernel == choice.INT4_TPU:
        return product.tpu
    if kernel == choice.INT4_TENSOR_CORES:
        return product.triton
    if kernel == choice.INT4_FEW_ROWS:
        return product.summed
    blocked = where == "cpu" and not product.transpose and len(x) <= _BLOCKED_ROWS
    return product.blocked if blocked else product.xla


def _refuse(implementation: str, reason: str | None) -> None:
    if reason:
        raise ValueError(f"expected what {implementation} takes, found {reason}")
