"""The engine: requests in, their text out piece by piece, many at a time in one batch."""

import collections
import contextlib
import dataclasses
import functools
import threading
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from lora_jax import errors, tokenizer
from lora_jax.generation import config as generation_config
from lora_jax.generation import grammar as grammars
from lora_jax.generation import output as outputs
from lora_jax.generation import pool as pools
from lora_jax.generation import request as requests
from lora_jax.generation import sampling as samplers
from lora_jax.generation import slots as slot_choice
from lora_jax.generation import steps
from lora_jax.generation import weights as decode_weights
from lora_jax.lora.nnx import bank, model_state
from lora_jax.models import llama
from lora_jax.parallel import mesh as sharding

CHUNKS = (32, 128, 512)  # tokens of a prompt that are computed at once
_SHORTEST_SPAN = 256
_PATIENCE = 4  # how often, times the slots, later requests may be served before an earlier one


class Stats(NamedTuple):
    """Requests that wait and run now; and in total, their tokens and those found in the cache."""

    waiting: int
    running: int
    slots: int
    requests: int
    prompt_tokens: int
    cached_tokens: int
    generated_tokens: int


@dataclasses.dataclass
class _Work:
    """A request that is being served.

    filled: how many tokens of the prompt are in the cache. sent: for how many tokens a step was
    dispatched. overtaken: how many later requests were served first.
    """

    request: requests.Request
    output: outputs.Output
    matcher: grammars.Matcher | None = None
    slot: slot_choice.Slot | None = None
    lease: Any = None
    mixture: np.ndarray | None = None
    filled: int = 0
    sent: int = 0
    overtaken: int = 0
    done: bool = False

    @property
    def is_ready(self) -> bool:
        """Whether the whole prompt but its last token is in the cache."""
        return self.filled == len(self.request.prompt) - 1

    @property
    def length(self) -> int:
        return len(self.request.prompt) + self.sent


class Engine:
    """Serves requests to one model in a fixed number of slots.

    A free slot takes the next request at once. Long prompts are computed in chunks between the
    steps of the others. The host reads the tokens of a step while the devices compute the next.

    Args:
      model: with or without an adapter of its own.
      reader: its tokenizer.
      eos_ids: the tokens that end a text.
      slots: how many requests are served at a time.
      context: the most tokens of a request, prompt and output; None: those of the model.
      mesh: of devices; None: one device.
      pool: the adapters that requests may name.
      seed: for the seeds of requests that have none.
    """

    def __init__(
        self,
        model: llama.LlamaForCausalLM,
        reader: Any,
        *,
        eos_ids: Sequence[int],
        slots: int = 8,
        context: int | None = None,
        mesh: Mesh | None = None,
        pool: pools.Pool | None = None,
        seed: int = 0,
    ):
        self.reader, self.eos_ids, self.pool = reader, tuple(eos_ids), pool
        self.context = min(context or model.config.context, model.config.context)
        self.mesh = mesh or sharding.make_mesh({"data": 1, "fsdp": 1, "tensor": 1})
        self.num_slots = slots
        self.vocab_size = model.config.vocab_size
        graphdef, *parts = nnx.split(
            model, bank.BankParam, model_state.LoRAParam, model_state.DropoutKey, ...
        )
        parts = (sharding.place(nnx.to_pure_dict(part), self.mesh) for part in parts)
        adapters, trained, keys, base = parts
        self._weights = steps.Weights(base, trained, keys, adapters)
        self.form = decode_weights.choose(model, self.mesh)
        self.form_bytes = decode_weights.num_bytes(model, self.form) if self.form else 0
        self.programs = steps.Programs(graphdef, self.form)
        self._groups = steps.num_groups(slots, self.mesh)
        self._size = cache_size(model.config, self.context)
        self._can_reuse = model.config.rope.rope_type != "dynamic"
        self._state: steps.State | None = None
        self._slots = [
            slot_choice.Slot(index, index * self._groups // slots) for index in range(slots)
        ]
        self._seeds = np.random.default_rng(seed)
        self._inbox: collections.deque[_Work] = collections.deque()
        self._waiting: list[_Work] = []
        self._running: list[_Work] = []
        self._dispatched: tuple[Any, list[_Work]] | None = None
        self._totals = collections.Counter()
        self._clock = 0
        self._lock = threading.RLock()
        self._wake = threading.Condition()
        self._thread: threading.Thread | None = None
        self._closing = False
        self._failure: str | None = None

    @functools.cached_property
    def _grammar(self) -> grammars.Grammar:
        return grammars.Grammar(self.reader, self.vocab_size, self.eos_ids)

    # What users call.

    def submit(
        self,
        prompt: Sequence[int],
        sampling: generation_config.Sampling | None = None,
        *,
        adapters: Mapping[str, float] | str | None = None,
        listener: Callable[[requests.Piece], None] | None = None,
    ) -> requests.Request:
        """Queues a request, and returns it: iterate over its pieces, or call `result()`.

        adapters: a name, or the weight of each; without, the base answers. listener: is called in
        the engine's thread with each piece. Raises: UserError if it can never be served.
        """
        sampling = sampling or generation_config.Sampling()
        adapters = {adapters: 1.0} if isinstance(adapters, str) else dict(adapters or {})
        prompt = tuple(int(token) for token in prompt)
        self._check(prompt, sampling, adapters)
        matcher = self._grammar.matcher(sampling.grammar) if sampling.grammar else None
        if sampling.seed is None and sampling.temperature:
            sampling = dataclasses.replace(sampling, seed=int(self._seeds.integers(2**63)))
        request = requests.Request(
            prompt, sampling, adapters, listener=listener,
            advance=None if self._thread else self.advance,
        )  # fmt: skip
        if self._failure or self._closing:
            request.emit(requests.Piece(
                finish_reason="error", error=self._failure or "the engine is closed"
            ))  # fmt: skip
            return request
        output = outputs.Output(request, self.reader, self.eos_ids)
        self._inbox.append(_Work(request, output, matcher))
        with self._wake:
            self._wake.notify()
        return request

    def generate(
        self,
        prompts: Iterable[Sequence[int]],
        sampling: generation_config.Sampling | None = None,
        *,
        adapters: Mapping[str, float] | str | None = None,
    ) -> Iterator[requests.Result]:
        """Yields the result of each prompt, in their order; prompts are taken as they are needed.

        sampling.seed: of the first prompt; each has the next number.
        """
        sampling = sampling or generation_config.Sampling()
        outstanding: collections.deque[requests.Request] = collections.deque()
        for number, prompt in enumerate(prompts):
            own = sampling
            if sampling.seed is not None:
                own = dataclasses.replace(sampling, seed=sampling.seed + number)
            outstanding.append(self.submit(prompt, own, adapters=adapters))
            if len(outstanding) >= 4 * self.num_slots:
                yield outstanding.popleft().result()
        while outstanding:
            yield outstanding.popleft().result()

    def start(self) -> None:
        """Serves from a thread of its own from now on."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._serve, name="engine", daemon=True)
            self._thread.start()

    def close(self) -> None:
        """Ends all requests, and the thread."""
        self._closing = True
        with self._wake:
            self._wake.notify()
        if self._thread:
            self._thread.join()
        with self._lock:
            self._end_all("abort")

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def stats(self) -> Stats:
        total = self._totals
        return Stats(
            len(self._waiting) + len(self._inbox), len(self._running), self.num_slots,
            total["requests"], total["prompt"], total["cached"], total["generated"],
        )  # fmt: skip

    def advance(self) -> None:
        """One turn: at most one step of all slots, and one chunk of a prompt."""
        with self._lock:
            try:
                self._turn()
            except Exception as error:
                self._failure = f"{type(error).__name__}: {error}"
                self._end_all("error", self._failure)
                raise

    def use(self, trained: Any, frozen: model_state.Frozen) -> None:
        """Takes other values of the model's own adapter and base, between requests."""
        with self._lock:
            self.release()
            self._weights = self._weights._replace(
                base=frozen.base, trained=trained, keys=frozen.dropout_keys
            )

    def release(self) -> None:
        """Frees the cache and the weights' second form; the next request makes them again."""
        with self._lock:
            self._state, self._weights = None, self._weights._replace(forms=None)
            for slot in self._slots:
                slot.tokens, slot.key = [], None

    # One turn.

    def _serve(self) -> None:
        while not self._closing:
            with self._wake:
                self._wake.wait_for(lambda: self._closing or self._has_work())
            try:
                while self._has_work() and not self._closing:
                    self.advance()
            except Exception:
                traceback.print_exc()
                return

    def _has_work(self) -> bool:
        return bool(self._inbox or self._waiting or self._running or self._dispatched)

    def _turn(self) -> None:
        self._take()
        self._admit()
        if self._dispatched and any(work.matcher for work in self._running):
            # A grammar allows the next token by the one before it.
            self._read_dispatched()
        ready = [work for work in self._running if work.is_ready and not work.done
                 and work.sent < work.request.sampling.max_new_tokens]  # fmt: skip
        ready, allowed = self._allowed(ready)
        before, self._dispatched = self._dispatched, None
        with self._on_devices():
            if ready:
                self._dispatch(ready, allowed)
            self._fill()
        if before:
            self._read(*before)

    def _read_dispatched(self) -> None:
        before, self._dispatched = self._dispatched, None
        self._read(*before)

    def _allowed(self, ready: list[_Work]) -> tuple[list[_Work], np.ndarray | None]:
        """(those that go on, the tokens that their grammars allow, as bits)."""
        if not any(work.matcher for work in ready):
            return ready, None
        allowed = np.full((self.num_slots, -(-self.vocab_size // 32)), -1, np.int32)
        left = []
        for work in ready:
            try:
                if work.matcher:
                    work.matcher.mask(allowed[work.slot.index])
                left.append(work)
            except errors.UserError as error:
                self._end(work, work.output.end("error", str(error)))
        return left, allowed

    def _take(self) -> None:
        """New requests join the queue; those that were aborted end."""
        while self._inbox:
            self._waiting.append(self._inbox.popleft())
            self._totals["requests"] += 1
        for work in [*self._waiting, *self._running]:
            if work.request.aborted.is_set() and not work.done:
                self._end(work, work.output.end("abort"))
        self._waiting = [work for work in self._waiting if not work.done]

    def _admit(self) -> None:
        """Free slots take requests, the oldest first."""
        left, blocked = [], False
        for work in self._waiting:
            if blocked or not self._start(work):
                left.append(work)
                blocked |= work.overtaken > _PATIENCE * self.num_slots
                blocked |= all(slot.busy for slot in self._slots)
            else:
                for earlier in left:
                    earlier.overtaken += 1
        self._waiting = left

    def _start(self, work: _Work) -> bool:
        """Gives a request a slot and its adapters; False if there are none now."""
        if all(slot.busy for slot in self._slots):
            return False
        request, key = work.request, ()
        work.mixture = np.zeros(self.num_adapters, np.float32)
        if request.adapters:
            try:
                work.lease = self.pool.acquire(request.adapters)
            except errors.UserError as error:  # unloaded while it waited
                self._end(work, work.output.end("error", str(error)))
                return True
            if work.lease is None:
                return False
            work.mixture, key = work.lease.row, work.lease.key
        reuse = key if self._can_reuse and request.sampling.prompt_logprobs is None else None
        choice = slot_choice.choose(self._slots, request.prompt, reuse)
        slot, source, common = choice
        if self._state is None:
            self._make_state()
        with self._on_devices():
            if source is not slot and common:
                self._copy(source, slot)
            slot.tokens, slot.key, slot.busy = list(request.prompt[:common]), key, True
            work.slot, work.filled = slot, common
            request.cached_tokens = common
            self._state = self.programs.admit(
                self._state, np.int32(slot.index), np.int32(request.prompt[-1]),
                np.int32(len(request.prompt)), work.mixture, self._row(work),
            )  # fmt: skip
        self._running.append(work)
        self._totals["prompt"] += len(request.prompt)
        self._totals["cached"] += common
        return True

    def _dispatch(self, ready: list[_Work], allowed: np.ndarray | None) -> None:
        """Starts a step of these requests."""
        live = np.zeros(self.num_slots, bool)
        live[[work.slot.index for work in ready]] = True
        span = self._span(max(work.length for work in ready))
        self._state, tokens, found = self.programs.decode(
            self._all_weights(), self._state, live, allowed, span=span
        )
        for work in ready:
            work.sent += 1
        wanted = any(work.request.sampling.logprobs is not None for work in ready)
        read = (tokens, found if wanted else None)
        jax.tree.map(lambda array: array.copy_to_host_async(), read)
        self._dispatched = read, ready

    def _fill(self) -> None:
        """Starts the next chunk of a prompt, one in each group of slots."""
        chosen: dict[int, _Work] = {}
        for work in self._running:
            if not work.is_ready and not work.done:
                chosen.setdefault(work.slot.group, work)
        if not chosen:
            return
        most = max(len(work.request.prompt) - 1 - work.filled for work in chosen.values())
        size = _chunk_size(most)
        shape = (self._groups, size)
        ids, following = np.zeros(shape, np.int32), np.zeros(shape, np.int32)
        start, num_real, length, row = np.zeros((4, self._groups), np.int32)
        mixture = np.zeros((self._groups, self.num_adapters), np.float32)
        for group, work in chosen.items():
            prompt, first = work.request.prompt, work.filled
            own = prompt[first : min(first + size, len(prompt) - 1)]
            ids[group, : len(own)] = own
            following[group, : len(own)] = prompt[first + 1 : first + 1 + len(own)]
            start[group], num_real[group], length[group] = first, len(own), len(prompt)
            row[group] = work.slot.index - group * (self.num_slots // self._groups)
            mixture[group] = work.mixture
        chunk = steps.Chunk(ids, start, num_real, length, row, mixture)
        how = {"span": self._span(int((start + num_real).max()))}
        scored = any(work.request.sampling.prompt_logprobs is not None for work in chosen.values())
        if scored:
            self._state, found = self.programs.score(
                self._all_weights(), self._state, chunk, following, **how
            )
            found = jax.tree.map(np.asarray, found)
        else:
            self._state = self.programs.prefill(self._all_weights(), self._state, chunk, **how)
        for group, work in chosen.items():
            count = int(num_real[group])
            work.slot.tokens += work.request.prompt[work.filled : work.filled + count]
            work.filled += count
            top = work.request.sampling.prompt_logprobs
            if top is not None:
                work.request.prompt_logprobs += [
                    _logprob(int(following[group, i]), found, (group, i), top) for i in range(count)
                ]

    def _read(self, found: tuple[Any, Any], ready: list[_Work]) -> None:
        """Reads the tokens of a step, and delivers them."""
        tokens, logprobs = jax.tree.map(np.asarray, found)
        for work in ready:
            if work.done:
                continue  # it ended with the token before this one
            index, top = work.slot.index, work.request.sampling.logprobs
            token = int(tokens[index])
            own = None if top is None else _logprob(token, logprobs, index, top)
            # The token before it is in the cache now.
            work.slot.tokens.append((*work.request.prompt[-1:], *work.output.tokens)[-1])
            self._totals["generated"] += 1
            piece = work.output.push(token, own)
            if work.matcher:
                work.matcher.accept(token)
                if work.matcher.finished and not piece.finish_reason:
                    work.request.emit(piece)
                    piece = work.output.end("stop")
            if piece.finish_reason:
                self._end(work, piece)
            else:
                work.request.emit(piece)

    def _end(self, work: _Work, piece: requests.Piece) -> None:
        """Delivers the last piece, and frees what the request holds."""
        work.done = True
        if work.slot is not None:
            self._clock += 1
            work.slot.busy, work.slot.used = False, self._clock
            if len(work.slot.tokens) > self._size:
                work.slot.key = None  # the first tokens were overwritten
            self._running.remove(work)
        if work.lease is not None:
            self.pool.release(work.lease)
        work.request.emit(piece)

    def _end_all(self, reason: str, error: str | None = None) -> None:
        while self._inbox:
            self._waiting.append(self._inbox.popleft())
        for work in [*self._waiting, *self._running]:
            if not work.done:
                self._end(work, work.output.end(reason, error))
        self._waiting, self._dispatched = [], None

    # Arrays.

    @property
    def num_adapters(self) -> int:
        """The slots for adapters."""
        return self.pool.num_slots if self.pool else 0

    def _all_weights(self) -> steps.Weights:
        return self._weights._replace(adapters=self.pool.state) if self.pool else self._weights

    def _make_state(self) -> None:
        with self._on_devices():
            if self.form:
                own_rows = self.num_slots // self._groups
                self._weights = self._weights._replace(
                    forms=self.programs.derive(self._weights, own_rows)
                )
            self._state = self.programs.empty(
                self._all_weights(), self.num_slots, self._size, self.num_adapters
            )

    def _copy(self, source: slot_choice.Slot, target: slot_choice.Slot) -> None:
        own = self.num_slots // self._groups
        # In the other groups, a slot is copied onto itself.
        where = np.zeros((2, self._groups), np.int32)
        where[:, target.group] = source.index % own, target.index % own
        self._state = self.programs.copy(self._state, *where)

    def _row(self, work: _Work) -> samplers.Rows:
        request, stops = work.request, []
        if request.sampling.min_tokens:
            stops += request.sampling.stop_token_ids
            stops += () if request.sampling.ignore_eos else self.eos_ids
        return samplers.row(request.sampling, request.prompt, stops, self.vocab_size)

    def _span(self, length: int) -> int:
        """How much of the cache a program reads: few sizes, so that few are compiled."""
        span = _SHORTEST_SPAN
        while span < length:
            span *= 2
        return self._size if span >= self._size or self._size < self.context else span

    @contextlib.contextmanager
    def _on_devices(self):
        with jax.set_mesh(self.mesh):
            yield

    def _check(self, prompt, sampling, adapters: Mapping[str, float]) -> None:
        """Raises: UserError with everything that is wrong with a request."""
        problems: list[errors.UserError] = []
        with errors.noted(problems):
            check_length(len(prompt), sampling.max_new_tokens, self.context)
        with errors.noted(problems):
            tokenizer.check_ids(self.reader, [prompt], self.vocab_size)
        with errors.noted(problems):
            if self.pool:
                self.pool.check(adapters)
            elif adapters:
                raise errors.UserError(
                    expected="a model that has adapters by name",
                    found=f"a request for {', '.join(adapters)}",
                )
        biased = [token for token, _ in sampling.logit_bias if not 0 <= token < self.vocab_size]
        if biased:
            problems.append(errors.UserError(
                expected=f"ids from 0 to {self.vocab_size - 1}", found=[*map(str, biased)],
                where="logit_bias",
            ))  # fmt: skip
        stops = len(sampling.stop_token_ids) + len(self.eos_ids)
        if sampling.min_tokens and stops > generation_config.MOST_STOP_IDS:
            problems.append(errors.UserError(
                expected=f"at most {generation_config.MOST_STOP_IDS} stop tokens with min_tokens",
                found=f"{stops}", where="stop_token_ids",
            ))  # fmt: skip
        if problems:
            raise errors.UserError.together(problems)


def check_length(num_prompt_tokens: int, max_new_tokens: int, context: int) -> None:
    """Raises UserError if the prompt has no tokens, or leaves no room for the new ones."""
    if num_prompt_tokens == 0:
        raise errors.UserError(
            expected="a prompt of at least one token",
            found="an empty prompt, and a tokenizer that adds no BOS",
            where="--prompt",
        )
    if num_prompt_tokens + max_new_tokens > context:
        raise errors.UserError(
            expected=f"prompt + new tokens within the model's context of {context} tokens",
            found=f"a prompt of {num_prompt_tokens} tokens + {max_new_tokens} new ones",
            where="--prompt, --max-new-tokens",
            do=f"shorten the prompt, or --max-new-tokens {max(context - num_prompt_tokens, 1)}"
            if num_prompt_tokens < context
            else "shorten the prompt",
        )


def _chunk_size(num_tokens: int) -> int:
    """How many of so many tokens to compute at once; less than half of a chunk is padding."""
    padded = next((size for size in CHUNKS if size >= num_tokens), CHUNKS[-1])
    whole = max((size for size in CHUNKS if size <= num_tokens), default=padded)
    return padded if num_tokens > padded // 2 else whole


def cache_size(config: Any, context: int) -> int:
    """Places for each sequence: if all layers have sliding windows, only those are kept."""
    windows = config.sliding_windows
    if windows and all(windows):
        return min(context, max(windows) + CHUNKS[-1])
    return context


def _logprob(token: int, found: Any, at: Any, top: int) -> requests.Logprob:
    return requests.Logprob(
        token,
        float(found.chosen[at]),
        tuple(zip(found.ids[at][:top].tolist(), found.values[at][:top].tolist(), strict=True)),
    )  # fmt: skip
