"""The engine: requests in, their text out piece by piece, many at a time in one batch."""

import collections
import contextlib
import copy
import dataclasses
import functools
import threading
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jax.sharding import Mesh

from lora_jax import errors
from lora_jax.generation import ahead, limits, lockstep
from lora_jax.generation import batch as batches
from lora_jax.generation import config as generation_config
from lora_jax.generation import grammar as grammars
from lora_jax.generation import output as outputs
from lora_jax.generation import pool as pools
from lora_jax.generation import request as requests
from lora_jax.lora.nnx import model_state
from lora_jax.models import llama
from lora_jax.parallel import mesh as sharding

_PATIENCE = 4  # how often, times the slots, later requests may be served before an earlier one
_FEW = 4  # requests at most, while guessed tokens are worth their computation


class Stats(NamedTuple):
    """Requests that wait and run now; and in total, their tokens and those found in the cache.

    guessed, accepted: tokens that were guessed by repetition, and those that were right.
    """

    waiting: int
    running: int
    slots: int
    requests: int
    prompt_tokens: int
    cached_tokens: int
    generated_tokens: int
    guessed_tokens: int
    accepted_tokens: int


class Engine:
    """Serves requests to one model in a fixed number of slots.

    A free slot takes the next request at once. Long prompts are computed in chunks between the
    steps of the others. The host reads the tokens of a step while the devices compute the next.

    Of several processes, all make the same engine. They call `generate` with the same prompts; or
    process 0 calls `start`, and the others `follow` it.

    Args:
      model: with or without an adapter of its own.
      reader: its tokenizer.
      eos_ids: the tokens that end a text.
      slots: how many requests are served at a time.
      context: the most tokens of a request, prompt and output; None: those of the model.
      mesh: of devices; None: one device.
      pool: the adapters that requests may name.
      kv_dtype: "int8" halves the memory of the cache, and changes the logits a little; None: the
        model's dtype.
      speculate: guess so many tokens from repetitions in the text, and compute them in one step.
        The tokens of greedy requests stay the same. It has an effect while few requests run.
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
        kv_dtype: str | None = None,
        speculate: int = 0,
        seed: int = 0,
    ):
        self.reader, self.eos_ids, self.pool = reader, tuple(eos_ids), pool
        self.context = min(context or model.config.context, model.config.context)
        self.num_slots, self.vocab_size = slots, model.config.vocab_size
        self.batch = batches.Batch(
            model,
            num_slots=slots,
            context=self.context,
            mesh=mesh or sharding.make_mesh({"data": 1, "fsdp": 1, "tensor": 1}),
            pool=pool,
            kv_dtype=kv_dtype,
        )
        self._speculate = speculate if self.batch.can_speculate else 0
        self._decoder = reader  # for tokens of the output
        self._seeds = np.random.default_rng(seed)
        self._inbox: collections.deque[batches.Work] = collections.deque()
        self._waiting: list[batches.Work] = []
        self._running: list[batches.Work] = []
        self._dispatched: batches.Step | None = None
        self._totals = collections.Counter()
        self._lock = threading.RLock()
        self._wake = threading.Condition()
        self._thread: threading.Thread | None = None
        self._compiler: threading.Thread | None = None
        self._followers: lockstep.Leader | None = None
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
        limits.check(
            prompt, sampling, adapters, reader=self.reader, eos_ids=self.eos_ids,
            context=self.context, vocab_size=self.vocab_size, pool=self.pool,
        )  # fmt: skip
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
        output = outputs.Output(request, self._decoder, self.eos_ids)
        self._inbox.append(batches.Work(request, output, matcher))
        with self._wake:
            self._wake.notify()
        return request

    def compile_grammar(self, grammar: str) -> None:
        """Compiles the grammar of a request, in any thread: `submit` need not do it then.

        Raises: UserError if it has an error.
        """
        self._grammar.matcher(grammar)

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
            # A tokenizer that decodes refuses to encode in another thread at the same time.
            self._decoder = copy.deepcopy(self.reader)
            self._followers = lockstep.leader()
            self._thread = threading.Thread(target=self._serve, name="engine", daemon=True)
            self._thread.start()

    def follow(self) -> None:
        """Does what the engine of process 0 does, until that is closed."""
        while (news := lockstep.receive()) is not None:
            for each in news.submitted:
                self.submit(each.prompt, each.sampling, adapters=each.adapters)
            known = {work.request.number: work for work in (*self._waiting, *self._running)}
            known |= dict(enumerate(self._inbox, self._totals["requests"]))
            for number in news.aborted:
                if number in known:
                    known[number].request.abort()
            self.advance()

    def warm_up(self) -> None:
        """Compiles what the first short requests need, before they come."""
        self.submit([0, 0], generation_config.Sampling(2, temperature=1.0)).result()

    def compile_ahead(self) -> threading.Thread:
        """Compiles all that later requests may need, in a thread of its own, which it returns.

        Requests are served meanwhile. Without it, the first that needs a program waits for it, and
        so do all others.
        """
        with self._lock:
            programs = ahead.programs(self.batch, self._speculate)

        def compile_all() -> None:
            for program in programs:
                if self._closing:
                    return
                with contextlib.suppress(Exception):  # the request that needs it reports it
                    program.compile(self.batch)

        self._compiler = threading.Thread(target=compile_all, name="compiler", daemon=True)
        self._compiler.start()
        return self._compiler

    def close(self) -> None:
        """Ends all requests, and the threads."""
        self._closing = True
        with self._wake:
            self._wake.notify()
        for thread in (self._thread, self._compiler):
            if thread:
                thread.join()
        if self._followers:
            self._followers.close()
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
            total["guessed"], total["accepted"],
        )  # fmt: skip

    def advance(self) -> None:
        """One turn: at most one step of all slots, then some tokens of the prompts that wait."""
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
            self.batch.use(trained, frozen)

    def release(self) -> None:
        """Frees the cache and the weights' second form; the next request makes them again."""
        with self._lock:
            self.batch.release()

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
        guesses = 0 < len(self._running) <= _FEW and self._speculate
        if guesses or (self._dispatched and self._dispatched.counts is not None):
            self._read()  # the next step depends on its tokens
        ready = [work for work in self._running
                 if work.is_ready and not work.done and work.left > 0]  # fmt: skip
        if any(work.matcher for work in ready):
            following = self._follow_grammars(ready)
        elif drafts := self._drafts(ready) if guesses else {}:
            following = self.batch.verify(ready, drafts, self._speculate)
        else:
            following = self.batch.decode(ready) if ready else None
        self.batch.fill(self._running)
        self._read()
        self._dispatched = following

    def _follow_grammars(self, ready: list[batches.Work]) -> batches.Step | None:
        """Starts a step in which grammars say what may come.

        What they say depends on the tokens of the step before. Those are read, and the grammars
        advance, while the devices compute the logits.
        """
        logits = self.batch.forward(ready)
        self._read()
        ready, allowed = self._allowed([work for work in ready if not work.done])
        return self.batch.choose(ready, logits, allowed) if ready else None

    def _drafts(self, ready: list[batches.Work]) -> dict[int, Sequence[int]]:
        """Guesses at the next tokens of greedy requests, by slot."""
        found = {}
        for work in ready:
            if work.request.sampling.is_plain_greedy:
                draft = work.lookup.draft(min(self._speculate, work.left - 1))
                if draft:
                    found[work.slot.index] = draft
                    self._totals["guessed"] += len(draft)
        return found

    def _allowed(self, ready: list[batches.Work]) -> tuple[list[batches.Work], np.ndarray]:
        """(those that go on, the tokens that their grammars allow, as bits)."""
        allowed = np.full((self.num_slots, -(-self.vocab_size // 32)), -1, np.int32)
        left = []
        for work in ready:
            try:
                if work.matcher:
                    work.matcher.mask(allowed[work.slot.index])
                left.append(work)
            except errors.UserError as error:
                self._end(work, work.output.end("error", error.on_one_line()))
        return left, allowed

    def _take(self) -> None:
        """New requests join the queue; those that were aborted end."""
        new = [self._inbox.popleft() for _ in range(len(self._inbox))]
        for work in new:
            work.request.number = self._totals["requests"]
            self._totals["requests"] += 1
        self._waiting += new
        aborted = [work for work in (*self._waiting, *self._running)
                   if work.request.aborted.is_set() and not work.done]  # fmt: skip
        if self._followers:
            self._followers.send(
                [work.request for work in new], [work.request.number for work in aborted]
            )
        for work in aborted:
            self._end(work, work.output.end("abort"))
        self._waiting = [work for work in self._waiting if not work.done]

    def _admit(self) -> None:
        """Free slots take requests, the oldest first."""
        left, blocked = [], False
        for work in self._waiting:
            if blocked or not self._start(work):
                left.append(work)
                blocked |= work.overtaken > _PATIENCE * self.num_slots
                blocked |= not self.batch.has_free_slot
            else:
                for earlier in left:
                    earlier.overtaken += 1
        self._waiting = left

    def _start(self, work: batches.Work) -> bool:
        """Gives a request a slot and its adapters; False if there are none now."""
        if not self.batch.has_free_slot:
            return False
        if work.request.adapters:
            try:
                work.lease = self.pool.acquire(work.request.adapters)
            except errors.UserError as error:  # unloaded while it waited
                self._end(work, work.output.end("error", str(error)))
                return True
            if work.lease is None:
                return False
        self.batch.admit(work, self.eos_ids)
        self._running.append(work)
        self._totals["prompt"] += len(work.request.prompt)
        self._totals["cached"] += work.filled
        return True

    def _read(self) -> None:
        """Reads the tokens of the step that was dispatched, and delivers them."""
        step, self._dispatched = self._dispatched, None
        if step is None:
            return
        tokens = np.asarray(step.tokens).reshape(self.num_slots, -1)
        logprobs = step.logprobs and type(step.logprobs)(*map(np.asarray, step.logprobs))
        for work in step.works:
            if work.done:
                continue  # it ended with the token before this one
            index, top = work.slot.index, work.request.sampling.logprobs
            count = 1
            if step.counts is not None:
                count = int(np.asarray(step.counts)[index])
                work.sent += count
                self._totals["accepted"] += count - 1
            for token in tokens[index, :count].tolist():
                own = None if top is None else batches.logprob(token, logprobs, index, top)
                self._deliver(work, token, own)
                if work.done:
                    break

    def _deliver(self, work: batches.Work, token: int, logprob: requests.Logprob | None) -> None:
        # The token before it is in the cache now.
        work.slot.tokens.append((*work.request.prompt[-1:], *work.output.tokens[-1:])[-1])
        self._totals["generated"] += 1
        piece = work.output.push(token, logprob)
        if self._speculate:
            work.lookup.extend([token])
        if work.matcher:
            work.matcher.accept(token)
            if work.matcher.finished and not piece.finish_reason:
                work.request.emit(piece)
                piece = work.output.end("stop")
        if piece.finish_reason:
            self._end(work, piece)
        else:
            work.request.emit(piece)

    def _end(self, work: batches.Work, piece: requests.Piece) -> None:
        """Delivers the last piece, and frees what the request holds."""
        work.done = True
        if work.slot is not None:
            self.batch.free(work.slot)
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
