"""Products of few rows with A and B in stacks of layers: Pallas kernels for Triton.

A program of `shrink` takes some columns of A and a part of its rows; one of `expand` some columns
of B.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Float, Int

from lora_jax.kernels import platform

MOST_ROWS = 64  # of x
_FEWEST_ROWS = 16  # that the tensor cores take
_STEP = 64  # rows of A in a step, and columns of B
_MOST_PARTS = 32  # of A's rows
_STEPS = 4  # the fewest in a part


def refusal(
    x: jax.ShapeDtypeStruct | jax.Array,
    A: jax.ShapeDtypeStruct | jax.Array,
    B: jax.ShapeDtypeStruct | jax.Array,
) -> str | None:
    """Why the kernels do not take x [M, K], A [L, K, R] and B [L, R, N], or None if they do."""
    (_, k, rank), n = A.shape, B.shape[2]
    if not 1 <= x.shape[0] <= MOST_ROWS:
        return f"{x.shape[0]} rows of x: from 1 to {MOST_ROWS}"
    if x.dtype not in (jnp.bfloat16, jnp.float16) or {A.dtype, B.dtype} != {x.dtype}:
        return f"x in {x.dtype.name}, A in {A.dtype.name} and B in {B.dtype.name}"
    if k % _STEP or n % _STEP or rank % 16:
        return f"A [{k}, {rank}] and B [{rank}, {n}]: sides in multiples of {_STEP}, ranks of 16"
    if not platform.is_ampere_to_hopper():
        return "this GPU: NVIDIA's of compute capability 8.0 to 9.0"
    return None


def shrink(
    x: Float[Array, "M K"],
    A: Float[Array, "L K R"],
    layer: Int[Array, ""],
    *,
    interpret: bool = False,
) -> Float[Array, "M R"]:
    """x · A of a layer, in float32. interpret: run without a GPU, in Pallas's interpreter."""
    (rows, k), rank = x.shape, A.shape[2]
    padded, columns = _padded(rows), _tile(rank, 32)
    steps = k // _STEP
    parts = min(max(steps // _STEPS, 1), _MOST_PARTS)
    out = pl.pallas_call(
        functools.partial(_shrink, parts=parts, steps=steps, rows=rows, columns=columns),
        grid=(parts, rank // columns),
        in_specs=[
            pl.BlockSpec(),
            pl.BlockSpec((padded, k), lambda part, column: (0, 0)),
            pl.BlockSpec(),
        ],
        out_specs=pl.BlockSpec((None, padded, columns), lambda part, column: (part, 0, column)),
        out_shape=jax.ShapeDtypeStruct((parts, rows, rank), jnp.float32),
        compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=3),
        interpret=interpret,
        name="shrink",
    )(layer.reshape(1), x, A)
    return out.sum(axis=0)


def _shrink(layer_ref, x_ref, a_ref, out_ref, *, parts, steps, rows, columns):
    part, column = pl.program_id(0), pl.program_id(1)
    layer, is_row = layer_ref[0], (jnp.arange(len(x_ref)) < rows)[:, None]

    def take(step, out):
        of_k = pl.ds(step * _STEP, _STEP)
        x = plgpu.load(x_ref.at[:, of_k], mask=is_row, other=0)
        return out + _product(x, a_ref[layer, of_k, pl.ds(column * columns, columns)])

    first, last = (lax.div(steps * (part + i), parts) for i in (0, 1))
    out = lax.fori_loop(first, last, take, jnp.zeros(out_ref.shape, jnp.float32))
    plgpu.store(out_ref.at[:, :], out, mask=is_row)


def expand(
    y: Float[Array, "M N"],
    mixed: Float[Array, "M R"],
    B: Float[Array, "L R N"],
    weights: Float[Array, "M X"],
    stretch: Float[Array, "L X N"],
    bias: Float[Array, " N"] | None,
    layer: Int[Array, ""],
    *,
    interpret: bool = False,
) -> Float[Array, "M N"]:
    """y + mixed · B + (weights · stretch) ∘ (y − bias) of a layer, as low_rank.expand defines it.

    interpret: run without a GPU, in Pallas's interpreter.
    """
    (rows, n), rank, slots = y.shape, mixed.shape[1], weights.shape[1]
    padded, biases = _padded(rows), () if bias is None else (bias,)
    columns = 32 if n <= 4096 else _STEP  # enough programs to keep a GPU busy
    of_y = pl.BlockSpec((padded, columns), lambda column: (0, column))
    return pl.pallas_call(
        functools.partial(_expand, rows=rows, columns=columns),
        grid=(n // columns,),
        in_specs=[
            pl.BlockSpec(),
            of_y,
            pl.BlockSpec((padded, rank), lambda column: (0, 0)),
            pl.BlockSpec(),
            pl.BlockSpec((padded, slots), lambda column: (0, 0)),
            pl.BlockSpec(),
            *[pl.BlockSpec()] * len(biases),
        ],
        out_specs=of_y,
        out_shape=jax.ShapeDtypeStruct(y.shape, y.dtype),
        compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=3),
        interpret=interpret,
        name="expand",
    )(layer.reshape(1), y, mixed, B, weights, stretch, *biases)


def _expand(layer_ref, y_ref, mixed_ref, b_ref, weights_ref, stretch_ref, *refs, rows, columns):
    *bias_refs, out_ref = refs
    own = pl.ds(pl.program_id(0) * columns, columns)
    layer, is_row = layer_ref[0], (jnp.arange(len(y_ref)) < rows)[:, None]
    y = plgpu.load(y_ref.at[:, :], mask=is_row, other=0).astype(jnp.float32)
    step = _tile(mixed_ref.shape[1], 64)

    def add(index, out):
        of_rank = pl.ds(index * step, step)
        mixed = plgpu.load(mixed_ref.at[:, of_rank], mask=is_row, other=0)
        return out + _product(mixed, b_ref[layer, of_rank, own])

    def stretched(slot, total):
        weight = plgpu.load(weights_ref.at[:, pl.ds(slot, 1)], mask=is_row, other=0)
        return total + weight * stretch_ref[layer, slot, own][None]

    none = jnp.zeros(y.shape, jnp.float32)
    extra = lax.fori_loop(0, mixed_ref.shape[1] // step, add, none)
    total = lax.fori_loop(0, weights_ref.shape[1], stretched, none)
    unbiased = y
    for bias_ref in bias_refs:  # one or none
        unbiased -= bias_ref[own].astype(jnp.float32)[None]
    out = (y + extra + total * unbiased).astype(out_ref.dtype)
    plgpu.store(out_ref.at[:, :], out, mask=is_row)


def _padded(rows: int) -> int:
    return max(_FEWEST_ROWS, pl.next_power_of_2(rows))


def _tile(size: int, most: int) -> int:
    """The largest power of two, of at most so many, that divides a multiple of 16."""
    return min(size & -size, most)


def _product(a: jax.Array, b: jax.Array) -> jax.Array:
    """a · b in float32; TF32 would round float32 operands."""
    return jnp.dot(a, b, precision=lax.Precision.HIGHEST, preferred_element_type=jnp.float32)
