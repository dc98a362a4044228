"""The objects and chunks of OpenAI's API, made of what the engine has generated."""

import time
import uuid
from collections.abc import Iterator, Sequence
from typing import Any

import lora_jax
from lora_jax.generation import request
from lora_jax.serving.replies import calls, generating, tokens
from lora_jax.serving.requests import protocol

Json = dict[str, Any]


class _Form:
    """What both endpoints share: the frame around choices."""

    prefix = whole = chunk = ""
    usual_tokens: int | None = None  # to generate, if none are asked for; None: up to the context
    echoes = False

    def __init__(self, asked: protocol.Asked, model: str, texts: tokens.Tokens):
        self.id = f"{self.prefix}-{uuid.uuid4().hex}"
        self._asked, self._texts = asked, texts
        self._model, self._created = model, int(time.time())

    def frame(self, kind: str, choices: list[Json], **more: Any) -> Json:
        return {
            "id": self.id,
            "object": kind,
            "created": self._created,
            "model": self._model,
            "system_fingerprint": f"lora_jax-{lora_jax.__version__}",
            "choices": choices,
            **more,
        }

    def usage(self, generation: generating.Generation) -> Json:
        """The last chunk, if include_usage asks for it."""
        return self.frame(self.chunk, [], usage=generation.usage)

    def _ids(self, name: str, ids: Sequence[int]) -> Json:
        """{name: ids} if return_token_ids asks for it."""
        return {name: [*ids]} if self._asked.return_token_ids else {}

    def _prompt_logprobs(self, choice: generating.Choice) -> Json:
        """{"prompt_logprobs": …} if they are asked for."""
        top = self._asked.prompt_logprobs
        if top is None:
            return {}
        found = tokens.prompt(self._texts, choice.request.prompt_logprobs, top)
        return {"prompt_logprobs": found}

    def _stopped(self, choice: generating.Choice) -> Json:
        """stop_reason, which is vLLM's: the stop string or id that ended the text."""
        return {"stop_reason": choice.stop_reason, **self._ids("token_ids", choice.tokens)}


class Chat(_Form):
    """Of /v1/chat/completions."""

    prefix, whole, chunk = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def __init__(self, chat: protocol.Chat, model: str, texts: tokens.Tokens, source: str):
        """source: the chat template, which says how the model writes calls of tools."""
        super().__init__(chat.asked, model, texts)
        self._chat, self._source = chat, source
        self._parsers: dict[int, calls.Parser] = {}

    def response(self, generation: generating.Generation) -> Json:
        """The whole answer."""
        first = generation.choices[0]
        more = self._ids("prompt_token_ids", first.prompt) | self._prompt_logprobs(first)
        choices = [*map(self._choice, generation.choices)]
        return self.frame(self.whole, choices, usage=generation.usage, **more)

    def _choice(self, choice: generating.Choice) -> Json:
        parser = self._parser(choice)
        content, _ = parser.push(choice.text, is_end=True)
        message: Json = {"role": "assistant", "content": content, "refusal": None}
        if parser.calls:
            message |= {"content": content or None, "tool_calls": parser.calls}
        return {
            "index": choice.index,
            "message": message,
            "logprobs": self._logprobs(choice.logprobs),
            "finish_reason": _reason(choice, parser),
            **self._stopped(choice),
        }

    def begin(self, choice: generating.Choice) -> Iterator[Json]:
        """The chunks before the first piece of a choice."""
        more = self._ids("prompt_token_ids", choice.prompt)
        yield self._one(choice, {"role": "assistant", "content": ""}, **more)

    def go_on(self, choice: generating.Choice, piece: request.Piece) -> Iterator[Json]:
        """The chunks of a piece."""
        parser = self._parser(choice)
        known = len(parser.calls)
        content, called = parser.push(piece.text, is_end=piece.finish_reason is not None)
        logprobs = self._logprobs(piece.logprobs) if piece.logprobs else None
        ids = self._ids("token_ids", piece.tokens)
        if content or logprobs or (ids and piece.tokens):
            yield self._one(choice, {"content": content}, logprobs, **ids)
        for number, call in enumerate(called, start=known):
            yield self._one(choice, {"tool_calls": [{"index": number, **call}]})
        if piece.finish_reason:
            stop = {"finish_reason": _reason(choice, parser), "stop_reason": choice.stop_reason}
            yield self._one(choice, {}, **stop)

    def _one(
        self, choice: generating.Choice, delta: Json, logprobs: Json | None = None, **more: Any
    ) -> Json:
        made = {"index": choice.index, "delta": delta, "logprobs": logprobs, "finish_reason": None}
        return self.frame(self.chunk, [made | more])

    def _logprobs(self, entries: Sequence[request.Logprob]) -> Json | None:
        top = self._asked.sampling.logprobs
        if top is None:
            return None
        return tokens.chat(self._texts, entries, top, self._asked.tokens_as_ids)

    def _parser(self, choice: generating.Choice) -> calls.Parser:
        if choice.index not in self._parsers:
            self._parsers[choice.index] = calls.Parser(self._chat, self._source)
        return self._parsers[choice.index]


class Completion(_Form):
    """Of /v1/completions."""

    prefix, whole, chunk = "cmpl", "text_completion", "text_completion"
    usual_tokens = 16  # OpenAI's

    def __init__(self, completion: protocol.Completion, model: str, texts: tokens.Tokens):
        super().__init__(completion.asked, model, texts)
        self._completion, self.echoes = completion, completion.echo
        self._offsets: dict[int, tokens.Offsets] = {}

    def response(self, generation: generating.Generation) -> Json:
        """The whole answer."""
        choices = [*map(self._choice, generation.choices)]
        return self.frame(self.whole, choices, usage=generation.usage)

    def _choice(self, choice: generating.Choice) -> Json:
        parts = [*self._echo_logprobs(choice), *self._logprobs(choice, choice.logprobs)]
        return {
            "index": choice.index,
            "text": self._echoed(choice) + choice.text,
            "logprobs": tokens.joined(parts) if parts else None,
            "finish_reason": choice.finish_reason,
            **self._stopped(choice),
            **self._ids("prompt_token_ids", choice.prompt),
            **self._prompt_logprobs(choice),
        }

    def begin(self, choice: generating.Choice) -> Iterator[Json]:
        """The chunks before the first piece of a choice: the prompt, if it is echoed."""
        more = self._ids("prompt_token_ids", choice.prompt)
        if self._completion.echo or more:
            parts = [*self._echo_logprobs(choice)]
            logprobs = tokens.joined(parts) if parts else None
            yield self._one(choice, self._echoed(choice), logprobs, **more)

    def go_on(self, choice: generating.Choice, piece: request.Piece) -> Iterator[Json]:
        """The chunks of a piece."""
        parts = [*self._logprobs(choice, piece.logprobs)] if piece.logprobs else []
        more = self._ids("token_ids", piece.tokens)
        if piece.finish_reason:
            more |= {"finish_reason": piece.finish_reason, "stop_reason": piece.stop_reason}
        if piece.text or parts or more.get("token_ids") or piece.finish_reason:
            yield self._one(choice, piece.text, parts[0] if parts else None, **more)

    def _one(
        self, choice: generating.Choice, text: str, logprobs: Json | None, **more: Any
    ) -> Json:
        made = {"index": choice.index, "text": text, "logprobs": logprobs, "finish_reason": None}
        return self.frame(self.chunk, [made | more])

    def _echoed(self, choice: generating.Choice) -> str:
        """The text of the prompt, if it is echoed."""
        if not self._completion.echo:
            return ""
        prompts = self._completion.prompts
        prompt = prompts[choice.index // self._asked.n]
        if isinstance(prompt, str) and self._asked.truncate is None:
            return prompt
        return self._texts.whole(choice.prompt, self._asked.sampling.skip_special_tokens)

    def _echo_logprobs(self, choice: generating.Choice) -> Iterator[Json]:
        if self._completion.echo and self._asked.sampling.logprobs is not None:
            offsets = self._offset(choice)
            yield offsets.first(choice.prompt[0])
            yield offsets.of(choice.request.prompt_logprobs)

    def _logprobs(
        self, choice: generating.Choice, entries: Sequence[request.Logprob]
    ) -> Iterator[Json]:
        if self._asked.sampling.logprobs is not None:
            yield self._offset(choice).of(entries)

    def _offset(self, choice: generating.Choice) -> tokens.Offsets:
        sampling = self._asked.sampling
        if choice.index not in self._offsets:
            self._offsets[choice.index] = tokens.Offsets(
                self._texts,
                sampling.logprobs or 0,
                echoed=self._echoed(choice) if self.echoes else None,
                as_ids=self._asked.tokens_as_ids,
                skip_special_tokens=sampling.skip_special_tokens,
            )
        return self._offsets[choice.index]


def _reason(choice: generating.Choice, parser: calls.Parser) -> str | None:
    return "tool_calls" if parser.calls and choice.finish_reason == "stop" else choice.finish_reason
