"""The colors of messages: characters that stand for a message in place of its letters.

A chat whose messages are painted is rendered beside the chat itself. The two texts differ only in
the messages, so it is known which message each character belongs to. Imports no jax.
"""

import json
import re
import typing
from collections.abc import Sequence

import numpy as np

Message = dict[str, typing.Any]

# Of a message: one for its text, for its reasoning, for the names of functions it calls, for their
# arguments, and for each key of these, so that keys stay different.
PER_MESSAGE = 16
_TEXT, _REASONS, _NAME, _ARGUMENTS = range(4)
_FIRST, _NUM = 0xF0000, 0x1FFFE  # private use, which templates do not know
MOST_MESSAGES = _NUM // PER_MESSAGE
NOTHING = re.compile("(?!)")
_REASONING = ("reasoning_content", "reasoning", "thinking")
TOOLS = ("tool", "function", "ipython")  # roles
TEXTS = ("text", "input_text", "output_text")  # types of parts
_REASONS_END = "</think>"  # in the text itself
# JSON and HTML escape some characters, and templates look for brackets: these have no color.
_COLORABLE = re.compile(r"""[^\s"'\\<>&{}\[\]|]""")
_BRACKETS = re.compile(r"[{}\[\]|]")  # have one in a text of nothing else


def is_data(message: Message) -> bool:
    """Whether the content is the answer of a tool as data, not as a text or parts with texts.

    It has no color: a template prints it as JSON, or as Python does.
    """
    content = message.get("content")
    if message.get("role") not in TOOLS or content is None or isinstance(content, str):
        return False
    parts = content if isinstance(content, list) else [None]
    texts = (isinstance(part, dict) and part.get("type") in TEXTS for part in parts)
    return not (parts and all(texts))


def painted(message: Message, number: int, keep: re.Pattern[str] = NOTHING) -> Message:
    """The message number `number` in its colors. keep: what has none."""
    text, reasons, name, arguments, *keys = (
        chr(_FIRST + PER_MESSAGE * number + k) for k in range(PER_MESSAGE)
    )

    def paint(value: typing.Any, color: str) -> typing.Any:
        if isinstance(value, str):
            parts, at = [], 0
            for found in keep.finditer(value):
                parts += [_COLORABLE.sub(color, value[at : found.start()]), found.group()]
                at = found.end()
            painted = "".join([*parts, _COLORABLE.sub(color, value[at:])])
            return painted if _COLORABLE.search(value) else _BRACKETS.sub(color, value)
        if isinstance(value, list):
            return [paint(each, color) for each in value]
        if isinstance(value, dict):
            kept = ("type", "id", "role")
            return {k: v if k in kept else paint(v, color) for k, v in value.items()}
        return value

    def paint_arguments(value: typing.Any) -> typing.Any:
        if not isinstance(value, dict):
            return paint(value, arguments)
        # In the order of the keys, which a template may sort.
        colors = dict(zip(sorted(value, key=str.lower), keys, strict=False))
        return {
            paint(key, colors[key]) if key in colors else key: paint(each, arguments)
            for key, each in value.items()
        }

    def paint_call(call: Message) -> Message:
        painted = dict(call)
        if "name" in call:
            painted["name"] = paint(call["name"], name)
        if "arguments" in call:
            painted["arguments"] = paint_arguments(call["arguments"])
        return painted

    result = dict(message)
    if "content" in message and not is_data(message):
        result["content"] = paint(message["content"], text)
    if isinstance(content := message.get("content"), str) and _REASONS_END in content:
        before, end, answer = content.rpartition(_REASONS_END)
        result["content"] = paint(before + end, reasons) + paint(answer, text)
    for field in _REASONING:
        if field in message:
            result[field] = paint(message[field], reasons)
    if "tool_calls" in message:
        result["tool_calls"] = [
            paint_call(call) | {k: paint_call(v) for k, v in call.items() if k == "function"}
            for call in message["tool_calls"]
        ]
    return result


def of_characters(text: str, other: str, messages: Sequence[Message]) -> np.ndarray | None:
    """The number of each character's color, −1 for what the template writes.

    text: of the chat. other: of the painted chat. None if they differ in more than colors.
    """
    if len(other) != len(text):
        return None
    before, after = _codes(text), _codes(other)
    differ = before != after
    if not (after[differ] >= _FIRST).all():
        return None
    return _without_echoes(np.where(differ, after.astype(np.int64) - _FIRST, -1), messages)


def is_whole(message: Message, number: int, seen: set[int]) -> bool:
    """Whether a message's answer and its tool calls are among the colors that were seen. Reasoning
    may be left out, and of a tool call either its name or its arguments."""
    answer = message.get("content")
    if isinstance(answer, str):
        answer = answer.rpartition(_REASONS_END)[2]
    text = _in_colors(painted({"content": answer} if answer else {}, number))
    calls = _in_colors(painted({"tool_calls": message.get("tool_calls", [])}, number))
    return text <= seen and (not message.get("tool_calls") or bool(calls & seen))


def lacks_reasoning(message: Message, number: int, seen: set[int]) -> bool:
    """Whether a message has reasoning, none of which is among the colors that were seen."""
    content = message.get("content")
    within = content.rpartition(_REASONS_END)[0] if isinstance(content, str) else ""
    given = (within.replace("<think>", ""), *map(message.get, _REASONING))
    has = any(isinstance(each, str) and _COLORABLE.search(each) for each in given)
    return has and PER_MESSAGE * number + _REASONS not in seen


def _in_colors(message: Message) -> set[int]:
    codes = _codes(json.dumps(message, ensure_ascii=False, default=str)).astype(np.int64) - _FIRST
    return set(codes[codes >= 0].tolist())


def _without_echoes(owners: np.ndarray, messages: Sequence[Message]) -> np.ndarray:
    """The colors without the names of functions where they are not called: templates write them
    again in front of the answer of a tool."""
    for number, message in enumerate(messages):
        if names := [call.get("function", call)["name"] for call in message.get("tool_calls", ())]:
            at = np.flatnonzero(owners == PER_MESSAGE * number + _NAME)
            owners[at[sum(len(_COLORABLE.findall(name)) for name in names) :]] = -1
    return owners


def _codes(text: str) -> np.ndarray:
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)
