"""Calls of tools in a chat's output, and the grammar that forces one."""

import uuid
from typing import Any

from lora_jax import errors
from lora_jax.serving import protocol, refusal, structure


class Parser:
    """Divides the output of a choice into its text and its calls of tools, as it comes."""

    def __init__(self, chat: protocol.Chat, source: str):
        """source: the chat template, which says how the model writes calls."""
        self.calls: list[dict[str, Any]] = []
        self._most = None if chat.parallel_tool_calls else 1
        self._reader: Any = None
        if chat.tools and chat.tool_choice != "none":
            from lora_jax.serving import tools

            names = [tool["function"]["name"] for tool in chat.tools]
            self._reader = tools.Parser(source, names)

    def push(self, text: str, *, is_end: bool = False) -> tuple[str, list[dict[str, Any]]]:
        """(the text that is certainly no call, the calls that are complete) since the last time."""
        if self._reader is None:
            return text, []
        content = self._reader.push(text)
        if is_end:
            content += self._reader.finish()
        known = len(self.calls)
        self.calls += map(_call, self._reader.calls[: self._most][known:])
        return content, self.calls[known:]


def _call(call: Any) -> dict[str, Any]:
    return {
        "id": f"call_{uuid.uuid4().hex[:24]}",
        "type": "function",
        "function": {"name": call.name, "arguments": call.arguments},
    }


def grammar(chat: protocol.Chat, source: str) -> str | None:
    """The grammar of what tool_choice demands, or of what response_format leaves beside calls.

    None if tools demand none. A forced call has no text that response_format could be about.
    Raises: Refusal if a tool's parameters are no JSON schema that can be followed.
    """
    form = chat.asked.structure
    if chat.tool_choice == "none" or (chat.tool_choice == "auto" and not form):
        return None  # without llguidance too
    from lora_jax.serving import tools

    text = structure.schema(form) if form and chat.tool_choice == "auto" else None
    try:
        return tools.grammar(
            chat.tools, chat.tool_choice, source, parallel=chat.parallel_tool_calls, text=text
        )
    except errors.UserError as error:
        raise refusal.of(error, "tools") from None
