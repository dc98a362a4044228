"""The requests in the slots of a cache on the devices, and the programs that serve them."""

import contextlib
import dataclasses
import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from lora_jax.generation import grammar as grammars
from lora_jax.generation import lookup, steps
from lora_jax.generation import output as outputs
from lora_jax.generation import pool as pools
from lora_jax.generation import request as requests
from lora_jax.generation import sampling as samplers
from lora_jax.generation import slots as slot_choice
from lora_jax.generation import weights as decode_weights
from lora_jax.lora.nnx import bank, model_state
from lora_jax.models import config as model_config
from lora_jax.models import llama
from lora_jax.parallel import mesh as sharding

CHUNKS = (32, 64, 128, 512)  # tokens of a prompt that are computed at once
_MOST_AT_ONCE = 512  # tokens of prompts between two steps, so that they do not stall the others
_SHORTEST_SPAN = 128


@dataclasses.dataclass
class Work:
    """A request that waits or is being served.

    filled: how many tokens of the prompt are in the cache. sent: for how many tokens a step was
    dispatched. overtaken: how many later requests were served first.
    """

    request: requests.Request
    output: outputs.Output
    matcher: grammars.Matcher | None = None
    slot: slot_choice.Slot | None = None
    lease: pools.Lease | None = None
    filled: int = 0
    sent: int = 0
    overtaken: int = 0
    done: bool = False

    @functools.cached_property
    def lookup(self) -> lookup.Lookup:
        """Of the prompt and the output so far."""
        return lookup.Lookup((*self.request.prompt, *self.output.tokens))

    @property
    def is_ready(self) -> bool:
        """Whether the whole prompt but its last token is in the cache."""
        return _unfilled(self) == 0

    @property
    def length(self) -> int:
        """Of the sequence when the steps that were dispatched are done."""
        return len(self.request.prompt) + self.sent

    @property
    def left(self) -> int:
        """How many tokens may still be generated."""
        return self.request.sampling.max_new_tokens - self.sent


@dataclasses.dataclass(frozen=True)
class Step:
    """A step that was dispatched: its tokens [B, T], how many of them count [B], and log p.

    counts: None if each slot has one token; tokens are [B] then.
    """

    works: Sequence[Work]
    tokens: jax.Array
    counts: jax.Array | None
    logprobs: samplers.Logprobs | None


class Batch:
    """The slots, their state on the devices, and the weights of the model.

    kv_dtype: None, the model's, or "int8". See engine.Engine for the others.
    """

    def __init__(
        self,
        model: llama.LlamaForCausalLM,
        *,
        num_slots: int,
        context: int,
        mesh: Mesh,
        pool: pools.Pool | None,
        kv_dtype: str | None,
    ):
        graphdef, *parts = nnx.split(
            model, bank.BankParam, model_state.LoRAParam, model_state.DropoutKey, ...
        )
        parts = (sharding.place(nnx.to_pure_dict(part), mesh) for part in parts)
        adapters, trained, keys, base = parts
        self._own_weights = steps.Weights(base, trained, keys, adapters)
        self.form = decode_weights.choose(model, mesh)
        self.form_bytes = decode_weights.num_bytes(model, self.form) if self.form else 0
        self.programs = steps.Programs(graphdef, self.form)
        self._mesh, self._pool, self._kv_dtype = mesh, pool, kv_dtype
        self.num_slots, self.vocab_size = num_slots, model.config.vocab_size
        self.num_groups = steps.num_groups(num_slots, mesh)
        self._context, self._size = context, size(model.config, context)
        self._is_static = model.config.rope.rope_type != "dynamic"
        self._state: steps.State | None = None
        self._spread: tuple[Any, Any] | None = None  # the bank that was spread, and the result
        self._slots = [
            slot_choice.Slot(index, index * self.num_groups // num_slots)
            for index in range(num_slots)
        ]
        self._clock = 0

    @property
    def has_free_slot(self) -> bool:
        return not all(slot.busy for slot in self._slots)

    @property
    def spans(self) -> list[int]:
        """The parts of the cache that programs read, the shortest first."""
        lengths = [_SHORTEST_SPAN << n for n in range(self._size.bit_length())]
        return sorted({self._span(min(length, self._size)) for length in lengths})

    def chunks(self, span: int) -> Iterator[steps.Chunk]:
        """Chunks of prompts of all sizes that end within a span, without tokens."""
        for num_tokens in CHUNKS:
            if self._span(num_tokens // 2 + 1) <= span:
                yield self._empty_chunk(num_tokens)
        own = self.num_slots // self.num_groups
        if own > 1 and self._fits_together(span):
            ids = np.zeros((self.num_slots, common_size(own)), np.int32)
            yield steps.Chunk(ids, *(np.zeros(self.num_slots, np.int32) for _ in range(3)))

    @property
    def can_speculate(self) -> bool:
        """Whether a token may be computed beside others that turn out to be wrong.

        Dynamic rotary embeddings depend on the length of the sequence.
        """
        return self._is_static

    @property
    def num_adapters(self) -> int:
        """The slots for adapters."""
        return self._pool.num_slots if self._pool else 0

    @property
    def weights(self) -> steps.Weights:
        """The arrays that the programs read now."""
        if not self._pool:
            return self._own_weights
        adapters = self._pool.state
        if self.form == "dense":
            if self._spread is None or self._spread[0] is not adapters:
                self._spread = adapters, self.programs.spread(adapters)
            adapters = self._spread[1]
        return self._own_weights._replace(adapters=adapters)

    @property
    def state(self) -> steps.State:
        """The state of the slots; made if there is none."""
        if self._state is None:
            with self.on_devices():
                if self.form:
                    own_rows = self.num_slots // self.num_groups
                    forms = self.programs.derive(self.weights, own_rows)
                    self._own_weights = self._own_weights._replace(forms=forms)
                self._state = self.programs.empty(
                    self.weights, self.num_slots, self._size, self.num_adapters, self._kv_dtype
                )
        return self._state

    def on_devices(self) -> contextlib.AbstractContextManager[Any]:
        """The context in which programs run."""
        return jax.set_mesh(self._mesh)

    def use(self, trained: Any, frozen: model_state.Frozen) -> None:
        """Takes other values of the model's own adapter and base."""
        self.release()
        self._own_weights = self._own_weights._replace(
            base=frozen.base, trained=trained, keys=frozen.dropout_keys
        )

    def release(self) -> None:
        """Frees the state and the weights' second form; they are made again when needed."""
        self._state, self._spread = None, None
        self._own_weights = self._own_weights._replace(forms=None)
        for slot in self._slots:
            slot.tokens, slot.key = [], None

    def admit(self, work: Work, eos_ids: Sequence[int]) -> None:
        """Gives a request a free slot, with what is known of its prompt."""
        request, sampling = work.request, work.request.sampling
        key = work.lease.key if work.lease else ()
        reused = key if self._is_static and sampling.prompt_logprobs is None else None
        slot, source, common = slot_choice.choose(self._slots, request.prompt, reused)
        stops: list[int] = []
        if sampling.min_tokens:
            stops += sampling.stop_token_ids
            stops += () if sampling.ignore_eos else eos_ids
        row = samplers.row(sampling, request.prompt, stops, self.vocab_size)
        state = self.state
        with self.on_devices():
            if source is not slot and common:
                state = self.programs.copy(state, *self._copied(source, slot))
            self._state = self.programs.admit(
                state, np.int32(slot.index), np.int32(request.prompt[-1]),
                np.int32(len(request.prompt)), self._mixture(work), row,
            )  # fmt: skip
        slot.tokens, slot.key, slot.busy = list(request.prompt[:common]), key, True
        work.slot, work.filled, request.cached_tokens = slot, common, common

    def free(self, slot: slot_choice.Slot) -> None:
        """Ends a request's use of a slot, which keeps its tokens."""
        self._clock += 1
        slot.busy, slot.used = False, self._clock
        if len(slot.tokens) > self._size:
            slot.key = None  # the first tokens were overwritten

    def decode(self, works: Sequence[Work]) -> Step:
        """Starts a step of these requests."""
        span = self._span(max(work.length for work in works))
        with self.on_devices():
            self._state, tokens, found = self.programs.decode(
                self.weights, self.state, self._live(works), span=span
            )
        return _sent(works, tokens, found)

    def forward(self, works: Sequence[Work]) -> jax.Array:
        """Starts a step without its end: returns the logits of all slots, for `choose`."""
        span = self._span(max(work.length for work in works))
        with self.on_devices():
            self._state, logits = self.programs.forward(
                self.weights, self.state, self._live(works), span=span
            )
        return logits

    def choose(self, works: Sequence[Work], logits: jax.Array, allowed: np.ndarray) -> Step:
        """Starts the end of a step. allowed: bits of the tokens that grammars allow, by slot."""
        with self.on_devices():
            self._state, tokens, found = self.programs.choose(
                self.state, logits, self._live(works), allowed
            )
        return _sent(works, tokens, found)

    def verify(self, works: Sequence[Work], drafts: Mapping[int, Sequence[int]], most: int) -> Step:
        """Starts a step that also checks guesses. drafts: {slot: its next tokens, at most most}."""
        ids, counts = np.zeros((self.num_slots, most), np.int32), np.zeros(self.num_slots, np.int32)
        for slot, draft in drafts.items():
            ids[slot, : len(draft)], counts[slot] = draft, len(draft)
        span = self._span(max(work.length for work in works) + most)
        with self.on_devices():
            self._state, tokens, counted, found = self.programs.verify(
                self.weights, self.state, self._live(works), ids, counts, span=span
            )
        return _reading(works, tokens, counted, found)

    def fill(self, works: Sequence[Work]) -> None:
        """Starts the computation of prompts, up to _MOST_AT_ONCE tokens in each group of slots."""
        left = _MOST_AT_ONCE
        while left > 0:
            waiting = [work for work in works if not work.is_ready and not work.done]
            if not waiting:
                return
            fill = self._fill_slots if self._is_together(waiting) else self._fill_one
            left -= fill(waiting)

    def _is_together(self, waiting: Sequence[Work]) -> bool:
        """Whether to compute a chunk of the prompts in all slots at once, not one after the other.

        A slot whose prompt does not wait computes padding, so half of them have to. Long prompts
        are better one after the other: their chunks are large, and the first one ends sooner.
        """
        if 2 * len(waiting) < self.num_slots or self.num_slots == self.num_groups:
            return False
        if any(work.request.sampling.prompt_logprobs is not None for work in waiting):
            return False
        own = self.num_slots // self.num_groups
        span = self._span(max(work.filled for work in waiting) + common_size(own))
        return self._fits_together(span) and max(map(_unfilled, waiting)) <= CHUNKS[-2]

    def _fits_together(self, span: int) -> bool:
        """Whether the logits of attention take no more memory than those of the longest chunk."""
        own = self.num_slots // self.num_groups
        return own * common_size(own) * span <= CHUNKS[-1] * self._size

    def _fill_slots(self, waiting: Sequence[Work]) -> int:
        """Fills a chunk of each prompt; returns its tokens in a group of slots."""
        size = common_size(self.num_slots // self.num_groups)
        ids = np.zeros((self.num_slots, size), np.int32)
        start, num_real, length = (np.zeros(self.num_slots, np.int32) for _ in range(3))
        for work in waiting:
            own = work.request.prompt[work.filled : work.filled + min(size, _unfilled(work))]
            slot = work.slot.index
            ids[slot, : len(own)] = own
            start[slot], num_real[slot] = work.filled, len(own)
            length[slot] = len(work.request.prompt)
        chunk = steps.Chunk(ids, start, num_real, length)
        with self.on_devices():
            self._state = self.programs.prefill(
                self.weights, self.state, chunk, span=self._span(int((start + num_real).max()))
            )
        for work in waiting:
            _note_filled(work, int(num_real[work.slot.index]))
        return size * self.num_slots // self.num_groups

    def _fill_one(self, waiting: Sequence[Work]) -> int:
        """Fills a chunk of one prompt in each group of slots; returns its tokens."""
        chosen: dict[int, Work] = {}
        for work in waiting:
            chosen.setdefault(work.slot.group, work)
        chunk, following = self._chunk(chosen)
        span = self._span(int((chunk.start + chunk.num_real).max()))
        found = None
        with self.on_devices():
            if any(work.request.sampling.prompt_logprobs is not None for work in chosen.values()):
                self._state, found = self.programs.score(
                    self.weights, self.state, chunk, following, span=span
                )
                found = jax.tree.map(np.asarray, found)
            else:
                self._state = self.programs.prefill(self.weights, self.state, chunk, span=span)
        for group, work in chosen.items():
            count, top = int(chunk.num_real[group]), work.request.sampling.prompt_logprobs
            _note_filled(work, count)
            if top is not None:
                work.request.prompt_logprobs += [
                    logprob(int(following[group, i]), found, (group, i), top) for i in range(count)
                ]
        return chunk.ids.shape[1]

    def _chunk(self, chosen: Mapping[int, Work]) -> tuple[steps.Chunk, np.ndarray]:
        """(the chunk, the token after each of its tokens) of one request in each group."""
        size = chunk_size(max(map(_unfilled, chosen.values())))
        chunk = self._empty_chunk(size)
        following = np.zeros_like(chunk.ids)
        for group, work in chosen.items():
            prompt, first = work.request.prompt, work.filled
            own = prompt[first : first + min(size, _unfilled(work))]
            chunk.ids[group, : len(own)] = own
            following[group, : len(own)] = prompt[first + 1 : first + 1 + len(own)]
            chunk.start[group], chunk.num_real[group] = first, len(own)
            chunk.length[group] = len(prompt)
            chunk.row[group] = work.slot.index - group * (self.num_slots // self.num_groups)
            chunk.mixture[group] = self._mixture(work)
        return chunk, following

    def _empty_chunk(self, num_tokens: int) -> steps.Chunk:
        """A chunk of one slot in each group, to be filled in."""
        start, num_real, length, row = (np.zeros(self.num_groups, np.int32) for _ in range(4))
        ids = np.zeros((self.num_groups, num_tokens), np.int32)
        mixture = np.zeros((self.num_groups, self.num_adapters), np.float32)
        return steps.Chunk(ids, start, num_real, length, row, mixture)

    def _copied(self, source: slot_choice.Slot, target: slot_choice.Slot) -> np.ndarray:
        """The slot to copy from and to in each group; in the others, a slot onto itself."""
        own = self.num_slots // self.num_groups
        where = np.zeros((2, self.num_groups), np.int32)
        where[:, target.group] = source.index % own, target.index % own
        return where

    def _live(self, works: Sequence[Work]) -> np.ndarray:
        live = np.zeros(self.num_slots, bool)
        live[[work.slot.index for work in works]] = True
        return live

    def _mixture(self, work: Work) -> np.ndarray:
        return work.lease.row if work.lease else np.zeros(self.num_adapters, np.float32)

    def _span(self, length: int) -> int:
        """How much of the cache a program reads: few sizes, so that few are compiled."""
        span = _SHORTEST_SPAN
        while span < length:
            span *= 2
        return self._size if span >= self._size or self._size < self._context else span


def _unfilled(work: Work) -> int:
    """How many tokens of the prompt are still to be computed; the last one is by `decode`."""
    return len(work.request.prompt) - 1 - work.filled


def _note_filled(work: Work, count: int) -> None:
    work.slot.tokens += work.request.prompt[work.filled : work.filled + count]
    work.filled += count


def chunk_size(num_tokens: int) -> int:
    """How many of so many tokens to compute at once; less than half of a chunk is padding."""
    padded = next((size for size in CHUNKS if size >= num_tokens), CHUNKS[-1])
    whole = max((size for size in CHUNKS if size <= num_tokens), default=padded)
    return padded if num_tokens > padded // 2 else whole


def common_size(num_slots: int) -> int:
    """The tokens of each slot in a chunk that is computed in all slots of a group at once."""
    fair = _MOST_AT_ONCE // num_slots
    return max((each for each in CHUNKS if each <= fair), default=CHUNKS[0])


def size(config: model_config.LlamaConfig, context: int) -> int:
    """Places for each sequence: if all layers have sliding windows, only those are kept."""
    windows = config.sliding_windows
    if windows and all(windows):
        return min(context, max(windows) + CHUNKS[-1])
    return context


def logprob(token: int, found: samplers.Logprobs, at: Any, top: int) -> requests.Logprob:
    """Of one token at an index of the arrays, with the `top` most likely ones."""
    pairs = zip(found.ids[at][:top].tolist(), found.values[at][:top].tolist(), strict=True)
    return requests.Logprob(token, float(found.chosen[at]), tuple(pairs))


def _sent(works, tokens, found) -> Step:
    """The step, which gives each of these requests a token."""
    for work in works:
        work.sent += 1
    return _reading(works, tokens, None, found)


def _reading(works, tokens, counts, found) -> Step:
    """The step, whose results are on their way to the host."""
    wanted = any(work.request.sampling.logprobs is not None for work in works)
    step = Step([*works], tokens, counts, found if wanted else None)
    jax.tree.map(lambda array: array.copy_to_host_async(), (tokens, counts, step.logprobs))
    return step
