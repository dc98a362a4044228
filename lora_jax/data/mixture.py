"""Several sources dealt out in fixed shares, in any order of asking. No jax here."""

import typing
from collections.abc import Sequence

import numpy as np


@typing.runtime_checkable
class Source(typing.Protocol):
    """source[n]: the n-th of its lines, which have no end: it begins anew."""

    def __getitem__(self, n: int, /) -> typing.Any: ...


class Mixture:
    """mixture[n]: the n-th line, of sources that each have a share of weight / Σ weights.

    Of any first n lines, a source has its share of n to within one line. The lines of a source come
    in its own order, however the others are weighted.
    """

    def __init__(self, sources: Sequence[Source], weights: Sequence[int]):
        """weights: whole numbers; so many lines of each come in every Σ weights lines."""
        self.sources, self.weights = sources, weights
        self._dealt = deal(weights)
        each = self._dealt[:, None] == np.arange(len(weights))
        self._before = (each.cumsum(axis=0) - each)[np.arange(len(each)), self._dealt]

    def __getitem__(self, n: int) -> typing.Any:
        source, number = self.place(n)
        return self.sources[source][number]

    def __len__(self) -> int:
        """Lines of an epoch: as many as the sources have together."""
        return sum(map(len, self.sources))

    def place(self, n: int) -> tuple[int, int]:
        """(source, number): the n-th line is this source's line of this number."""
        again, at = divmod(n, len(self._dealt))
        source = int(self._dealt[at])
        return source, again * self.weights[source] + int(self._before[at])


def shares(weights: Sequence[int]) -> list[float]:
    """Of all lines, those of each source."""
    return [weight / sum(weights) for weight in weights]


def deal(weights: Sequence[int]) -> np.ndarray:
    """Which source comes where in Σ weights lines; then each has come as often as its weight.

    Source: Balinski and Young's quota method, https://doi.org/10.2307/2318729: the source that has
    the most weight for each line it would then have had, of those that are behind their share.
    """
    total, had = sum(weights), [0] * len(weights)
    dealt = np.empty(total, np.int32)
    for n in range(total):
        behind = [s for s, weight in enumerate(weights) if had[s] * total < (n + 1) * weight]
        dealt[n] = source = max(behind, key=lambda s: weights[s] / (had[s] + 1))
        had[source] += 1
    return dealt
