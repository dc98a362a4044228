"""y = x · W on a Hopper GPU, for up to 64 rows of x and W in symmetric int4: a Pallas kernel.

The weight is the left operand of the tensor cores, outᵀ[N, M] = W[N, K] · xᵀ: its nibbles go from
shared memory to registers, become bfloat16 there and are never written back. This needs a layout
with K minor, which `k_minor` makes from the stored words, once for many tokens.
"""

import inspect
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

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
    (y,) = matmuls(x, weight, scale, column_scale, layer, weight.shape[1:2])
    return y


def matmuls(
    x: Float[Array, "M K"],
    weight: Int4[Array, "L N K"],
    scale: Num[Array, "L groups N"],
    column_scale: Float[Array, "L 1 N"] | None,
    layer: Int[Array, ""],
    widths: Sequence[int],
) -> list[Float[Array, "M _"]]:
    """The parts of `matmul`'s result that have so many columns each."""
    num_rows, k = x.shape
    columns, groups = weight.shape[1], scale.shape[1]
    reason = refusal(num_rows, k, columns, k // groups, x.dtype, scale.dtype)
    if reason:
        raise ValueError(f"the Mosaic GPU kernel does not take {reason}")
    rows = max(8, 1 << (num_rows - 1).bit_length())
    x = jnp.pad(x, ((0, rows - num_rows), (0, 0)))
    tile = _tile(rows, k, columns, k // groups, scale.dtype)
    splits = _splits(columns // tile.columns, k // tile.step, rows, k)
    if splits == 1 and all(width % tile.columns == 0 for width in widths):
        found = _kernel(x, weight, scale, column_scale, layer, tile, widths=widths)
        return [y[:num_rows] for y in found]
    sums = _kernel(x, weight, scale, None, layer, tile, splits=splits)
    if column_scale is not None:
        column_scale = lax.dynamic_index_in_dim(column_scale, layer, keepdims=False)
    found, start = [], 0
    # Each part on its own: XLA would write all of y, and then copy its parts out.
    for width in widths:
        own = slice(start, start + width)
        y = sums[:, own].sum(axis=0).T
        if column_scale is not None:
            y = y * column_scale[:, own]
        found.append(y[:num_rows].astype(x.dtype))
        start += width
    return found


def _kernel(x, weight, scale, column_scale, layer, tile, *, splits=1, widths=None) -> Any:
    """Parts of y with these widths, in x.dtype: a list of [M, width], whole tiles of columns.

    widths None: what each of `splits` parts of K contributes to yᵀ, without column_scale: float32
    [splits, N, M].
    """
    (rows, k), columns = x.shape, weight.shape[1]
    group = k // scale.shape[1]
    block, step, stages = tile
    num_steps = k // step
    piece = min(group, 64)  # rows of K in one tensor core product, all of one group
    more = () if column_scale is None else (column_scale,)

    def kernel(layer_ref, x_ref, w_ref, s_ref, *refs):
        *refs, staging, c_s, c_copied = refs
        column_scale_refs, outs = refs[: len(more)], refs[len(more) :]
        split, column = lax.axis_index("split"), lax.axis_index("column")
        first = split * num_steps // splits
        last = (split + 1) * num_steps // splits
        which, own = layer_ref[0], pl.ds(column * block, block)
        for ref in column_scale_refs:  # one or none
            plgpu.copy_gmem_to_smem(ref.at[which, 0, own], c_s, c_copied)

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

        total = pl.run_scoped(products, plgpu.ACC((block, rows), jnp.float32))
        if widths is None:
            staging[...] = total
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(staging, outs[0].at[split, own])
        else:
            if column_scale_refs:
                plgpu.barrier_wait(c_copied)
                c = plgpu.layout_cast(c_s[...], plgpu.Layout.WGMMA.reduce(1))
                total = total * lax.broadcast_in_dim(c, total.shape, (0,))
            total = plgpu.layout_cast(total.astype(x.dtype), plgpu.Layout.WGMMA_TRANSPOSED)
            staging.at[...].transpose((1, 0))[...] = total
            plgpu.commit_smem()
            start = 0
            for out in outs:
                end = start + out.shape[1] // block

                @pl.when((start <= column) & (column < end))
                def _(out=out, start=start):
                    here = pl.ds((column - start) * block, block)
                    plgpu.copy_smem_to_gmem(staging, out.at[:, here])

                start = end
        plgpu.wait_smem_to_gmem(0)

    if widths is None:
        transforms = _swizzled(bits=32, swizzle=min(4 * rows, 128))
        staging = plgpu.SMEM((block, rows), jnp.float32, transforms=transforms)
        out = jax.ShapeDtypeStruct((splits, columns, rows), jnp.float32)
    else:
        staging = plgpu.SMEM((rows, block), x.dtype, transforms=_swizzled(bits=16, swizzle=128))
        out = [jax.ShapeDtypeStruct((rows, width), x.dtype) for width in widths]
    return plgpu.kernel(
        kernel,
        grid=(splits, columns // block),
        grid_names=("split", "column"),
        **{
            f"out_{_TYPE}": out,
            f"scratch_{_TYPE}s": [staging, plgpu.SMEM((block,), jnp.float32), plgpu.Barrier()],
        },
    )(jnp.reshape(layer, (1,)), x, weight, scale, *more)


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
