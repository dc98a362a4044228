"""The cases of the embedding and the loss. Their inputs are random; weights are given."""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from lora_jax.kernels import capping, choice, cross_entropy, embedding, partitioning
from lora_jax.selftest import case, draws

_TOKENS = 600  # of the cross-entropy: more than a chunk


def vocabulary_loss(
    head: Float[Array, "_ _"],
    *,
    batch: int,
    length: int,
    dtype: jax.typing.DTypeLike,
    partition: partitioning.Partition = partitioning.WHOLE,
    transposed: bool = False,
    soft_cap: float | None = None,
) -> case.Case:
    """The cross-entropy of some tokens, and its gradient. head: [D, V]; transposed: [V, D]."""
    width, size = head.shape[::-1] if transposed else head.shape
    count = min(_TOKENS, batch * length)
    chosen = draws.spread(batch * length, count)

    def inputs():
        every = jnp.full(batch * length, -100).at[chosen].set(draws.numbers(0, (count,), size))
        return draws.random(1, (batch, length, width), dtype), every.reshape(batch, length)

    def rows(each, gradient):
        return {"loss": each.reshape(-1)[chosen], "dh": gradient.reshape(-1, width)[chosen]}

    def compute(head, given, number):
        hidden, targets = given
        how = targets, partition, transposed, soft_cap
        each, vjp = jax.vjp(lambda hidden: cross_entropy.cross_entropy(hidden, head, *how), hidden)
        return rows(each, vjp(jnp.ones_like(each))[0])

    def reference(head, given, number):
        hidden, targets = (a.reshape(batch * length, -1)[chosen] for a in given)

        @jax.checkpoint
        def one(hidden, target):
            wide = head.astype(jnp.float32)
            logits = jnp.dot(hidden, wide.T if transposed else wide)
            logits = capping.capped(logits, soft_cap)
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
        f"vocabulary {size}{case.of_soft_cap(soft_cap)}{case.of_mesh(partition)}",
        head, inputs, compute, reference,
        flops=4.0 * count * width * size,
        num_bytes=2.0 * item * width * size,
    )  # fmt: skip


def embedding_lookup(
    table: Float[Array, "V D"],
    *,
    batch: int,
    length: int,
    partition: partitioning.Partition = partitioning.WHOLE,
) -> case.Case:
    """table[ids]."""
    size, width = table.shape

    def compute(table, ids, number):
        return {"y": embedding.lookup(table, ids, partition=partition)}

    return case.Case(
        choice.XLA,
        "embedding",
        f"{table.dtype.name} [{size}, {width}], ids [{batch}, {length}]{case.of_mesh(partition)}",
        table,
        lambda: draws.numbers(0, (batch, length), size),
        compute,
        lambda table, ids, number: {"y": jnp.take(table, ids, axis=0)},
        flops=0.0,
        num_bytes=2.0 * batch * length * width * table.dtype.itemsize,
    )  # fmt: skip
