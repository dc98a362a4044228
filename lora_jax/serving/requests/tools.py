"""Calls of tools in generated text.

How a model writes a call is read off the text of its chat template:

  <tool_call>      Hermes and Qwen: <tool_call>{"name": …, "arguments": {…}}</tool_call>, anywhere;
                   SmolLM writes a list of calls there
  [TOOL_CALLS]     Mistral: [TOOL_CALLS] [{"name": …, "arguments": {…}}, …], or
                   [TOOL_CALLS]name[ARGS]{…}
  "parameters":    Llama 3.1 and 3.2: {"name": …, "parameters": {…}} alone or after <|python_tag|>;
                   several are divided by ";"
  none of these    as Llama, with the key "arguments"

[TOOL_CALLS] and <|python_tag|> are special tokens, which text usually leaves out: at its beginning,
a call may be without them. Imports no jax.
"""

import contextlib
import json
import re
from collections.abc import Collection
from typing import NamedTuple


class Call(NamedTuple):
    """A call of a tool. arguments: the text of a JSON object."""

    name: str
    arguments: str


class Form(NamedTuple):
    """How calls are written: between opening and closing, which may be "".

    bare: what begins a call at the beginning of a text, where the opening is left out; "": nothing.
    key: of the arguments. named: the name may also be in front of the arguments.
    """

    opening: str
    closing: str = ""
    bare: str = ""
    key: str = "arguments"
    named: bool = False


_NAME = re.compile(r"\s*([\w.-]+)(?:\[CALL_ID\]\w+)?(?:\[ARGS\])?\s*(?=\{)")
_FIRST_KEYS = ("name", "type", "function", "id", "parameters", "arguments")  # of a call
_DECODER = json.JSONDecoder(strict=False)  # models write line breaks into strings

HERMES = Form("<tool_call>", "</tool_call>")
MISTRAL = Form("[TOOL_CALLS]", bare="[", named=True)
_LLAMA = Form("<|python_tag|>", bare="{", key="parameters")
_OTHER = Form("<|python_tag|>", bare="{")


def form(source: str) -> Form:
    """How calls are written with this chat template."""
    if HERMES.opening in source:
        return HERMES
    if MISTRAL.opening in source:
        return MISTRAL
    return _LLAMA if re.search(r'"parameters\\?": ', source) else _OTHER


class Parser:
    """Divides text that comes in pieces into its calls and the text beside them.

    `push` returns text that is certainly no part of a call, `finish` the rest of it. `calls` grows
    as calls are completed. What looks like a call and is none is text, and no text is lost but
    spaces next to a call.

    source: the chat template. names: of the tools. A call without an opening is one only if it
    calls one of them; None: any name.
    """

    def __init__(self, source: str, names: Collection[str] | None = None):
        self.calls: list[Call] = []
        self._form, self._names = form(source), names
        self._held = ""
        self._bare = bool(self._form.bare)  # whether a call may begin here without an opening
        self._after_call = False

    def push(self, text: str) -> str:
        self._held += text
        return self._advance(reads=any(end in text for end in "}>"), is_end=False)

    def finish(self) -> str:
        return self._advance(reads=True, is_end=True)

    def _advance(self, *, reads: bool, is_end: bool) -> str:
        """Takes what is decided off the held text, and returns what of it is no call.

        reads: whether a call may have been completed since the last time.
        """
        free = ""
        while self._held:
            if self._after_call:
                self._held = self._held.lstrip("; \n\r\t" if self._form.bare else None)
            begun = self._begin()
            if begun is None:
                keep = 0 if is_end else self._undecided()
                return free + self._release(len(self._held) - keep)
            place, size = begun
            before = self._held[:place].rstrip()  # spaces before a call are not text
            start = place + size
            found = self._read(start, is_bare=not size, is_end=is_end) if reads else None
            if found is None and not is_end and self._may_be_call(self._held[start:]):
                return free + self._release(len(before))
            if found and found[0]:
                free += before
                self.calls += found[0]
                self._held = self._held[found[1] :]
                self._after_call, self._bare = True, bool(self._form.bare)
            else:
                free += self._release(start or 1)
        return free

    def _release(self, size: int) -> str:
        text, self._held = self._held[:size], self._held[size:]
        if text:
            self._bare = self._after_call = False
        return text

    def _begin(self) -> tuple[int, int] | None:
        """Where a call may begin, and the length of its opening; None: nowhere yet."""
        first = len(self._held) - len(self._held.lstrip())
        rest = self._held[first:]
        is_begun = rest.startswith(self._form.bare) or (self._form.named and self._names)
        if self._bare and rest and is_begun and self._may_be_call(rest, is_bare=True):
            return first, 0
        place = self._held.find(self._form.opening)
        return None if place < 0 else (place, len(self._form.opening))

    def _undecided(self) -> int:
        """The length of the end of the held text that may belong to a call: the beginning of an
        opening, and the spaces before it."""
        size = min(len(self._form.opening) - 1, len(self._held))
        while size and not self._held.endswith(self._form.opening[:size]):
            size -= 1
        before = self._held[: len(self._held) - size]
        return size + len(before) - len(before.rstrip())

    def _may_be_call(self, text: str, *, is_bare: bool = False) -> bool:
        """Whether a text that is perhaps not complete can be that of a call."""
        start = re.match(r"\s*\[?\s*\{?\s*", text)
        rest = text[start.end() :] if start else text
        if not rest or (start and "{" in start[0]):
            return not rest or any(
                f'"{key}"'.startswith(rest[: len(key) + 2]) for key in _FIRST_KEYS
            )
        name = re.match(r"\s*([\w.-]+)\s*(\S?)", text) if self._form.named else None
        if not name or name[2] not in ("", "{", "["):
            return False
        known = self._names or ()
        return not is_bare or (
            name[1] in known if name[2] else any(each.startswith(name[1]) for each in known)
        )

    def _read(self, start: int, *, is_bare: bool, is_end: bool) -> tuple[list[Call], int] | None:
        """The calls whose text begins at `start`, and where it ends; None if it is not complete."""
        name = _NAME.match(self._held, start) if self._form.named else None
        if name:
            start = name.end()
        start += len(self._held[start:]) - len(self._held[start:].lstrip())
        try:
            value, end = _DECODER.raw_decode(self._held, start)
        except (ValueError, RecursionError):
            return None
        calls = _calls({"name": name[1], "arguments": value} if name else value)
        if is_bare and not all(self._names is None or call.name in self._names for call in calls):
            calls = []
        if is_bare and not name and _has_other_keys(value):
            calls = []
        rest = self._held[end:].lstrip()
        if rest.startswith(self._form.closing):
            return calls, len(self._held) - len(rest) + len(self._form.closing)
        return None if self._form.closing.startswith(rest) and not is_end else (calls, end)


def _calls(value: object) -> list[Call]:
    """The calls that JSON stands for; [] if a part of it is none."""
    values = value if isinstance(value, list) else [value]
    calls = [_call(each) for each in values]
    return [] if None in calls else [each for each in calls if each]


def _has_other_keys(value: object) -> bool:
    """Whether JSON has keys that a call does not have: an answer that happens to look like one."""
    values = value if isinstance(value, list) else [value]
    return any(isinstance(each, dict) and each.keys() - {*_FIRST_KEYS} for each in values)


def _call(value: object) -> Call | None:
    if isinstance(value, dict) and isinstance(value.get("function"), dict):  # as OpenAI writes it
        value = value["function"]
    if not isinstance(value, dict) or not isinstance(value.get("name"), str) or not value["name"]:
        return None
    given = [value[key] for key in ("arguments", "parameters") if value.get(key) is not None]
    arguments = given[0] if given else {}
    if isinstance(arguments, str):  # JSON within JSON
        with contextlib.suppress(ValueError, RecursionError):
            arguments = _DECODER.decode(arguments)
    if not isinstance(arguments, dict):
        return None
    return Call(value["name"], json.dumps(arguments, ensure_ascii=False))
