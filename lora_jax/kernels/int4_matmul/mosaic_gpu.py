"""y = x · W on a Hopper GPU, for up to 64 rows of x and W in symmetric int4: a Pallas kernel.

The weight is the left operand of the tensor cores, outᵀ[N, M] = W[N, K] · xᵀ: its nibbles go from
shared memory to registers, become bfloat16 there and are never written back. This needs a layout
with K minor, which `k_minor` makes from the stored words, once for many tokens.
"""

import inspect
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import layout
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int, Int4, Num, UInt32

MOST_ROWS = 64  # of x
_PROCESSORS = 132  # of an H100 or H200 SXM; each runs two or three blocks of threads at a time
_MIN_STEPS = 2  # the fewest steps along K of a block that shares its columns with others
# jax 0.10.1 and older name the arguments of plgpu.kernel out_shape and scratch_shapes.
_TYPE = "type" if "out_type" in inspect.signature(plgpu.kernel).parameters else "shape"


def k_minor(q: UInt32[Array, "L words N"]) -> Int4[Array, "L N K"]:
    """The weights as int4 [L, N, K], which take 4 bits each on a GPU; call it under jit.

    Nibble i of word j is row 8j+i (kernels/packed.py). Transposes words once, without temporaries.
    """
    words = jnp.swapaxes(q, 1, 2)
    # Without the constraint, XLA transposes the nibbles, byte by byte, instead of the words.
    words = layout.with_layout_constraint(words, layout.Layout(major_to_minor=(0, 1, 2)))
    return lax.bitcast_convert_type(words, jnp.int4).reshape(*words.shape[:2], -1)


def refusal(
    num_rows: int,
    k: int,
    n: int,
    group: int,
    dtype: jax.typing.DTypeLike,
    scale_dtype: jax.typing.DTypeLike,
) -> str | None:
    """Why the kernel does not take this product, or None if it does."""
    if not 1 <= num_rows <= MOST_ROWS:
        return f"{num_rows} rows of x: from 1 to {MOST_ROWS}"
    if jnp.dtype(dtype) != jnp.bfloat16:
        return f"x in {jnp.dtype(dtype).name}: bfloat16 only"
    if scale_dtype not in (jnp.int8, jnp.bfloat16, jnp.float32):
        return f"scales in {jnp.dtype(scale_dtype).name}: int8, bfloat16 or float32"
    if group not in (32, 64, 128):
        return f"groups of {group} rows: 32, 64 or 128"
    if k % 128 or n % 64:
        return f"a weight [{k}, {n}]: d_in in multiples of 128 and d_out of 64"
    if _tile(num_rows, k, n, group, scale_dtype) is None:
        return f"int8 scales of groups of {group} rows with d_in {k}: multiples of 256"
    return None


def matmul(
    x: Float[Array, "M K"],
    weight: Int4[Array, "L N K"],
    scale: Num[Array, "L groups N"],
    column_scale: Float[Array, "L 1 N"] | None,
    layer: Int[Array, ""],
) -> Float[Array, "M N"]:
    """y = x · (code · scale · column_scale)[layer], symmetric int4, accumulated in float32.

    code · scale is rounded to bfloat16, as a dequantized weight would be; column_scale multiplies
    the sum. The layer's arrays are read in place, from the stack.

    Raises: ValueError for what `refusal` names.
    """
    num_rows, k = x.shape
    columns, groups = weight.shape[1], scale.shape[1]
    reason = refusal(num_rows, k, columns, k // groups, x.dtype, scale.dtype)
    if reason:
        raise ValueError(f"the Mosaic GPU kernel does not take {reason}")
    rows = max(8, 1 << (num_rows - 1).bit_length())
    x = jnp.pad(x, ((0, rows - num_rows), (0, 0)))
    y = _partial_products(x, weight, scale, layer).sum(axis=0).T
    if column_scale is not None:
        y = y * lax.dynamic_index_in_dim(column_scale, layer, keepdims=False)
    return y[:num_rows].astype(x.dtype)


def _partial_products(x, weight, scale, layer) -> jax.Array:
    """float32 [splits, N, M]: the contribution of each part of K to outᵀ."""
    rows, k = x.shape
    columns = weight.shape[1]
    group = k // scale.shape[1]
    block, step, stages = _tile(rows, k, columns, group, scale.dtype)
    num_steps = k // step
    splits = _splits(columns // block, num_steps, rows, k)
    piece = min(group, 64)  # rows of K in one tensor core product, all of one group

    def kernel(layer_ref, x_ref, w_ref, s_ref, out_ref, staging):
        split, column = lax.axis_index("split"), lax.axis_index("column")
        first = split * num_steps // splits
        last = (split + 1) * num_steps // splits
        which = layer_ref[0]

        def products(acc):
            def take_step(_, x_s, w_s, s_s):
                codes = plgpu.layout_cast(w_s[...], plgpu.Layout.WGMMA_UPCAST_4X)
                for start in range(0, step, piece):
                    w = lax.slice(codes, (0, start), (block, start + piece))
                    w = plgpu.layout_cast(w, plgpu.Layout.WGMMA).astype(x.dtype)
                    s = plgpu.layout_cast(s_s[start // group], plgpu.Layout.WGMMA.reduce(1))
                    s = s.astype(x.dtype)
                    w = w * lax.broadcast_in_dim(s, w.shape, (0,))
                    x_piece = x_s.at[:, pl.ds(start, piece)]
                    plgpu.wgmma(acc, w, x_piece.transpose((1, 0)))
                plgpu.wgmma_wait(0)  # before the copies of a later step overwrite x_s

            plgpu.emit_pipeline(
                take_step,
                grid=(last - first,),
                in_specs=[
                    plgpu.BlockSpec(
                        (rows, step),
                        lambda i: (0, first + i),
                        transforms=_swizzled(bits=16, swizzle=2 * piece),
                    ),
                    plgpu.BlockSpec(
                        (block, step),
                        lambda i: (column, first + i),
                        transforms=_swizzled(bits=4, swizzle=step // 2),
                    ),
                    plgpu.BlockSpec((step // group, block), lambda i: (first + i, column)),
                ],
                max_concurrent_steps=stages,
            )(x_ref, w_ref.at[which], s_ref.at[which])
            return acc[...]

        staging[...] = pl.run_scoped(products, plgpu.ACC((block, rows), jnp.float32))
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(staging, out_ref.at[split, pl.ds(column * block, block)])
        plgpu.wait_smem_to_gmem(0)

    staging = plgpu.SMEM(
        (block, rows), jnp.float32, transforms=_swizzled(bits=32, swizzle=min(4 * rows, 128))
    )
    out = jax.ShapeDtypeStruct((splits, columns, rows), jnp.float32)
    return plgpu.kernel(
        kernel,
        grid=(splits, columns // block),
        grid_names=("split", "column"),
        **{f"out_{_TYPE}": out, f"scratch_{_TYPE}s": [staging]},
    )(jnp.reshape(layer, (1,)), x, weight, scale)


class _Tile(NamedTuple):
    """The part that a block of threads takes in one step, and the number of steps in flight."""

    columns: int
    step: int  # rows of K
    stages: int


def _tile(num_rows: int, k: int, n: int, group: int, scale_dtype) -> _Tile | None:
    # Every tile of columns reads x again: with many rows, wider tiles read it less often.
    wide = num_rows > 16
    columns = 128 if wide and n % 128 == 0 else 64
    for step, stages in ((128, 3), (256, 2)) if wide else ((256, 4), (128, 6)):
        scale_bytes = step // group * columns * jnp.dtype(scale_dtype).itemsize
        if k % step == 0 and scale_bytes % 128 == 0:  # the smallest size of a copy
            return _Tile(columns, step, stages)
    return None


def _splits(tiles: int, num_steps: int, rows: int, k: int) -> int:
    # The partial sums, each 4 · rows bytes per column, must stay below half of the weight's bytes.
    most = max(1, min(num_steps // _MIN_STEPS, k // (16 * rows)))
    busy = [s for s in range(1, most + 1) if tiles * s > 1.5 * _PROCESSORS]
    # Of the few that give every processor enough work, the one that spreads blocks most evenly.
    return min(busy[:3] or [most], key=lambda s: math.ceil(tiles * s / _PROCESSORS) / s)


def _swizzled(*, bits: int, swizzle: int) -> tuple:
    """Tiles of 8 rows × `swizzle` bytes, as the tensor cores and the copies need them."""
    return plgpu.TilingTransform((8, swizzle * 8 // bits)), plgpu.SwizzleTransform(swizzle)
