"""Calls of tools in a chat's output, and the grammar that forces one."""

import typing
import uuid
from typing import Any

from lora_jax import errors
from lora_jax.serving import refusal
from lora_jax.serving.requests import protocol, structure

if typing.TYPE_CHECKING:
    import transformers


class Parser:
    """Divides the output of a choice into its text and its calls of tools, as it comes."""

    def __init__(self, chat: protocol.Chat, source: str):
        """source: the chat template, which says how the model writes calls."""
        self.calls: list[dict[str, Any]] = []
        self._most = None if chat.parallel_tool_calls else 1
        self._reader: Any = None
        if chat.tools and chat.tool_choice != "none":
            from lora_jax.serving.requests import tools

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


def grammar(
    chat: protocol.Chat, source: str, reader: "transformers.PreTrainedTokenizerBase"
) -> str | None:
    """The grammar of what tool_choice, response_format and strict tools demand.

    None if they demand none. A forced call has no text that response_format could be about.
    Raises: Refusal if a tool's parameters are no JSON schema that can be followed.
    """
    form = chat.asked.structure
    is_free = chat.tool_choice == "auto" and not form
    if chat.tool_choice == "none" or (is_free and not chat.tools):
        return None  # without llguidance too
    from lora_jax.serving.requests import tool_grammar

    text = structure.schema(form) if form and chat.tool_choice == "auto" else None
    shown = {  # in the text, in which calls are found
        name: token
        for name, token in reader.get_added_vocab().items()
        if token not in reader.all_special_ids
    }
    try:
        return tool_grammar.grammar(
            chat.tools, chat.tool_choice, source,
            parallel=chat.parallel_tool_calls, text=text, tokens=shown,
        )  # fmt: skip
    except errors.UserError as error:
        raise refusal.of(error, "tools") from None
