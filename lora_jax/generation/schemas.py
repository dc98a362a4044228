"""JSON schemas as people and libraries write them → as llguidance follows them. Imports no jax."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

# Formats of strings that are enforced. By JSON Schema a program may ignore those it does not know.
_FORMATS = frozenset(
    "date-time time date duration email hostname ipv4 ipv6 uuid uri unknown".split()
)
_NAMED = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")
_VALUES = ("const", "enum", "default", "examples")
_JOINS = ("$ref", "$dynamicRef", "allOf", "anyOf", "oneOf", "not", "if", "dependentSchemas")
_MORE = ("additionalProperties", "patternProperties", "propertyNames", "unevaluatedProperties",
         "minProperties")  # fmt: skip


def followable(schema: Any, drops: Callable[[str], bool]) -> Any:
    """A copy of a schema that demands the same, or more.

    Formats of strings that cannot be enforced are left out, and patterns that `drops`. An object
    has no properties but those that its schema lists, unless `additionalProperties` says that it
    may: models go on inventing properties until the text is cut.
    """
    return _copy(schema, drops, closes=not _combines(schema))


def within(schema: Any, place: str) -> Any:
    """A copy of a schema as a part of another; place: the JSON pointer to it there."""
    if isinstance(schema, Sequence) and not isinstance(schema, str):
        return [within(each, place) for each in schema]
    if not isinstance(schema, Mapping):
        return schema
    return {
        name: f"#{place}{value[1:]}"
        if name == "$ref" and isinstance(value, str) and value.startswith("#")
        else value
        if name in _VALUES
        else within(value, place)
        for name, value in schema.items()
    }


def _copy(schema: Any, drops: Callable[[str], bool], *, closes: bool) -> Any:
    def copy(each: Any) -> Any:
        return _copy(each, drops, closes=closes)

    if isinstance(schema, Sequence) and not isinstance(schema, str):
        return [copy(each) for each in schema]
    if not isinstance(schema, Mapping):
        return schema
    copied = {
        name: {key: copy(each) for key, each in value.items()}
        if name in _NAMED and isinstance(value, Mapping)
        else value
        if name in _VALUES
        else copy(value)
        for name, value in schema.items()
        if not (name == "format" and value not in _FORMATS)
        and not (name == "pattern" and isinstance(value, str) and drops(value))
    }
    if closes and _lists_all(schema):
        copied["additionalProperties"] = False
    return copied


def _lists_all(schema: Mapping[str, Any]) -> bool:
    """Whether an object's schema lists all properties that it needs, and says nothing of others."""
    listed, required = schema.get("properties"), schema.get("required", [])
    return (
        isinstance(listed, Mapping)
        and bool(listed)
        and not any(name in schema for name in _MORE)
        and isinstance(required, Sequence)
        and all(name in listed for name in required)
    )


def _combines(schema: Any) -> bool:
    """Whether somewhere an object must follow two schemas, each of which lists a part of it."""
    if isinstance(schema, Sequence) and not isinstance(schema, str):
        return any(map(_combines, schema))
    if not isinstance(schema, Mapping):
        return False
    joins = [name for name in _JOINS if name in schema]
    every = schema.get("allOf", [])
    if joins and (
        len(joins) > 1
        or (isinstance(every, Sequence) and len(every) > 1)
        or joins[0] in ("not", "if", "dependentSchemas")
        or any(name in schema for name in ("properties", "required", *_MORE))
    ):
        return True
    return any(
        any(map(_combines, value.values()))
        if name in _NAMED and isinstance(value, Mapping)
        else _combines(value)
        for name, value in schema.items()
        if name not in _VALUES
    )
