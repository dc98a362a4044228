"""The engine: requests in, their text out piece by piece, many at a time in one batch."""

import collections
import contextlib
import copy
import dataclasses
import functools
import threading
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from lora_jax.generation import ahead, limits, lockstep, loop, progress, scheduler
from lora_jax.generation import batch as batches
from lora_jax.generation import config as generation_config
from lora_jax.generation import grammar as grammars
from lora_jax.generation import output as outputs
from lora_jax.generation import pool as pools
from lora_jax.generation import request as requests
from lora_jax.lora.nnx import model_state
from lora_jax.models import llama
from lora_jax.parallel import mesh as sharding

_TRIALS = 3  # of an engine after a failure, since another request may break one of them
_GATHERS = 0.02  # seconds that the first request of an idle engine waits for others, at most


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
            mesh=mesh or sharding.make_mesh(sharding.ONE),
            pool=pool,
            kv_dtype=kv_dtype,
        )
        self._decoder = reader  # for tokens of the output
        self._seeds = np.random.default_rng(seed)
        self._scheduler = scheduler.Scheduler(self.batch, pool, self.eos_ids)
        self._loop = loop.Loop(
            self.batch, self._scheduler, speculate, alone=jax.process_count() == 1
        )
        self._lock = threading.RLock()
        self._wake = threading.Condition()
        self._thread: threading.Thread | None = None
        self._compiler: threading.Thread | None = None
        self._followers: lockstep.Leader | None = None
        self._expected = 0
        self._closing = False
        self.failure: str | None = None  # why it serves no more requests

    @functools.cached_property
    def _grammar(self) -> grammars.Grammar:
        return grammars.Grammar(self.reader, self.vocab_size, self.eos_ids)

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
        if self.failure or self._closing:
            request.emit(requests.Piece(
                finish_reason="error", error=self.failure or "the engine is closed"
            ))  # fmt: skip
            return request
        output = outputs.Output(request, self._decoder, self.eos_ids)
        self._scheduler.inbox.append(progress.Work(request, output, matcher))
        with self._wake:
            self._wake.notify()
        return request

    @contextlib.contextmanager
    def expecting(self) -> Iterator[None]:
        """Inside, a request is prepared: an idle engine waits a moment, to begin it with others.

        Requests that arrive together would otherwise each take a step of the first ones alone.
        """
        with self._wake:
            self._expected += 1
        try:
            yield
        finally:
            with self._wake:
                self._expected -= 1
                self._wake.notify()

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
            for number in news.aborted:
                self._scheduler.abort(number)
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
            programs = ahead.programs(self.batch, self._loop.speculate)

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
            self._loop.close()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def stats(self) -> scheduler.Stats:
        return self._scheduler.stats()

    def advance(self) -> None:
        """One turn: at most one step of all slots, then some tokens of the prompts that wait."""
        with self._lock:
            try:
                self._loop.turn(self._followers)
            except Exception as error:
                self.failure = f"{type(error).__name__}: {error}"
                self._loop.end_all("error", self.failure)
                raise

    def use(self, trained: Any, frozen: model_state.Frozen) -> None:
        """Takes other values of the model's own adapter and base, between requests."""
        with self._lock:
            self.batch.use(trained, frozen)

    def release(self) -> None:
        """Frees the cache and the weights' second form; the next request makes them again."""
        with self._lock:
            self.batch.release()

    def _serve(self) -> None:
        while not self._closing:
            with self._wake:
                self._wake.wait_for(lambda: self._closing or self._loop.has_work)
                self._wake.wait_for(lambda: self._closing or not self._expected, _GATHERS)
            if self.failure:  # which a request did not see that came at that moment
                with self._lock:
                    self._loop.end_all("error", self.failure)
            try:
                while self._loop.has_work and not self._closing:
                    self.advance()
            except Exception:
                traceback.print_exc()
                self._begin_again()

    def _begin_again(self) -> None:
        """After a turn that failed: makes the state anew, and tries it with a request.

        One request that no check has foreseen must not end the service of all later ones. Several
        processes end instead: they cannot know how far each of them came.
        """
        if self._followers:
            self._followers.fail(str(self.failure))
            return
        for _ in range(_TRIALS):
            try:
                self.release()
                self.failure = None
                self.submit([0], generation_config.Sampling(1))
                while self._loop.has_work and not self._closing:
                    self.advance()
                return
            except Exception:
                traceback.print_exc()
