"""Negation and exclusion of JSON Schemas, for `not`, `if` and `oneOf`, which grammars cannot express directly."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Sequence
from typing import Any

from nybble.constraints.document import BOUNDS, CONSTRAINING, FORMATS, TYPES, Document, Json, Schema, type_of

Names = Collection[str] | None
"""The property names that objects may have at a place; None if they may have any."""

_OPPOSITES: dict[str, Callable[[Any], Json | None]] = {
    "minimum": lambda n: {"exclusiveMaximum": n},
    "maximum": lambda n: {"exclusiveMinimum": n},
    "exclusiveMinimum": lambda n: {"maximum": n},
    "exclusiveMaximum": lambda n: {"minimum": n},
    "minLength": lambda n: {"maxLength": n - 1} if n else None,
    "maxLength": lambda n: {"minLength": n + 1},
    "minItems": lambda n: {"maxItems": n - 1} if n else None,
    "maxItems": lambda n: {"minItems": n + 1},
    "minProperties": lambda n: {"maxProperties": n - 1} if n else None,
    "maxProperties": lambda n: {"minProperties": n + 1},
}
"""The bound that holds exactly where another does not; None if the other always holds."""

_MAX_DEPTH = 30


class CannotNegateError(Exception):
    """The opposite of a schema cannot be written as a schema that grammars support. The argument is the keyword."""


def negation(
    document: Document, schema: Schema, names: Names = None, given: Schema = True, depth: int = 0
) -> list[Schema]:
    """The alternatives that together allow exactly the values that `schema` does not.

    Args:
        document: The document of the schema.
        schema: The schema.
        names: The property names that objects may have anyway; None for any.
        given: A schema that the values follow anyway.
        depth: The nesting so far.

    Raises:
        CannotNegateError: There are none that grammars support.
    """
    document.count_question()
    if isinstance(schema, bool):
        return [] if schema else [True]
    if depth > _MAX_DEPTH:
        raise CannotNegateError("$ref")
    given = document.resolved(given, "#")
    known = given if isinstance(given, dict) else {}
    found: list[Schema] = []
    for key, value in schema.items():
        is_given = key in _INDEPENDENT and key in known and known[key] == value
        if key in CONSTRAINING and not is_given and not (key == "format" and value not in FORMATS):
            found += _negated_keyword(document, schema, key, value, names, known, depth + 1)
    return found


_INDEPENDENT = frozenset({"type", "const", "enum", "pattern", "format", "multipleOf", "required", "$ref", *BOUNDS})
"""Keywords whose meaning does not depend on those next to them."""


def _negated_keyword(
    document: Document, schema: Json, key: str, value: Any, names: Names, given: Json, depth: int
) -> Sequence[Schema]:
    if key in BOUNDS and not isinstance(value, bool):
        opposite = _OPPOSITES[key](value)
        return [] if opposite is None else [{"type": BOUNDS[key][0], **opposite}]
    match key:
        case "type":
            types = [value] if isinstance(value, str) else value
            if "integer" in types and "number" not in types:
                raise CannotNegateError("type integer")
            others = [name for name in TYPES if name not in types]
            return [{"type": others}] if others else []
        case "const":
            return _without([value])
        case "enum":
            return _without(value)
        case "required":
            return [{"type": "object", "properties": {name: False}} for name in value]
        case "properties":
            return [
                {"type": "object", "properties": {name: {"anyOf": parts}}, "required": [name]}
                for name, part in value.items()
                if (parts := negation(document, part, None, given.get("properties", {}).get(name, True), depth))
            ]
        case "additionalProperties" if "patternProperties" not in schema and names is not None:
            others = [name for name in names if name not in schema.get("properties", {})]
            parts = negation(document, value, None, True, depth)
            return [
                {"type": "object", "properties": {name: {"anyOf": parts}}, "required": [name]}
                for name in others
                if parts
            ]
        case "additionalProperties" if value is True:
            return []
        case "anyOf":
            return [{"allOf": [{"anyOf": _some(negation(document, part, names, given, depth))} for part in value]}]
        case "allOf":
            return [each for part in value for each in negation(document, part, names, given, depth)]
        case "not":
            return [value]
        case "$ref":
            target = document.at(document.pointer_of(value, "#"), "#")
            return negation(document, target, names, given, depth)
    raise CannotNegateError(key)


def _some(parts: Sequence[Schema]) -> Sequence[Schema]:
    return parts or [False]


def _without(values: Sequence[Any]) -> list[Schema]:
    """The alternatives for all values but a few."""
    by_type: dict[str, list[Any]] = {}
    for value in values:
        by_type.setdefault(type_of(value), []).append(value)
    others = [name for name in TYPES if name not in by_type]
    found: list[Schema] = [{"type": others}] if others else []
    for name, excluded in by_type.items():
        if name == "boolean":
            found += [{"const": value} for value in (False, True) if value not in excluded]
        elif name == "string":
            found.append({"type": "string", "pattern": f"^{_other_strings(excluded)}$"})
        elif name == "number":
            edges = sorted({*excluded})
            found.append({"type": "number", "exclusiveMaximum": edges[0]})
            found += [
                {"type": "number", "exclusiveMinimum": low, "exclusiveMaximum": high}
                for low, high in itertools.pairwise(edges)
            ]
            found.append({"type": "number", "exclusiveMinimum": edges[-1]})
        elif name != "null":
            raise CannotNegateError(f"const or enum of type {name}")
    return found


_ANY = r"[^\x00]"


def _other_strings(excluded: Sequence[str]) -> str:
    """A regular expression for all strings but some."""
    heads = sorted({text[0] for text in excluded if text})
    options = [] if "" in excluded else [""]
    options.append(f"[^{''.join(map(_escaped, heads))}]{_ANY}*" if heads else f"{_ANY}+")
    options += [_escaped(head) + _other_strings([t[1:] for t in excluded if t[:1] == head]) for head in heads]
    return f"({'|'.join(options)})"


def _escaped(char: str) -> str:
    return char if char.isalnum() else f"\\x{ord(char):02x}" if ord(char) < 256 else f"\\u{{{ord(char):x}}}"


def disjoint(document: Document, a: Schema, b: Schema, names: Names, depth: int = 0) -> bool:
    """Whether it is certain that no value follows both schemas.

    Args:
        document: The document of the schemas.
        a: A schema.
        b: The other schema.
        names: The property names that objects of `a` may have; None for any.
        depth: The nesting so far.
    """
    document.count_question()
    if a is False or b is False:
        return True
    if not isinstance(a, dict) or not isinstance(b, dict) or depth > _MAX_DEPTH:
        return False
    depth += 1
    for one, other, sides in ((a, b, False), (b, a, True)):
        values = document.values(one)
        if values is not None and all(document.accepts(other, value) is False for value in values):
            return True

        def parted(part: Schema, other: Schema = other, sides: bool = sides) -> bool:
            return disjoint(document, *((other, part) if sides else (part, other)), names, depth)

        if "$ref" in one and parted(document.at(document.pointer_of(one["$ref"], "#"), "#")):
            return True
        if any(map(parted, one.get("allOf", ()))):
            return True
        if any(key in one and all(map(parted, one[key])) for key in ("anyOf", "oneOf")):
            return True
    types = document.types(a) & document.types(b)
    return all(_disjoint_in_type(document, name, a, b, names, depth) for name in types)


def _disjoint_in_type(document: Document, name: str, a: Json, b: Json, names: Names, depth: int) -> bool:
    if name == "object":
        if names is not None and any(required not in names for required in b.get("required", ())):
            return True
        required = {*a.get("required", ()), *b.get("required", ())}
        return any(disjoint(document, _property(a, key), _property(b, key), None, depth) for key in sorted(required))
    low, high = _range(name, a, b)
    return low is not None and high is not None and low > high


def _property(schema: Json, name: str) -> Schema:
    if name in schema.get("properties", {}):
        return schema["properties"][name]
    return True if "patternProperties" in schema else schema.get("additionalProperties", True)


def _range(name: str, a: Json, b: Json) -> tuple[Any, Any]:
    """The bounds that two schemas set together to the values of a type."""
    low: list[Any] = []
    high: list[Any] = []
    for schema in (a, b):
        for key, (of, _) in BOUNDS.items():
            if of == name and type_of(schema.get(key)) == "number":
                (low if "min" in key.lower() else high).append(schema[key])
    return max(low, default=None), min(high, default=None)
