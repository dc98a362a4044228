"""Sequences → the arrays of each optimizer step, in a seeded order. Imports no jax."""

import bisect
import functools
import math
from collections.abc import Sequence

import numpy as np

from lora_jax.data import encoding, mixture, packing
from lora_jax.data.packing import TokenSequence


def pad(sequences: Sequence[TokenSequence], length: int) -> dict[str, np.ndarray]:
    """input_ids, labels, attention_mask of the sequences, int32 [B, length].

    labels[t] is the token at t if it is trained, else −100 (the loss shifts them); an example's
    first token follows nothing, so it is not trained. attention_mask is n on the tokens of the n-th
    example, counted from 1, and 0 on padding, which is on the right.
    """
    shape = (len(sequences), length)
    padded = {
        "input_ids": np.zeros(shape, np.int32),
        "labels": np.full(shape, encoding.IGNORED, np.int32),
        "attention_mask": np.zeros(shape, np.int32),
    }
    for n, sequence in enumerate(sequences):
        start = 0
        for number, (ids, trained) in enumerate(sequence, start=1):
            own = slice(start, start + len(ids))
            padded["input_ids"][n, own] = ids
            padded["labels"][n, own] = np.where(trained, ids, encoding.IGNORED)
            padded["labels"][n, start : start + 1] = encoding.IGNORED
            padded["attention_mask"][n, own] = number
            start = own.stop
    return padded


class Shuffled:
    """shuffled[n]: the n-th sequence of endless epochs, each a new seeded permutation.

    The order is numpy's: default_rng([seed, epoch, number]). grain's MapDataset would give such an
    order too, but importing it takes seconds and imports jax.
    """

    def __init__(self, sequences: Sequence[TokenSequence], seed: int, number: int = 0):
        """number: of this source in a mixture."""
        self._sequences = sequences
        self._order = functools.lru_cache(maxsize=4)(
            lambda epoch: np.random.default_rng([seed, epoch, number]).permutation(len(sequences))
        )

    def __len__(self) -> int:
        return len(self._sequences)

    def __getitem__(self, n: int) -> TokenSequence:
        epoch, at = divmod(n, len(self._sequences))
        return self._sequences[self._order(epoch)[at]]


class Batches:
    """batches.batch(step): the arrays of a step, a function of the arguments alone.

    Steps may be requested in any order. Consecutive steps take the sequences in order, across the
    ends of epochs, so that no example is dropped. T is one static length.
    """

    def __init__(self, sequences: mixture.Source, *, batch_size: int, grad_accum: int, length: int):
        self.sequences = sequences
        self.batch_size = batch_size
        self.grad_accum = grad_accum
        self.length = length

    def num_steps(self, epochs: float) -> int:
        """Optimizer steps that show every example `epochs` times; the last may show a few again."""
        return math.ceil(epochs * len(self.sequences) / self.step_size)

    def shape(self, step: int) -> tuple[int, int, int]:
        """[A, B, T] of each array of a step's batch."""
        return self.grad_accum, self.batch_size, self._length_of(step)

    def batch(self, step: int, columns: slice = slice(None)) -> dict[str, np.ndarray]:
        """The arrays of `pad` for optimizer step `step` = 0, 1, …: int32 [A, B, T].

        columns: which of the B sequences of each micro-batch to make; the arrays hold only these.
        """
        every = [self.sequences[int(n)] for n in self._numbers(step)]
        # Of all, so that a stream with a bad row ends each process at the same step.
        numbers = np.arange(self.step_size).reshape(self.grad_accum, self.batch_size)[:, columns]
        length = self._length_of(step)
        padded = pad([every[n] for n in numbers.ravel()], length)
        return {name: array.reshape(*numbers.shape, length) for name, array in padded.items()}

    @property
    def step_size(self) -> int:
        """Sequences in a step."""
        return self.batch_size * self.grad_accum

    def _numbers(self, step: int) -> Sequence[int]:
        """The numbers of a step's sequences, counted over all epochs."""
        return range(step * self.step_size, (step + 1) * self.step_size)

    def _length_of(self, step: int) -> int:
        return self.length


class ByLength(Batches):
    """Batches of sequences of similar length; each step has one of at most `NUM_LENGTHS` lengths.

    The sequences of `WINDOW` steps are sorted by length and dealt out to these steps again, in a
    seeded order.
    """

    WINDOW, NUM_LENGTHS = 32, 8

    def __init__(self, batches: Batches, num_steps: int, seed: int):
        """batches: shows the same sequences in a run of num_steps."""
        vars(self).update(vars(batches))
        self._num_steps, self._seed = num_steps, seed
        sizes = range(1, self.NUM_LENGTHS + 1)
        self.lengths = sorted(
            {min(self.length, math.ceil(self.length * n / len(sizes) / 16) * 16) for n in sizes}
        )
        self._window = functools.lru_cache(maxsize=4)(self._deal)

    @property
    def used(self) -> list[int]:
        """The lengths that occur."""
        return sorted({self._length_of(step) for step in range(self._num_steps)})

    @property
    def filled(self) -> float:
        """The share of real tokens, not padding, in what is computed."""
        shapes = (self.shape(step) for step in range(self._num_steps))
        numbers = (n for step in range(self._num_steps) for n in self._numbers(step))
        return sum(map(self._size_of, numbers)) / sum(map(math.prod, shapes))

    def _numbers(self, step: int) -> Sequence[int]:
        return self._window(step // self.WINDOW)[step % self.WINDOW]

    def _deal(self, window: int) -> list[list[int]]:
        """The numbers of the sequences of each step in a window."""
        first = window * self.WINDOW
        steps = min(self.WINDOW, self._num_steps - first)
        shown = sorted(
            range(first * self.step_size, (first + steps) * self.step_size), key=self._size_of
        )
        order = np.random.default_rng([self._seed, window, 1]).permutation(steps)
        return [shown[n * self.step_size : (n + 1) * self.step_size] for n in order]

    def _length_of(self, step: int) -> int:
        needed = max(map(self._size_of, self._numbers(step)))
        return self.lengths[bisect.bisect_left(self.lengths, needed)]

    def _size_of(self, number: int) -> int:
        return packing.num_tokens(self.sequences[number])
