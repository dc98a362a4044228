"""Several sources of sequences mixed in fixed shares. Imports no jax."""

import typing
from collections.abc import Sequence

import numpy as np


@typing.runtime_checkable
class Source(typing.Protocol):
    """source[n]: its n-th sequence, for any n; it starts again at its end."""

    def __getitem__(self, n: int, /) -> typing.Any: ...


class Mixture:
    """mixture[n]: the n-th sequence, from sources that each have the share weight / Σ weights.

    In every prefix a source has its share, to within one sequence. Its sequences come in its own
    order, whatever the weights.
    """

    def __init__(self, sources: Sequence[Source], weights: Sequence[int]):
        """weights: whole numbers; how many of Σ weights sequences come from each source."""
        self.sources, self.weights = sources, weights
        self._dealt = deal(weights)
        each = self._dealt[:, None] == np.arange(len(weights))
        self._before = (each.cumsum(axis=0) - each)[np.arange(len(each)), self._dealt]

    def __getitem__(self, n: int) -> typing.Any:
        source, number = self.locate(n)
        return self.sources[source][number]

    def __len__(self) -> int:
        """Sequences in an epoch: as many as all sources have together."""
        return sum(map(len, self.sources))

    def locate(self, n: int) -> tuple[int, int]:
        """(source, number): the n-th sequence is sequence `number` of this source."""
        again, at = divmod(n, len(self._dealt))
        source = int(self._dealt[at])
        return source, again * self.weights[source] + int(self._before[at])


def shares(weights: Sequence[int]) -> list[float]:
    """The share of each source in all sequences."""
    return [weight / sum(weights) for weight in weights]


def deal(weights: Sequence[int]) -> np.ndarray:
    """The source of each of Σ weights sequences; each source occurs as often as its weight.

    Source: Balinski and Young's quota method, https://doi.org/10.2307/2318729: among the sources
    that are behind their share, the one with the largest weight per sequence it would then have.
    """
    total, had = sum(weights), [0] * len(weights)
    dealt = np.empty(total, np.int32)
    for n in range(total):
        behind = [s for s, weight in enumerate(weights) if had[s] * total < (n + 1) * weight]
        dealt[n] = source = max(behind, key=lambda s: weights[s] / (had[s] + 1))
        had[source] += 1
    return dealt
