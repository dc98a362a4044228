"""The operations that `doctor` checks and times, in the shapes of Llama-3.1-8B."""

import math
from collections.abc import Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax.generation import weights
from lora_jax.kernels import choice
from lora_jax.kernels import packed as packing
from lora_jax.selftest import (
    case,
    decoding,
    int4_products,
    low_rank,
    self_attention,
    vocabulary,
)

_DTYPE = jnp.bfloat16
_GROUP = 32


class Sizes(NamedTuple):
    """matmuls: (d_in, d_out). stack: bytes of weights to cycle through, so that a cache does not
    help. rows: of x, forward, and forward and backward. tokens: of a sequence. heads: (heads,
    groups, width). vocabulary: (rows, width)."""

    matmuls: tuple[tuple[int, int], ...]
    stack: float
    rows: tuple[tuple[int, ...], tuple[int, ...]]
    tokens: tuple[int, ...]
    heads: tuple[int, int, int]
    vocabulary: tuple[int, int]


FULL = Sizes(
    matmuls=((4096, 4096), (4096, 14336)),
    stack=400e6,
    rows=((1, 8, 64), (2048,)),
    tokens=(2048, 8192),
    heads=(32, 8, 128),
    vocabulary=(32000, 4096),
)
SMALL = Sizes(  # for a CPU
    matmuls=((512, 1024),),
    stack=1e6,
    rows=((1, 64), (64,)),
    tokens=(256,),
    heads=(4, 2, 64),
    vocabulary=(4096, 512),
)


class Case(NamedTuple):
    """A case with its name on the screen."""

    operation: str
    shapes: str
    of: case.Case


def cases(device: jax.Device, sizes: Sizes) -> Iterator[Case]:
    """Made one after the other on the ambient mesh of that device, with random weights."""
    for d_in, d_out in sizes.matmuls:
        stack = _weights(d_in, d_out, sizes.stack)
        for backward, every in enumerate(sizes.rows):
            for rows in every:
                yield Case(
                    "int4 and gradient" if backward else "int4",
                    f"{rows} × {d_in} → {d_out}",
                    int4_products.int4_product(
                        stack, rows=rows, dtype=_DTYPE, layer=0, backward=bool(backward)
                    ),
                )
        if weights.best(device) == "k_minor":
            yield from _decoding(stack, sizes.rows[0])
        for rows in sizes.rows[0]:
            found = low_rank.products(rows=rows, k=d_in, n=d_out, slots=8, rank=16, dtype=_DTYPE)
            if found.kernel != choice.XLA:
                yield Case("8 adapters of rank 16", f"{rows} × {d_in} → {d_out}", found)
    heads, groups, width = sizes.heads
    for tokens in sizes.tokens:
        for packed in (False, True):
            yield Case(
                "attention, packed" if packed else "attention",
                f"{tokens} tokens",
                self_attention.self_attention(
                    batch=1, length=tokens, heads=heads, kv_heads=groups, width=width,
                    dtype=_DTYPE, packed=packed,
                ),
            )  # fmt: skip
    for slots in sizes.rows[0]:
        found = decoding.cached_attention(
            slots=slots, places=sizes.tokens[0], heads=heads, kv_heads=groups, width=width,
            dtype=_DTYPE,
        )  # fmt: skip
        if found.kernel != choice.XLA:
            yield Case("attention to a cache", f"{slots} × {sizes.tokens[0]} tokens", found)
    num_tokens, width = sizes.vocabulary
    tokens = max(sizes.tokens)
    head = _normal(1, width, num_tokens) / math.sqrt(width)
    found = vocabulary.vocabulary_loss(head, batch=1, length=tokens, dtype=_DTYPE)
    yield Case("cross-entropy", f"{tokens} × {num_tokens}", found)
    table = _normal(0, num_tokens, width)
    found = vocabulary.embedding_lookup(table, batch=1, length=tokens)
    yield Case("embedding", f"{tokens} × {width}", found)


def _normal(seed: int, *shape: int) -> jax.Array:
    # By numpy: jax.random would be compiled for each shape.
    values = np.random.default_rng(seed).standard_normal(shape, np.float32)
    return jnp.asarray(values.astype(_DTYPE))


def _weights(d_in: int, d_out: int, num_bytes: float) -> packing.Packed:
    """A stack [L, …] of random int4 weights of that many bytes, at least one."""
    layers = max(1, math.ceil(num_bytes / (d_in * d_out / 2)))
    draw = np.random.default_rng(0)
    shape = layers, d_in // 8, d_out
    return packing.Packed(
        jnp.asarray(draw.integers(0, 2**32, shape, np.uint32)),
        jnp.asarray(draw.integers(-127, 128, (layers, d_in // _GROUP, d_out), np.int8)),
        jnp.full((layers, 1, d_out), 1 / (300 * math.sqrt(d_in)), jnp.float32),
    )


def _decoding(stack: packing.Packed, every: tuple[int, ...]) -> Iterator[Case]:
    """The product with the second form of the weights, which generation uses on Hopper GPUs."""
    from lora_jax.kernels.int4_matmul import mosaic_gpu  # its imports take a second

    turned = stack._replace(q=jax.jit(mosaic_gpu.k_minor)(stack.q))
    columns, k = turned.q.shape[1:]
    for rows in every:
        if not mosaic_gpu.refusal(rows, k, columns, _GROUP, _DTYPE, stack.scale.dtype):
            found = int4_products.hopper_product(turned, [stack], rows=rows)
            yield Case("int4 decoding", f"{rows} × {k} → {columns}", found)
