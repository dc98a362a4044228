"""The memory layout of a frozen 4-bit weight W [K, N] (K = d_in, N = d_out), and its decoding.

All 4-bit formats and checkpoints are converted to this layout, and all kernels read it:

  q              uint32 [K/8, N]   nibble i of word j is row 8j+i
  scale          [K/G, N]          one per group of G rows: int8, float, or uint8 for nested scales
  column_scale   float32 [1, N]    multiplies every scale of its column
  group_bias     [K/G, N]          added to every weight of the group, in asymmetric quantization
  nested_scale   float32 [blocks]  of uint8 scales ("double quantization"), 256 scales a block in
  nested_offset  float32 [1]       the order of [N, K/G], as bitsandbytes stores them
  order          int32 [K]         row k of the above multiplies feature order[k] of x, for GPTQ's
                                   act-order, whose groups collect rows from anywhere

  w = code(nibble) · scale · column_scale + group_bias

code is the nibble in two's complement ("int4") or an index into a table: NormalFloat's ("nf4",
Dettmers et al. 2023, https://arxiv.org/abs/2305.14314, appendix E) or bitsandbytes' own 4-bit
floats ("fp4"). K is padded to a multiple of G. Fields that a format does not use are None. Stacked
weights have a leading axis [L, …] in every array.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int8, Int32, Num, UInt32

NF4_CODE = np.array(
    [
        *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
        *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
        *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
        *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
    ],
    np.float32,
)
# One bit of sign, two of exponent and one of mantissa, divided by 12; nibble 8 is a second zero.
FP4_CODE = np.array(
    [0, 0.0625, 8, 12, 4, 6, 2, 3, 0, -0.0625, -8, -12, -4, -6, -2, -3], np.float32
) / np.float32(12)
TABLES = {"nf4": NF4_CODE, "fp4": FP4_CODE}
CODES = ("int4", *TABLES)
NESTED_BLOCK = 256


class Packed(NamedTuple):
    """A quantized weight. 4-bit formats: as above; int8: q int8 [K, N] and column_scale."""

    q: UInt32[Array, "*L words N"] | Int8[Array, "*L K N"]
    scale: Num[Array, "*L groups N"] | None = None
    column_scale: Float[Array, "*L 1 N"] | None = None
    group_bias: Float[Array, "*L groups N"] | None = None
    nested_scale: Float[Array, "*L blocks"] | None = None
    nested_offset: Float[Array, "*L 1"] | None = None
    order: Int32[Array, "*L K"] | None = None


def layer(packed: Packed, index: jax.typing.ArrayLike) -> Packed:
    """The weight of one layer of a stack [L, …]; index is not negative."""

    def of(stack):
        # With the arithmetic for a negative index, XLA's GPU backend copies the words of a layer.
        return lax.dynamic_index_in_dim(stack, index, keepdims=False, allow_negative_indices=False)

    return jax.tree.map(of, packed)


def scales(packed: Packed) -> Float[Array, "groups N"]:
    """scale · column_scale of every group, in float32."""
    scale = packed.scale.astype(jnp.float32)
    if packed.nested_scale is not None:
        groups, columns = scale.shape
        flat = lax.broadcasted_iota(jnp.int32, (groups, columns), 1) * groups
        flat += lax.broadcasted_iota(jnp.int32, (groups, columns), 0)
        values, code = dynamic_map(), packed.scale.astype(jnp.int32)
        scale = jnp.asarray(values)[code] * packed.nested_scale[flat // NESTED_BLOCK]
        # This changes nothing where the product is 0. Elsewhere it keeps compilers from fusing the
        # product and the sum into one rounding, which would differ from bitsandbytes.
        scale = jnp.where(code == np.flatnonzero(values == 0)[0], 0, scale)
        scale = scale + packed.nested_offset[None]
    return scale if packed.column_scale is None else scale * packed.column_scale


def nibbles(q: UInt32[Array, "words N"]) -> Int32[Array, "words 8 N"]:
    """The codes −8 … 7 of each word."""
    # Shift the nibble to the top, then arithmetically down, which extends its sign.
    shift = 28 - 4 * lax.broadcasted_iota(jnp.uint32, (1, 8, 1), 1)
    return lax.bitcast_convert_type(q[:, None] << shift, jnp.int32) >> 28


def dequantize(
    packed: Packed, codes: str = "int4", dtype: jax.typing.DTypeLike = jnp.float32
) -> Float[Array, "K N"]:
    """w = code(q) · scale · column_scale + group_bias in float32, rounded once to dtype.

    The rows are in the order of x's features.
    """
    words, columns = packed.q.shape
    if codes == "int4":
        values = nibbles(packed.q).astype(jnp.float32)
    else:
        values = jnp.asarray(TABLES[codes])[nibbles(packed.q) & 15]
    scale = scales(packed)
    weight = values.reshape(scale.shape[0], -1, columns) * scale[:, None]
    if packed.group_bias is not None:
        weight = weight + packed.group_bias.astype(jnp.float32)[:, None]
    weight = weight.reshape(words * 8, columns).astype(dtype)
    if packed.order is None:
        return weight
    rows = len(packed.order)  # without the padding, which stays in place
    return weight.at[packed.order].set(weight[:rows], unique_indices=True)


def dynamic_map() -> np.ndarray:
    """The 256 values that a uint8 nested scale stands for, ascending: 8-bit dynamic quantization.

    float32 [256], equal to bitsandbytes' table bit for bit.
    Source: Dettmers et al. 2022, https://arxiv.org/abs/2110.02861, §2.2.
    """
    low, high = np.float32([0.1, 1])
    values = [np.float32([0, 1])]
    for exponent in range(7):
        steps = np.arange(2**exponent + 1)
        step = (high - low) / np.float32(2**exponent)
        # Evenly spaced as in torch.linspace: from the nearer end, rounded once.
        exact = np.where(
            steps < len(steps) // 2,
            np.float64(low) + np.float64(step) * steps,
            np.float64(high) - np.float64(step) * steps[::-1],
        )
        edges = exact.astype(np.float32)
        middles = (edges[:-1] + edges[1:]) / 2 * np.float32(10.0 ** (exponent - 6))
        values += [middles, -middles]
    return np.sort(np.concatenate(values))
