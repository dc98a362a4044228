"""What a case is computed with: random arrays that compile quickly, and the rows to compare."""

import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

_FEW, _MANY = 256, 1024  # rows that are compared, if each tile has one of the few
_TILE = 128


def random(seed: int, shape: tuple[int, ...], dtype: jax.typing.DTypeLike) -> jax.Array:
    """Uniform, with mean 0 and variance 1. jax.random takes a second to compile for a TPU."""
    uniform = (_bits(seed, shape) >> 8).astype(jnp.float32) / 2**23 - 1
    return (math.sqrt(3) * uniform).astype(dtype)


def numbers(seed: int, shape: tuple[int, ...], size: int) -> jax.Array:
    """Integers in [0, size)."""
    return (_bits(seed, shape) % jnp.uint32(size)).astype(jnp.int32)


def _bits(seed: int, shape: tuple[int, ...]) -> jax.Array:
    """A hash of the indices. Source of the multipliers: https://github.com/skeeto/hash-prospector"""
    x = jnp.full(shape, (seed + 1) * 0x9E3779B9 % 2**32, jnp.uint32)
    for axis in range(len(shape)):
        stride = math.prod(shape[axis + 1 :]) % 2**32
        x += lax.broadcasted_iota(jnp.uint32, shape, axis) * jnp.uint32(stride)
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
        x = (x ^ (x >> shift)) * jnp.uint32(factor)
    return x ^ (x >> 16)


def some(count: int) -> np.ndarray:
    """Some of `count` rows, in different places of each tile, and the last row."""
    step = 1 << max(0, math.ceil(math.log2(count / _FEW)))
    if step > _TILE:
        step = _TILE * math.ceil(count / (_TILE * _MANY))
    parts = np.arange(-(-count // step))
    rows = parts * step + 37 * parts % step
    return np.union1d(rows[rows < count], [count - 1])


def spread(count: int, number: int) -> np.ndarray:
    """`number` different rows of `count`: one of each of `number` parts."""
    starts = np.arange(number + 1) * count // number
    return starts[:-1] + 37 * np.arange(number) % np.diff(starts)
