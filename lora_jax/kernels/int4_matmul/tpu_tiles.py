"""The choice of a tile for the TPU kernel: the one that fits with the least estimated time."""

import functools
import math
from typing import NamedTuple

import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu

_STEP_CYCLES = 300  # overhead of a grid step: bookkeeping, filling and draining
_MOST_CYCLES = 20_000  # of one step in bfloat16; its code is unrolled, so this bounds compile time


class Chip(NamedTuple):
    """What the choice of tiles depends on: a TensorCore's rates per cycle and vector memory."""

    bf16_ops: int
    hbm_bytes: int
    vmem_bytes: int
    bf16_registers: bool  # whether vector registers multiply in bfloat16
    bundles: float  # instruction words that keep the matrix unit busy for one cycle


class Tile(NamedTuple):
    """The extent of one grid step in x's rows, in the outputs and along the contracted axis."""

    rows: int
    outputs: int
    contracted: int


def chip_here() -> Chip:
    """The TPU of the ambient mesh (jax.set_mesh, shard_map), else the default device.

    If neither is a TPU, a cautious guess that works from v5e on and is fast in training.
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
def choose(num_rows, k, n, group, dtype, scale_dtype, transpose, chip) -> Tile | None:
    """The tile with the least estimated time among those that fit, or None."""
    contracted, outputs = (n, k) if transpose else (k, n)
    whole_scales = scale_unit(scale_dtype) * group
    # The matrix unit has 256 columns. A tile needs 8 rows of float32 scales, or a whole block of
    # stored ones.
    units = (math.lcm(8 * group, 256), 128) if transpose else (256, whole_scales)
    depths = [d for d in range(units[1], contracted, units[1]) if contracted % d == 0]
    best, least = None, math.inf
    for rows in _parts(num_rows, 256):
        for width in _parts(outputs, units[0]):
            for depth in (*depths, contracted):
                tile = Tile(rows, width, depth)
                # Such a tile also unpacks its neighbors' scales, and nothing hides that time.
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
        held_bytes(tile, contracted, dtype) > chip.vmem_bytes * 0.7
        or multiply > _MOST_CYCLES * passes
    ):
        return math.inf
    # Registers hold 1024 elements. An eighth of the time to unpack and to add up is not hidden.
    unpack = depth * width / 1024 * (0.5 if chip.bf16_registers else 1)
    sums = rows * width / 1024 / 8 * split
    issued = multiply * chip.bundles + unpack / 8 + scales / 400 + sums + _STEP_CYCLES
    moved = blocks if split else weight + rows * width * item
    step = max(multiply, issued, unpack + _STEP_CYCLES, moved / chip.hbm_bytes)
    count = -(-num_rows // rows) * -(-outputs // width) * (contracted // depth)
    # The last factor prefers short steps, which compile faster, where long ones gain little.
    return (count * step + blocks / chip.hbm_bytes) * (1 + multiply * 1e-6)


def held_bytes(tile: Tile, contracted: int, dtype) -> int:
    """Vector memory of one step: two copies of the blocks, the unpacked weight and the sums."""
    rows, width, depth = tile
    item = jnp.dtype(dtype).itemsize
    blocks = depth * width * 5 // 8 + (rows * depth + rows * width) * item
    sums = rows * width * 4 * (1 + (depth < contracted))
    return 2 * blocks + depth * width * item + sums


def scale_unit(dtype) -> int:
    """The fewest rows of a block of scales that does not span the whole axis."""
    return 32 // jnp.dtype(dtype).itemsize
