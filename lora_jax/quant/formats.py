"""The formats of quantized weights: quantize to int8, int4, NF4 or FP4, and dequantize."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Num, UInt8

from lora_jax import errors
from lora_jax.kernels import packed as packing

_COLUMNS = 512  # quantized at a time, so that temporaries are small compared to the weight
# Without search: the largest |w| of a group in steps. It is more than 8, the largest code, so that
# the steps are finer for the other weights. 823 is prime, so no ratio of two bfloat16 numbers lies
# halfway between two codes. How such a tie is rounded would depend on the last bit of the scale,
# and so on how the code was compiled.
_FAST = 8.23


class Format(NamedTuple):
    """How weights are quantized to codes of 4 bits, or of 8 for int8.

    codes: what the codes mean. group: the number of rows that share a scale. nested: whether the
    scales are quantized, too.
    """

    codes: str
    group: int = 1
    nested: bool = False


FORMATS = {
    "int8": Format("int8"),
    "int4": Format("int4", 32),
    "int4-g64": Format("int4", 64),
    "int4-g128": Format("int4", 128),
    "nf4": Format("nf4", 64),
    "nf4-dq": Format("nf4", 64, nested=True),
    "fp4": Format("fp4", 64),
    "fp4-dq": Format("fp4", 64, nested=True),
}


def codes(fmt: str) -> str:
    """What the codes mean: "int8", or one of packing.CODES. Raises: UserError if unknown."""
    return _format(fmt).codes


def bits_per_weight(packed: packing.Packed, rows: int) -> float:
    """The bits of the arrays, with padding, per entry of the weight [rows, N]."""
    arrays = jax.tree.leaves(packed)
    num_bytes = sum(array.size * array.dtype.itemsize for array in arrays)
    return 8 * num_bytes / (rows * packed.q.size // packed.q.shape[-2])


@functools.partial(jax.jit, static_argnames=("fmt", "multiple", "search", "transposed"))
def quantize(
    weight: Float[Array, "K N"],
    fmt: str,
    multiple: int = 1,
    *,
    search: bool = True,
    transposed: bool = False,
) -> packing.Packed:
    """The packed weight nearest to `weight` in one of FORMATS.

    int8: absmax per column. int4: symmetric, with a signed scale, so that the largest |w| can have
    the code −8. A search finds the scale with the least squared error; it is then refitted, and
    rounded to int8 × one float32 per column. Without `search` the largest |w| has the code −8,
    which is faster and has up to 5 % more error.
    nf4, fp4 and their -dq: the same bits as bitsandbytes if K is a multiple of 64 and nothing is
    padded. K is padded with zeros to a multiple of the group × `multiple`, the number of shards.
    transposed: `weight` is [N, K], as on disk; it is transposed block by block, never as a whole.
    """
    form = _format(fmt)
    rows, columns = weight.shape[::-1] if transposed else weight.shape
    padding = -rows % (form.group * multiple)
    block = min(_COLUMNS, columns)
    quantizer = {
        "int8": _int8,
        "int4": functools.partial(_int4, group=form.group, search=search),
        "nf4": functools.partial(_table, table=packing.NF4_CODE, group=form.group),
        "fp4": functools.partial(_table, table=packing.FP4_CODE, group=form.group),
    }[form.codes]

    def quantize_block(index, packed):
        # The last block starts early enough to fit; the overlap is computed twice, equally.
        start = jnp.minimum(index * block, columns - block)
        part = lax.dynamic_slice_in_dim(weight, start, block, axis=0 if transposed else 1)
        part = (part.T if transposed else part).astype(jnp.float32)
        part = jnp.pad(part, ((0, padding), (0, 0)))
        return jax.tree.map(
            lambda whole, new: lax.dynamic_update_slice_in_dim(whole, new, start, axis=1),
            packed,
            quantizer(part),
        )

    shapes = jax.eval_shape(quantizer, jax.ShapeDtypeStruct((rows + padding, columns), jnp.float32))
    empty = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
    packed = lax.fori_loop(0, -(-columns // block), quantize_block, empty)
    return _nest(packed, -(-rows // form.group)) if form.nested else packed


def dequantize(
    packed: packing.Packed, fmt: str, rows: int, dtype: jax.typing.DTypeLike = jnp.float32
) -> Float[Array, "K N"]:
    """The first `rows` rows of the weight that `packed` represents."""
    if codes(fmt) == "int8":
        return (packed.q.astype(jnp.float32) * packed.column_scale).astype(dtype)[:rows]
    return packing.dequantize(packed, codes(fmt), dtype)[:rows]


def asymmetric(
    codes: UInt8[Array, "K N"], scale: Num[Array, "groups N"], zero: Num[Array, "groups N"]
) -> packing.Packed:
    """The weight (codes − zero) · scale as int4: codes − 8, with the group bias (8 − zero) · scale.

    codes and zero are 0 … 15. Exact in float32 if scale · 15 is, as for scales in float16 or
    bfloat16. Raises: ValueError if the groups are not equal multiples of 8 rows.
    """
    if codes.shape[0] % (8 * scale.shape[0]):
        raise ValueError(
            f"expected groups of a multiple of 8 rows, found {codes.shape[0]} rows in "
            f"{scale.shape[0]} groups"
        )
    bias = (8 - zero.astype(jnp.float32)) * scale.astype(jnp.float32)
    return packing.Packed(_pack(codes.astype(jnp.int32) - 8), scale, group_bias=bias)


def error(weight: Float[Array, "K N"], packed: packing.Packed, fmt: str) -> Float[Array, ""]:
    """‖W − Ŵ‖ / ‖W‖, Frobenius norms; 0 for a weight of zeros."""
    lost, total = squares(weight, packed, fmt)
    return jnp.sqrt(lost / jnp.where(total == 0, 1, total))


@functools.partial(jax.jit, static_argnames="fmt")
def squares(
    weight: Float[Array, "K N"], packed: packing.Packed, fmt: str
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """(‖W − Ŵ‖², ‖W‖²), dequantized a block of columns at a time."""
    rows, columns = weight.shape
    block = min(_COLUMNS, columns)
    if codes(fmt) != "int8":  # blocks of nested scales span several columns
        packed = packing.Packed(packed.q, packing.scales(packed), group_bias=packed.group_bias)

    def add(index, sums):
        start = jnp.minimum(index * block, columns - block)
        part, cut = jax.tree.map(
            lambda whole: lax.dynamic_slice_in_dim(whole, start, block, axis=1), (weight, packed)
        )
        part = part.astype(jnp.float32)
        new = start + jnp.arange(block) >= index * block  # not counted in the previous block
        lost = dequantize(cut, fmt, rows) - part
        each = (jnp.square(lost).sum(axis=0), jnp.square(part).sum(axis=0))
        return jax.tree.map(lambda sum, more: sum + jnp.where(new, more, 0).sum(), sums, each)

    return lax.fori_loop(0, -(-columns // block), add, (jnp.zeros(()), jnp.zeros(())))


def _format(fmt: str) -> Format:
    if fmt not in FORMATS:
        raise errors.UserError(
            expected=f"a format among {', '.join(FORMATS)}",
            found=repr(fmt),
            do="choose one of them",
        )
    return FORMATS[fmt]


def _int8(weight: jax.Array) -> packing.Packed:
    column_scale = jnp.abs(weight).max(axis=0, keepdims=True) / 127
    q = _rounded(weight, column_scale, 127).astype(jnp.int8)
    return packing.Packed(q, column_scale=column_scale)


def _int4(weight: jax.Array, *, group: int, search: bool) -> packing.Packed:
    grouped = weight.reshape(-1, group, weight.shape[1])

    def codes(scale):
        return jnp.clip(_rounded(grouped, scale), -8, 7)

    q = codes(_searched(grouped, codes) if search else _signed(grouped))
    refit = (grouped * q).sum(axis=1) / jnp.maximum(jnp.square(q).sum(axis=1), 1)
    column_scale = jnp.abs(refit).max(axis=0, keepdims=True) / 127
    scale = _rounded(refit, column_scale).astype(jnp.int8)
    q = codes((scale * column_scale)[:, None]).astype(jnp.int32)
    return packing.Packed(_pack(q.reshape(weight.shape)), scale, column_scale)


def _searched(grouped: jax.Array, codes) -> jax.Array:
    largest = jnp.abs(grouped).max(axis=1, keepdims=True)

    def try_scale(index, best):
        # 2 signs × 24 magnitudes, from a range wider than the group's to one that clips its ends.
        # The divisors are never half-integers, with which the largest weight would lie halfway
        # between two codes: how such a tie is rounded depends on how the loop was compiled.
        error, scale = best
        candidate = largest / (6.55 + (index // 2) / 6.0) * (1 - 2 * (index % 2))
        new_error = jnp.square(codes(candidate) * candidate - grouped).sum(axis=1, keepdims=True)
        better = new_error < error
        return jnp.where(better, new_error, error), jnp.where(better, candidate, scale)

    start = (jnp.full_like(largest, jnp.inf), largest / 7)
    return lax.fori_loop(0, 48, try_scale, start)[1]


def _signed(grouped: jax.Array) -> jax.Array:
    most, least = (f(axis=1, keepdims=True) for f in (grouped.max, grouped.min))
    return jnp.where(most > -least, most, least) / -_FAST


def _table(weight: jax.Array, *, table: np.ndarray, group: int) -> packing.Packed:
    """The nearest codes of a table; of two equally near, that of the lower value."""
    grouped = weight.reshape(-1, group, weight.shape[1])
    absmax = jnp.abs(grouped).max(axis=1)
    scaled = grouped * jnp.where(absmax == 0, 0, 1 / absmax)[:, None]
    order = np.argsort(table, kind="stable")
    middles = (table[order[1:]] + table[order[:-1]]) / 2
    q = sum((scaled > middle).astype(jnp.int32) for middle in middles)
    if (order != np.arange(len(table))).any():
        q = jnp.asarray(order, jnp.int32)[q]
    return packing.Packed(_pack(q.reshape(weight.shape)), absmax)


def _nest(packed: packing.Packed, used: int) -> packing.Packed:
    """`packed` with its scales, minus their mean, as 8-bit codes of the dynamic map.

    used: the number of groups without padding; padding does not count in the mean and the maxima.
    """
    groups, columns = packed.scale.shape
    offset = _sum(packed.scale[:used].reshape(-1)) / (used * columns)
    centred = jnp.where(jnp.arange(groups)[:, None] < used, packed.scale - offset, 0)
    flat = centred.T.reshape(-1)  # in the order of [out, in], like the blocks of bitsandbytes
    blocks = jnp.pad(flat, (0, -flat.size % packing.NESTED_BLOCK)).reshape(-1, packing.NESTED_BLOCK)
    largest = jnp.abs(blocks).max(axis=1)
    scaled = blocks * jnp.where(largest == 0, 0, 1 / largest)[:, None]
    values = packing.dynamic_map()
    bounds = jnp.asarray((values[1:] + values[:-1]) / 2)  # a tie takes the lower value
    code = jnp.searchsorted(bounds, scaled.reshape(-1)).astype(jnp.uint8)
    return packed._replace(
        scale=code[: flat.size].reshape(columns, groups).T,
        nested_scale=largest,
        nested_offset=offset[None],
    )


def _sum(values: jax.Array) -> jax.Array:
    """The sum in a fixed order, by halves; that of a reduction depends on how it is compiled."""
    while values.size > 1:
        values = jnp.pad(values, (0, values.size % 2))
        half = values.size // 2
        values = values[:half] + values[half:]
    return values[0]


def _rounded(weight: jax.Array, scale: jax.Array, largest: int | None = None) -> jax.Array:
    codes = jnp.rint(weight * jnp.where(scale == 0, 0, 1 / scale))
    return codes if largest is None else jnp.clip(codes, -largest, largest)


def _pack(codes: jax.Array) -> jax.Array:
    """int32 codes [K, N] → uint32 [K/8, N], nibble i of word j = row 8j+i."""
    nibbles = lax.bitcast_convert_type(codes & 15, jnp.uint32).reshape(-1, 8, codes.shape[1])
    return sum(nibbles[:, i] << (4 * i) for i in range(8))
