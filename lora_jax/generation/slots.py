"""Which slot of the cache a request takes, so that most of its prompt is there already.

Imports no jax.
"""

import dataclasses
from collections.abc import Hashable, Sequence
from typing import NamedTuple

_WORTH_COPYING = 16  # tokens that a copy must save


@dataclasses.dataclass
class Slot:
    """One sequence of the cache.

    group: of the slots between which a copy is possible. tokens: those whose keys and values are in
    the cache, in order. key: what they were computed with, beside the base; None: nothing can be
    reused. used: when it was freed last, as a number that grows.
    """

    index: int
    group: int = 0
    tokens: list[int] = dataclasses.field(default_factory=list)
    key: Hashable = None
    busy: bool = False
    used: int = 0


class Choice(NamedTuple):
    """The slot to take, the slot to copy the prefix from, which may be the same, and its length."""

    slot: Slot
    source: Slot
    num_common: int


def choose(slots: Sequence[Slot], prompt: Sequence[int], key: Hashable) -> Choice | None:
    """The best free slot for a prompt; None if all are busy.

    At least the last token of the prompt is left to be computed.
    """
    free = [slot for slot in slots if not slot.busy]
    if not free:
        return None
    common = {slot.index: _num_common(slot, prompt, key) for slot in slots}
    # If nothing is lost, the slot that was used least recently.
    own = max(free, key=lambda slot: (common[slot.index], -slot.used))
    best = max(slots, key=lambda slot: common[slot.index])
    if common[best.index] - common[own.index] >= _WORTH_COPYING:
        near = [slot for slot in free if slot.group == best.group]
        if near:
            least = min(near, key=lambda slot: slot.used)
            return Choice(least, best, common[best.index])
    return Choice(own, own, common[own.index])


def _num_common(slot: Slot, prompt: Sequence[int], key: Hashable) -> int:
    """How many tokens at the start of the prompt are in the slot."""
    if key is None or slot.key != key:
        return 0
    low, high = 0, min(len(slot.tokens), len(prompt) - 1)
    if slot.tokens[:high] == list(prompt[:high]):
        return high
    while high - low > 1:  # the first `low` tokens are equal, the first `high` ones are not
        middle = (low + high) // 2
        if slot.tokens[low:middle] == list(prompt[low:middle]):
            low = middle
        else:
            high = middle
    return low
