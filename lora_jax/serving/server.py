"""What the endpoints do: bodies of requests → answers, in terms of no web framework."""

import asyncio
import concurrent.futures
import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from lora_jax import errors
from lora_jax.generation import config
from lora_jax.serving import bridge, metrics, models, refusal, settings
from lora_jax.serving.replies import (
    answers,
    calls,
    completions,
    generating,
    responses_events,
    tokens,
)
from lora_jax.serving.requests import fields, prompts, protocol, responses_body, structure


class Server:
    """An engine, its models and its limits. Start it in the event loop that serves it.

    engine: a generation.Engine that runs in a thread of its own.
    """

    def __init__(self, engine: Any, known: models.Models, limits: settings.ServeSettings):
        self.models, self.limits, self.metrics = known, limits, metrics.Metrics()
        self._engine, self._reader = engine, engine.reader
        self._prompts = prompts.Prompts(
            engine.reader, engine.vocab_size, engine.context, limits.max_prompt
        )
        self._texts = tokens.Tokens(engine.reader)
        # A fast tokenizer cannot be used by two threads at once: "Already borrowed".
        self._texts_thread = concurrent.futures.ThreadPoolExecutor(1, "prompts")
        self._loads_thread = concurrent.futures.ThreadPoolExecutor(1, "adapters")
        self._grammars_thread = concurrent.futures.ThreadPoolExecutor(1, "grammars")
        self._link: bridge.Bridge | None = None
        self._preparing = 0

    def start(self) -> None:
        self._link = bridge.Bridge(self._engine)

    def stop(self) -> None:
        for thread in (self._texts_thread, self._loads_thread, self._grammars_thread):
            thread.shutdown(cancel_futures=True)

    @property
    def link(self) -> bridge.Bridge:
        assert self._link is not None, "start() comes first"
        return self._link

    # ------------------------------------------------------------------ generation

    @contextlib.contextmanager
    def admitted(self) -> Iterator[None]:
        """Inside, a request is read. Raises: Refusal 429 if too many wait already."""
        self._check_queue(1, self._preparing)
        self._preparing += 1
        try:
            yield
        finally:
            self._preparing -= 1

    async def chat(self, body: Mapping[str, Any]) -> answers.Answer:
        """Answers /v1/chat/completions. Raises: Refusal."""
        chat = protocol.chat(body)
        return await self._chat(chat, lambda *about: completions.Chat(chat, *about))

    async def _chat(
        self,
        chat: protocol.Chat,
        make: Callable[..., Any],
        answer: type[answers.Answer] = answers.Answer,
    ) -> answers.Answer:
        """make: (the model's name, texts of tokens, the chat template) → the form of the answer."""
        model, adapters = self._model(chat.asked)
        with self._engine.expecting():
            ids = await _within(self._texts_thread, self._prompts.chat, chat)
            source = self._reader.get_chat_template(None, chat.tools or None)
            forced = await _within(self._texts_thread, calls.grammar, chat, source, self._reader)
            form = make(model, self._texts, source)
            return await self._generate(chat.asked, form, [ids], adapters, forced, answer)

    async def response(self, body: Mapping[str, Any]) -> answers.Answer:
        """Answers /v1/responses: a chat in another form. Raises: Refusal."""
        chat = responses_body.read(body)
        try:
            return await self._chat(
                chat,
                lambda *about: responses_events.Response(body, chat, *about),
                responses_events.Answer,
            )
        except refusal.Refusal as error:
            raise responses_body.renamed(error) from None

    async def completion(self, body: Mapping[str, Any]) -> answers.Answer:
        """Answers /v1/completions. Raises: Refusal."""
        completion = protocol.completion(body)
        model, adapters = self._model(completion.asked)
        with self._engine.expecting():
            ids = await _within(self._texts_thread, self._prompts.completion, completion)
            form = completions.Completion(completion, model, self._texts)
            return await self._generate(completion.asked, form, ids, adapters, None)

    async def _generate(
        self,
        asked: protocol.Asked,
        form: Any,
        ids: list[list[int]],
        adapters: Mapping[str, float],
        grammar: str | None,
        answer: type[answers.Answer] = answers.Answer,
    ) -> answers.Answer:
        if grammar is None and asked.structure:
            grammar = await _within(self._texts_thread, structure.grammar, asked.structure)
        if grammar is not None:
            await self._compile(grammar, asked.structure.param if asked.structure else "tools")
        samplings = [self._sampling(asked, len(each), grammar, form.usual_tokens) for each in ids]
        self._check_queue(len(ids) * asked.n)
        generation = generating.Generation(self.link, self.metrics, self.limits.timeout)
        with contextlib.ExitStack() as stack:
            stack.enter_context(generation)
            for each, sampling in zip(ids, samplings, strict=True):
                discards = asked.max_tokens == 0
                generation.submit(each, sampling, adapters, asked.n, discards=discards)
            stack.pop_all()  # nothing went wrong: the answer ends it
        return answer(asked, form, generation)

    async def _compile(self, grammar: str, param: str) -> None:
        """Compiles a grammar while others are answered: it may take seconds. Raises: Refusal."""
        try:
            await _within(self._grammars_thread, self._engine.compile_grammar, grammar)
        except errors.UserError as error:
            raise refusal.of(error, param) from None

    def _sampling(
        self, asked: protocol.Asked, num_prompt: int, grammar: str | None, usual: int | None
    ) -> config.Sampling:
        most = self._prompts.room(num_prompt, asked.max_tokens, self.limits.max_tokens, usual)
        if asked.sampling.min_tokens > most:
            raise refusal.Refusal(
                f"min_tokens: {asked.sampling.min_tokens} is above max_tokens, {most}",
                param="min_tokens",
            )
        return dataclasses.replace(asked.sampling, max_new_tokens=max(most, 1), grammar=grammar)

    def _model(self, asked: protocol.Asked) -> tuple[str, dict[str, float]]:
        if asked.n > self.limits.max_n:
            raise refusal.Refusal(
                f"n: {asked.n} is above this server's limit of {self.limits.max_n}", param="n"
            )
        return self.models.chosen(asked.model, asked.adapters)

    def _check_queue(self, more: int, preparing: int = 0) -> None:
        """preparing: the requests that a new one would join."""
        room = self._engine.stats().slots + self.limits.max_queue
        if more > room:
            raise refusal.Refusal(
                f"{more} choices in one request are more than the {room} this server has room for"
            )
        if self.link.open + more > room or preparing >= room:
            raise refusal.Refusal(
                "Too many requests wait already. Try again later.",
                status=429,
                code="rate_limit_exceeded",
                headers={"Retry-After": "1"},
            )

    # ------------------------------------------------------------------ tokens

    async def tokenize(self, body: Mapping[str, Any]) -> answers.Json:
        """Answers /tokenize: the ids of a text or of a chat. Raises: Refusal."""
        given = fields.Fields(body)
        self.models.chosen(given.text("model"), {})
        show = given.flag("return_token_strs")
        special = given.flag("add_special_tokens", True)
        if "messages" in given:
            chat = protocol.chat(body)
            ids = await _within(self._texts_thread, self._prompts.chat, chat)
        else:
            prompt = given.text("prompt")
            if prompt is None and "prompt" not in given:
                given.wrong("prompt", "expected a string, or messages")
            given.raise_problems()
            ids = await _within(self._texts_thread, self._prompts.encode, prompt, special)
        shown = [self._texts.text(each) for each in ids] if show else None
        return {
            "count": len(ids),
            "max_model_len": self._engine.context,
            "tokens": ids,
            "token_strs": shown,
        }

    async def detokenize(self, body: Mapping[str, Any]) -> answers.Json:
        """Answers /detokenize: the text of ids, with special tokens. Raises: Refusal."""
        given = fields.Fields(body)
        self.models.chosen(given.text("model"), {})
        ids = given.array("tokens", int, "token ids")
        most = len(self._reader) - 1
        if "tokens" not in given or not all(0 <= each <= most for each in ids):
            given.wrong("tokens", f"expected an array of token ids, each from 0 to {most}")
        given.raise_problems()
        return {"prompt": await _within(self._texts_thread, self._texts.whole, ids, False)}

    def tokenizer_info(self) -> answers.Json:
        """Answers /tokenizer_info: what a client needs to render and encode as this server does."""
        reader = self._reader
        names = ("bos_token", "eos_token", "pad_token", "unk_token")
        return {
            "tokenizer_class": type(reader).__name__,
            **{name: getattr(reader, name) for name in names},
            "additional_special_tokens": sorted(set(reader.all_special_tokens)),
            "chat_template": reader.chat_template,
            "vocab_size": len(reader),
            "model_max_length": self._engine.context,
        }

    # ------------------------------------------------------------------ adapters, numbers

    async def load_adapter(self, body: Mapping[str, Any]) -> str:
        """Answers /v1/load_lora_adapter. Raises: Refusal."""
        self.models.check_runtime()
        given = fields.Fields(body)
        name, path = given.text("lora_name", ""), given.text("lora_path", "")
        replace = given.flag("load_inplace")
        for field, value in (("lora_name", name), ("lora_path", path)):
            if not value:
                given.wrong(field, "expected a string")
        given.raise_problems()
        await _within(self._loads_thread, lambda: self.models.load(name, path, replace=replace))
        return f"Success: LoRA adapter '{name}' added successfully."

    async def unload_adapter(self, body: Mapping[str, Any]) -> str:
        """Answers /v1/unload_lora_adapter. Raises: Refusal."""
        self.models.check_runtime()
        given = fields.Fields(body)
        name = given.text("lora_name", "")
        if not name:
            given.wrong("lora_name", "expected a string")
        given.raise_problems()
        await _within(self._loads_thread, self.models.unload, name)
        return f"Success: LoRA adapter '{name}' removed successfully."

    def health(self) -> answers.Json:
        """Answers /health. Raises: Refusal 503 if the engine serves no more requests."""
        if self._engine.failure:
            raise refusal.Refusal(f"The engine has failed: {self._engine.failure}", status=503)
        return {"status": "ok"}

    def metrics_text(self) -> str:
        """Answers /metrics."""
        stats, sample = self._engine.stats(), metrics.Sample
        adapters = [({"adapter": name}, count) for name, count in self.link.by_adapter.items()]
        return self.metrics.text(
            [
                sample("requests_waiting", "Choices that wait for a slot.", [({}, stats.waiting)]),
                sample("requests_running", "Choices in a slot.", [({}, stats.running)]),
                sample("slots", "Choices that can run at the same time.", [({}, stats.slots)]),
                sample("slots_used_ratio", "The share of slots that are in use.",
                      [({}, stats.running / max(stats.slots, 1))]),
                sample("prompt_cached_tokens_total", "Tokens of prompts that were in the cache.",
                      [({}, stats.cached_tokens)], "counter"),
                sample("adapters_loaded", "Adapters that can be named.",
                      [({}, len(self.models.adapters()))]),
                sample("adapter_requests", "Choices that wait or run, by adapter.", adapters),
            ]
        )  # fmt: skip


async def _within(
    thread: concurrent.futures.Executor, function: Callable[..., Any], *arguments: Any
) -> Any:
    """The result of a function that another thread calls."""
    return await asyncio.get_running_loop().run_in_executor(thread, function, *arguments)
