"""Examples → the sequences of a batch: one example each, pairs, or packed. Imports no jax."""

import bisect
import collections
import math
from collections.abc import Sequence

from lora_jax.data.encoding import Example

# One row of a batch: the examples in it, side by side. Attention stays within an example.
TokenSequence = Sequence[Example]


def arrange(
    examples: Sequence[Example], seq_len: int, *, packing: bool, in_pairs: bool
) -> list[TokenSequence]:
    """Sequences of the examples: packed, pairs of a chosen and a rejected one, or one each."""
    if packing:
        return pack(examples, seq_len)
    return pairs(examples) if in_pairs else alone(examples)


def alone(examples: Sequence[Example]) -> list[TokenSequence]:
    """Each example in a sequence of its own."""
    return [(example,) for example in examples]


def pairs(examples: Sequence[Example]) -> list[TokenSequence]:
    """Two examples in each sequence: the chosen and the rejected answer."""
    return list(zip(examples[::2], examples[1::2], strict=True))


def pack(examples: Sequence[Example], length: int) -> list[TokenSequence]:
    """Sequences of at most `length` tokens, each of whole examples: the longest example first, each
    where it leaves the least room.

    Source: best fit decreasing, Johnson 1973, https://dspace.mit.edu/handle/1721.1/57819: at most
    11/9 of the smallest possible number of sequences, plus one.
    """
    sequences: list[list[Example]] = []
    with_room = collections.defaultdict(list)  # {tokens left: numbers of sequences}
    rooms: list[int] = []  # the keys of with_room that have sequences, ascending
    for example in sorted(examples, key=lambda example: -len(example[0])):
        size = len(example[0])
        at = bisect.bisect_left(rooms, size)
        if at < len(rooms):
            room = rooms[at]
            number = with_room[room].pop()
            if not with_room[room]:
                del rooms[at]
        else:
            room, number = length, len(sequences)
            sequences.append([])
        sequences[number].append(example)
        left = room - size
        if left and not with_room[left]:
            bisect.insort(rooms, left)
        with_room[left].append(number)
    return sequences


def longest(sequences: Sequence[TokenSequence]) -> int:
    """Tokens of the longest sequence, rounded up to a multiple of 16."""
    return math.ceil(max(map(num_tokens, sequences)) / 16) * 16


def filled(sequences: Sequence[TokenSequence], length: int) -> float:
    """The share of real tokens, not padding, in sequences padded to `length`."""
    return sum(map(num_tokens, sequences)) / (len(sequences) * length)


def num_tokens(sequence: TokenSequence) -> int:
    return sum(len(ids) for ids, _ in sequence)
