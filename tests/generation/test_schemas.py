"""Schemas of people and libraries: what is closed, what is left out, what stays as it is."""

import copy

import pytest

from lora_jax.generation import schemas

POINT = {"type": "object", "properties": {"x": {}, "y": {}}, "required": ["x"]}
NAMED = {"type": "object", "properties": {"name": {}}, "required": ["name"]}
CLOSED = {"additionalProperties": False}


def followable(schema):
    before = copy.deepcopy(schema)
    made = schemas.followable(schema, drops=lambda pattern: "(?" in pattern)
    assert schema == before
    return made


@pytest.mark.parametrize(
    ("schema", "made"),
    [
        (POINT, POINT | CLOSED),
        ({"items": POINT}, {"items": POINT | CLOSED}),
        # As pydantic writes an optional field, a reference with a default, and a union.
        (
            {"$defs": {"P": POINT}, "properties": {"p": {
                "anyOf": [{"$ref": "#/$defs/P"}, {"type": "null"}], "default": None}}},
            {"$defs": {"P": POINT | CLOSED}, "properties": {"p": {
                "anyOf": [{"$ref": "#/$defs/P"}, {"type": "null"}], "default": None}}} | CLOSED,
        ),
        (
            {"$defs": {"P": POINT}, "$ref": "#/$defs/P", "type": "object"},
            {"$defs": {"P": POINT | CLOSED}, "$ref": "#/$defs/P", "type": "object"},
        ),
        (
            {"oneOf": [POINT, NAMED], "discriminator": {"propertyName": "kind"}},
            {"oneOf": [POINT | CLOSED, NAMED | CLOSED],
             "discriminator": {"propertyName": "kind"}},
        ),
        ({"properties": {"not": {}, "if": {}}}, {"properties": {"not": {}, "if": {}}} | CLOSED),
    ],
)  # fmt: skip
def test_objects_have_no_properties_but_those_listed(schema, made):
    assert followable(schema) == made


@pytest.mark.parametrize(
    "schema",
    [
        True,
        {"type": "object"},
        {"type": "object", "properties": {}},
        POINT | {"additionalProperties": True},
        POINT | {"additionalProperties": {"type": "string"}},
        POINT | {"patternProperties": {"^a": {}}},
        POINT | {"minProperties": 3},
        POINT | {"required": ["x", "z"]},
        # An object that follows both has the properties of both.
        {"allOf": [POINT, NAMED]},
        {"$defs": {"P": POINT}, "$ref": "#/$defs/P", "properties": {"name": {}}},
        {"$defs": {"P": POINT}, "$ref": "#/$defs/P", "required": ["name"]},
        POINT | {"anyOf": [{"required": ["x"]}, {"properties": {"z": {}}}]},
        {"anyOf": [POINT, NAMED], "allOf": [NAMED]},
        {"items": {"not": POINT}},
        {"if": POINT, "then": NAMED},
        {"enum": [POINT], "default": POINT},
    ],
)
def test_objects_that_may_have_others_stay_open(schema):
    assert followable(schema) == schema


def test_formats_and_patterns_that_cannot_be_enforced_are_left_out():
    schema = {"items": {"format": "phone", "pattern": "^(?!a)"}, "format": "date", "pattern": "a"}
    assert followable(schema) == {"items": {}, "format": "date", "pattern": "a"}
    named = {"properties": {"format": {"const": 1}, "pattern": {"const": "(?"}}}
    assert followable(named) == named | CLOSED


def test_references_hold_within_another_schema():
    schema = {"$defs": {"a": {"const": "#"}}, "items": [{"$ref": "#/$defs/a"}, {"$ref": "#"}]}
    made = {"$defs": {"a": {"const": "#"}}, "items": [{"$ref": "#/x/y/$defs/a"}, {"$ref": "#/x/y"}]}
    assert schemas.within(schema, "/x/y") == made
    kept = {"enum": [{"$ref": "#"}], "$ref": "https://example.org/a"}
    assert schemas.within(kept, "/x") == kept
