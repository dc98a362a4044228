"""The body of /v1/responses → that of a chat, which `protocol` reads and checks.

What needs a memory of earlier responses is refused: this server keeps none.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from lora_jax.serving import refusal
from lora_jax.serving.requests import fields as reading
from lora_jax.serving.requests import protocol, unsupported

Json = dict[str, Any]

_LOGPROBS = "message.output_text.logprobs"
_NOTHING_STORED = "this server stores no responses; send the whole conversation as input"
_CHAT = {  # fields of the chat, by what they are called here
    "messages": "input",
    "response_format": "text.format",
    "max_completion_tokens": "max_output_tokens",
    "max_tokens": "max_output_tokens",
}
_REFUSED = {
    "previous_response_id": unsupported.Known(do=_NOTHING_STORED),
    "conversation": unsupported.Known(do=_NOTHING_STORED),
    "store": unsupported.Known((False,), _NOTHING_STORED),
    "background": unsupported.Known((False,)),
    "prompt": unsupported.Known(do="use instructions and input"),
    "messages": unsupported.Known(do="use input, or /v1/chat/completions"),
    "response_format": unsupported.Known(do="use text.format"),
    "max_completion_tokens": unsupported.Known(do="use max_output_tokens"),
    "max_tokens": unsupported.Known(do="use max_output_tokens"),
    "n": unsupported.Known((1,), "use /v1/chat/completions"),
    "truncation": unsupported.Known(("disabled",), "use truncate_prompt_tokens"),
    "max_tool_calls": unsupported.Known(),
    "context_management": unsupported.Known(([],)),
    "moderation": unsupported.Known(),
    "prompt_logprobs": unsupported.Known(do="use /v1/completions"),
}
_OWN = (*_REFUSED, "input", "instructions", "include", "reasoning", "text", "stream_options",
        "max_output_tokens", "tools", "tool_choice", "top_logprobs")  # fmt: skip
_TEXTS = ("input_text", "output_text", "text")


def read(body: Mapping[str, Any]) -> protocol.Chat:
    """The chat that a request to /v1/responses asks for. Raises: Refusal."""
    given = reading.Fields(body)
    unsupported.note(given, _REFUSED, both={})
    made = {name: value for name, value in body.items() if name not in _OWN}
    made["max_completion_tokens"] = given.whole("max_output_tokens", least=1)
    made |= _logprobs(given) | _reasoning(given) | _text(given) | _tools(given)
    made["messages"] = _messages(given)
    given.raise_problems()
    try:
        return protocol.chat(made)
    except refusal.Refusal as error:
        raise renamed(error) from None


def renamed(error: refusal.Refusal) -> refusal.Refusal:
    """An error of the chat that a request was read as, with the names that the request has."""
    message = re.sub(
        r"\b(" + "|".join(_CHAT) + r")\b", lambda found: _CHAT[found[0]], error.message
    )
    return refusal.Refusal(
        message, status=error.status, code=error.code, headers=error.headers,
        param=_CHAT.get(error.param or "", error.param),
    )  # fmt: skip


def _logprobs(given: reading.Fields) -> Json:
    asked = given.array("include", str, "strings")
    # Models here have no reasoning that is kept apart, so none has to be included.
    if unknown := [
        each for each in asked if each not in (_LOGPROBS, "reasoning.encrypted_content")
    ]:
        given.wrong("include", f"{unknown[0]!r} is not supported here; leave it out")
    top = given.whole("top_logprobs", 0, least=0)
    return {"logprobs": True, "top_logprobs": top} if top or _LOGPROBS in asked else {}


def _reasoning(given: reading.Fields) -> Json:
    asked = given.object("reasoning")
    for name, value in asked.items():
        if name != "effort" and value is not None:
            given.wrong(f"reasoning.{name}", "not supported here; leave it out")
    return {"reasoning_effort": asked.get("effort")}


def _text(given: reading.Fields) -> Json:
    """response_format, and verbosity as chats have it."""
    asked = given.object("text")
    made, form = {"verbosity": asked.get("verbosity")}, asked.get("format")
    if isinstance(form, dict) and form.get("type") == "json_schema":
        form = {"type": "json_schema", "json_schema": {**form}}
    return {**made, "response_format": form}


def _tools(given: reading.Fields) -> Json:
    """tools and tool_choice with the functions' names where chats have them."""
    tools = [_function(tool) for tool in given.array("tools", dict, "objects")]
    choice = given.get("tool_choice")
    if isinstance(choice, dict) and choice.get("type") == "function":
        choice = _function(choice)
    elif isinstance(choice, dict) and choice.get("type") == "allowed_tools":
        allowed = choice.get("tools")
        if isinstance(allowed, list):
            allowed = [_function(each) if isinstance(each, dict) else each for each in allowed]
        within = {"mode": choice.get("mode"), "tools": allowed}
        choice = {"type": "allowed_tools", "allowed_tools": within}
    return {"tools": tools or None, "tool_choice": choice}


def _function(tool: Json) -> Json:
    if tool.get("type") != "function":
        return tool
    known = ("name", "description", "parameters", "strict")
    function = {name: tool[name] for name in known if tool.get(name) is not None}
    return {"type": "function", "function": function}


def _messages(given: reading.Fields) -> list[Any]:
    """The messages of a chat: instructions, then the items of the input."""
    asked, messages = given.get("input"), []
    instructions = given.text("instructions")
    if instructions:
        messages.append({"role": "system", "content": instructions})
    if isinstance(asked, str):
        return [*messages, {"role": "user", "content": asked}]
    if not isinstance(asked, list) or not asked:
        given.wrong("input", "expected a string, or an array with at least one item")
        return messages
    for number, item in enumerate(asked):
        _add(messages, item, f"input.{number}", given)
    return messages


def _add(messages: list[Any], item: object, where: str, given: reading.Fields) -> None:
    """Adds an item of the input to the messages."""
    kind = item.get("type", "message") if isinstance(item, dict) else None
    if not isinstance(item, dict):
        given.wrong(where, f"{reading.kind(item)}, not an object")
    elif kind == "message":
        role, content = item.get("role"), _content(item.get("content"))
        messages.append({"role": role, "content": content})
    elif kind == "function_call":
        function = {name: item.get(name) for name in ("name", "arguments")}
        call = {"id": item.get("call_id"), "type": "function", "function": function}
        last = messages[-1] if messages else {}
        if last.get("role") != "assistant":  # calls follow the text of their turn
            last = {"role": "assistant", "content": None}
            messages.append(last)
        last.setdefault("tool_calls", []).append(call)
    elif kind == "function_call_output":
        content = _content(item.get("output"))
        messages.append({"role": "tool", "tool_call_id": item.get("call_id"), "content": content})
    elif kind == "item_reference":
        given.wrong(where, _NOTHING_STORED)
    else:
        given.wrong(where, f"the type {kind!r} is none of message, function_call, "
                    "function_call_output")  # fmt: skip


def _content(content: object) -> object:
    """Parts of text as chats have them; others as they are, which are refused there."""
    if not isinstance(content, Sequence) or isinstance(content, str):
        return content
    return [
        {"type": "text", "text": part.get("text")}
        if isinstance(part, dict) and part.get("type") in _TEXTS
        else part
        for part in content
    ]
