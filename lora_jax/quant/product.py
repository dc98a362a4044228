"""The product with a packed weight, of any layer that is a linear map."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Num

from lora_jax.kernels import explicit, int4_matmul, int8_matmul, partitioning
from lora_jax.kernels import packed as packing
from lora_jax.layers import linear_map
from lora_jax.quant import formats


def multiplier(
    packed: packing.Packed,
    fmt: str,
    layer: Int[Array, ""] | None = None,
    partition: partitioning.Partition = partitioning.WHOLE,
) -> jax.tree_util.Partial:
    """x → x · dequantize(packed), as a tree of the packed arrays.

    layer: which of a stack of weights.
    """
    product = functools.partial(_product, fmt=fmt, partition=partition)
    return jax.tree_util.Partial(product, packed=packed, layer=layer)


def _product(x, *, packed, layer, fmt, partition):
    codes = formats.codes(fmt)
    if codes == "int8":
        packed = packed if layer is None else packing.layer(packed, layer)
        return int8_matmul.int8_matmul(x, packed.q, packed.column_scale)
    return int4_matmul.int4_matmul(x, packed, codes=codes, layer=layer, partition=partition)


def multiply(
    how: linear_map.Einsum,
    x: Num[Array, "..."],
    weight: Callable[[jax.Array], jax.Array],
    *,
    shape: Sequence[int],
    bias: Num[Array, "..."] | None = None,
    out_sharding: Any = None,
) -> Float[Array, "..."]:
    """y = how.multiply(x, weight) + bias; with Explicit axes, y is sharded as a dense layer's.

    weight: a `multiplier`. shape: of the dense weight. out_sharding: of y, as in Flax's layers.
    Raises: jax's ShardingTypeError where a dense layer would need out_sharding.
    """

    def compute(x, weight, bias):
        y = how.multiply(x, weight, shape=shape)
        if bias is None:
            return y
        return y + how.spread(bias.reshape(-1).astype(y.dtype), y.ndim, shape)

    mesh = explicit.mesh_of(x, weight)
    if mesh is None and out_sharding is None:
        return compute(x, weight, bias)
    if mesh is None:
        return jax.sharding.reshard(compute(x, weight, bias), out_sharding)
    *_, k, n = explicit.axes_of(weight.keywords["packed"].q)
    axes = how.tensor_axes(k, n, shape, mesh)
    dense = jax.ShapeDtypeStruct(
        tuple(shape[-how.ndim :]), x.dtype, sharding=explicit.sharding(mesh, *axes)
    )
    product = functools.partial(jnp.einsum, f"{how.x},{how.w}->{how.y}", out_sharding=out_sharding)
    y = jax.eval_shape(product, x, dense)
    return explicit.automatic(compute, x, weight, bias, out=y.sharding)
