"""A JSON Schema document: its references, the types and the finite values of its parts, and a small validator."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any
from urllib.parse import unquote

Schema = Any
"""A dict, or a boolean: True allows every value, False none."""
Json = dict[str, Any]

TYPES = ("null", "boolean", "number", "string", "array", "object")

_MAX_DEPTH = 60
"""References and nested schemas that a question about a schema follows before it gives up."""
_MAX_QUESTIONS = 200_000
"""Questions about parts of a schema, which bound the time that a malicious one takes."""
_MAX_VALUES = 64
"""Values of a schema that are listed one by one."""

BOUNDS: dict[str, tuple[str, Callable[[Any, Any], bool]]] = {
    "minimum": ("number", lambda value, bound: value >= bound),
    "maximum": ("number", lambda value, bound: value <= bound),
    "exclusiveMinimum": ("number", lambda value, bound: value > bound),
    "exclusiveMaximum": ("number", lambda value, bound: value < bound),
    "minLength": ("string", lambda value, bound: len(value) >= bound),
    "maxLength": ("string", lambda value, bound: len(value) <= bound),
    "minItems": ("array", lambda value, bound: len(value) >= bound),
    "maxItems": ("array", lambda value, bound: len(value) <= bound),
    "minProperties": ("object", lambda value, bound: len(value) >= bound),
    "maxProperties": ("object", lambda value, bound: len(value) <= bound),
}
"""Keywords that compare a value of one type with a number."""

ANNOTATIONS = frozenset({
    "title", "description", "default", "examples", "example", "deprecated", "readOnly", "writeOnly", "$comment", "$id",
    "id", "$anchor", "$dynamicAnchor", "$vocabulary", "contentEncoding", "contentMediaType", "contentSchema", "$defs",
    "definitions", "discriminator", "externalDocs", "xml",
})  # fmt: skip
"""Keywords that do not restrict values."""

_DECIDED = frozenset({
    "type", "const", "enum", "required", "properties", "additionalProperties", "items", "prefixItems", "anyOf", "oneOf",
    "allOf", "not", "$ref", "pattern", *BOUNDS,
})  # fmt: skip
"""Keywords that `Document.accepts` knows."""

FORMATS = frozenset({
    "date-time", "time", "date", "duration", "email", "hostname", "ipv4", "ipv6", "uuid", "uri",
})  # fmt: skip
"""The formats that grammars enforce. The standard lets others pass."""

CONSTRAINING = _DECIDED | {
    "format", "multipleOf", "patternProperties", "uniqueItems", "contains", "minContains", "maxContains",
    "propertyNames", "if", "dependentRequired", "dependentSchemas", "dependencies", "additionalItems",
    "unevaluatedProperties", "unevaluatedItems", "$dynamicRef", "$recursiveRef",
}  # fmt: skip
"""Keywords that restrict values."""


class SchemaError(ValueError):
    """A JSON Schema is invalid, or has a part that the grammar cannot enforce.

    Attributes:
        place: Where in the schema, as a JSON pointer such as `#/properties/name`.
        reason: What is wrong there.
        parameter: The argument or parameter that holds the schema.
    """

    def __init__(self, place: str, reason: str, parameter: str = "schema") -> None:
        super().__init__(place, reason, parameter)
        self.place = place
        self.reason = reason
        self.parameter = parameter

    def __str__(self) -> str:
        where = "" if self.place == "#" else f"{self.place}: "
        return f"{self.parameter}: {where}{self.reason}"


def step(place: str, *keys: str | int) -> str:
    """The place of a part below `place`."""
    return "/".join([place, *(str(key).replace("~", "~0").replace("/", "~1") for key in keys)])


def type_of(value: Any) -> str:
    """The JSON type of a value."""
    if value is None:
        return "null"
    names = {bool: "boolean", int: "number", float: "number", str: "string", list: "array", dict: "object"}
    return names[type(value)]


def equal(a: Any, b: Any) -> bool:
    """Whether two JSON values are equal. Unlike in Python, true is not 1."""
    if type_of(a) != type_of(b):
        return False
    if isinstance(a, list):
        return len(a) == len(b) and all(map(equal, a, b))
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    return bool(a == b)


class Document:
    """A JSON Schema with the schemas that its references name.

    Args:
        root: The schema that `#` refers to.
    """

    def __init__(self, root: Json) -> None:
        self.root = root
        self._anchors: dict[str, str] | None = None
        self._questions = 0

    def pointer_of(self, ref: Any, place: str) -> str:
        """The JSON pointer, with its `#`, that a `$ref` names.

        Raises:
            SchemaError: It refers to another document.
        """
        if not isinstance(ref, str):
            raise SchemaError(place, f"$ref: found {ref!r:.60}, expected a string")
        own = self.root.get("$id", self.root.get("id"))
        if isinstance(own, str) and own and ref.startswith(own.rstrip("#")):
            ref = ref[len(own.rstrip("#")) :] or "#"
        if not ref.startswith("#"):
            raise SchemaError(place, f"$ref: found {ref!r:.100}, expected a reference into the same schema, from #")
        fragment = unquote(ref[1:])
        if not fragment or fragment.startswith("/"):
            return f"#{fragment}"
        if self._anchors is None:
            self._anchors = dict(_anchors(self.root, "#"))
        if fragment not in self._anchors:
            raise SchemaError(place, f"$ref: {ref!r:.100} does not exist in the schema")
        return self._anchors[fragment]

    def at(self, pointer: str, place: str) -> Schema:
        """The schema that a pointer names.

        Raises:
            SchemaError: There is none.
        """
        found: Any = self.root
        for key in pointer.split("/")[1:]:
            key = key.replace("~1", "/").replace("~0", "~")
            if isinstance(found, dict) and key in found:
                found = found[key]
            elif isinstance(found, list) and key.isdecimal() and int(key) < len(found):
                found = found[int(key)]
            else:
                raise SchemaError(place, f"$ref: {pointer!r:.100} does not exist in the schema")
        if not isinstance(found, dict | bool):
            raise SchemaError(place, f"$ref: {pointer!r:.100} is not a schema")
        return found

    def resolved(self, schema: Schema, place: str) -> Schema:
        """The schema itself, or the one that it refers to if it has no other content."""
        for _ in range(_MAX_DEPTH):
            if not isinstance(schema, dict) or "$ref" not in schema or schema.keys() - ANNOTATIONS != {"$ref"}:
                return schema
            schema = self.at(self.pointer_of(schema["$ref"], place), place)
        raise SchemaError(place, "$ref: the reference leads back to itself")

    # --- Questions about schemas

    def count_question(self) -> None:
        """Counts a question about a part of the schema.

        Raises:
            SchemaError: There were too many.
        """
        self._questions += 1
        if self._questions > _MAX_QUESTIONS:
            raise SchemaError(
                "#", "the schema is too complex: oneOf, not, if and finite sets take too many comparisons"
            )

    def types(self, schema: Schema, depth: int = 0) -> frozenset[str]:
        """The types that values of a schema may have. "integer" counts as "number"."""
        self.count_question()
        every = frozenset(TYPES)
        if not isinstance(schema, dict) or depth > _MAX_DEPTH:
            return every if schema is not False else frozenset()
        found = every
        given = schema.get("type")
        if given is not None:
            names = [given] if isinstance(given, str) else given
            found &= {"number" if name == "integer" else name for name in names}
        if "const" in schema:
            found &= {type_of(schema["const"])}
        if isinstance(schema.get("enum"), list):
            found &= {type_of(value) for value in schema["enum"]}
        for part in self._all_of(schema):
            found &= self.types(part, depth + 1)
        for key in ("anyOf", "oneOf"):
            if isinstance(schema.get(key), list):
                found &= frozenset().union(*(self.types(part, depth + 1) for part in schema[key]))
        return found

    def values(self, schema: Schema, depth: int = 0) -> list[Any] | None:
        """All values of a schema, if they are few and known; otherwise None."""
        self.count_question()
        if schema is False:
            return []
        if not isinstance(schema, dict) or depth > _MAX_DEPTH:
            return None
        found = self._candidates(schema, depth)
        if found is None or len(found) > _MAX_VALUES:
            return None
        decided = [(value, self.accepts(schema, value, depth + 1)) for value in found]
        return None if any(fits is None for _, fits in decided) else [value for value, fits in decided if fits]

    def _candidates(self, schema: Json, depth: int) -> list[Any] | None:
        if "const" in schema:
            return [schema["const"]]
        if isinstance(schema.get("enum"), list):
            return _distinct(iter(schema["enum"]))
        for part in self._all_of(schema):
            if (found := self.values(part, depth + 1)) is not None:
                return found
        for key in ("anyOf", "oneOf"):
            if isinstance(schema.get(key), list):
                parts = [self.values(part, depth + 1) for part in schema[key]]
                if all(part is not None for part in parts):
                    return _distinct(value for part in parts for value in part or ())
        given = schema.get("type")
        names = [given] if isinstance(given, str) else given or []
        found = []
        for name in names:
            if name == "boolean":
                found += [False, True]
            elif name == "null":
                found.append(None)
            elif name == "integer" and (numbers := _integers(schema)) is not None:
                found += numbers
            else:
                return None
        return found or None

    def _all_of(self, schema: Json) -> Iterator[Schema]:
        if "$ref" in schema:
            yield self.at(self.pointer_of(schema["$ref"], "#"), "#")
        if isinstance(schema.get("allOf"), list):
            yield from schema["allOf"]

    def accepts(self, schema: Schema, value: Any, depth: int = 0) -> bool | None:
        """Whether a value is valid; None if that takes keywords that are not decided here."""
        self.count_question()
        if not isinstance(schema, dict):
            return schema is not False
        if depth > _MAX_DEPTH:
            return None
        answers = [self._accepts(schema, key, value, depth + 1) for key in schema if key in CONSTRAINING]
        return _every(answers)

    def _accepts(self, schema: Json, key: str, value: Any, depth: int) -> bool | None:
        wanted, kind = schema[key], type_of(value)
        if key in BOUNDS:
            of, fits = BOUNDS[key]
            return True if kind != of else None if isinstance(wanted, bool) else fits(value, wanted)
        match key:
            case "type":
                names = [wanted] if isinstance(wanted, str) else wanted
                return kind in names or ("integer" in names and _is_whole(value))
            case "const":
                return equal(value, wanted)
            case "enum":
                return any(equal(value, each) for each in wanted)
            case "pattern":
                return True if kind != "string" else _matches(wanted, value)
            case "format":
                return True if kind != "string" or wanted not in FORMATS else None
            case "required":
                return kind != "object" or all(name in value for name in wanted)
            case "properties":
                items = wanted.items() if kind == "object" else ()
                return _every([self.accepts(part, value[name], depth) for name, part in items if name in value])
            case "additionalProperties" if kind == "object":
                if "patternProperties" in schema:
                    return None
                others = [each for name, each in value.items() if name not in schema.get("properties", {})]
                return _every([self.accepts(wanted, each, depth) for each in others])
            case "prefixItems" | "items" if kind == "array":
                if isinstance(schema.get("items"), list):
                    return None
                first = schema.get("prefixItems", [])
                pairs = (
                    zip(wanted, value, strict=False)
                    if key == "prefixItems"
                    else ((wanted, v) for v in value[len(first) :])
                )
                return _every([self.accepts(part, each, depth) for part, each in pairs])
            case "additionalProperties" | "prefixItems" | "items":
                return True
            case "$ref":
                return self.accepts(self.at(self.pointer_of(wanted, "#"), "#"), value, depth)
            case "allOf":
                return _every([self.accepts(part, value, depth) for part in wanted])
            case "not":
                found = self.accepts(wanted, value, depth)
                return None if found is None else not found
            case "anyOf":
                answers = [self.accepts(part, value, depth) for part in wanted]
                return True if True in answers else None if None in answers else False
            case "oneOf":
                answers = [self.accepts(part, value, depth) for part in wanted]
                return None if None in answers else answers.count(True) == 1
        return None


def _is_whole(value: Any) -> bool:
    return type_of(value) == "number" and (isinstance(value, int) or value.is_integer())


def _every(answers: Sequence[bool | None]) -> bool | None:
    return False if False in answers else None if None in answers else True


def _matches(pattern: Any, text: str) -> bool | None:
    try:
        return re.search(pattern, text) is not None
    except (re.error, TypeError, RecursionError):
        return None


def _distinct(values: Iterator[Any]) -> list[Any]:
    found: list[Any] = []
    for value in values:
        if not any(equal(value, other) for other in found):
            found.append(value)
    return found


def _integers(schema: Mapping[str, Any]) -> list[int] | None:
    """The integers between the bounds of a schema, if they are few."""
    bounds = [schema.get(key) for key in ("minimum", "exclusiveMinimum", "maximum", "exclusiveMaximum")]
    if not all(bound is None or type_of(bound) == "number" for bound in bounds):
        return None
    low, over, high, under = bounds
    lowest = [bound for bound in (low, over) if bound is not None]
    highest = [bound for bound in (high, under) if bound is not None]
    if not lowest or not highest or not -(2**53) < min(highest) - max(lowest) <= _MAX_VALUES:
        return None
    first = int(max(lowest)) - 1
    return [n for n in range(first, first + _MAX_VALUES + 4) if _within(n, *bounds)]


def _within(n: int, low: Any, over: Any, high: Any, under: Any) -> bool:
    return ((low is None or n >= low) and (over is None or n > over) and (high is None or n <= high)) and (
        under is None or n < under
    )


def _anchors(schema: Any, place: str) -> Iterator[tuple[str, str]]:
    if isinstance(schema, dict):
        for key in ("$anchor", "$dynamicAnchor"):
            if isinstance(schema.get(key), str):
                yield schema[key], place
        for key, part in schema.items():
            yield from _anchors(part, step(place, key))
    elif isinstance(schema, list):
        for index, part in enumerate(schema):
            yield from _anchors(part, step(place, index))
