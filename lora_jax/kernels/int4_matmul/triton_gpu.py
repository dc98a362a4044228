"""y = x · W on an NVIDIA GPU, for up to 128 rows of x and W in int4: a Pallas kernel for Triton.

Each word is read once and in place, and unpacked in the registers from which the tensor cores take
it. Nibble i of all words is a matrix of its own, the rows 8j+i of W, which multiplies the same
features of x: so no value moves between threads. The weight is the left operand, outᵀ = Wᵀ · xᵀ,
because Triton gives each warp rows of that one: no two warps unpack the same word.

From how many rows on dequantizing first is faster, by the published peaks, in time per weight: it
moves 5.6 bytes (the layer's words are copied out first), which takes an A100 2.7 ps. This kernel
instead unpacks each word again for each 64 rows, with 9 instructions per weight: 0.45 ps. So they
meet at about 400 rows on an A100, and at 2,000 on an L4, whose memory is slower. The limit of 128
leaves a margin, because none of it has been measured.
"""

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Float, Int

from lora_jax.kernels import packed as packing
from lora_jax.kernels import platform

MOST_ROWS = 128  # of x
_WORDS = 16  # rows of words in one step: the tensor cores contract 16 values at a time
_MIN_STEPS = 4  # the fewest steps along K of a block that shares its columns with others
_SHARED = 96 << 10  # bytes of shared memory that the copies in flight take: an L4 has 99 KiB
_SCALES = (jnp.int8, jnp.float16, jnp.bfloat16, jnp.float32)


def refusal(
    num_rows: int,
    k: int,
    n: int,
    group: int,
    dtype: jax.typing.DTypeLike,
    scale_dtype: jax.typing.DTypeLike,
) -> str | None:
    """Why the kernel does not take this product, or None if it does."""
    if not platform.is_ampere_to_hopper():
        return "this GPU: NVIDIA's of compute capability 8.0 to 9.0"
    if not 1 <= num_rows <= MOST_ROWS:
        return f"{num_rows} rows of x: from 1 to {MOST_ROWS}"
    if dtype not in (jnp.bfloat16, jnp.float16):
        return f"x in {jnp.dtype(dtype).name}: bfloat16 or float16"
    if scale_dtype not in _SCALES:
        return f"scales in {jnp.dtype(scale_dtype).name}: int8, or floats of 16 or 32 bits"
    if group % 8:
        return f"groups of {group} rows: multiples of 8"
    if k % (8 * _WORDS) or n % 64:
        return f"a weight [{k}, {n}]: d_in in multiples of {8 * _WORDS} and d_out of 64"
    return None


def matmul(
    x: Float[Array, "M K"],
    packed: packing.Packed,
    layer: Int[Array, ""],
    *,
    interpret: bool = False,
) -> Float[Array, "M N"]:
    """y = x · W[layer] of a stack in int4, accumulated in float32, in x's dtype.

    code · scale + group_bias is rounded to x's dtype, as a dequantized weight would be;
    column_scale multiplies the sum. The layer's arrays are read in place, from the stack.

    Raises: ValueError for what `refusal` names.
    """
    (y,) = matmuls(x, (packed,), layer, interpret=interpret)
    return y


@functools.partial(jax.jit, static_argnames="interpret")
def matmuls(
    x: Float[Array, "M K"],
    weights: tuple[packing.Packed, ...],
    layer: Int[Array, ""],
    *,
    interpret: bool = False,
) -> list[Float[Array, "M _"]]:
    """[matmul(x, packed, layer) for packed in weights], in one kernel.

    With more columns, fewer parts of K keep the processors busy, so fewer partial sums are written.

    Raises: ValueError for what `refusal` names, and for weights that are not alike.
    """
    num_rows, k = x.shape
    if not alike(weights):
        found = [jax.tree.map(lambda a: f"{a.dtype.name}{a.shape}", packed) for packed in weights]
        raise ValueError(f"expected weights that differ in their columns only, found {found}")
    words, group = weights[0].q.shape[1], k // weights[0].scale.shape[1]
    widths = [packed.q.shape[2] for packed in weights]
    for n in widths:
        if reason := refusal(num_rows, k, n, group, x.dtype, weights[0].scale.dtype):
            raise ValueError(f"the Triton kernel does not take {reason}")
    tile = _tile(num_rows, k, widths, weights[0])
    planes = x.reshape(num_rows, words, 8).transpose(2, 0, 1)
    # Partial sums are added in float32.
    dtype = x.dtype if tile.splits == 1 else jnp.float32
    found = pl.pallas_call(
        functools.partial(_kernel, tile, group),
        grid=(pl.cdiv(num_rows, tile.rows), sum(widths) // tile.columns, tile.splits),
        out_shape=[jax.ShapeDtypeStruct((tile.splits, num_rows, n), dtype) for n in widths],
        compiler_params=plgpu.CompilerParams(num_warps=tile.warps, num_stages=tile.stages),
        interpret=interpret,
    )(jnp.reshape(layer, (1,)), planes, weights)
    return [y[0] if tile.splits == 1 else y.sum(axis=0).astype(x.dtype) for y in found]


def alike(weights: Sequence[packing.Packed]) -> bool:
    """Whether they have the same rows, groups and dtypes."""
    kinds = {tuple(a if a is None else (a.shape[:-1], a.dtype) for a in each) for each in weights}
    return len(kinds) == 1


def _kernel(tile, group, layer_ref, x_ref, weights, *out_refs):
    """One tile of one of the products; `weights` hold references, or None."""
    (row, column, split), first = (pl.program_id(axis) for axis in range(3)), 0
    for packed, out_ref in zip(weights, out_refs, strict=True):
        where = row, column - first, split
        own = functools.partial(
            _write_tile, tile, group, where, layer_ref[0], x_ref, packed, out_ref
        )
        last = first + out_ref.shape[2] // tile.columns
        if len(weights) == 1:
            own()
        else:
            pl.when((first <= column) & (column < last))(own)
        first = last


def _write_tile(tile, group, where, layer, x_ref, packed, out_ref):
    """One tile of out [split, rows, columns]. where: its number on each axis of the grid."""
    row, column, split = where
    rows = row * tile.rows + lax.iota(jnp.int32, tile.rows)
    rows = jnp.minimum(rows, x_ref.shape[1] - 1)  # the last one again in place of missing ones
    columns = pl.ds(column * tile.columns, tile.columns)
    num_steps = x_ref.shape[2] // _WORDS

    def add_step(step, total):
        these = pl.ds(step * _WORDS, _WORDS)
        words = packed.q[layer, these, columns]
        group_of = lax.div(8 * (step * _WORDS + lax.iota(jnp.int32, _WORDS)), jnp.int32(group))
        scale = packed.scale[layer, group_of, columns].astype(jnp.float32)
        if packed.group_bias is not None:
            bias = packed.group_bias[layer, group_of, columns].astype(jnp.float32)
        for nibble in range(8):
            weight = _code(words, nibble) * scale
            if packed.group_bias is not None:
                weight += bias
            total += lax.dot_general(
                weight.astype(x_ref.dtype),
                x_ref[nibble, rows, these],
                (((0,), (1,)), ((), ())),
                preferred_element_type=jnp.float32,
            )
        return total

    total = lax.fori_loop(
        lax.div(split * num_steps, tile.splits),
        lax.div((split + 1) * num_steps, tile.splits),
        add_step,
        jnp.zeros((tile.columns, tile.rows), jnp.float32),
    )
    if packed.column_scale is not None:
        total *= packed.column_scale[layer, 0, columns][:, None]
    out_ref[split, rows, columns] = total.T.astype(out_ref.dtype)


def _code(words: jax.Array, nibble: int) -> jax.Array:
    """The codes −8 … 7 in float32, without converting integers, which GPUs do slowly.

    The nibble becomes the upper bits of a mantissa: with its own top bit flipped, which adds 8 to
    a code in two's complement, and with the exponent of 128, the float32 is 136 + code.
    """
    up = 16 - 4 * nibble
    moved = words << up if up >= 0 else words >> -up
    bits = (moved & 0x000F0000) ^ 0x43080000
    return lax.bitcast_convert_type(bits, jnp.float32) - 136


class _Tile(NamedTuple):
    """What a block of threads computes, into how many parts K is split, and Triton's parameters."""

    rows: int
    columns: int
    splits: int
    warps: int
    stages: int  # one more than the steps whose copies are in flight


def _tile(num_rows: int, k: int, widths: Sequence[int], packed: packing.Packed) -> _Tile:
    rows = min(64, max(16, 1 << (num_rows - 1).bit_length()))
    # Every tile of columns reads x again: with more rows, wider tiles read it less often.
    columns = 128 if rows > 16 and all(n % 128 == 0 for n in widths) else 64
    splits = _splits(-(-num_rows // rows) * (sum(widths) // columns), num_rows, k)
    read = (packed.q, packed.scale, packed.group_bias)
    per_column = sum(array.dtype.itemsize for array in read if array is not None)
    step = _WORDS * (columns * per_column + 8 * rows * 2)  # bytes
    return _Tile(
        rows, columns, splits, warps=8 if rows > 32 else 4, stages=4 if 3 * step <= _SHARED else 3
    )


def _splits(blocks: int, num_rows: int, k: int) -> int:
    """The number of parts of K with the least time, in units of that to read the weight once."""
    processors, steps = platform.num_processors(), k // (8 * _WORDS)

    def time(splits: int) -> float:
        each = blocks * splits / processors
        idle = math.ceil(each) / each * (1 + splits / steps)  # a block waits for its first copies
        sums = 0 if splits == 1 else 8 * num_rows * splits / (k * 9 / 16)  # written and read
        return idle + sums

    return min(range(1, max(1, steps // _MIN_STEPS) + 1), key=time)
