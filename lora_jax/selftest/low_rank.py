"""The case of the products with A and B of many adapters, by kernels that read them in place."""

import math

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax.kernels import low_rank, partitioning
from lora_jax.selftest import case, draws

_LAYERS = 2


def products(
    *,
    rows: int,
    k: int,
    n: int,
    slots: int,
    rank: int,
    dtype: jax.typing.DTypeLike,
    partition: partitioning.Partition = partitioning.WHOLE,
) -> case.Case:
    """(w ∘ x A) and y + (w ∘ x A) B + (w v) ∘ (y − bias), of one of two layers.

    slots, rank: X adapters of rank R. Every fifth row has none of them.
    """
    width = slots * rank
    weights = np.zeros((rows, slots), np.float32)
    weights[np.arange(rows), np.arange(rows) % slots] = np.where(np.arange(rows) % 5 == 4, 0, 1.5)
    shapes = (rows, k), (_LAYERS, k, width), (_LAYERS, width, n), (rows, n), (n,)

    def inputs():
        x, A, B, y, bias = (draws.random(i, shape, dtype) for i, shape in enumerate(shapes))
        A, B = (a / math.sqrt(size) for a, size in ((A, k), (B, rank)))
        stretch = draws.random(len(shapes), (_LAYERS, slots, n), jnp.float32)
        return x, A.astype(dtype), B.astype(dtype), y, bias, stretch

    each = np.repeat(weights, rank, axis=1)

    def layer_of(number):
        return (jnp.int32(number) + _LAYERS - 1) % _LAYERS

    def compute(_, given, number):
        x, A, B, y, bias, stretch = given
        layer = layer_of(number)
        mixed = low_rank.shrink(x, A, layer, partition) * each
        own = jnp.asarray(weights)
        mixture = mixed.astype(dtype), B, own, stretch
        out = low_rank.expand(y, *mixture, bias, layer, partition)
        return {"x A": mixed, "y": out}

    def reference(_, given, number):
        x, A, B, y, bias, stretch = (a.astype(jnp.float32) for a in given)
        layer = layer_of(number)
        mixed = (x @ A[layer]) * each
        stretched = (weights @ stretch[layer]) * (y - bias[None])
        return {"x A": mixed, "y": y + mixed @ B[layer] + stretched}

    arrays = (jax.ShapeDtypeStruct(shape, dtype) for shape in shapes[:3])
    item = jnp.dtype(dtype).itemsize
    return case.Case(
        low_rank.kernel_of(*arrays, partition),
        "products with A and B",
        f"{jnp.dtype(dtype).name} [{rows}, {k}] × A [{k}, {width}] × B [{width}, {n}]",
        (), inputs, compute, reference,
        flops=2.0 * rows * width * (k + n),
        num_bytes=item * (width + rows) * (k + n) + 4.0 * slots * n,
    )  # fmt: skip
