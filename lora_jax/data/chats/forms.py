"""The forms of a chat's messages that chat templates expect. Imports no jax."""

import json
import re
import typing
from collections.abc import Callable, Iterator

from lora_jax.data.chats import colors, messages
from lora_jax.data.chats.template import ChatError, Message

_OLD_ROLES = {"developer": "system", "function": "tool"}  # of templates that do not know the first


def of(chat: list[Message], source: str) -> Iterator[list[Message]]:
    """Yields the messages in the forms that templates expect, the most likely one first.

    Templates differ in whether a list of text parts is joined or passed on, in whether a tool's
    arguments, and its answer, are an object or JSON text, and in where reasoning is. source: the
    template.
    """
    chat = [_without_own_parts(_known_role(message, source), source) for message in chat]
    yield from _forms(chat, source)
    if any(map(colors.is_data, chat)):  # if the template does not print them
        yield from _forms([_with_data_as_text(message) for message in chat], source)
    yield [{"content": "", **message} for message in chat]


def _forms(chat: list[Message], source: str) -> Iterator[list[Message]]:
    """The same, but of messages with known roles and tools' answers as they are."""
    has_parts = any(map(_has_parts, chat))
    calls = [call for message in chat for call in _functions(message)]
    has_text = any(isinstance(call.get("arguments"), str) for call in calls)
    arguments: list[Callable[[object], object]] = [_as_object, _as_text] if calls else [_same]
    if has_text and re.search(r"arguments\S*\s+is\s+(not\s+)?(string|mapping)", source):
        arguments.insert(0, _same)
    for convert in arguments:
        with_calls = [_with_arguments(message, convert) for message in chat]
        if has_parts:
            if _reads_parts(source):
                yield with_calls
            yield [_joined(message) for message in with_calls]
            yield with_calls
        else:
            yield with_calls
            if _reads_parts(source):
                yield [_as_parts(message) for message in with_calls]


def _without_own_parts(message: Message, source: str) -> Message:
    """The message with fields in place of parts with reasoning and tool calls; but the reasoning
    stays a part if the template reads it there, as Magistral's."""
    content = message.get("content")
    if message["role"] != "assistant" or not isinstance(content, list):
        return message
    stays = re.search(r"==\s*['\"]thinking['\"]", source)
    found, kept = dict(message), []
    for part in content:
        own = messages.own_part(part)
        if not own or (stays and part["type"] == "thinking"):
            kept.append(part)
        elif "tool_calls" in own:
            found["tool_calls"] = [*found.get("tool_calls", ()), *own["tool_calls"]]
        else:
            before = found.get("reasoning_content")
            texts = filter(None, [before, own["reasoning_content"]])
            found["reasoning_content"] = "\n".join(texts)
    return {**found, "content": kept} if len(kept) < len(content) else message


def _functions(message: Message) -> list[dict[str, typing.Any]]:
    return [call.get("function", call) for call in message.get("tool_calls", ())]


def _with_arguments(message: Message, convert: Callable[[object], object]) -> Message:
    if "tool_calls" not in message:
        return message
    calls = []
    for call in message["tool_calls"]:
        function = dict(call.get("function", call))
        if function.get("arguments") is not None:
            function["arguments"] = convert(function["arguments"])
        calls.append({**call, "function": function} if "function" in call else function)
    return {**message, "tool_calls": calls}


def _same(value: object) -> object:
    return value


def _as_object(value: object) -> object:
    found = messages.parsed(value)
    return found if isinstance(found, dict | list) else value


def _as_text(value: object) -> object:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def _known_role(message: Message, source: str) -> Message:
    """The message with a role that the template may know. Raises: ChatError if it has none."""
    role = message["role"]
    if re.search(rf"['\"]{re.escape(role)}['\"]", source):
        return message
    if role in _OLD_ROLES:
        return {**message, "role": _OLD_ROLES[role]}
    if role not in messages.KNOWN:
        raise ChatError(f"unknown role {role!r}; known are {', '.join(messages.KNOWN)}")
    return message


def _reads_parts(source: str) -> bool:
    """Whether a template looks into a list of parts, for their text. Others may print the list."""
    text = r"""\.text\b|\[\s*['"]text['"]\s*\]|(get\(|\battribute\s*=)\s*['"]text['"]"""
    return bool(re.search(text, source))


def _has_parts(message: Message) -> bool:
    return isinstance(message.get("content"), list) and not colors.is_data(message)


def _with_data_as_text(message: Message) -> Message:
    if not colors.is_data(message):
        return message
    return {**message, "content": _as_text(message["content"])}


def _joined(message: Message) -> Message:
    if not _has_parts(message):
        return message
    return {**message, "content": messages.text_of(message)}


def _as_parts(message: Message) -> Message:
    content = message.get("content")
    if not isinstance(content, str):
        return message
    return {**message, "content": [{"type": "text", "text": content}]}
