"""Rows of token ids → batches, one row to a line or several packed side by side. No jax here."""

import bisect
import collections
import functools
import math
from collections.abc import Sequence

import numpy as np

from lora_jax.data import encoding, mixture

Line = Sequence[encoding.Row]  # rows side by side, which do not see each other


def arrange(
    rows: Sequence[encoding.Row], seq_len: int, *, packing: bool, in_pairs: bool
) -> list[Line]:
    """Lines of `rows`: packed, in pairs of a chosen and a rejected one, or each alone."""
    if packing:
        return pack(rows, seq_len)
    return pairs(rows) if in_pairs else alone(rows)


def alone(rows: Sequence[encoding.Row]) -> list[Line]:
    """Each row on a line of its own."""
    return [(row,) for row in rows]


def pairs(rows: Sequence[encoding.Row]) -> list[Line]:
    """Two rows on each line: what was chosen, and what was rejected."""
    return list(zip(rows[::2], rows[1::2], strict=True))


def pack(rows: Sequence[encoding.Row], length: int) -> list[Line]:
    """Lines of whole rows, at most `length` tokens each: the longest row first, each where it
    leaves least room.

    Source: best fit decreasing, Johnson 1973, https://dspace.mit.edu/handle/1721.1/57819: at most
    11/9 of the fewest lines there could be, and one.
    """
    lines: list[list[encoding.Row]] = []
    with_room = collections.defaultdict(list)  # tokens left: lines
    rooms: list[int] = []  # the keys of with_room that have lines, ascending
    for row in sorted(rows, key=lambda row: -len(row[0])):
        size = len(row[0])
        at = bisect.bisect_left(rooms, size)
        if at < len(rooms):
            room = rooms[at]
            line = with_room[room].pop()
            if not with_room[room]:
                del rooms[at]
        else:
            room, line = length, len(lines)
            lines.append([])
        lines[line].append(row)
        left = room - size
        if left and not with_room[left]:
            bisect.insort(rooms, left)
        with_room[left].append(line)
    return lines


def longest(lines: Sequence[Line]) -> int:
    """Tokens of the longest line, rounded up to a multiple of 16."""
    return math.ceil(max(map(_size, lines)) / 16) * 16


def filled(lines: Sequence[Line], length: int) -> float:
    """The share of lines of `length` tokens that are tokens of rows, not padding."""
    return sum(map(_size, lines)) / (len(lines) * length)


def _size(line: Line) -> int:
    return sum(len(ids) for ids, _ in line)


def pad(lines: Sequence[Line], length: int) -> dict[str, np.ndarray]:
    """input_ids, labels, attention_mask of `lines`, int32 [B, length].

    labels[t] is the token at t if it is trained, else −100 (the loss shifts); a row's first token
    follows nothing and is not. attention_mask is n on the n-th row's tokens, counted from 1, and 0
    on padding, which is on the right.
    """
    shape = (len(lines), length)
    padded = {
        "input_ids": np.zeros(shape, np.int32),
        "labels": np.full(shape, encoding.IGNORED, np.int32),
        "attention_mask": np.zeros(shape, np.int32),
    }
    for n, line in enumerate(lines):
        start = 0
        for number, (ids, trained) in enumerate(line, start=1):
            own = slice(start, start + len(ids))
            padded["input_ids"][n, own] = ids
            padded["labels"][n, own] = np.where(trained, ids, encoding.IGNORED)
            padded["labels"][n, start : start + 1] = encoding.IGNORED
            padded["attention_mask"][n, own] = number
            start = own.stop
    return padded


class Shuffled:
    """shuffled[n]: the n-th line of endless epochs, each a new seeded permutation of all lines.

    The order is numpy's: default_rng([seed, epoch, number]). grain's MapDataset would give the same
    kind of order, but importing it takes seconds and imports jax.
    """

    def __init__(self, lines: Sequence[Line], seed: int, number: int = 0):
        """number: of this source among those of a mixture."""
        self._lines = lines
        self._order = functools.lru_cache(maxsize=4)(
            lambda epoch: np.random.default_rng([seed, epoch, number]).permutation(len(lines))
        )

    def __len__(self) -> int:
        return len(self._lines)

    def __getitem__(self, n: int) -> Line:
        epoch, at = divmod(n, len(self._lines))
        return self._lines[self._order(epoch)[at]]


class Batches:
    """batches.batch(step): the same arrays for the same arguments, in any order of asking.

    Step after step shows the lines as they come, across the borders of epochs, so that no row is
    dropped. T is one static length.
    """

    def __init__(self, lines: mixture.Source, *, batch_size: int, grad_accum: int, length: int):
        self.lines = lines
        self.batch_size = batch_size
        self.grad_accum = grad_accum
        self.length = length

    def num_steps(self, epochs: float) -> int:
        """Optimiser steps that show every row `epochs` times (the last one may show a few more)."""
        return math.ceil(epochs * len(self.lines) / self.step_size)

    def shape(self, step: int) -> tuple[int, int, int]:
        """[A, B, T] of each array of a step's batch."""
        return self.grad_accum, self.batch_size, self._length_of(step)

    def batch(self, step: int, columns: slice = slice(None)) -> dict[str, np.ndarray]:
        """What `pad` gives, for optimiser step `step` = 0, 1, …: int32 [A, B, T].

        columns: which of the B lines of each micro-batch to make; the arrays are of these alone.
        """
        numbers = np.reshape(self._numbers(step), (self.grad_accum, self.batch_size))[:, columns]
        length = self._length_of(step)
        padded = pad([self.lines[int(n)] for n in numbers.ravel()], length)
        return {name: array.reshape(*numbers.shape, length) for name, array in padded.items()}

    @property
    def step_size(self) -> int:
        """Lines of a step."""
        return self.batch_size * self.grad_accum

    def _numbers(self, step: int) -> Sequence[int]:
        """Which lines a step shows, counted over all epochs."""
        return range(step * self.step_size, (step + 1) * self.step_size)

    def _length_of(self, step: int) -> int:
        return self.length


class ByLength(Batches):
    """Batches of lines that are about as long: each step has one of at most `NUM_LENGTHS` lengths.

    What `WINDOW` steps show together is sorted by length and dealt out to them, in a seeded order.
    """

    WINDOW, NUM_LENGTHS = 32, 8

    def __init__(self, batches: Batches, num_steps: int, seed: int):
        """The batches of a run of so many steps: it shows the lines that they would show."""
        vars(self).update(vars(batches))
        self._num_steps, self._seed = num_steps, seed
        sizes = range(1, self.NUM_LENGTHS + 1)
        self.lengths = sorted(
            {min(self.length, math.ceil(self.length * n / len(sizes) / 16) * 16) for n in sizes}
        )
        self._window = functools.lru_cache(maxsize=4)(self._deal)

    @property
    def used(self) -> list[int]:
        """Those of the lengths that occur."""
        return sorted({self._length_of(step) for step in range(self._num_steps)})

    @property
    def filled(self) -> float:
        """The share of what is computed that are tokens of rows, not padding."""
        shapes = (self.shape(step) for step in range(self._num_steps))
        numbers = (n for step in range(self._num_steps) for n in self._numbers(step))
        return sum(map(self._size_of, numbers)) / sum(map(math.prod, shapes))

    def _numbers(self, step: int) -> Sequence[int]:
        return self._window(step // self.WINDOW)[step % self.WINDOW]

    def _deal(self, window: int) -> list[list[int]]:
        """The lines of each step of a window."""
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
        return _size(self.lines[number])
