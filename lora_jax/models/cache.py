"""Keys and values of the tokens so far, and attention to them.

Axes: B sequences of the cache · G sequences that are extended · T their new tokens · S places ·
K kv-heads · H head_dim · L layers.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import layout
from jaxtyping import Array, Float, Int, Num

from lora_jax import errors
from lora_jax.kernels import choice, platform
from lora_jax.kernels.attention import cached, dense

KV_DTYPES = (None, "int8")
_TILE = 8  # places of a head in one tile of a TPU


class KVCache(NamedTuple):
    """Keys and values in all layers [L, B, K, S, H].

    The token at position p is in place p, or p mod S where every layer has a sliding window and S
    is less than the context. The places of a head are next to each other, as its product with the
    queries wants them: XLA's GPU backend copied the whole cache into that order, and back, in each
    step. In int8, each is multiplied by a scale of its token and head. On a CPU bfloat16 is stored
    as its bits, because XLA would convert the whole cache to float32 and back to write one token.
    """

    k: Num[Array, "L B K S H"]
    v: Num[Array, "L B K S H"]
    k_scale: Float[Array, "L B K S"] | None = None
    v_scale: Float[Array, "L B K S"] | None = None


def empty(
    shape: tuple[int, int, int, int, int], dtype: jax.typing.DTypeLike, kv_dtype: str | None
) -> KVCache:
    """A cache of `shape` for keys and values in dtype. kv_dtype: None, or "int8" to store them so.

    Raises: UserError for another kv_dtype.
    """
    if kv_dtype not in KV_DTYPES:
        raise errors.UserError(
            expected=f"a kv_dtype among {', '.join(map(str, KV_DTYPES))}", found=str(kv_dtype)
        )
    if kv_dtype == "int8":
        k, v = (jnp.zeros(shape, jnp.int8) for _ in range(2))
        return KVCache(k, v, *(jnp.zeros(shape[:-1], jnp.float32) for _ in range(2)))
    if platform.on_cpu() and dtype == jnp.bfloat16:
        dtype = jnp.uint16
    return KVCache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype))


class Place(NamedTuple):
    """Where the new tokens of a call go.

    start [G]: the position of each sequence's first new token. num_real [G]: how many of its new
    tokens are real; the others, at the end, are not stored. length [G]: of the whole sequence, by
    which dynamic rotary embeddings scale. row [G]: the cache is G groups of B/G sequences, and of
    each group the one at `row` is extended; None: each of the B sequences is. span: only places
    before it are read, static; None: all.
    """

    start: Int[Array, " G"]
    num_real: Int[Array, " G"]
    length: Int[Array, " G"]
    row: Int[Array, " G"] | None = None
    span: int | None = None

    def positions(self, num_tokens: int) -> Int[Array, "G T"]:
        """Of each new token; those after the real ones repeat the last position."""
        last = jnp.maximum(self.num_real, 1)[:, None] - 1
        return self.start[:, None] + jnp.minimum(jnp.arange(num_tokens)[None], last)


def attention_to(
    cache: KVCache,
    place: Place,
    num_tokens: int,
    windows: Sequence[int | None],
    kinds: Int[Array, " L"],
    soft_cap: float | None = None,
) -> Callable:
    """(layer, the cache, q, k, v, partition) → (attended, the cache with the new tokens).

    windows: the distinct sliding windows. kinds: the index of each layer's window. soft_cap: see
    dense.attention. partition: how a mesh splits the sequences and heads.
    """
    size = cache.k.shape[3]
    steps = jnp.arange(num_tokens)[None]
    new = place.start[:, None] + steps
    is_real = steps < place.num_real[:, None]
    places = jnp.where(is_real, new % size, size)  # an index out of bounds is not written
    # The position of the token in each place: the last one that was written there.
    last = (place.start + place.num_real - 1)[:, None]
    held = jnp.arange(size)[None, : place.span]
    held = last - (last - held) % size
    distance = new[:, :, None] - held[:, None]
    seen = (distance >= 0) & (held >= 0)[:, None]
    widths = jnp.asarray([window or np.iinfo(np.int32).max for window in windows], jnp.int32)

    def attend(layer, kv, q, k, v, partition):
        dtype = v.dtype
        new = KVCache(k, v) if kv.k_scale is None else KVCache(*_int8(k, v))
        kv = jax.tree.map(
            lambda stored, each: _write(stored, _as(each, stored.dtype), layer, places, place),
            kv, new,
        )  # fmt: skip
        window = widths[kinds[layer]]
        if place.row is None and cached.kernel_of(q, kv.k, partition) != choice.XLA:
            where = {"layer": layer, "start": place.start, "num_real": place.num_real}
            how = {"window": window, "soft_cap": soft_cap, "partition": partition}
            return cached.attend(q, *kv, **where, **how), kv
        k, v, k_scale, v_scale = (
            None if stored is None else _read(stored, layer, place) for stored in kv
        )
        if k_scale is None:
            k, v = _as(k, dtype), _as(v, dtype)
        else:
            k, v = (
                (a * scale[..., None]).astype(dtype) for a, scale in ((k, k_scale), (v, v_scale))
            )
        return dense.attention(q, k, v, seen & (distance < window), soft_cap), kv

    return attend


def _int8(k: jax.Array, v: jax.Array) -> tuple[jax.Array, ...]:
    """k and v as int8, and the scales of each token and head."""

    def rounded(a):
        a = a.astype(jnp.float32)
        scale = jnp.maximum(jnp.abs(a).max(axis=-1), jnp.finfo(jnp.float32).tiny) / 127
        return jnp.round(a / scale[..., None]).astype(jnp.int8), scale

    (k, k_scale), (v, v_scale) = rounded(k), rounded(v)
    return k, v, k_scale, v_scale


def _write(stored, new, layer, places, place):
    """stored [L, B, K, S, …] with new [G, T, K, …] in the places [G, T] of a layer.

    One scatter, with the sequences or groups as a batch axis, which a mesh may split. (`.at` under
    vmap would move that axis to the front, and so copy the cache.)
    """
    mesh = jax.sharding.get_abstract_mesh()
    unsplit = mesh.size == mesh.shape.get("tensor")
    if platform.platform_here() == "tpu" and unsplit and stored.ndim == 5:
        return _write_tiles(stored, new, layer, place)
    layers = jnp.broadcast_to(layer, places.shape)
    if place.row is None:
        return _scatter(stored, (layers, places), new)
    rows = jnp.broadcast_to(place.row[:, None], places.shape)
    grouped = stored.reshape(stored.shape[0], len(rows), -1, *stored.shape[2:])
    return _scatter(grouped, (layers, rows, places), new).reshape(stored.shape)


def _write_tiles(stored, new, layer, place):
    """The same for sequences that no mesh splits, one after the other.

    For a scatter, XLA's TPU backend wants the heads of a token next to each other, and copies the
    whole cache into that order and back. This writes whole tiles, in which the places of no new
    token keep what they have.
    """
    (num_groups, num_tokens, heads, width), size = new.shape, stored.shape[3]
    window = min(num_tokens if num_tokens > 1 else _TILE, size)
    rows = jnp.arange(num_groups) * (stored.shape[1] // num_groups)
    rows = rows if place.row is None else rows + place.row
    padded = jnp.pad(new, ((0, 0), (window, window), (0, 0), (0, 0))).swapaxes(1, 2)

    def put(stored, group, first, token):
        """With the window from place `first`, which is for the new token number `token`."""
        where = (layer, rows[group], 0, first, 0)
        sizes = (1, 1, heads, window, width)
        tokens = token + jnp.arange(window)
        is_new = (tokens >= 0) & (tokens < place.num_real[group])
        own = lax.dynamic_slice(padded, (group, 0, window + token, 0), sizes[1:])[None]
        mixed = jnp.where(is_new[:, None], own, lax.dynamic_slice(stored, where, sizes))
        return _in_order(lax.dynamic_update_slice(stored, mixed, where))

    def each(group, stored):
        start = place.start[group] % size
        first = start if num_tokens > 1 else start // window * window
        first = jnp.minimum(first, size - window)
        stored = put(stored, group, first, first - start)
        # Those that do not fit at the end begin again at place 0.
        return put(stored, group, 0, size - start) if num_tokens > 1 else stored

    return lax.fori_loop(0, num_groups, each, stored)


def _in_order(stored):
    """The same. XLA keeps its last axis minor, and so has nothing to copy between programs."""
    return layout.with_layout_constraint(stored, layout.Layout(tuple(range(stored.ndim))))


def _scatter(operand, indices, updates):
    """operand [L, G, …, K, S, *H] with updates [G, T, K, *H] at its other indices, each [G, T]."""
    at = operand.ndim - 1 - (updates.ndim - 3)  # the axis of places
    indexed = (0, *range(2, at - 1), at)
    dims = lax.ScatterDimensionNumbers(
        update_window_dims=tuple(range(2, updates.ndim)),
        inserted_window_dims=indexed,
        scatter_dims_to_operand_dims=indexed,
        operand_batching_dims=(1,),
        scatter_indices_batching_dims=(0,),
    )
    return lax.scatter(operand, jnp.stack(indices, axis=-1), updates, dims, mode="drop")


def _read(stored, layer, place):
    """[G, K, span, …] of a layer."""
    span = stored.shape[3] if place.span is None else min(place.span, stored.shape[3])
    sizes = (1, *stored.shape[1:3], span, *stored.shape[4:])
    own = lax.dynamic_slice(stored, (layer, *[0] * (stored.ndim - 1)), sizes)[0]
    if place.row is not None:
        grouped = own.reshape(len(place.row), -1, *own.shape[1:])
        own = jax.vmap(lambda own, row: lax.dynamic_index_in_dim(own, row, keepdims=False))(
            grouped, place.row
        )
    return own


def _as(array: jax.Array, dtype: jax.typing.DTypeLike) -> jax.Array:
    """The same bits in another dtype."""
    return array if array.dtype == dtype else lax.bitcast_convert_type(array, dtype)
