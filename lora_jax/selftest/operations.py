"""The cases of each operation. Their inputs are random; weights are given."""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from lora_jax.kernels import attention, choice, cross_entropy, embedding, int4_matmul
from lora_jax.kernels import packed as packing
from lora_jax.kernels import partition as dealing
from lora_jax.selftest import case, draws

_TOKENS = 600  # of the cross-entropy: more than a chunk


def int4_product(
    packed: packing.Packed,
    *,
    rows: int,
    dtype: jax.typing.DTypeLike,
    codes: str = "int4",
    layer: int | None = None,
    partition: dealing.Partition = dealing.WHOLE,
    backward: bool = False,
) -> case.Case:
    """x · W and, with `backward`, dy · Wᵀ. packed: W, or a stack of which `layer` is one."""
    k, n = packed.q.shape[-2] * 8, packed.q.shape[-1]
    groups = packed.scale.shape[-2]
    how = {"codes": codes, "partition": partition}
    x = jax.ShapeDtypeStruct((rows, k), dtype)
    found = [int4_matmul.kernel_of(x, packed, **how)]
    if backward:
        dy = jax.ShapeDtypeStruct((rows, n), dtype)
        found.append(int4_matmul.kernel_of(dy, packed, **how, transpose=True))
    compared = draws.some(rows)

    def product(packed, x, number=0, **more):
        index = None if layer is None else (layer + jnp.int32(number)) % len(packed.q)
        return int4_matmul.int4_matmul(x, packed, layer=index, **how, **more)

    def inputs():
        return draws.random(0, (rows, k), dtype), draws.random(1, (rows, n), dtype)

    def compute(packed, given, number):
        x, dy = given
        if not backward:
            return {"y": product(packed, x, number)[compared]}
        y, vjp = jax.vjp(lambda x: product(packed, x, number), x)
        return {"y": y[compared], "dx": vjp(dy)[0][compared]}

    def reference(packed, given):
        x, dy = (a[compared].astype(jnp.float32) for a in given)
        y, vjp = jax.vjp(lambda x: product(packed, x, implementation="xla"), x)
        return {"y": y, "dx": vjp(dy)[0]} if backward else {"y": y}

    kernel = next((each for each in found if each != choice.XLA), choice.XLA)
    passes = 2 if backward else 1
    stack = "" if layer is None else f" {layer + 1} of {len(packed.q)}"
    return case.Case(
        kernel,
        f"{codes} product" + (" and gradient" if backward else ""),
        f"{jnp.dtype(dtype).name} [{rows}, {k}] × W{stack} [{k}, {n}], groups of {k // groups}, "
        f"{packed.scale.dtype} scales{'' if packed.group_bias is None else ' and bias'}"
        + of_mesh(partition),
        packed, inputs, compute, reference,
        flops=2.0 * rows * k * n * passes,
        num_bytes=passes * (bytes_of(packed, layer) + jnp.dtype(dtype).itemsize * rows * (k + n)),
    )  # fmt: skip


def hopper_product(
    turned: packing.Packed,
    stacks: Sequence[packing.Packed],
    *,
    rows: int,
    partition: dealing.Partition = dealing.WHOLE,
) -> case.Case:
    """x · W of decoding on Hopper. turned: `stacks`, concatenated, with K minor."""
    layers = len(turned.q)
    widths = [packed.q.shape[-1] for packed in stacks]

    def compute(weights, x, number):
        layer = jnp.int32(number) % layers
        how = {"layer": layer, "widths": widths, "partition": partition}
        return {"y": jnp.concatenate(int4_matmul.from_k_minor(x, weights[0], **how), axis=-1)}

    def reference(weights, x):
        return _products(x, weights[1], jnp.int32(0))

    return _decoding(choice.INT4_HOPPER, (turned, stacks), stacks, rows, partition, compute,
                     reference)  # fmt: skip


def joined_products(
    stacks: Sequence[packing.Packed],
    *,
    rows: int,
    partition: dealing.Partition = dealing.WHOLE,
) -> case.Case:
    """x · W of the last layer of stacks of weights that decoding joins, in one kernel on a GPU."""
    layers = len(stacks[0].q)
    x = jax.ShapeDtypeStruct((rows, 8 * stacks[0].q.shape[-2]), jnp.bfloat16)
    kernels = {int4_matmul.kernel_of(x, packed, partition=partition) for packed in stacks}

    def compute(stacks, x, number):
        layer = (layers - 1 + jnp.int32(number)) % layers
        found = int4_matmul.joined(x, stacks, layer=layer, partition=partition)
        return {"y": jnp.concatenate(found, axis=-1)}

    def reference(stacks, x):
        return _products(x, stacks, jnp.int32(layers - 1))

    kernel = kernels.pop() if len(kernels) == 1 else choice.XLA
    return _decoding(kernel, stacks, stacks, rows, partition, compute, reference)


def _products(x, stacks, layer):
    each = (int4_matmul.int4_matmul(x.astype(jnp.float32), packed, layer=layer,
                                    implementation="xla")
            for packed in stacks)  # fmt: skip
    return {"y": jnp.concatenate([*each], axis=-1)}


def _decoding(kernel, weights, stacks, rows, partition, compute, reference) -> case.Case:
    """Of products with a layer of stacks of weights, computed together."""
    k, n = 8 * stacks[0].q.shape[-2], [packed.q.shape[-1] for packed in stacks]
    return case.Case(
        kernel,
        "int4 product of decoding",
        f"bfloat16 [{rows}, {k}] × W [{k}, {' + '.join(map(str, n))}], "
        f"{stacks[0].scale.dtype} scales" + of_mesh(partition),
        weights,
        lambda: draws.random(0, (rows, k), jnp.bfloat16),
        compute,
        reference,
        flops=2.0 * rows * k * sum(n),
        num_bytes=bytes_of(stacks, 0) + 2.0 * rows * (k + sum(n)),
    )


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
    partition: dealing.Partition = dealing.WHOLE,
) -> case.Case:
    """Attention and its gradients. packed: several examples in a sequence, not one; each sequence
    ends with padding."""
    shapes = [(batch, length, n, width) for n in (heads, kv_heads, kv_heads, heads)]
    shaped = (jax.ShapeDtypeStruct(shape, dtype) for shape in shapes[:3])
    kernel = attention.kernel_of(*shaped, packed=packed)
    queries = draws.some(length)
    how = {"windows": (window,), "partition": partition}
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

    def reference(_, given):
        *qkv, d_out, examples = given
        out, vjp = jax.vjp(
            lambda q, k, v: _attention(q, k, v, examples, queries, window),
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
        + of_mesh(partition),
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


def _attention(q, k, v, examples, queries, window) -> Float[Array, "B Q N H"]:
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
        p = jnp.where(visible, jax.nn.softmax(jnp.where(visible, logits, -1e30), axis=-1), 0)
        return jnp.einsum("bqt,bth->bqh", p, v)

    k, v = (jnp.repeat(a, repeats, axis=2) for a in (k, v))
    by_head = (a.swapaxes(0, 2).swapaxes(1, 2) for a in (q[:, queries], k, v))
    return lax.map(head, tuple(by_head)).swapaxes(1, 2).swapaxes(0, 2)


def vocabulary_loss(
    head: Float[Array, "D V"],
    *,
    batch: int,
    length: int,
    dtype: jax.typing.DTypeLike,
    partition: dealing.Partition = dealing.WHOLE,
) -> case.Case:
    """The cross-entropy of some tokens, and its gradient."""
    width, size = head.shape
    count = min(_TOKENS, batch * length)
    chosen = draws.spread(batch * length, count)

    def inputs():
        every = jnp.full(batch * length, -100).at[chosen].set(draws.numbers(0, (count,), size))
        return draws.random(1, (batch, length, width), dtype), every.reshape(batch, length)

    def rows(each, gradient):
        return {"loss": each.reshape(-1)[chosen], "dh": gradient.reshape(-1, width)[chosen]}

    def compute(head, given, number):
        hidden, targets = given
        each, vjp = jax.vjp(
            lambda hidden: cross_entropy.cross_entropy(hidden, head, targets, partition), hidden
        )
        return rows(each, vjp(jnp.ones_like(each))[0])

    def reference(head, given):
        hidden, targets = (a.reshape(batch * length, -1)[chosen] for a in given)

        @jax.checkpoint
        def one(hidden, target):
            logits = jnp.dot(hidden, head.astype(jnp.float32))
            return jax.nn.logsumexp(logits) - logits[target[0]]

        def all_of(hidden):
            return lax.map(lambda part: one(*part), (hidden, targets), batch_size=128)

        each, vjp = jax.vjp(all_of, hidden.astype(jnp.float32))
        return {"loss": each, "dh": vjp(jnp.ones_like(each))[0]}

    item = jnp.dtype(dtype).itemsize
    return case.Case(
        choice.XLA,
        "cross-entropy and gradient",
        f"{jnp.dtype(dtype).name} [{batch}, {length}, {width}], {count} tokens, "
        f"vocabulary {size}{of_mesh(partition)}",
        head, inputs, compute, reference,
        flops=4.0 * count * width * size,
        num_bytes=2.0 * item * width * size,
    )  # fmt: skip


def embedding_lookup(
    table: Float[Array, "V D"],
    *,
    batch: int,
    length: int,
    partition: dealing.Partition = dealing.WHOLE,
) -> case.Case:
    """table[ids]."""
    size, width = table.shape

    def compute(table, ids, number):
        return {"y": embedding.lookup(table, ids, partition=partition)}

    return case.Case(
        choice.XLA,
        "embedding",
        f"{table.dtype.name} [{size}, {width}], ids [{batch}, {length}]{of_mesh(partition)}",
        table,
        lambda: draws.numbers(0, (batch, length), size),
        compute,
        lambda table, ids: {"y": jnp.take(table, ids, axis=0)},
        flops=0.0,
        num_bytes=2.0 * batch * length * width * table.dtype.itemsize,
    )  # fmt: skip


def bytes_of(weights: Any, layer: int | None) -> int:
    """Of packed weights, or of a layer of stacks."""
    arrays = jax.tree.leaves(weights)
    return sum(a.nbytes if layer is None else a.nbytes // len(a) for a in arrays)


def of_mesh(partition: dealing.Partition) -> str:
    """How the ambient mesh splits an operation, as part of a case's shapes."""
    axes = {axis: size for axis, size in dealing.open_axes().items() if size > 1}
    if partition == dealing.WHOLE or not axes:
        return ""
    rows, *_ = partition.computed(0)
    split = {"rows": "·".join(rows), **dict(zip(("K", "N"), partition.stored(), strict=True))}
    return (
        ", on "
        + " × ".join(f"{axis}={size}" for axis, size in axes.items())
        + "".join(f", {name} over {axis}" for name, axis in split.items() if axis)
    )
