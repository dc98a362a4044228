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
from jaxtyping import Array, Float, Int, Num

from lora_jax import errors
from lora_jax.kernels import platform
from lora_jax.kernels.attention import dense

KV_DTYPES = (None, "int8")


class KVCache(NamedTuple):
    """Keys and values in all layers [L, B, S, K, H].

    The token at position p is in place p, or p mod S where every layer has a sliding window and S
    is less than the context. In int8, each is multiplied by a scale of its token and head. On a CPU
    bfloat16 is stored as its bits, because XLA would convert the whole cache to float32 and back to
    write one token.
    """

    k: Num[Array, "L B S K H"]
    v: Num[Array, "L B S K H"]
    k_scale: Float[Array, "L B S K"] | None = None
    v_scale: Float[Array, "L B S K"] | None = None


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
) -> Callable:
    """(layer, the cache, q, k, v, _) → (attended, the cache with the new tokens).

    windows: the distinct sliding windows. kinds: the index of each layer's window.
    """
    size = cache.k.shape[2]
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

    def attend(layer, kv, q, k, v, _):
        dtype = v.dtype
        new = KVCache(k, v) if kv.k_scale is None else KVCache(*_int8(k, v))
        kv = jax.tree.map(
            lambda stored, each: _write(stored, _as(each, stored.dtype), layer, places, place.row),
            kv, new,
        )  # fmt: skip
        k, v, k_scale, v_scale = (
            None if stored is None else _read(stored, layer, place) for stored in kv
        )
        if k_scale is None:
            k, v = _as(k, dtype), _as(v, dtype)
        else:
            k, v = (
                (a * scale[..., None]).astype(dtype) for a, scale in ((k, k_scale), (v, v_scale))
            )
        return dense.attention(q, k, v, seen & (distance < widths[kinds[layer]])), kv

    return attend


def _int8(k: jax.Array, v: jax.Array) -> tuple[jax.Array, ...]:
    """k and v as int8, and the scales of each token and head."""

    def rounded(a):
        a = a.astype(jnp.float32)
        scale = jnp.maximum(jnp.abs(a).max(axis=-1), jnp.finfo(jnp.float32).tiny) / 127
        return jnp.round(a / scale[..., None]).astype(jnp.int8), scale

    (k, k_scale), (v, v_scale) = rounded(k), rounded(v)
    return k, v, k_scale, v_scale


def _write(stored, new, layer, places, row):
    """stored [L, B, S, …] with new [G, T, …] in the places [G, T] of a layer.

    One scatter, with the sequences or groups as a batch axis, which a mesh may split. (`.at` under
    vmap would move that axis to the front, and so copy the cache.)
    """
    layers = jnp.broadcast_to(layer, places.shape)
    if row is None:
        return _scatter(stored, (layers, places), new)
    rows = jnp.broadcast_to(row[:, None], places.shape)
    grouped = stored.reshape(stored.shape[0], len(row), -1, *stored.shape[2:])
    return _scatter(grouped, (layers, rows, places), new).reshape(stored.shape)


def _scatter(operand, indices, updates):
    """operand [L, G, …, S, *rest] with updates [G, T, *rest] at its indices, each [G, T]."""
    indexed = (0, *range(2, 1 + len(indices)))
    dims = lax.ScatterDimensionNumbers(
        update_window_dims=tuple(range(2, updates.ndim)),
        inserted_window_dims=indexed,
        scatter_dims_to_operand_dims=indexed,
        operand_batching_dims=(1,),
        scatter_indices_batching_dims=(0,),
    )
    return lax.scatter(operand, jnp.stack(indices, axis=-1), updates, dims, mode="drop")


def _read(stored, layer, place):
    """[G, span, …] of a layer."""
    own = lax.dynamic_index_in_dim(stored, layer, keepdims=False)
    if place.row is not None:
        grouped = own.reshape(len(place.row), -1, *own.shape[1:])
        own = jax.vmap(lambda own, row: lax.dynamic_index_in_dim(own, row, keepdims=False))(
            grouped, place.row
        )
    return own[:, : place.span]


def _as(array: jax.Array, dtype: jax.typing.DTypeLike) -> jax.Array:
    """The same bits in another dtype."""
    return array if array.dtype == dtype else lax.bitcast_convert_type(array, dtype)
