"""What a text must follow: response_format, structured_outputs, and the tools of a chat."""

import re
from collections.abc import Callable
from typing import Any, NamedTuple

from lora_jax import errors
from lora_jax.serving import refusal
from lora_jax.serving.requests import fields as reading

_NAME = re.compile(r"[\w.-]{1,128}", re.ASCII)
_KINDS = ("json", "regex", "choice", "grammar", "json_object")


class Structure(NamedTuple):
    """kind: one of json, regex, choice, grammar, json_object. param: the field that asked for it.

    strict: keywords of a JSON schema that cannot be enforced are an error, not ignored.
    """

    kind: str
    value: Any
    param: str
    strict: bool = True


def grammar(structure: Structure) -> str:
    """The grammar of a structure. Raises: Refusal if it has an error."""
    from lora_jax.generation import grammar as grammars

    make: dict[str, Callable[[], str]] = {
        "json": lambda: grammars.json_schema(structure.value, lenient=not structure.strict),
        "json_object": grammars.json_object,
        "regex": lambda: grammars.regex(structure.value),
        "choice": lambda: grammars.choice(structure.value),
        "grammar": lambda: grammars.lark(structure.value),
    }
    try:
        return make[structure.kind]()
    except errors.UserError as error:
        raise refusal.of(error, structure.param) from None


def schema(response_format: Structure) -> str:
    """The schema of a response_format, as llguidance takes it. Raises: Refusal if it is none."""
    from lora_jax.generation import grammar as grammars

    asked = response_format.value if response_format.kind == "json" else {"type": "object"}
    try:
        return grammars.schema_text(asked, lenient=not response_format.strict)
    except errors.UserError as error:
        raise refusal.of(error, response_format.param) from None


def read(given: reading.Fields) -> Structure | None:
    """What the text must follow; None if it is free."""
    found = [
        *_response_format(given),
        *_structured_outputs(given.object("structured_outputs"), "structured_outputs", given),
        *_structured_outputs(  # vLLM's older names
            {kind: given.get(f"guided_{kind}") for kind in _KINDS}, "guided", given
        ),
    ]
    if len(found) > 1:
        names = " and ".join(each.param for each in found)
        given.wrong(found[-1].param, f"only one of {names} can be followed")
    return found[0] if found else None


def _response_format(given: reading.Fields) -> list[Structure]:
    name = "response_format"
    asked = given.object(name)
    kind = asked.get("type", "text" if not asked else None)
    if kind == "text":
        return []
    if kind == "json_object" and asked.get("schema") is None:
        return [Structure("json_object", None, name)]
    if kind in ("json_schema", "json_object"):
        within = asked.get("json_schema")
        if within is None:
            within = asked  # llama.cpp's and Together's form: the schema beside the type
        schema = within.get("schema") if isinstance(within, dict) else None
        if isinstance(schema, dict | bool):
            return [Structure("json", schema, name, within.get("strict") is True)]
        given.wrong(name, 'expected {"type": "json_schema", "json_schema": {"name": …, "schema": '
                    "{…}}}")  # fmt: skip
    else:
        given.wrong(name, f"the type {kind!r} is none of text, json_object, json_schema")
    return []


def _structured_outputs(asked: dict[str, Any], name: str, given: reading.Fields) -> list[Structure]:
    found = []
    for kind, value in asked.items():
        if value is None or (kind == "json_object" and value is False):
            continue
        param = f"{name}_{kind}" if name == "guided" else f"{name}.{kind}"
        fits = {
            "json": isinstance(value, dict | str | bool),
            "regex": isinstance(value, str),
            "choice": isinstance(value, list) and value and all(isinstance(v, str) for v in value),
            "grammar": isinstance(value, str),
            "json_object": value is True,
        }
        if not fits.get(kind, True):
            given.wrong(param, f"{reading.kind(value)} cannot be followed")
        elif kind == "json" and isinstance(value, str):  # the text of a schema, as vLLM takes it
            try:
                found.append(Structure(kind, reading.parse(value.encode()), param, strict=False))
            except refusal.Refusal as error:
                given.wrong(param, error.message)
        elif kind in fits:
            found.append(Structure(kind, value, param, strict=False))
        elif kind not in ("disable_any_whitespace", "disable_fallback") or value is not False:
            given.wrong(param, "not supported here; leave it out")
    return found


def tools(given: reading.Fields) -> tuple[list[dict[str, Any]], str | dict[str, Any]]:
    """The tools of a chat, and which of them are to be called."""
    found = given.array("tools", dict, "objects")
    names = []
    for number, tool in enumerate(found):
        function, name = tool.get("function"), _name(tool)
        parameters = function.get("parameters") if isinstance(function, dict) else None
        if tool.get("type", "function") != "function":
            given.wrong(f"tools.{number}", f'the type {tool.get("type")!r} is not "function"')
        elif name is None or not _NAME.fullmatch(name):
            given.wrong(f"tools.{number}", "expected function.name of letters, digits, _ . -")
        elif parameters is not None and not isinstance(parameters, dict):
            given.wrong(f"tools.{number}", "function.parameters is no JSON schema")
        else:
            names.append(name)
    if len(set(names)) < len(names):
        given.wrong("tools", "two functions have the same name")
    choice = given.get("tool_choice")
    if choice is None:
        return found, "auto" if found else "none"
    if isinstance(choice, dict) and choice.get("type") == "allowed_tools":
        found, choice = _allowed(given, found, choice.get("allowed_tools"))
    if choice in ("none", "auto", "required"):
        if choice == "required" and not found:
            given.wrong("tool_choice", "required without tools")
        return found, choice if found else "none"
    function = choice.get("function") if isinstance(choice, dict) else None
    if not isinstance(function, dict) or choice.get("type", "function") != "function":
        given.wrong("tool_choice", 'expected none, auto, required or {"type": "function", '
                    '"function": {"name": …}}')  # fmt: skip
        return found, "none"
    if function.get("name") not in names:
        given.wrong("tool_choice", f"no tool has the name {function.get('name')!r}")
    return found, choice


def _allowed(
    given: reading.Fields, tools: list[dict[str, Any]], allowed: object
) -> tuple[list[dict[str, Any]], str]:
    """The tools that tool_choice leaves of all, and "auto" or "required"."""
    mode, listed = None, []
    if isinstance(allowed, dict):
        mode, listed = allowed.get("mode"), allowed.get("tools")
    known = {_name(tool): tool for tool in tools}
    names = [_name(tool) for tool in listed] if isinstance(listed, list) else []
    if mode not in ("auto", "required") or not names:
        given.wrong("tool_choice", 'expected allowed_tools: {"mode": "auto" or "required", '
                    '"tools": [{"type": "function", "function": {"name": …}}, …]}')  # fmt: skip
        return tools, "auto"
    for name in names:
        if name not in known:
            given.wrong("tool_choice", f"no tool has the name {name!r}")
    return [tool for name, tool in known.items() if name in names], mode


def _name(tool: object) -> str | None:
    """The name of a function; None if it has none."""
    function = tool.get("function") if isinstance(tool, dict) else None
    name = function.get("name") if isinstance(function, dict) else None
    return name if isinstance(name, str) else None
