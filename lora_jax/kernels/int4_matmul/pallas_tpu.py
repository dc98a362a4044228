"""y = x · W and dx = dy · Wᵀ on a TPU, W [K, N] in symmetric int4 as kernels/packed.py stores it.

One grid step unpacks and scales a tile of W in registers and multiplies with it, as straight-line
code, so that the scheduler can hide the unpacking behind the matrix unit. If it fits, a tile spans
the whole contracted axis: then no partial sums go through memory, which on v6e would cost more than
the unpacking.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int, Num, UInt32

from lora_jax.kernels.int4_matmul import tpu_tiles

GROUPS = (32, 64, 128)
_FEW_ROWS = 64


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

    W [K, N] = int4(q) · scale · column_scale, K = 8 · words. C = K and O = N; with transpose, C = N
    and O = K. The kernel selects the layer: no slice of the stack is copied. For x in bfloat16, the
    weights are rounded to bfloat16 (from v6e on, their scales too); for float32 they are float32.

    Raises: ValueError for what `refusal` names, or for x of another width.
    """
    k, n = q.shape[1] * 8, q.shape[2]
    group = k // scale.shape[1]
    shape = (x.shape[0], k, n, group, x.dtype, scale.dtype)
    if x.shape[1] != (n if transpose else k):
        raise ValueError(f"expected x [M, {n if transpose else k}], found {x.shape}")
    if reason := refusal(*shape, transpose=transpose):
        raise ValueError(reason)
    chip = tpu_tiles.chip_here()
    tile = tpu_tiles.choose(*shape, transpose, chip)
    held = tpu_tiles.held_bytes(tile, n if transpose else k, x.dtype)
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
    if (
        tpu_tiles.choose(
            num_rows, k, n, group, dtype, scale_dtype, transpose, tpu_tiles.chip_here()
        )
        is None
    ):
        return f"no tile of a weight [{k}, {n}] fits this TPU's vector memory and a step's length"
    return None


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
    if not interpret:
        # XLA does not know that the kernel reads one layer, and would move a whole stack into the
        # memory on the chip in each iteration of a loop.
        q, scale, column_scale = jax.tree.map(_in_main_memory, (q, scale, column_scale))
    columns = () if column_scale is None else (column_scale,)
    # A block of scales covers `shared` tiles, as many as make its rows whole, or all of them.
    tile_groups = tile_k // group
    shared = math.lcm(tile_groups, tpu_tiles.scale_unit(scale.dtype)) // tile_groups
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
                *[pl.BlockSpec((None, 1, tile_n), weight_block(pl.cdiv(k, tile_k)))] * len(columns),
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
    )(layer, x, q, scale, *columns)


@jax.custom_batching.custom_vmap
def _in_main_memory(stack: jax.Array) -> jax.Array:
    """The same array, which XLA leaves where it is unless it is mapped over (jax.vmap)."""
    return pltpu.with_memory_space_constraint(stack, pltpu.HBM)


@_in_main_memory.def_vmap
def _(_, batched, stack):  # jax 0.9 cannot map over an array with a memory space
    return stack, batched[0]


def _kernel(group, scaled_in, steps, shared, transpose, *refs):
    _, x_ref, q_ref, scale_ref, *column_refs, out_ref, sum_ref, scale_tile_ref = refs
    tile_k = q_ref.shape[0] * 8
    scales = scale_ref[...].astype(jnp.float32)
    for column_ref in column_refs:  # one or none
        scales = scales * column_ref[...]
    if shared > 1:
        # In float32, because a tile's first row is aligned there, while in int8 it is not.
        scale_tile_ref[: scales.shape[0]] = scales
        first = lax.rem(pl.program_id(1 if transpose else 2), shared) * (tile_k // group)
        rows = pl.ds(pl.multiple_of(first, 8), tile_k // group)
        scales = scale_tile_ref[rows, :]
    scales = scales.astype(scaled_in)
    # With few rows the sums stay in registers, and so do the weights if they come in parts. The
    # matrix unit rounds the weights to bfloat16 itself if the registers do not.
    few = x_ref.shape[0] <= _FEW_ROWS and not transpose
    part = min(512, tile_k) if few else tile_k
    multiplied_in = scaled_in if few else x_ref.dtype
    exact = x_ref.dtype == jnp.float32
    precision = lax.Precision.HIGHEST if exact else lax.Precision.DEFAULT

    def product(start: int, size: int) -> jax.Array:
        """x · rows [start, start + size) of the tile of W."""
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
        # Masked at the first step instead of branched: the scheduler does not look past a branch.
        total += jnp.where(pl.program_id(2) > 0, sum_ref[...], 0.0)
        sum_ref[...] = total
    out_ref[...] = total.astype(out_ref.dtype)
