"""Held-out loss, exact match, and the agreement of two models' predictions."""

import collections
import functools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Float

from lora_jax.data import batches, packing
from lora_jax.lora.nnx import model_state
from lora_jax.models import llama
from lora_jax.optim import loss as train_loss
from lora_jax.parallel import mesh as sharding


class Answer(NamedTuple):
    """A held-out prompt, the expected answer, and the answer of the model."""

    prompt: str
    expected: str
    text: str


def means(
    eval_loss: Callable,
    trained: Any,
    frozen: model_state.Frozen,
    sequences: Sequence[packing.TokenSequence],
    batch_size: int,
    mesh: Mesh,
) -> dict[str, float]:
    """{metric: mean over all of `sequences`}.

    `eval_loss` returns sums and a count per batch. Both are added up before one division.
    """
    where = sharding.rows(batch_size, mesh)
    length = packing.longest(sequences)
    total, count = collections.Counter(), 0
    for first in range(0, len(sequences), batch_size):
        chunk = sequences[first : first + batch_size]
        padded = batches.pad([*chunk, *[()] * (batch_size - len(chunk))], length)
        batch = sharding.put(train_loss.Batch(**padded), where)
        values, counted = eval_loss(trained, frozen, batch)
        total.update({name: value.item() for name, value in values.items()})
        count += counted.item()
    return {name: value / count for name, value in total.items()}


def answers(
    found: Iterable[str], prompts: Sequence[tuple[np.ndarray, str]], reader: Any
) -> list[Answer]:
    """The texts that follow each (prompt ids, expected text), beside those."""
    return [
        Answer(reader.decode(prompt.tolist(), skip_special_tokens=True), expected, text)
        for (prompt, expected), text in zip(prompts, found, strict=True)
    ]


def exact_match(found: Sequence[Answer]) -> float:
    """The share of answers that equal the expected text, apart from surrounding whitespace."""
    return sum(a.text.strip() == a.expected.strip() for a in found) / len(found)


def log_probabilities(
    model: llama.LlamaForCausalLM, texts: Sequence[Sequence[int]]
) -> list[Float[np.ndarray, "T V"]]:
    """log p(next token) after each token of each text."""
    length = max(map(len, texts))
    ids = np.zeros((len(texts), length), np.int32)
    for row, text in zip(ids, texts, strict=True):
        row[: len(text)] = text
    found = np.asarray(_log_probabilities(*nnx.split(model), ids))
    return [row[: len(text)] for row, text in zip(found, texts, strict=True)]


@functools.partial(jax.jit, static_argnums=0)
def _log_probabilities(graphdef, state, ids):
    return jax.nn.log_softmax(nnx.merge(graphdef, state)(ids))


def agreement(
    expected: Sequence[Float[np.ndarray, "_ V"]], found: Sequence[Float[np.ndarray, "_ V"]]
) -> tuple[float, float]:
    """(share of positions with the same most likely token, mean KL(expected ‖ found) in nats).

    expected, found: log-probabilities of the same texts, as log_probabilities returns them.
    Both figures are NaN if any of them is not finite.
    """
    p, q = np.concatenate(expected), np.concatenate(found)
    if not (np.isfinite(p).all() and np.isfinite(q).all()):
        return math.nan, math.nan
    same = (p.argmax(axis=-1) == q.argmax(axis=-1)).mean()
    kl = (np.exp(p) * (p - q)).sum(axis=-1).mean()
    return float(same), max(0.0, float(kl))  # rounding can make it negative
