"""y = x · W and dx = dy · Wᵀ on a TPU, W [K, N] in symmetric int4 as kernels/packed.py stores it.

One grid step unpacks and scales a tile of W in registers and multiplies with it, in one straight
run of instructions, so that the scheduler hides the unpacking behind the matrix unit. A tile spans
the whole contracted axis where that fits: partial sums then never travel through memory, which
on v6e costs more than the unpacking does.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int, Num, UInt32

GROUPS = (32, 64, 128)
_STEP_CYCLES = 300  # what a grid step costs besides its work: bookkeeping, filling and draining
_MOST_CYCLES = 20_000  # of one step in bfloat16: it is written out, so this bounds compile time
_FEW_ROWS = 64


class Chip(NamedTuple):
    """What the choice of tiles depends on, of one TensorCore; rates are per cycle."""

    bf16_ops: int
    hbm_bytes: int
    vmem_bytes: int
    bf16_registers: bool  # whether vector registers multiply in bfloat16
    bundles: float  # instruction words to keep the matrix unit busy for one cycle


class Tile(NamedTuple):
    """The extent of one grid step in x's rows, in the outputs and along the contracted axis."""

    rows: int
    outputs: int
    contracted: int


def matmul(
    x: Float[Array, "M C"],
    q: UInt32[Array, "L words N"],
    scale: Num[Array, "L groups N"],
    column_scale: Float[Array, "L 1 N"] | None,
    layer: Int[Array, ""],
    *,
    transpose: bool = False,
    interpret: bool = False,
) -> Float[Array, "M O"]:
    """x · W[layer], or x · W[layer]ᵀ with transpose, accumulated in float32, in x's dtype.

    W [K, N] = int4(q) · scale · column_scale, K = 8 · words. C = K and O = N; with transpose C = N
    and O = K. The layer is picked inside the kernel: no slice of the stack is copied. bfloat16 x
    meets weights rounded to bfloat16 (from v6e on their scales as well), float32 x float32 weights.

    Raises: ValueError for what refusal() names, or x of another width.
    """
    k, n = q.shape[1] * 8, q.shape[2]
    group = k // scale.shape[1]
    shape = (x.shape[0], k, n, group, x.dtype, scale.dtype)
    if x.shape[1] != (n if transpose else k):
        raise ValueError(f"expected x [M, {n if transpose else k}], found {x.shape}")
    if reason := refusal(*shape, transpose=transpose):
        raise ValueError(reason)
    if column_scale is None:
        column_scale = jnp.ones((q.shape[0], 1, n), jnp.float32)
    chip = _chip()
    tile = _tile(*shape, transpose, chip)
    held = _held_bytes(tile, n if transpose else k, x.dtype)
    in_bf16 = chip.bf16_registers and x.dtype == jnp.bfloat16
    return _call(
        *(jnp.reshape(layer, (1,)).astype(jnp.int32), x, q, scale, column_scale),
        tile=tile,
        scaled_in=jnp.bfloat16 if in_bf16 else jnp.float32,
        vmem_bytes=min(2 * held + (16 << 20), chip.vmem_bytes * 9 // 10),
        transpose=transpose,
        interpret=interpret,
    )


def refusal(
    num_rows: int,
    k: int,
    n: int,
    group: int,
    dtype: jax.typing.DTypeLike,
    scale_dtype: jax.typing.DTypeLike,
    *,
    transpose: bool = False,
) -> str | None:
    """Why matmul does not take x [num_rows, …] of `dtype` and a weight [k, n], or None."""
    dtype, scale_dtype = jnp.dtype(dtype), jnp.dtype(scale_dtype)
    if dtype not in (jnp.bfloat16, jnp.float32):
        return f"the TPU kernel multiplies bfloat16 or float32, not {dtype}"
    if scale_dtype not in (jnp.int8, jnp.bfloat16, jnp.float32):
        return f"the TPU kernel reads int8, bfloat16 or float32 scales, not {scale_dtype}"
    if group not in GROUPS or k % group:
        return f"the TPU kernel takes groups of {GROUPS} rows that divide {k}, not {group}"
    if num_rows < 1:
        return "the TPU kernel takes at least one row"
    if _tile(num_rows, k, n, group, dtype, scale_dtype, transpose, _chip()) is None:
        return f"no tile of a weight [{k}, {n}] fits this TPU's vector memory and a step's length"
    return None


def _chip() -> Chip:
    """The TPU of the surrounding mesh (jax.set_mesh, shard_map), else the default device.

    Where neither is a TPU, a cautious guess: correct from v5e on, and fast in training.
    """
    try:
        info = pltpu.get_tpu_info()
    except ValueError:
        return Chip(2**17, hbm_bytes=600, vmem_bytes=64 << 20, bf16_registers=False, bundles=1.0)
    hertz = {4: 1.05e9, 5: 1.5e9 if info.is_lite else 1.75e9, 6: 1.75e9}.get(info.generation, 2e9)
    return Chip(
        bf16_ops=int(info.bf16_ops_per_second / hertz),
        hbm_bytes=int(info.mem_bw_bytes_per_second / hertz),
        vmem_bytes=info.vmem_capacity_bytes,
        bf16_registers=info.generation >= 6,
        bundles=1.0 if info.generation >= 6 else 0.93,
    )


@functools.lru_cache(maxsize=1024)
def _tile(num_rows, k, n, group, dtype, scale_dtype, transpose, chip) -> Tile | None:
    """The tile with the least estimated time among those that fit, or None."""
    contracted, outputs = (n, k) if transpose else (k, n)
    whole_scales = _scale_unit(scale_dtype) * group
    # The matrix unit's 256 columns; of float32 scales 8 rows, of stored ones a whole block.
    units = (math.lcm(8 * group, 256), 128) if transpose else (256, whole_scales)
    depths = [d for d in range(units[1], contracted, units[1]) if contracted % d == 0]
    best, least = None, math.inf
    for rows in _parts(num_rows, 256):
        for width in _parts(outputs, units[0]):
            for depth in (*depths, contracted):
                tile = Tile(rows, width, depth)
                # Such a tile unpacks its neighbours' scales as well, and that is not hidden.
                shares = transpose and width < outputs and width % whole_scales
                scales = depth * whole_scales / group * bool(shares)
                cycles = _cycles(tile, scales, num_rows, outputs, contracted, dtype, chip)
                if cycles < least:
                    best, least = tile, cycles
    return best


def _parts(size: int, unit: int) -> list[int]:
    """Extents ≤ 2048 of the tiles of an axis: equal parts, rounded up to whole units."""
    if size <= unit:
        return [size]
    parts = {-(-size // (count * unit)) * unit for count in range(1, 1 + -(-size // unit))}
    return sorted(min(part, size) for part in parts if part <= max(unit, 2048))


def _cycles(tile: Tile, scales: float, num_rows, outputs, contracted, dtype, chip: Chip) -> float:
    """Estimated cycles of the whole product; infinite for a tile that is too large."""
    rows, width, depth = tile
    item = jnp.dtype(dtype).itemsize
    split = depth < contracted
    weight = depth * width * 9 / 16  # bytes: 4 bits and a scale
    blocks = weight + (rows * depth + rows * width) * item
    passes = 1 if item == 2 else 6  # a float32 product is six bfloat16 ones
    multiply = 2 * max(rows, 128) * depth * width * passes / chip.bf16_ops
    if (
        _held_bytes(tile, contracted, dtype) > chip.vmem_bytes * 0.7
        or multiply > _MOST_CYCLES * passes
    ):
        return math.inf
    # Registers of 1024 elements: an eighth of the unpacking and of the partial sums is seen.
    unpack = depth * width / 1024 * (0.5 if chip.bf16_registers else 1)
    sums = rows * width / 1024 / 8 * split
    issued = multiply * chip.bundles + unpack / 8 + scales / 400 + sums + _STEP_CYCLES
    moved = blocks if split else weight + rows * width * item
    step = max(multiply, issued, unpack + _STEP_CYCLES, moved / chip.hbm_bytes)
    count = -(-num_rows // rows) * -(-outputs // width) * (contracted // depth)
    # The last factor prefers short steps, which compile sooner, where long ones gain little.
    return (count * step + blocks / chip.hbm_bytes) * (1 + multiply * 1e-6)


def _held_bytes(tile: Tile, contracted: int, dtype) -> int:
    """Vector memory of one step: blocks twice, the unpacked weight and the sums."""
    rows, width, depth = tile
    item = jnp.dtype(dtype).itemsize
    blocks = depth * width * 5 // 8 + (rows * depth + rows * width) * item
    sums = rows * width * 4 * (1 + (depth < contracted))
    return 2 * blocks + depth * width * item + sums


def _scale_unit(dtype) -> int:
    """The least rows of a block of scales that is not the whole axis."""
    return 32 // jnp.dtype(dtype).itemsize


@functools.partial(
    jax.jit, static_argnames=("tile", "scaled_in", "vmem_bytes", "transpose", "interpret")
)
def _call(
    layer, x, q, scale, column_scale, *, tile, scaled_in, vmem_bytes, transpose, interpret
) -> jax.Array:
    num_rows, contracted = x.shape
    k, n = q.shape[1] * 8, q.shape[2]
    group = k // scale.shape[1]
    outputs = k if transpose else n
    steps = contracted // tile.contracted
    tile_k = tile.outputs if transpose else tile.contracted
    tile_n = tile.contracted if transpose else tile.outputs
    # A block of scales covers the `shared` tiles that make its rows whole, or all of them.
    tile_groups = tile_k // group
    shared = math.lcm(tile_groups, _scale_unit(scale.dtype)) // tile_groups
    shared = min(shared, pl.cdiv(k, tile_k))
    scale_rows = min(shared * tile_groups, scale.shape[1])

    def weight_block(tiles_of_k: int):
        def index(i, j, step, layer):
            row, column = (j, step) if transpose else (step, j)
            return layer[0], lax.div(row, tiles_of_k), column

        return index

    sums = (tile.rows, tile.outputs) if steps > 1 else (8, 128)
    scales = (shared * tile_groups, tile_n) if shared > 1 else (8, 128)
    return pl.pallas_call(
        functools.partial(_kernel, group, scaled_in, steps, shared, transpose),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(pl.cdiv(num_rows, tile.rows), pl.cdiv(outputs, tile.outputs), steps),
            in_specs=[
                pl.BlockSpec((tile.rows, tile.contracted), lambda i, j, step, layer: (i, step)),
                pl.BlockSpec((None, tile_k // 8, tile_n), weight_block(1)),
                pl.BlockSpec((None, scale_rows, tile_n), weight_block(shared)),
                pl.BlockSpec((None, 1, tile_n), weight_block(pl.cdiv(k, tile_k))),
            ],
            out_specs=pl.BlockSpec((tile.rows, tile.outputs), lambda i, j, step, layer: (i, j)),
            scratch_shapes=[pltpu.VMEM(sums, jnp.float32), pltpu.VMEM(scales, jnp.float32)],
        ),
        out_shape=jax.ShapeDtypeStruct((num_rows, outputs), x.dtype),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"), vmem_limit_bytes=vmem_bytes
        ),
        cost_estimate=pl.CostEstimate(
            flops=2 * num_rows * k * n,
            bytes_accessed=x.nbytes + num_rows * outputs * x.dtype.itemsize + k * n * 9 // 16,
            transcendentals=0,
        ),
        interpret=interpret,
    )(layer, x, q, scale, column_scale)


def _kernel(group, scaled_in, steps, shared, transpose, *refs):
    _, x_ref, q_ref, scale_ref, column_ref, out_ref, sum_ref, scale_tile_ref = refs
    tile_k = q_ref.shape[0] * 8
    scales = scale_ref[...].astype(jnp.float32) * column_ref[...]
    if shared > 1:
        # In float32, because there a tile's first row is aligned where in int8 it is not.
        scale_tile_ref[: scales.shape[0]] = scales
        first = lax.rem(pl.program_id(1 if transpose else 2), shared) * (tile_k // group)
        rows = pl.ds(pl.multiple_of(first, 8), tile_k // group)
        scales = scale_tile_ref[rows, :]
    scales = scales.astype(scaled_in)
    # With few rows the sums stay in registers, and the weights do too if they come in parts; the
    # matrix unit rounds them to bfloat16 itself where the registers do not.
    few = x_ref.shape[0] <= _FEW_ROWS and not transpose
    part = min(512, tile_k) if few else tile_k
    multiplied_in = scaled_in if few else x_ref.dtype
    exact = x_ref.dtype == jnp.float32
    precision = lax.Precision.HIGHEST if exact else lax.Precision.DEFAULT

    def product(start: int, size: int) -> jax.Array:
        """x times the rows [start, start + size) of the tile of W."""
        codes = pltpu.bitcast(q_ref[start // 8 : (start + size) // 8], jnp.int4)
        parts = [
            codes[row : row + group].astype(scaled_in) * scales[(start + row) // group][None]
            for row in range(0, size, group)
        ]
        return lax.dot_general(
            (x_ref[...] if transpose else x_ref[:, start : start + size]).astype(multiplied_in),
            jnp.concatenate(parts).astype(multiplied_in),
            (((1,), (1 if transpose else 0,)), ((), ())),
            precision=precision,
            preferred_element_type=jnp.float32,
        )

    products = [product(row, min(part, tile_k - row)) for row in range(0, tile_k, part)]
    total = functools.reduce(jnp.add, products)
    if steps > 1:
        # Masked at the first step instead of branched: a branch ends the scheduler's view.
        total += jnp.where(pl.program_id(2) > 0, sum_ref[...], 0.0)
        sum_ref[...] = total
    out_ref[...] = total.astype(out_ref.dtype)
