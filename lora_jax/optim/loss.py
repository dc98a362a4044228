"""The loss of a batch: of its trained tokens, or with DPO of its pairs of answers."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from lora_jax import lora
from lora_jax.data import encoding
from lora_jax.kernels import cross_entropy
from lora_jax.lora.nnx import model_state
from lora_jax.models import decoder
from lora_jax.optim import dpo
from lora_jax.parallel import mesh as sharding

HEAD_CHUNK = 128  # tokens of each sequence whose logits are held at a time if the head is trained


class Batch(NamedTuple):
    """The data of one optimizer step: A micro-batches of B sequences of T tokens.

    labels: input_ids where a token is trained, else −100. attention_mask: 0 on padding, else the
    number of the token's example within its sequence, from 1.
    """

    input_ids: Int[Array, "A B T"]
    labels: Int[Array, "A B T"]
    attention_mask: Int[Array, "A B T"]


class Sums(NamedTuple):
    """Sums over a batch: the loss, the count that its mean divides by, and further metrics."""

    loss: Float[Array, "*S"]
    count: Int[Array, "*S"]
    metrics: dict[str, Float[Array, "*S"]]


def zero_sums(beta: float | None, shape: tuple[int, ...] = ()) -> Sums:
    """The Sums of an empty batch."""
    names = () if beta is None else dpo.METRICS
    zero = jnp.zeros(shape)
    return Sums(zero, jnp.zeros(shape, jnp.int32), dict.fromkeys(names, zero))


def losses(model: nnx.Module, batch: Batch, *, remat: str = "none") -> Float[Array, "B T"]:
    """−log p(next token) at each token of one micro-batch whose next token is trained, else 0."""
    targets = jnp.pad(batch.labels[:, 1:], ((0, 0), (0, 1)), constant_values=encoding.IGNORED)
    hidden = model.hidden_states(batch.input_ids, batch.attention_mask, remat=remat)
    head = model.frozen_head()
    if head is None:
        return _of_trained_head(model, hidden, targets)
    hidden, partition = decoder.scaled(hidden, head.factor), sharding.partition(("lm_head",))
    how = partition, head.transposed, head.soft_cap
    return cross_entropy.cross_entropy(hidden, head.weight, targets, *how)


def _of_trained_head(model, hidden, targets):
    """Chunk by chunk of the sequences; the backward pass recomputes the logits of a chunk."""
    sequences, length, width = hidden.shape
    size = min(HEAD_CHUNK, length)
    padding = -length % size
    hidden = jnp.pad(hidden, ((0, 0), (0, padding), (0, 0))).reshape(sequences, -1, size, width)
    targets = jnp.pad(targets, ((0, 0), (0, padding)), constant_values=encoding.IGNORED)
    targets = targets.reshape(sequences, -1, size)
    graphdef, keys, rest = nnx.split(model, lora.DropoutKey, ...)

    @jax.checkpoint
    def of_chunk(number, hidden, targets):
        own = lora.reseed_by(keys, number)  # each chunk has its own dropout mask
        logits = nnx.merge(graphdef, own, rest).logits(hidden)
        return cross_entropy.of_logits(logits, targets)

    chunks = jnp.arange(hidden.shape[1]), hidden.swapaxes(0, 1), targets.swapaxes(0, 1)
    _, found = jax.lax.scan(lambda _, chunk: (None, of_chunk(*chunk)), None, chunks)
    return found.swapaxes(0, 1).reshape(sequences, -1)[:, :length]


def objective(beta: float | None) -> Callable[[jax.Array, jax.Array | None, Batch], Sums]:
    """(losses of a micro-batch, those of the reference, the micro-batch) → Sums.

    beta: the β of DPO, where each sequence is a pair of examples; None for the loss of tokens,
    which has no reference.
    """

    def tokens(now, before, batch):
        return Sums(now.sum(), (batch.labels[:, 1:] != encoding.IGNORED).sum(), {})

    def pairs(now, before, batch):
        return Sums(*dpo.loss(now, before, batch.attention_mask, beta))

    return tokens if beta is None else pairs


def of_model(
    graphdef: nnx.GraphDef, beta: float | None
) -> Callable[[nnx.Module, model_state.Frozen, Batch, str], Sums]:
    """(model, frozen, micro-batch, remat) → Sums; with beta, `frozen` holds the reference."""

    def sums(model, frozen: Any, batch, remat):
        before = None
        if beta is not None:
            reference = nnx.merge(graphdef, frozen.reference, frozen.dropout_keys, frozen.base)
            reference.eval()
            # Computed in the same way as below, so that both are rounded alike: the first loss is
            # log 2.
            before = jax.lax.stop_gradient(losses(reference, batch, remat=remat))
        return objective(beta)(losses(model, batch, remat=remat), before, batch)

    return sums
