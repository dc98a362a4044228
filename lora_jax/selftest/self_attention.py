"""The case of attention within sequences. Its inputs are random."""

import math

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from lora_jax.kernels import attention, capping, partitioning
from lora_jax.selftest import case, draws


def self_attention(
    *,
    batch: int,
    length: int,
    heads: int,
    kv_heads: int,
    width: int,
    dtype: jax.typing.DTypeLike,
    packed: bool = False,
    window: int | None = None,
    soft_cap: float | None = None,
    partition: partitioning.Partition = partitioning.WHOLE,
) -> case.Case:
    """Attention and its gradients. packed: several examples in a sequence, not one; each sequence
    ends with padding."""
    shapes = [(batch, length, n, width) for n in (heads, kv_heads, kv_heads, heads)]
    shaped = (jax.ShapeDtypeStruct(shape, dtype) for shape in shapes[:3])
    kernel = attention.kernel_of(*shaped, packed=packed, soft_cap=soft_cap)
    queries = draws.some(length)
    how = {"windows": (window,), "soft_cap": soft_cap, "partition": partition}
    window = window or length

    def inputs():
        q, k, v, d_out = (draws.random(n, shape, dtype) for n, shape in enumerate(shapes))
        examples = _examples(batch, length, packed)
        compared = jnp.zeros((1, length), bool).at[:, queries].set(True) & (examples != 0)
        return q, k, v, jnp.where(compared[..., None, None], d_out, 0), examples

    def compute(_, given, number):
        q, k, v, d_out, examples = given

        def attend(q, k, v):
            return attention.self_attention(q, k, v, examples, **how)

        out, vjp = jax.vjp(attend, q, k, v)
        return compared(out, *vjp(d_out), examples)

    def reference(_, given, number):
        *qkv, d_out, examples = given
        out, vjp = jax.vjp(
            lambda q, k, v: _attention(q, k, v, examples, queries, window, soft_cap),
            *(a.astype(jnp.float32) for a in qkv),
        )
        d_q, d_k, d_v = vjp(d_out[:, queries].astype(jnp.float32))
        return compared(out, d_q, d_k, d_v, examples)

    def compared(out, d_q, d_k, d_v, examples):
        if out.shape[1] == length:
            out = out[:, queries]
        out = jnp.where((examples != 0)[:, queries, None, None], out, 0)
        return {"out": out, "dq": d_q[:, queries], "dk": d_k, "dv": d_v}

    pairs = batch * heads * length * min(window, length) / 2
    return case.Case(
        kernel,
        "attention and gradient",
        f"{jnp.dtype(dtype).name} [{batch}, {length}, {heads}, {width}], {kv_heads} heads of keys"
        + (", packed" if packed else "")
        + (f", window {window}" if window < length else "")
        + case.of_soft_cap(soft_cap)
        + case.of_mesh(partition),
        (), inputs, compute, reference,
        flops=14 * pairs * width,  # two products of a pair of tokens forward, five backward
        num_bytes=8.0 * batch * length * (heads + kv_heads) * width * jnp.dtype(dtype).itemsize,
    )  # fmt: skip


def _examples(batch: int, length: int, packed: bool) -> jax.Array:
    """[B, T]: examples of different lengths, or one, and then padding."""
    real = jnp.arange(length) < length - length // 16
    if not packed:
        return jnp.broadcast_to(real.astype(jnp.int32), (batch, length))
    mean = max(1, length // 5)
    token = jnp.arange(length)[None] + jnp.arange(batch)[:, None] * (mean // 3)
    examples = 1 + token // mean + token // (2 * mean + 1)
    examples -= examples[:, :1] - 1
    return jnp.where(real, examples, 0)


def _attention(q, k, v, examples, queries, window, soft_cap) -> Float[Array, "B Q N H"]:
    """The definition, at some of the queries, one head at a time."""
    length = q.shape[1]
    own = queries[:, None]
    keys = jnp.arange(length)[None]
    visible = ((keys <= own) & (own - keys < window))[None]
    visible &= (examples[:, own[:, 0], None] == examples[:, None]) & (examples != 0)[:, None]
    repeats = q.shape[2] // k.shape[2]

    @jax.checkpoint
    def head(part):
        q, k, v = part  # [B, Q, H], [B, T, H]
        logits = jnp.einsum("bqh,bth->bqt", q, k) / math.sqrt(q.shape[-1])
        logits = capping.capped(logits, soft_cap)
        p = jnp.where(visible, jax.nn.softmax(jnp.where(visible, logits, -1e30), axis=-1), 0)
        return jnp.einsum("bqt,bth->bqh", p, v)

    k, v = (jnp.repeat(a, repeats, axis=2) for a in (k, v))
    by_head = (a.swapaxes(0, 2).swapaxes(1, 2) for a in (q[:, queries], k, v))
    return lax.map(head, tuple(by_head)).swapaxes(1, 2).swapaxes(0, 2)
