"""What the client of a completion gets: one object, or server-sent events."""

import json
from collections.abc import AsyncIterator
from typing import Any

from lora_jax.serving import refusal
from lora_jax.serving.replies import generating
from lora_jax.serving.requests import protocol

BEAT = 15.0  # seconds without output after which a stream gets a comment, which keeps it open
Json = dict[str, Any]


class Answer:
    """What a request gets: `whole`, or `events` one by one. Each ends its generation."""

    def __init__(
        self,
        asked: protocol.Asked,
        form: Any,
        generation: generating.Generation,
    ):
        """form: one of `completions`, which makes the objects."""
        self.streams, self.id = asked.stream, form.id
        self._asked, self._form, self._generation = asked, form, generation

    async def whole(self) -> Json:
        """The whole answer. Raises: Refusal if the engine fails."""
        with self._generation:
            async for _ in self._generation.pieces():
                pass
            return self._form.response(self._generation)

    async def events(self) -> AsyncIterator[str]:
        """Server-sent events. An error is the last of them."""
        with self._generation:
            begun: set[int] = set()
            try:
                async for batch in self._generation.pieces(BEAT):
                    if not batch:
                        yield ": waiting\n\n"
                    events = []
                    for choice, piece in batch:
                        if choice.index not in begun:
                            begun.add(choice.index)
                            events += map(self._event, self._form.begin(choice))
                        events += map(self._event, self._form.go_on(choice, piece))
                    if events:
                        yield "".join(events)
                if self._asked.include_usage:
                    yield _event(self._form.usage(self._generation))
                yield "data: [DONE]\n\n"
            except refusal.Refusal as error:
                yield _event(error.body)

    def abort(self) -> None:
        """Ends the generation of an answer that nobody asks for."""
        self._generation.__exit__()

    def _event(self, chunk: Json) -> str:
        if self._asked.include_usage:
            chunk["usage"] = self._generation.usage if self._asked.continuous_usage else None
        return _event(chunk)


def _event(data: Json) -> str:
    return f"data: {json.dumps(data, ensure_ascii=False, separators=(',', ':'))}\n\n"
