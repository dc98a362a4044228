"""The requests in the slots of a cache on the devices, and the programs that serve them."""

import contextlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from lora_jax.generation import chunks as prompt_chunks
from lora_jax.generation import pool as pools
from lora_jax.generation import progress, steps
from lora_jax.generation import sampling as samplers
from lora_jax.generation import slots as slot_choice
from lora_jax.generation import weights as decode_weights
from lora_jax.lora.nnx import bank, model_state
from lora_jax.models import llama
from lora_jax.parallel import mesh as sharding


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
        self.spans = prompt_chunks.spans_of(model.config, context)
        self.chunks = prompt_chunks.Chunks(
            num_slots, self.num_groups, self.num_adapters, self.spans
        )
        ropes = [rope for rope in model.config.ropes or (model.config.rope,) if rope]
        self._is_static = all(rope.rope_type != "dynamic" for rope in ropes)
        # The lengths beyond which all tokens of a sequence are rotated in another way.
        self._turns = {rope.original_max_position_embeddings for rope in ropes
                       if rope.rope_type == "longrope"}  # fmt: skip
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
                    forms = self.programs.derive(self.weights, self.chunks.slots_of_group)
                    self._own_weights = self._own_weights._replace(forms=forms)
                self._state = self.programs.empty(
                    self.weights, self.num_slots, self.spans.size, self.num_adapters, self._kv_dtype
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

    def admit(self, work: progress.Work, eos_ids: Sequence[int]) -> None:
        """Gives a request a free slot, with what is known of its prompt."""
        request, sampling = work.request, work.request.sampling
        key = self._key(work)
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

    def current(self, works: Sequence[progress.Work]) -> list[progress.Work]:
        """Those whose next token is rotated as what the cache holds of them.

        The others are computed again from their first token on, once their output is known.
        Source: transformers does so in Phi3ForCausalLM.prepare_inputs_for_generation.
        """
        found = []
        for work in works:
            if self._turned(work.length) == self._turned(len(work.text)):
                found.append(work)
            elif work.sent == len(work.output.tokens):
                work.begin_again()
                work.slot.key = self._key(work)
        return found

    def before_turn(self, work: progress.Work) -> int | None:
        """How many more tokens are rotated as those before them; None: all."""
        return min((turn - work.length for turn in self._turns if turn >= work.length),
                   default=None)  # fmt: skip

    def _turned(self, length: int) -> int:
        """How a sequence of this length is rotated."""
        return sum(length > turn for turn in self._turns)

    def _key(self, work: progress.Work) -> tuple[Any, int]:
        """What the cache of a work depends on, beside its tokens."""
        return work.lease.key if work.lease else (), self._turned(len(work.text))

    def free(self, slot: slot_choice.Slot) -> None:
        """Ends a request's use of a slot, which keeps its tokens."""
        self._clock += 1
        slot.busy, slot.used = False, self._clock

    def decode(self, works: Sequence[progress.Work]) -> progress.Step:
        """Starts a step of these requests."""
        span = self._span_of_step(works)
        with self.on_devices():
            self._state, tokens, found = self.programs.decode(
                self.weights, self.state, self._live(works), span=span
            )
        return progress.step(works, tokens, None, found)

    def forward(self, works: Sequence[progress.Work]) -> jax.Array:
        """Starts a step without its end: returns the logits of all slots, for `choose`."""
        span = self._span_of_step(works)
        with self.on_devices():
            self._state, logits = self.programs.forward(
                self.weights, self.state, self._live(works), span=span
            )
        return logits

    def choose(
        self, works: Sequence[progress.Work], logits: jax.Array, allowed: np.ndarray
    ) -> progress.Step:
        """Starts the end of a step. allowed: bits of the tokens that grammars allow, by slot."""
        with self.on_devices():
            self._state, tokens, found = self.programs.choose(
                self.state, logits, self._live(works), allowed
            )
        return progress.step(works, tokens, None, found)

    def verify(
        self, works: Sequence[progress.Work], drafts: Mapping[int, Sequence[int]], most: int
    ) -> progress.Step:
        """Starts a step that also checks guesses. drafts: {slot: its next tokens, at most most}."""
        ids, counts = np.zeros((self.num_slots, most), np.int32), np.zeros(self.num_slots, np.int32)
        for slot, draft in drafts.items():
            ids[slot, : len(draft)], counts[slot] = draft, len(draft)
        span = self._span_of_step(works, most)
        with self.on_devices():
            self._state, tokens, counted, found = self.programs.verify(
                self.weights, self.state, self._live(works), ids, counts, span=span
            )
        return progress.step(works, tokens, counted, found)

    def fill(self, works: Sequence[progress.Work]) -> None:
        """Starts the computation of prompts: MOST_AT_ONCE tokens in each group of slots."""
        left = prompt_chunks.MOST_AT_ONCE
        while left > 0:
            waiting = [work for work in works if work.unfilled and not work.done]
            if not waiting:
                return
            fill = self._fill_slots if self.chunks.are_together(waiting) else self._fill_one
            left -= fill(waiting)

    def _fill_slots(self, waiting: Sequence[progress.Work]) -> int:
        """Fills a chunk of each prompt; returns its tokens in a group of slots."""
        chunk = self.chunks.of_slots(waiting)
        with self.on_devices():
            self._state = self.programs.prefill(
                self.weights, self.state, chunk, span=self._span_of(chunk)
            )
        for work in waiting:
            work.note_filled(int(chunk.num_real[work.slot.index]))
            self._note_length(work, work.filled)
        return chunk.ids.shape[1] * self.chunks.slots_of_group

    def _fill_one(self, waiting: Sequence[progress.Work]) -> int:
        """Fills a chunk of one prompt in each group of slots; returns its tokens."""
        chosen: dict[int, progress.Work] = {}
        for work in waiting:
            chosen.setdefault(work.slot.group, work)
        chunk, following = self.chunks.of_groups(chosen)
        span = self._span_of(chunk)
        found = None
        with self.on_devices():
            if any(work.prompt_logprobs is not None for work in chosen.values()):
                self._state, found = self.programs.score(
                    self.weights, self.state, chunk, following, span=span
                )
                found = jax.tree.map(np.asarray, found)
            else:
                self._state = self.programs.prefill(self.weights, self.state, chunk, span=span)
        for group, work in chosen.items():
            count, top = int(chunk.num_real[group]), work.prompt_logprobs
            work.note_filled(count)
            self._note_length(work, work.filled)
            if top is not None:
                work.request.prompt_logprobs += [
                    progress.logprob(int(following[group, i]), found, (group, i), top)
                    for i in range(count)
                ]
        return chunk.ids.shape[1]

    def _span_of_step(self, works: Sequence[progress.Work], most: int = 0) -> int:
        """most: how many tokens beside the next one are computed."""
        for work in works:
            self._note_length(work, work.length + most)
        return self.spans.of(max(work.length for work in works) + most)

    def _note_length(self, work: progress.Work, length: int) -> None:
        """Notes that a program computes a work's tokens up to this length."""
        if length > self.spans.size:
            work.slot.key = None  # its first tokens are overwritten, so no prefix can be copied

    def _span_of(self, chunk: steps.Chunk) -> int:
        return self.spans.of(int((chunk.start + chunk.num_real).max()))

    def _copied(self, source: slot_choice.Slot, target: slot_choice.Slot) -> np.ndarray:
        """The slot to copy from and to in each group; in the others, a slot onto itself."""
        own = self.chunks.slots_of_group
        where = np.zeros((2, self.num_groups), np.int32)
        where[:, target.group] = source.index % own, target.index % own
        return where

    def _live(self, works: Sequence[progress.Work]) -> np.ndarray:
        live = np.zeros(self.num_slots, bool)
        live[[work.slot.index for work in works]] = True
        return live

    def _mixture(self, work: progress.Work) -> np.ndarray:
        return work.lease.row if work.lease else np.zeros(self.num_adapters, np.float32)
