"""How much of the cache a program reads: a few lengths, so that few programs are compiled.

Imports no jax.
"""

from typing import NamedTuple

_SHORTEST = 128


class Spans(NamedTuple):
    """The lengths.

    context: the most tokens of a sequence. size: places of a sequence in the cache, which are fewer
    if all layers have sliding windows.
    """

    context: int
    size: int

    def of(self, length: int) -> int:
        """The part of the cache that sequences of this length need."""
        span = _SHORTEST
        while span < length:
            span *= 2
        return self.size if span >= self.size or self.size < self.context else span

    def all(self) -> list[int]:
        """The shortest first."""
        lengths = [_SHORTEST << n for n in range(self.size.bit_length())]
        return sorted({self.of(min(length, self.size)) for length in lengths})
