"""Checks that the keywords of a JSON Schema have values of the right types."""

from __future__ import annotations

from typing import Any

from nybble.constraints.document import TYPES, Schema, SchemaError, step
from nybble.constraints.regex import unsupported

_NAMED = frozenset({"properties", "patternProperties", "$defs", "definitions", "dependentSchemas"})
"""Keywords that map names to schemas."""
_LISTS = frozenset({"anyOf", "oneOf", "allOf", "prefixItems"})
"""Keywords that hold a list of schemas."""
_SINGLE = frozenset({
    "additionalProperties", "additionalItems", "contains", "propertyNames", "not", "if", "then", "else",
    "unevaluatedProperties", "unevaluatedItems",
})  # fmt: skip
"""Keywords that hold a schema."""
_COUNTS = frozenset({
    "minLength", "maxLength", "minItems", "maxItems", "minProperties", "maxProperties", "minContains", "maxContains",
})  # fmt: skip
_NUMBERS = frozenset({"minimum", "maximum", "multipleOf"})
_NUMBERS_OR_SWITCHES = frozenset({"exclusiveMinimum", "exclusiveMaximum"})  # Switches in draft 4.


def check(schema: Schema, place: str = "#") -> None:
    """Checks a schema and all schemas in it.

    Raises:
        SchemaError: A keyword has a value of the wrong type. The message names the place and the keyword.
    """
    if isinstance(schema, bool):
        return
    if not isinstance(schema, dict):
        raise SchemaError(place, f"found {schema!r:.60}, expected a JSON Schema: an object, true or false")
    for key, value in schema.items():
        _check_keyword(key, value, place)
        for pattern in [value] if key == "pattern" else value if key == "patternProperties" else ():
            if (reason := unsupported(pattern)) is not None:
                raise SchemaError(place, f"{key}: found {pattern!r:.100}: {reason}")
        if key in _NAMED:
            for name, part in value.items():
                check(part, step(place, key, name))
        elif key in _LISTS or (key == "items" and isinstance(value, list)):
            for index, part in enumerate(value):
                check(part, step(place, key, index))
        elif key in _SINGLE or key == "items":
            check(value, step(place, key))


def _check_keyword(key: str, value: Any, place: str) -> None:
    expected = None
    if key in _NAMED and not isinstance(value, dict):
        expected = "an object of schemas"
    elif key in _LISTS and not (isinstance(value, list) and value):
        # An empty prefixItems says nothing.
        expected = None if key == "prefixItems" and value == [] else "a list of schemas that is not empty"
    elif key == "enum" and not isinstance(value, list):
        expected = "a list of values"
    elif key == "required" and not (isinstance(value, list) and all(isinstance(name, str) for name in value)):
        expected = "a list of property names"
    elif key == "type":
        names = [value] if isinstance(value, str) else value
        known = {*TYPES, "integer"}
        if not (isinstance(names, list) and names and all(isinstance(n, str) and n in known for n in names)):
            expected = f"one or several of {', '.join(sorted(known))}"
    elif key in _COUNTS and not (_is_number(value) and value >= 0 and value % 1 == 0):
        expected = "a whole number, 0 or more"
    elif (key in _NUMBERS and not _is_number(value)) or (
        key in _NUMBERS_OR_SWITCHES and not (_is_number(value) or isinstance(value, bool))
    ):
        expected = "a number"
    elif key in ("pattern", "format", "$ref") and not isinstance(value, str):
        expected = "a string"
    elif key == "dependentRequired" and not (
        isinstance(value, dict) and all(_are_names(names) for names in value.values())
    ):
        expected = "an object of lists of property names"
    elif key == "dependencies" and not (
        isinstance(value, dict) and all(_are_names(each) or isinstance(each, dict | bool) for each in value.values())
    ):
        expected = "an object of lists of property names or schemas"
    if expected is not None:
        raise SchemaError(place, f"{key}: found {value!r:.60}, expected {expected}")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _are_names(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(name, str) for name in value)
