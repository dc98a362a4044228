"""Held-out loss and exact match."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from jax.sharding import Mesh

from lora_jax import data, generate, sharding, train


class Answer(NamedTuple):
    """A held-out prompt, what was expected, and what the model wrote."""

    prompt: str
    expected: str
    text: str


def mean_loss(
    eval_loss: Callable,
    trained: Any,
    frozen: train.Frozen,
    encoded: data.Encoded,
    batch_size: int,
    mesh: Mesh,
) -> float:
    """Mean of −log p over all trained tokens of the set: one sum, divided once."""
    where = sharding.rows(batch_size, mesh)
    rows = encoded.rows
    length = -(-max(len(ids) for ids, _ in rows) // 16) * 16
    empty = (np.zeros(0, np.int32), np.zeros(0, bool))
    total, count = 0.0, 0
    for first in range(0, len(rows), batch_size):
        chunk = rows[first : first + batch_size]
        padded = data.pad([*chunk, *[empty] * (batch_size - len(chunk))], length)
        batch = sharding.put(train.Batch(**padded), where)
        value, tokens = eval_loss(trained, frozen, batch)
        total, count = total + value.item(), count + tokens.item()
    return total / count


def answers(
    continue_: Callable,
    trained: Any,
    frozen: train.Frozen,
    prompts: Sequence[tuple[np.ndarray, str]],
    reader: Any,
    **how: Any,
) -> list[Answer]:
    """What the model answers to each (prompt ids, expected text); see generate.continuations."""
    ids = [prompt.tolist() for prompt, _ in prompts]
    found = generate.continuations(continue_, trained, frozen, ids, reader, **how)
    return [
        Answer(reader.decode(prompt, skip_special_tokens=True), expected, text)
        for prompt, (_, expected), text in zip(ids, prompts, found, strict=True)
    ]


def exact_match(found: Sequence[Answer]) -> float:
    """Share of the answers that equal what was expected, surrounding blanks aside."""
    return sum(a.text.strip() == a.expected.strip() for a in found) / len(found)
