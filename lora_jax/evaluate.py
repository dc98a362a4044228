"""Held-out loss and exact match."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from lora_jax import data, generate, tokenizer, train


class Answer(NamedTuple):
    """A held-out prompt, what was expected, and what the model wrote."""

    prompt: str
    expected: str
    text: str


def mean_loss(
    eval_loss: Callable, trained: Any, frozen: train.Frozen, encoded: data.Encoded, batch_size: int
) -> float:
    """Mean of −log p over all trained tokens of the set: one sum, divided once."""
    rows = encoded.rows
    length = -(-max(len(ids) for ids, _ in rows) // 16) * 16
    empty = (np.zeros(0, np.int32), np.zeros(0, bool))
    total, count = 0.0, 0
    for first in range(0, len(rows), batch_size):
        chunk = rows[first : first + batch_size]
        padded = data.pad([*chunk, *[empty] * (batch_size - len(chunk))], length)
        value, tokens = eval_loss(trained, frozen, train.Batch(**padded))
        total, count = total + value.item(), count + tokens.item()
    return total / count


def answers(
    generate_: Callable,
    trained: Any,
    frozen: train.Frozen,
    prompts: Sequence[tuple[np.ndarray, str]],
    reader: Any,
    batch_size: int,
) -> list[Answer]:
    """What the model answers to each (prompt ids, expected text); `reader` is its tokenizer."""
    found = []
    prompt_ids = [ids.tolist() for ids, _ in prompts]
    ids, mask = generate.pad_left(prompt_ids)
    for first in range(0, len(prompts), batch_size):
        # The last batch starts early enough to be full: one shape, one compilation.
        start = max(0, min(first, len(prompts) - batch_size))
        rows = slice(start, start + batch_size)
        tokens = generate_(trained, frozen, ids[rows], mask[rows], jax.random.key(0))
        chunk = prompt_ids[first : first + batch_size]
        new = texts(chunk, np.asarray(tokens)[first - start :], reader)
        for prompt, (_, expected), text in zip(chunk, prompts[first:], new, strict=False):
            found.append(Answer(reader.decode(prompt, skip_special_tokens=True), expected, text))
    return found


def exact_match(found: Sequence[Answer]) -> float:
    """Share of the answers that equal what was expected, surrounding blanks aside."""
    return sum(a.text.strip() == a.expected.strip() for a in found) / len(found)


def texts(prompts: Sequence[Sequence[int]], tokens: Any, reader: Any) -> list[str]:
    """What generated rows, filled with −1 after their end, add to their prompts."""
    rows = zip(prompts, np.asarray(tokens), strict=True)
    return [tokenizer.continuation(reader, prompt, new[new >= 0].tolist()) for prompt, new in rows]
