"""The 4-bit matmul in plain XLA: dequantize, then a dense product accumulated in float32."""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from lora_jax.kernels import matmul as dense
from lora_jax.kernels import packed as packing

_BLOCK = 256  # the most rows of W that `blocked` dequantizes at a time


def matmul(
    x: Float[Array, "M C"], packed: packing.Packed, *, codes: str, transpose: bool = False
) -> Float[Array, "M O"]:
    """x · W or, with transpose, x · Wᵀ for one weight [K, N], in x's dtype.

    The dense weight is a temporary in x's dtype; the scales are applied in float32.
    """
    weight = packing.dequantize(packed, codes, x.dtype)
    return dense.contract(x, weight, -1, 1 if transpose else 0).astype(x.dtype)


def blocked(x: Float[Array, "M K"], packed: packing.Packed, *, codes: str) -> Float[Array, "M N"]:
    """x · W for few rows of x, in x's dtype; W is dequantized in blocks of rows, in float32.

    On a CPU a block's dense weight stays in cache, and a float32 product is exact and has no slow
    path for a single row.
    """
    groups, columns = packed.scale.shape
    size = packed.q.shape[0] * 8 // groups
    # The few scales are computed for all blocks at once, including the column scales.
    packed = packing.Packed(packed.q, packing.scales(packed), group_bias=packed.group_bias)
    together = next(n for n in range(max(1, _BLOCK // size), 0, -1) if groups % n == 0)
    x_blocks = x.astype(jnp.float32).reshape(len(x), -1, together * size).swapaxes(0, 1)
    blocks = jax.tree.map(lambda a: a.reshape(groups // together, -1, columns), packed)

    def add(total, block):
        x_block, weight = block
        return total + dense.contract(x_block, packing.dequantize(weight, codes), -1, 0), None

    total, _ = lax.scan(add, jnp.zeros((len(x), columns)), (x_blocks, blocks))
    return total.astype(x.dtype)


def int8_activations(x: Float[Array, "M K"], packed: packing.Packed) -> Float[Array, "M N"]:
    """x · W with x rounded to int8, with one scale for each row and group: integer products.

    Adds about 0.7 % of relative error. Codes are two's complement; sums are in int32, scales in
    float32, y in x's dtype. On a CPU it is slower than `blocked` for most shapes, see
    benchmarks/cpu.md.
    """
    rows, groups = max(2, len(x)), packed.scale.shape[0]  # one row: as in kernels/matmul.py
    wide = jnp.pad(x.astype(jnp.float32), ((0, rows - len(x)), (0, 0)))
    wide = wide.reshape(rows, groups, -1)
    x_scale = jnp.abs(wide).max(axis=2) / 127
    rounded = jnp.rint(wide / jnp.where(x_scale == 0, 1, x_scale)[..., None]).astype(jnp.int8)
    codes = packing.nibbles(packed.q).astype(jnp.int8).reshape(groups, -1, packed.q.shape[1])
    sums = lax.dot_general(
        rounded, codes, (((2,), (1,)), ((1,), (0,))), preferred_element_type=jnp.int32
    )  # [groups, rows, N]
    scales = x_scale.T[:, :, None] * packing.scales(packed)[:, None]
    y = (sums.astype(jnp.float32) * scales).sum(axis=0)
    if packed.group_bias is not None:
        bias = packed.group_bias.astype(jnp.float32)
        y += jnp.dot(wide.sum(axis=2), bias, precision="highest")
    return y[: len(x)].astype(x.dtype)
