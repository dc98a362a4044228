"""Chunks of prompts: tokens computed at once, in one slot of each group or in all slots."""

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from lora_jax.generation import progress, spans, steps
from lora_jax.models import config as model_config

SIZES = (32, 64, 128, 512)  # tokens of a prompt that are computed at once
MOST_AT_ONCE = 512  # tokens of prompts between two steps, so that they do not stall the others


class Chunks(NamedTuple):
    """The chunks of a batch: its slots, the groups that they form, its adapters, its cache."""

    num_slots: int
    num_groups: int
    num_adapters: int
    spans: spans.Spans

    @property
    def slots_of_group(self) -> int:
        return self.num_slots // self.num_groups

    def all(self, span: int) -> Iterator[steps.Chunk]:
        """Chunks of all sizes that end within a span, without tokens."""
        for num_tokens in SIZES:
            if self.spans.of(num_tokens // 2 + 1) <= span:
                yield self._empty(num_tokens)
        if self.slots_of_group > 1 and self._fit_together(span):
            yield self._empty_of_slots()

    def are_together(self, waiting: Sequence[progress.Work]) -> bool:
        """Whether to compute a chunk of the prompts in all slots at once, not one after the other.

        A slot whose prompt does not wait computes padding, so half of them have to. Long prompts
        are better one after the other: their chunks are large, and the first one ends sooner.
        """
        if 2 * len(waiting) < self.num_slots or self.slots_of_group == 1:
            return False
        if any(work.prompt_logprobs is not None for work in waiting):
            return False
        end = max(work.filled for work in waiting) + common_size(self.slots_of_group)
        longest = max(work.unfilled for work in waiting)
        return self._fit_together(self.spans.of(end)) and longest <= SIZES[-2]

    def of_slots(self, waiting: Sequence[progress.Work]) -> steps.Chunk:
        """A chunk of each of these prompts."""
        chunk = self._empty_of_slots()
        for work in waiting:
            _put(work, chunk, work.slot.index)
        return chunk

    def of_groups(self, chosen: Mapping[int, progress.Work]) -> tuple[steps.Chunk, np.ndarray]:
        """(the chunk, the token after each of its tokens) of one request in each group."""
        chunk = self._empty(chunk_size(max(work.unfilled for work in chosen.values())))
        following = np.zeros_like(chunk.ids)
        for group, work in chosen.items():
            end = _put(work, chunk, group)
            after = work.text[work.filled + 1 : end + 1]
            following[group, : len(after)] = after
            chunk.row[group] = work.slot.index - group * self.slots_of_group
            if work.lease:
                chunk.mixture[group] = work.lease.row
        return chunk, following

    def _empty(self, num_tokens: int) -> steps.Chunk:
        """A chunk of one slot in each group, to be filled in."""
        start, num_real, length, row = (np.zeros(self.num_groups, np.int32) for _ in range(4))
        ids = np.zeros((self.num_groups, num_tokens), np.int32)
        mixture = np.zeros((self.num_groups, self.num_adapters), np.float32)
        return steps.Chunk(ids, start, num_real, length, row, mixture)

    def _empty_of_slots(self) -> steps.Chunk:
        """A chunk of all slots, to be filled in."""
        ids = np.zeros((self.num_slots, common_size(self.slots_of_group)), np.int32)
        return steps.Chunk(ids, *(np.zeros(self.num_slots, np.int32) for _ in range(3)))

    def _fit_together(self, span: int) -> bool:
        """Whether the logits of attention take no more memory than those of the longest chunk."""
        tokens = self.slots_of_group * common_size(self.slots_of_group)
        return tokens * span <= SIZES[-1] * self.spans.size


def _put(work: progress.Work, chunk: steps.Chunk, at: int) -> int:
    """Puts the next tokens of a text into row `at`. Returns where in the text they end."""
    text, start = work.text, work.filled
    own = text[start : start + min(chunk.ids.shape[1], work.unfilled)]
    chunk.ids[at, : len(own)] = own
    chunk.start[at], chunk.num_real[at], chunk.length[at] = start, len(own), len(text)
    return start + len(own)


def chunk_size(num_tokens: int) -> int:
    """How many of so many tokens to compute at once; less than half of a chunk is padding."""
    padded = next((size for size in SIZES if size >= num_tokens), SIZES[-1])
    whole = max((size for size in SIZES if size <= num_tokens), default=padded)
    return padded if num_tokens > padded // 2 else whole


def common_size(num_slots: int) -> int:
    """The tokens of each slot in a chunk that is computed in all slots of a group at once."""
    fair = MOST_AT_ONCE // num_slots
    return max((each for each in SIZES if each <= fair), default=SIZES[0])


def spans_of(config: model_config.LlamaConfig, context: int) -> spans.Spans:
    """If all layers have sliding windows, the cache has places for a window and a chunk only."""
    windows = config.sliding_windows
    if windows and all(windows):
        return spans.Spans(context, min(context, max(windows) + SIZES[-1]))
    return spans.Spans(context, context)
