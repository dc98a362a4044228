"""The programs that requests may need, so that they are compiled before they do.

A jitted function keeps what its `lower(…).compile()` made, and its calls find it.
"""

import itertools
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import numpy as np

from lora_jax.generation import batch as batches
from lora_jax.generation import config
from lora_jax.generation import sampling as samplers


class Program(NamedTuple):
    """A jitted function, and arguments of the shapes and shardings that it is called with."""

    function: Any
    arguments: tuple[Any, ...]
    static: dict[str, int]

    def compile(self, batch: batches.Batch) -> None:
        with batch.on_devices():
            self.function.lower(*self.arguments, **self.static).compile()


def programs(batch: batches.Batch, speculate: int) -> list[Program]:
    """All programs of a batch, in the order in which growing texts need them.

    speculate: how many tokens are guessed, 0 for none. It makes the batch's state if there is none.
    """
    state = jax.tree.map(_struct, batch.state)
    weights = jax.tree.map(_struct, batch.weights)  # which have all forms when the state is made
    run, slots = batch.programs, batch.num_slots
    live = np.zeros(slots, bool)
    found = [Program(run.admit, (state, *arguments), {}) for arguments in _admissions(batch)]
    if slots > 1:
        where = np.zeros((2, batch.num_groups), np.int32)
        found.append(Program(run.copy, (state, *where), {}))
    with batch.on_devices():
        _, logits = run.forward.eval_shape(weights, state, live, span=batch.spans.all()[0])
    logits = logits.update(sharding=state.lengths.sharding)
    allowed = np.zeros((slots, -(-batch.vocab_size // 32)), np.int32)
    # Few requests have a grammar, or ask for log p of their prompts.
    later = [Program(run.choose, (state, logits, live, allowed), {})]
    for span in batch.spans.all():
        static = {"span": span}
        found.append(Program(run.decode, (weights, state, live), static))
        if speculate:
            guesses = np.zeros((slots, speculate), np.int32), np.zeros(slots, np.int32)
            found.append(Program(run.verify, (weights, state, live, *guesses), static))
        for chunk in batch.chunks.all(span):
            found.append(Program(run.prefill, (weights, state, chunk), static))
            if chunk.row is not None:
                later.append(Program(run.score, (weights, state, chunk, chunk.ids), static))
        later.append(Program(run.forward, (weights, state, live), static))
    return [*found, *later]


def _admissions(batch: batches.Batch) -> Iterator[tuple[Any, ...]]:
    """Arguments of `admit` after the state, for requests without and with penalties."""
    mixture = np.zeros(batch.num_adapters, np.float32)
    for sampling in (config.Sampling(), config.Sampling(presence_penalty=1.0)):
        row = samplers.row(sampling, [0], [], batch.vocab_size)
        yield (*itertools.repeat(np.int32(0), 3), mixture, row)


def _struct(array: jax.Array) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=array.sharding)
