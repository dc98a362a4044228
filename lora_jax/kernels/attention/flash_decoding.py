"""Attention of a few new tokens to a KV cache, which is read in place: a Pallas kernel for Triton.

A program takes one kv-head of a sequence, all queries of that head together, and a part of the
keys that they see. The parts are put together afterwards. A sequence's result does not depend on
the others in the cache.
Source: Dao et al. 2023, Flash-Decoding, https://pytorch.org/blog/flash-decoding.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Float, Int, Num

from lora_jax.kernels import capping, platform

MOST_ROWS = 64  # queries of a kv-head
_FEWEST_ROWS = 16  # that the tensor cores take
_TILE_BYTES = 16384  # of the keys that a program has in registers
_PROGRAMS = 256  # that keep a GPU busy
_LONGEST = 2048  # keys of a part, so that no sequence keeps the others waiting for long
_HIDDEN = -1e30  # logit of a key that a query does not see


def refusal(q: jax.ShapeDtypeStruct | jax.Array, k: jax.ShapeDtypeStruct | jax.Array) -> str | None:
    """Why the kernel does not take queries [B, T, N, H] and a cache [L, B, K, S, H], or None."""
    _, tokens, heads, width = q.shape
    rows = heads // k.shape[2] * tokens
    if q.dtype not in (jnp.bfloat16, jnp.float16, jnp.float32) or k.dtype not in (
        q.dtype,
        jnp.int8,
    ):
        return f"queries in {q.dtype.name} and keys in {k.dtype.name}"
    if not 16 <= width <= 256 or width & (width - 1):
        return f"heads of width {width}: 16, 32, 64, 128 or 256"
    if rows > MOST_ROWS:
        return f"{rows} queries of a kv-head: at most {MOST_ROWS}"
    # Up to 4 GiB, Pallas computes a place in 32 bits, which overflow.
    if 2**31 < k.size <= 2**32 // k.dtype.itemsize:
        return f"a cache of {k.size} keys in {k.dtype.name}: at most 2³¹, or more than 2³²"
    if not platform.is_ampere_to_hopper():
        return "this GPU: NVIDIA's of compute capability 8.0 to 9.0"
    return None


def attend(
    q: Float[Array, "B T N H"],
    k: Num[Array, "L B K S H"],
    v: Num[Array, "L B K S H"],
    k_scale: Float[Array, "L B K S"] | None,
    v_scale: Float[Array, "L B K S"] | None,
    layer: Int[Array, ""],
    start: Int[Array, " B"],
    num_real: Int[Array, " B"],
    window: Int[Array, ""],
    *,
    soft_cap: float | None = None,
    interpret: bool = False,
) -> Float[Array, "B T N H"]:
    """softmax(q kᵀ / √H, over the visible keys) v, as cached.attend defines it.

    interpret: run without a GPU, in Pallas's interpreter.
    """
    sequences, tokens, heads, width = q.shape
    groups, size = k.shape[2:4]
    rows = heads // groups * tokens
    q = q.reshape(sequences, tokens, groups, -1, width)
    q = q.transpose(0, 2, 3, 1, 4).reshape(sequences, groups, rows, width)
    padded = max(_FEWEST_ROWS, pl.next_power_of_2(rows))
    block = min(max(_TILE_BYTES // (width * q.dtype.itemsize), 16), 128)
    parts = max(-(-_PROGRAMS // (sequences * groups)), -(-size // _LONGEST))
    parts = min(parts, -(-size // block))
    scales = () if k_scale is None else (k_scale, v_scale)

    def own(*widths):
        """The rows of one program, of an array [parts, B, K, rows, …]."""
        zeros = (0,) * (1 + len(widths))
        return pl.BlockSpec(
            (None, None, None, padded, *widths),
            lambda part, group, sequence: (part, sequence, group, *zeros),
        )

    out, normalizer = pl.pallas_call(
        functools.partial(
            _kernel, parts=parts, rows=rows, tokens=tokens, block=block, soft_cap=soft_cap
        ),
        grid=(parts, groups, sequences),
        in_specs=[
            *[pl.BlockSpec()] * 4,
            pl.BlockSpec(
                (None, None, padded, width), lambda part, group, sequence: (sequence, group, 0, 0)
            ),
            *[pl.BlockSpec()] * (2 + len(scales)),
        ],
        out_specs=[own(width), own()],
        out_shape=[
            jax.ShapeDtypeStruct((parts, *q.shape), q.dtype if parts == 1 else jnp.float32),
            jax.ShapeDtypeStruct((parts, *q.shape[:-1]), jnp.float32),
        ],
        compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=3),
        interpret=interpret,
        name="flash_decoding",
    )(layer.reshape(1), window.reshape(1), start, num_real, q, k, v, *scales)
    if parts > 1:
        share = jax.nn.softmax(normalizer, axis=0)
        out = jnp.sum(out * share[..., None], axis=0, keepdims=True).astype(q.dtype)
    out = out.reshape(sequences, groups, -1, tokens, width)
    return out.transpose(0, 3, 1, 2, 4).reshape(sequences, tokens, heads, width)


def _kernel(
    layer_ref, window_ref, start_ref, num_real_ref, q_ref, k_ref, v_ref, *refs,
    parts, rows, tokens, block, soft_cap,
):  # fmt: skip
    *scale_refs, out_ref, normalizer_ref = refs
    padded, width = q_ref.shape
    size = k_ref.shape[3]
    part, group, sequence = (pl.program_id(axis) for axis in range(3))
    layer, window = layer_ref[0], window_ref[0]
    start, num_real = start_ref[sequence], num_real_ref[sequence]
    end = start + num_real
    # Those that the first query sees, of the ones that later tokens have not overwritten.
    first = jnp.maximum(jnp.maximum(start - window + 1, end - size), 0)
    num_blocks = jnp.where(num_real > 0, lax.div(end - first + (block - 1), block), 0)
    row = jnp.arange(padded)
    position = start + lax.rem(row, tokens)
    is_row = row < rows
    q = plgpu.load(q_ref.at[:, :], mask=is_row[:, None], other=0)

    def take(index, carry):
        top, total, out = carry
        key = first + index * block + jnp.arange(block)
        place = lax.rem(jnp.minimum(key, end - 1), size)

        def read(ref):
            return ref[layer, sequence, group, place, :].astype(q.dtype)

        def scale_of(ref):
            return ref[layer, sequence, group, place][None]

        logits = _product(q, read(k_ref), 1) * (1 / math.sqrt(width))
        if scale_refs:
            logits *= scale_of(scale_refs[0])
        logits = capping.capped(logits, soft_cap)
        distance = position[:, None] - key[None]
        seen = (distance >= 0) & (distance < window) & (key < end)[None]
        logits = jnp.where(seen, logits, _HIDDEN)
        new = jnp.maximum(top, jnp.max(logits, axis=1))
        p, keep = jnp.exp(logits - new[:, None]), jnp.exp(top - new)
        total = total * keep + jnp.sum(p, axis=1)
        if scale_refs:
            p *= scale_of(scale_refs[1])
        out = out * keep[:, None] + _product(p.astype(q.dtype), read(v_ref), 0)
        return new, total, out

    # The initial maximum is above hidden logits, so that their exponential is 0.
    top, total, out = lax.fori_loop(
        lax.div(num_blocks * part, parts),
        lax.div(num_blocks * (part + 1), parts),
        take,
        (
            jnp.full(padded, _HIDDEN / 2, jnp.float32),
            jnp.zeros(padded, jnp.float32),
            jnp.zeros((padded, width), jnp.float32),
        ),
    )
    is_empty = total == 0
    total = jnp.where(is_empty, 1, total)
    normalizer = jnp.where(is_empty, _HIDDEN, top + jnp.log(total))
    out = (out / total[:, None]).astype(out_ref.dtype)
    plgpu.store(out_ref.at[:, :], out, mask=is_row[:, None])
    plgpu.store(normalizer_ref.at[:], normalizer, mask=is_row)


def _product(a: jax.Array, b: jax.Array, axis: int) -> jax.Array:
    """The sum over a's last axis and b's `axis`, in float32; TF32 would round float32 operands."""
    dims = (((1,), (axis,)), ((), ()))
    return lax.dot_general(
        a, b, dims, precision=lax.Precision.HIGHEST, preferred_element_type=jnp.float32
    )
