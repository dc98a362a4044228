"""Grammars of texts that call tools, in the form of the chat template. Imports no jax."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from lora_jax.generation import grammar as grammars
from lora_jax.generation import schemas
from lora_jax.serving.requests import tools as calling


def grammar(
    tools: Sequence[Mapping[str, Any]],
    choice: str | Mapping[str, Any],
    source: str,
    *,
    parallel: bool = True,
    text: str | None = None,
    tokens: Mapping[str, int] | None = None,
) -> str | None:
    """The grammar of what tool_choice demands; None if nothing is demanded.

    "required" is one or more calls of any tools, without `parallel` exactly one; a named tool is
    called once. "auto" is such calls, or JSON by the schema `text`. Without one it is free text,
    in which the calls follow the grammar if a tool is `strict` and the form has tags.
    Arguments follow the tool's `parameters`. Keywords that cannot be enforced are an error in a
    tool that is `strict`, and have no effect in others.
    tokens: {text: id} of added tokens that are part of the text, such as <tool_call> of Qwen. A
    grammar spells none of them if it does not name them.
    Raises: UserError if parameters are no JSON schema.
    """
    form = calling.form(source)
    is_free = choice == "auto" and text is None
    if choice == "none" or (is_free and not (form is calling.HERMES and any_strict(tools))):
        return None
    functions = [tool["function"] for tool in tools]
    if not isinstance(choice, str):
        functions = [each for each in functions if each["name"] == choice["function"]["name"]]
    several = parallel and isinstance(choice, str)
    tokens = tokens or {}
    if is_free:
        start = _among_text(form, tokens)
    elif form is calling.HERMES:
        one = f'{_tag(form.opening, tokens)} "\\n" call "\\n" {_tag(form.closing, tokens)}'
        start = rf'start: {one} ("\n" {one})*' if several else f"start: {one}"
    elif form is calling.MISTRAL:
        start = 'start: "[" call (", " call)* "]"' if several else 'start: "[" call "]"'
    else:  # these models write one call at a time
        start = "start: call"
    if text is not None:
        start += f" | text\ntext: %json {text}"
    call = " | ".join(f"call{number}" for number in range(len(functions)))
    is_json = text is not None and form.bare == "{"
    rules = (
        _call(number, each, form.key, is_json=is_json) for number, each in enumerate(functions)
    )
    return grammars.lark("\n".join((start, f"call: {call}", *rules)))


def any_strict(tools: Sequence[Mapping[str, Any]]) -> bool:
    """Whether the arguments of a tool must follow its parameters."""
    return any(tool["function"].get("strict") is True for tool in tools)


def _call(number: int, function: Mapping[str, Any], key: str, *, is_json: bool) -> str:
    """The rules of a call. is_json: it is read as JSON, of which other JSON is told apart late."""
    schema = {"type": "object", **(function.get("parameters") or {"properties": {}})}
    if schema.get("properties") == {}:  # which is how a function without parameters is written
        schema.setdefault("additionalProperties", False)
    if is_json:
        schema = {
            "type": "object",
            "properties": {
                "name": {"const": function["name"]},
                key: schemas.within(schema, f"/properties/{key}"),
            },
            "required": ["name", key],
            "additionalProperties": False,
        }
    text = grammars.schema_text(schema, lenient=function.get("strict") is not True)
    if is_json:
        return f"call{number}: %json {text}"
    head = grammars.quoted(f'{{"name": {json.dumps(function["name"])}, "{key}": ')
    return f'call{number}: {head} arguments{number} "}}"\narguments{number}: %json {text}'


def _among_text(form: calling.Form, tokens: Mapping[str, int]) -> str:
    """The rules of text with any number of calls in it."""
    opening = _tag(form.opening, tokens)
    body = rf'"\n" call "\n" {_tag(form.closing, tokens)}'
    if form.opening not in tokens:
        rules = ("start: called* TEXT", f"called: opening {body}", f"opening[lazy]: TEXT {opening}")
    else:
        others = [str(token) for name, token in tokens.items() if name != form.opening]
        free = f"free: (TEXT <[{','.join(others)}]>)* TEXT" if others else "free: TEXT"
        rules = ("start: (free called)* free", f"called: {opening} {body}", free)
    return "\n".join((*rules, "TEXT: /(?s:.*)/"))


def _tag(text: str, tokens: Mapping[str, int]) -> str:
    """A tag as a grammar has it: the one token that it is, or its characters."""
    return f"<[{tokens[text]}]>" if text in tokens else grammars.quoted(text)
