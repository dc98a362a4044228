"""The case of attention to a KV cache, by the kernel that reads it in place."""

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax.kernels import capping, partitioning
from lora_jax.kernels.attention import cached
from lora_jax.selftest import case, draws

_LAYERS = 2


def cached_attention(
    *,
    slots: int,
    places: int,
    heads: int,
    kv_heads: int,
    width: int,
    dtype: jax.typing.DTypeLike,
    kv_dtype: str | None = None,
    tokens: int = 1,
    window: int | None = None,
    soft_cap: float | None = None,
    partition: partitioning.Partition = partitioning.WHOLE,
) -> case.Case:
    """Attention of `tokens` new ones of each slot to one of two layers; some slots have none.

    Lengths reach from `tokens` to `places`; with a window, which must leave room in the places for
    the new tokens, to twice as many.
    """
    most = places * (2 if window else 1) - tokens
    start = (np.arange(slots, 0, -1) * most // slots).astype(np.int32)
    start[1:][-1:] = 0
    num_real = np.where(np.arange(slots) % 7 == 3, 0, tokens).astype(np.int32)
    width_of_window = window or np.iinfo(np.int32).max
    shape = _LAYERS, slots, kv_heads, places, width
    stored = jnp.dtype(kv_dtype or dtype)
    queries = jax.ShapeDtypeStruct((slots, tokens, heads, width), dtype)
    of_cache = jax.ShapeDtypeStruct(shape, stored)

    def inputs():
        q = draws.random(0, queries.shape, dtype)
        if kv_dtype is None:
            return q, *(draws.random(seed, shape, dtype) for seed in (1, 2)), None, None
        k, v = (draws.numbers(seed, shape, 255) - 127 for seed in (1, 2))
        scales = ((1 + draws.random(seed, shape[:-1], dtype) / 2) / 64 for seed in (3, 4))
        return q, k.astype(stored), v.astype(stored), *(a.astype(jnp.float32) for a in scales)

    def layer_of(number):
        return (jnp.int32(number) + _LAYERS - 1) % _LAYERS

    def compared(out):
        return {"out": jnp.where((num_real > 0)[:, None, None, None], out, 0)}

    def compute(_, given, number):
        return compared(
            cached.attend(
                *given,
                layer=layer_of(number),
                start=jnp.asarray(start),
                num_real=jnp.asarray(num_real),
                window=jnp.int32(width_of_window),
                soft_cap=soft_cap,
                partition=partition,
            )
        )

    def reference(_, given, number):
        q, *kv = given
        layer = layer_of(number)
        k, v, *scales = (None if a is None else a[layer].astype(jnp.float32) for a in kv)
        if kv_dtype is not None:
            k, v = (a * scale[..., None] for a, scale in zip((k, v), scales, strict=True))
        q = q.astype(jnp.float32).reshape(slots, tokens, kv_heads, -1, width)
        logits = jnp.einsum("btkgh,bksh->bkgts", q, k) / np.sqrt(width)
        logits = capping.capped(logits, soft_cap)
        visible = jnp.asarray(_visible(start, num_real, tokens, places, width_of_window))
        p = jax.nn.softmax(jnp.where(visible[:, None, None], logits, -1e30), axis=-1)
        out = jnp.einsum("bkgts,bksh->btkgh", p, v)
        return compared(out.reshape(slots, tokens, heads, width))

    seen = np.minimum(np.where(num_real > 0, start + num_real, 0), min(width_of_window, places))
    return case.Case(
        cached.kernel_of(queries, of_cache, partition),
        "attention to a cache",
        f"{jnp.dtype(dtype).name} [{slots}, {tokens}, {heads}, {width}], {kv_heads} heads of "
        f"{places} {stored.name} keys" + (f", window {window}" if window else "")
        + case.of_soft_cap(soft_cap) + case.of_mesh(partition),
        (), inputs, compute, reference,
        flops=4.0 * tokens * heads * width * int(seen.sum()),
        num_bytes=2.0 * stored.itemsize * kv_heads * width * int(seen.sum()),
    )  # fmt: skip


def _visible(start, num_real, tokens, places, window) -> np.ndarray:
    """[B, T, S]: whether each new token sees the token in each place."""
    position = start[:, None] + np.arange(tokens)
    last = (start + num_real - 1)[:, None]
    held = last - (last - np.arange(places)) % places
    distance = position[:, :, None] - held[:, None]
    return (distance >= 0) & (distance < window) & (held >= 0)[:, None]
