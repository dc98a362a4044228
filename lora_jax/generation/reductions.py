"""Reductions over the vocabulary: argmax, sums, draws and thresholds, each by blocks or bisected.

Nothing sorts the vocabulary.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, UInt

_BLOCK = 128  # tokens, whose maximum or sum is taken before those of all


def draw(w: Float[Array, "B V"], least: Float[Array, " B"], u: Float[Array, " B"]):
    """The first token at which the sum of the w ≥ least exceeds u of the total.

    It is looked for among sums of blocks, then within one: a long sum of float32 is worse.
    """
    least = least[:, None]
    sums = _blocks(jnp.where(w >= least, w, 0), 0).sum(axis=2)
    cumulative = jnp.cumsum(sums, axis=1)
    goal = u * cumulative[:, -1]
    block = _first_above(sums, cumulative, goal)
    goal -= _at(cumulative, block) - _at(sums, block)
    own = _block(w, block, 0)
    own = jnp.where(own >= least, own, 0)
    token = block * _BLOCK + _first_above(own, jnp.cumsum(own, axis=1), goal)
    return jnp.minimum(token, w.shape[1] - 1)  # a row whose tokens are all excluded


def _first_above(weight, cumulative, goal) -> Int[Array, " B"]:
    """The first place of a positive weight with cumulative > goal, or else the last such place.

    A parallel cumulative sum rounds, need not rise, and may end below the goal.
    """
    positive = weight > 0
    last = weight.shape[1] - 1 - jnp.argmax(positive[:, ::-1], axis=1)
    found = positive & (cumulative > goal[:, None])
    return jnp.where(found.any(axis=1), jnp.argmax(found, axis=1), last).astype(jnp.int32)


def argmax(logits: Float[Array, "B V"]) -> Int[Array, " B"]:
    """The first of the largest: by blocks, because XLA's argmax on a CPU is 20 times a maximum."""
    block = jnp.argmax(_blocks(logits, -jnp.inf).max(axis=2), axis=1).astype(jnp.int32)
    within = jnp.argmax(_block(logits, block, -jnp.inf), axis=1)
    return block * _BLOCK + within.astype(jnp.int32)


def _blocks(values: Float[Array, "B V"], fill: float) -> Float[Array, "B N 128"]:
    values = jnp.pad(values, ((0, 0), (0, -values.shape[1] % _BLOCK)), constant_values=fill)
    return values.reshape(len(values), -1, _BLOCK)


def _block(values: Float[Array, "B V"], block: Int[Array, " B"], fill: float):
    """Block number `block` of each row: [B, 128]."""
    index = block[:, None] * _BLOCK + jnp.arange(_BLOCK, dtype=jnp.int32)[None]
    return jnp.take_along_axis(values, index, axis=1, mode="fill", fill_value=fill)


def total(values: Float[Array, "B V"]) -> Float[Array, " B"]:
    """The sum of each row, whose rounding depends less on the number of rows than a plain one."""
    return _blocks(values, 0).sum(axis=2).sum(axis=1)


def _at(values: Float[Array, "B N"], index: Int[Array, " B"]) -> Float[Array, " B"]:
    return jnp.take_along_axis(values, index[:, None], axis=1)[:, 0]


def bisect(
    excess: Callable[[Array], Array], low: Float[Array, " B"], high: Float[Array, " B"]
) -> Float[Array, " B"]:
    """The largest float t in [low, high] with excess(t) ≥ 0, of a function that falls in each row.

    excess(low) ≥ 0. Halves the range of the floats' bits, which are in order: at most 32 times. A
    row ends early where excess is 0.
    """

    def halve(bounds):
        low, high = bounds
        middle = low + (high - low + 1 >> 1)
        found = excess(_from_ordered(middle))
        # Written so that a NaN ends too.
        return (
            jnp.where(found >= 0, middle, low),
            jnp.where(found > 0, high, jnp.where(found == 0, middle, middle - 1)),
        )

    bounds = (_to_ordered(low), _to_ordered(high))
    low, _ = jax.lax.while_loop(lambda bounds: (bounds[0] < bounds[1]).any(), halve, bounds)
    return _from_ordered(low)


_SIGN = np.uint32(1 << 31)


def _to_ordered(x: Float[Array, " B"]) -> UInt[Array, " B"]:
    """Integers in the order of the floats."""
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    return jnp.where(bits & _SIGN, ~bits, bits | _SIGN)


def _from_ordered(bits: UInt[Array, " B"]) -> Float[Array, " B"]:
    bits = jnp.where(bits & _SIGN, bits ^ _SIGN, ~bits)
    return jax.lax.bitcast_convert_type(bits, jnp.float32)
