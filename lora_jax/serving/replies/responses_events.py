"""The object that /v1/responses answers with, and the events of its stream."""

import json
import time
import uuid
from collections.abc import AsyncIterator, Iterator, Mapping
from typing import Any

from lora_jax.generation import request
from lora_jax.serving import refusal
from lora_jax.serving.replies import answers, calls, generating, tokens
from lora_jax.serving.requests import protocol

Json = dict[str, Any]

_ECHOED = {  # {field of the request: what it is when it is left out}
    "instructions": None, "max_output_tokens": None, "metadata": {}, "parallel_tool_calls": True,
    "temperature": 1.0, "tool_choice": "auto", "tools": [], "top_logprobs": 0, "top_p": 1.0,
    "user": None,
}  # fmt: skip
_FIXED = {
    "background": False, "max_tool_calls": None, "previous_response_id": None,
    "service_tier": "default", "store": False, "truncation": "disabled",
}  # fmt: skip


class Response:
    """Of /v1/responses: what is said so far, as items of its output."""

    usual_tokens: int | None = None  # up to the context

    def __init__(
        self,
        body: Mapping[str, Any],
        chat: protocol.Chat,
        model: str,
        texts: tokens.Tokens,
        source: str,
    ):
        """body: of the request. source: the chat template, which says how calls are written."""
        self.id = f"resp_{uuid.uuid4().hex}"
        self._body, self._model, self._created = body, model, int(time.time())
        self._texts, self._asked = texts, chat.asked
        self._parser = calls.Parser(chat, source)
        self._output: list[Json] = []
        self._open: Json | None = None  # the message at the end of the output, while it grows
        self._unsaid: list[Json] = []  # log-probabilities of tokens whose text is held back
        self._sent = 0

    def response(self, generation: generating.Generation) -> Json:
        """The whole answer."""
        (choice,) = generation.choices
        for _ in self.go_on(choice, request.Piece(choice.text, (), choice.logprobs,
                                                  choice.finish_reason)):  # fmt: skip
            pass
        return self._whole(generation)

    def begin(self) -> Iterator[Json]:
        """The events before the first piece."""
        for name in ("created", "in_progress"):
            yield self._event(f"response.{name}", response=self._object("in_progress"))

    def go_on(self, choice: generating.Choice, piece: request.Piece) -> Iterator[Json]:
        """The events of a piece."""
        is_end = piece.finish_reason is not None
        text, called = self._parser.push(piece.text, is_end=is_end)
        self._unsaid += self._logprobs(piece)
        if text or (is_end and self._open and not called):
            yield from self._say(text)
        for call in called:
            self._unsaid = []
            yield from self._end_message("completed")
            yield from self._call(call)
        if is_end:
            if not self._output:
                yield from self._say("")
            yield from self._end_message(_status(choice))

    def finish(self, generation: generating.Generation) -> Json:
        """The last event."""
        whole = self._whole(generation)
        return self._event(f"response.{whole['status']}", response=whole)

    def fail(self, error: refusal.Refusal) -> Iterator[Json]:
        """The events of a failure. OpenAI's client raises the second one."""
        about = {"code": "server_error", "message": error.message}
        yield self._event("response.failed", response=self._object("failed", error=about))
        yield self._event("error", message=error.message, code=error.code, param=error.param,
                          **error.body)  # fmt: skip

    def _whole(self, generation: generating.Generation) -> Json:
        (choice,) = generation.choices
        used, status = generation.usage, _status(choice)
        cached = used["prompt_tokens_details"]
        usage = {
            "input_tokens": used["prompt_tokens"],
            "input_tokens_details": {**cached, "cache_write_tokens": 0},
            "output_tokens": used["completion_tokens"],
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": used["total_tokens"],
        }
        why = {"reason": "max_output_tokens"} if status == "incomplete" else None
        return self._object(status, usage=usage, incomplete_details=why)

    def _object(self, status: str, **more: Any) -> Json:
        given = self._body
        echoed = {
            name: usual if given.get(name) is None else given[name]
            for name, usual in _ECHOED.items()
        }
        echoed["tools"] = [{"parameters": None, "strict": False} | tool for tool in echoed["tools"]]
        form = (given.get("text") or {}).get("format") or {"type": "text"}
        effort = (given.get("reasoning") or {}).get("effort")
        return {
            "id": self.id,
            "object": "response",
            "created_at": self._created,
            "status": status,
            "model": self._model,
            "output": [*self._output],
            "error": None,
            "incomplete_details": None,
            "usage": None,
            "reasoning": {"effort": effort, "summary": None},
            "text": {"format": form},
            **echoed,
            **_FIXED,
            **more,
        }

    def _say(self, text: str) -> Iterator[Json]:
        """Adds text to the message at the end of the output, which may begin with it."""
        logprobs, self._unsaid = self._unsaid, []
        if self._open is None:
            self._open = {"id": f"msg_{uuid.uuid4().hex}", "type": "message", "role": "assistant",
                          "status": "in_progress", "content": []}  # fmt: skip
            self._output.append(self._open)
            yield self._of_item("response.output_item.added", item={**self._open, "content": []})
            part = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
            self._open["content"].append(part)
            yield self._of_part("response.content_part.added", part={**part, "logprobs": []})
        part = self._open["content"][0]
        part["text"] += text
        part["logprobs"] += logprobs
        if text or logprobs:
            yield self._of_part("response.output_text.delta", delta=text, logprobs=logprobs)

    def _end_message(self, status: str) -> Iterator[Json]:
        if self._open is None:
            return
        self._open["status"] = status
        part = self._open["content"][0]
        said = {name: part[name] for name in ("text", "logprobs")}
        yield self._of_part("response.output_text.done", **said)
        yield self._of_part("response.content_part.done", part=part)
        yield self._of_item("response.output_item.done", item=self._open)
        self._open = None

    def _call(self, call: Json) -> Iterator[Json]:
        item = {"id": f"fc_{uuid.uuid4().hex}", "type": "function_call", "call_id": call["id"],
                "status": "completed", **call["function"]}  # fmt: skip
        self._output.append(item)
        empty = {**item, "status": "in_progress", "arguments": ""}
        name = "response.function_call_arguments"
        of, arguments = {"item_id": item["id"]}, item["arguments"]
        yield self._of_item("response.output_item.added", item=empty)
        yield self._of_item(f"{name}.delta", delta=arguments, **of)
        yield self._of_item(f"{name}.done", arguments=arguments, name=item["name"], **of)
        yield self._of_item("response.output_item.done", item=item)

    def _of_part(self, kind: str, **more: Any) -> Json:
        assert self._open is not None
        return self._of_item(kind, item_id=self._open["id"], content_index=0, **more)

    def _of_item(self, kind: str, **more: Any) -> Json:
        return self._event(kind, output_index=len(self._output) - 1, **more)

    def _event(self, kind: str, **more: Any) -> Json:
        self._sent += 1
        return {"type": kind, "sequence_number": self._sent - 1, **more}

    def _logprobs(self, piece: request.Piece) -> list[Json]:
        top = self._asked.sampling.logprobs
        if top is None:
            return []
        return tokens.chat(self._texts, piece.logprobs, top, self._asked.tokens_as_ids)["content"]


class Answer(answers.Answer):
    """What a request to /v1/responses gets."""

    _form: Response

    async def events(self) -> AsyncIterator[str]:
        """Server-sent events. An error is the last of them."""
        form = self._form
        with self._generation:
            yield "".join(map(_text, form.begin()))
            try:
                async for batch in self._generation.pieces(answers.BEAT):
                    if not batch:
                        yield ": waiting\n\n"
                    if events := [event for each in batch for event in form.go_on(*each)]:
                        yield "".join(map(_text, events))
                yield _text(form.finish(self._generation))
            except refusal.Refusal as error:
                yield "".join(map(_text, form.fail(error)))


def _status(choice: generating.Choice) -> str:
    return "incomplete" if choice.finish_reason == "length" else "completed"


def _text(event: Json) -> str:
    data = json.dumps(event, ensure_ascii=False, separators=(",", ":"))
    return f"event: {event['type']}\ndata: {data}\n\n"
