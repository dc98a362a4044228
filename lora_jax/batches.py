"""Rows of token ids → batches, one row to a line or several packed side by side. No jax here."""

import bisect
import collections
import functools
import math
from collections.abc import Sequence

import numpy as np

from lora_jax import data

Line = Sequence[data.Row]  # rows side by side, which do not see each other


def arrange(rows: Sequence[data.Row], seq_len: int, *, packing: bool, in_pairs: bool) -> list[Line]:
    """Lines of `rows`: packed, in pairs of a chosen and a rejected one, or each alone."""
    if packing:
        return pack(rows, seq_len)
    return pairs(rows) if in_pairs else alone(rows)


def alone(rows: Sequence[data.Row]) -> list[Line]:
    """Each row on a line of its own."""
    return [(row,) for row in rows]


def pairs(rows: Sequence[data.Row]) -> list[Line]:
    """Two rows on each line: what was chosen, and what was rejected."""
    return list(zip(rows[::2], rows[1::2], strict=True))


def pack(rows: Sequence[data.Row], length: int) -> list[Line]:
    """Lines of whole rows, at most `length` tokens each: the longest row first, each where it
    leaves least room.

    Source: best fit decreasing, Johnson 1973, https://dspace.mit.edu/handle/1721.1/57819: at most
    11/9 of the fewest lines there could be, and one.
    """
    lines: list[list[data.Row]] = []
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
        "labels": np.full(shape, data.IGNORED, np.int32),
        "attention_mask": np.zeros(shape, np.int32),
    }
    for n, line in enumerate(lines):
        start = 0
        for number, (ids, trained) in enumerate(line, start=1):
            own = slice(start, start + len(ids))
            padded["input_ids"][n, own] = ids
            padded["labels"][n, own] = np.where(trained, ids, data.IGNORED)
            padded["labels"][n, start : start + 1] = data.IGNORED
            padded["attention_mask"][n, own] = number
            start = own.stop
    return padded


class Batches:
    """batches.batch(step): the same arrays for the same arguments, in any order of asking.

    Lines come in epochs: each is a new seeded permutation of all lines, and batches run on across
    the border, so that no row is dropped. T is one static length, the longest line rounded up to a
    multiple of 16 and at most seq_len.

    The order is numpy's: default_rng([seed, epoch]). grain's MapDataset would give the same kind of
    order, but importing it takes seconds and imports jax.
    """

    def __init__(
        self,
        lines: Sequence[Line],
        *,
        batch_size: int,
        grad_accum: int,
        seed: int,
        seq_len: int,
    ):
        self.lines = lines
        self._sizes = [_size(line) for line in lines]
        self.batch_size = batch_size
        self.grad_accum = grad_accum
        self.seed = seed
        self.length = min(seq_len, longest(lines))

    def num_steps(self, epochs: float) -> int:
        """Optimiser steps that show every row `epochs` times (the last one may show a few more)."""
        return math.ceil(epochs * len(self.lines) / self._step_size)

    def shape(self, step: int) -> tuple[int, int, int]:
        """[A, B, T] of each array of a step's batch."""
        return self.grad_accum, self.batch_size, self._length_of(step)

    @property
    def filled(self) -> float:
        """The share of what is computed that are tokens of rows, not padding."""
        return filled(self.lines, self.length)

    def batch(self, step: int, columns: slice = slice(None)) -> dict[str, np.ndarray]:
        """What `pad` gives, for optimiser step `step` = 0, 1, …: int32 [A, B, T].

        columns: which of the B lines of each micro-batch to make; the arrays are of these alone.
        """
        numbers = np.reshape(self._numbers(step), (self.grad_accum, self.batch_size))[:, columns]
        length = self._length_of(step)
        padded = pad([self.lines[n] for n in numbers.ravel()], length)
        return {name: array.reshape(*numbers.shape, length) for name, array in padded.items()}

    @property
    def _step_size(self) -> int:
        return self.batch_size * self.grad_accum

    def _numbers(self, step: int) -> list[int]:
        """Which lines a step shows."""
        return self._shown(step * self._step_size, (step + 1) * self._step_size)

    def _shown(self, start: int, end: int) -> list[int]:
        """Which lines come where, counted over all epochs."""
        size = len(self.lines)
        return [int(_permutation(size, self.seed, n // size)[n % size]) for n in range(start, end)]

    def _length_of(self, step: int) -> int:
        return self.length


class ByLength(Batches):
    """Batches of lines that are about as long: each step has one of at most `NUM_LENGTHS` lengths.

    What `WINDOW` steps show together is sorted by length and dealt out to them, in a seeded order.
    """

    WINDOW, NUM_LENGTHS = 32, 8

    def __init__(self, batches: Batches, num_steps: int):
        """The batches of a run of so many steps: it shows the lines that they would show."""
        vars(self).update(vars(batches))
        self._num_steps = num_steps
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
        shapes = (self.shape(step) for step in range(self._num_steps))
        numbers = (n for step in range(self._num_steps) for n in self._numbers(step))
        return sum(map(self._sizes.__getitem__, numbers)) / sum(map(math.prod, shapes))

    def _numbers(self, step: int) -> list[int]:
        return self._window(step // self.WINDOW)[step % self.WINDOW]

    def _deal(self, window: int) -> list[list[int]]:
        """The lines of each step of a window."""
        first = window * self.WINDOW
        steps = min(self.WINDOW, self._num_steps - first)
        shown = self._shown(first * self._step_size, (first + steps) * self._step_size)
        shown.sort(key=self._sizes.__getitem__)
        order = np.random.default_rng([self.seed, window, 1]).permutation(steps)
        return [shown[n * self._step_size : (n + 1) * self._step_size] for n in order]

    def _length_of(self, step: int) -> int:
        needed = max(map(self._sizes.__getitem__, self._numbers(step)))
        return self.lengths[bisect.bisect_left(self.lengths, needed)]


@functools.lru_cache(maxsize=8)
def _permutation(num_lines: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch]).permutation(num_lines)
