"""The arguments of tagged calls, `<parameter=KEY>VALUE</parameter>`: their grammar, and their values.

A value is text if its schema allows a string, and JSON otherwise.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

from nybble.constraints.document import TYPES, Document, Schema, SchemaError, equal, step
from nybble.constraints.schema import grammar_schema

_MAX_LENGTH = 1000
"""The longest `maxLength` that the grammar of a text counts."""


class Arguments:
    """The arguments that a function takes.

    Args:
        schema: The JSON Schema of all arguments; None for any.
    """

    def __init__(self, schema: Mapping[str, Any] | None) -> None:
        self.document: Document = Document(dict(schema or {}))
        self.properties: dict[str, Schema] = {}
        self.pointers: dict[str, str] = {}
        """Where the schemas of the properties are."""
        try:
            for place, part in _combined_parts(self.document):
                for key, value in part.get("properties", {}).items():
                    if key not in self.properties:
                        self.properties[key], self.pointers[key] = value, step(place, "properties", key)
        except (SchemaError, TypeError, AttributeError, RecursionError):
            self.properties = {}  # Without a constraint, nobody has checked the schema.

    def is_text(self, key: str) -> bool:
        """Whether every value of an argument is a string, so that it can be passed on while it comes."""
        return self._types(key) == {"string"}

    def json_of(self, key: str, text: str) -> str:
        """A whole argument as JSON."""
        types = self._types(key)
        try:
            value = json.loads(text)
        except (ValueError, RecursionError):
            return json.dumps(text, ensure_ascii=False)
        if "string" in types and not (value is None and "null" in types) and not self._only_as_json(key, text, value):
            value = text
        return json.dumps(value, ensure_ascii=False)

    def _types(self, key: str) -> frozenset[str]:
        """The types of an argument. None are known for an argument that the schema does not list."""
        if key not in self.properties:
            return frozenset()
        try:
            return self.document.types(self.properties[key])
        except (SchemaError, TypeError, RecursionError):
            return frozenset(TYPES)

    def _only_as_json(self, key: str, text: str, value: Any) -> bool:
        """Whether the value is among the few possible ones as JSON, but not as text."""
        try:
            values = self.document.values(self.properties[key])
        except (SchemaError, TypeError, RecursionError):
            return False
        if values is None:
            return False
        return text not in values and any(equal(value, each) for each in values)


def element_rules(rule: str, name: str, schema: dict[str, Any], parameter: str) -> list[str]:
    """Grammar rules of one tagged call: an element per argument, in order; optional arguments may be missing.

    Args:
        rule: The name of the first rule.
        name: The name of the function.
        schema: The JSON Schema of its arguments.
        parameter: The parameter of the request that holds the schema, for errors.

    Raises:
        SchemaError: The schema is invalid or cannot be enforced.
    """
    grammar_schema(schema, parameter)  # Refuses what is invalid.
    known = Arguments(schema)
    required = _required(known.document, schema)
    for key in required:
        known.properties.setdefault(key, True)
    rules, parts = [], []
    for index, key in enumerate(known.properties):
        part = f"{rule}_{index}"
        parts.append(part if key in required else f"{part}?")
        rules += _element(part, known, key, schema, parameter)
    if not known.properties and "properties" not in schema and schema.get("additionalProperties") is not False:
        parts.append(f"{rule}_x*")
        rules += [
            f'{rule}_x: "<parameter=" /[A-Za-z0-9_.-]+/ ">\\n" {rule}_xv',
            f'{rule}_xv[suffix="</parameter>\\n"]: /(?s:.*)/',
        ]
    return [" ".join([f"{rule}:", _literal(f"{name}>\n"), *parts, '"</function>"']), *rules]


def _element(part: str, known: Arguments, key: str, schema: dict[str, Any], parameter: str) -> list[str]:
    """The rules of one argument."""
    value, opening = known.properties[key], _literal(f"<parameter={key}>\n")
    closing = _literal("\n</parameter>\n")
    types = known.document.types(value)
    if "string" not in types:
        body = json.dumps(grammar_schema(schema, parameter, known.pointers[key]))
        return [f"{part}: {opening} {part}_v {closing}", f"{part}_v: %json {body}"]
    values = known.document.values(value)
    if values is not None:
        spelled = dict.fromkeys(each if isinstance(each, str) else json.dumps(each) for each in values)
        return [f"{part}: {opening} ({' | '.join(map(_literal, spelled))}) {closing}"]
    if types == {"string"} and (pattern := _limited_text(known.document.resolved(value, "#"))) is not None:
        return [f"{part}: {opening} {part.upper()} {closing}", f"{part.upper()}: {pattern}"]
    return [f"{part}: {opening} {part}_v", f'{part}_v[suffix="</parameter>\\n"]: /(?s:.*)/']


def _combined_parts(document: Document) -> Iterator[tuple[str, dict[str, Any]]]:
    """The root of a schema and all that it combines, each with its place, the most general first."""
    waiting: list[tuple[str, Schema]] = [("#", document.root)]
    seen: set[str] = set()
    for place, part in waiting:
        if not isinstance(part, dict):
            continue
        document.count_question()
        yield place, part
        for key in ("allOf", "anyOf", "oneOf"):
            waiting += [(step(place, key, index), each) for index, each in enumerate(part.get(key, ()))]
        waiting += [(step(place, key), part[key]) for key in ("if", "then", "else") if key in part]
        if "$ref" in part and (pointer := document.pointer_of(part["$ref"], place)) not in seen:
            seen.add(pointer)
            waiting.append((pointer, document.at(pointer, place)))


def _required(document: Document, schema: Schema) -> dict[str, None]:
    """The names of the arguments that must be there, in their order."""
    found: dict[str, None] = {}
    waiting, seen = [schema], set[str]()
    while waiting:
        part = waiting.pop()
        if isinstance(part, dict):
            found.update(dict.fromkeys(part.get("required", ())))
            waiting += part.get("allOf", ())
            if "$ref" in part and (pointer := document.pointer_of(part["$ref"], "#")) not in seen:
                seen.add(pointer)
                waiting.append(document.at(pointer, "#"))
    return found


def _limited_text(value: Schema) -> str | None:
    """A terminal for a text of limited length or of a pattern, on one line; None if it is not limited."""
    low, high = int(value.get("minLength", 0)), value.get("maxLength")
    if max(low, high or 0) > _MAX_LENGTH:
        return None
    length = f"/[^\\n]{{{low},{'' if high is None else int(high)}}}/" if low or high is not None else None
    pattern = _line_pattern(value["pattern"]) if "pattern" in value else None
    return " & ".join(filter(None, (length or "/[^\\n]*/", pattern))) if length or pattern else None


def _line_pattern(pattern: str) -> str | None:
    """A terminal for the lines in which a pattern is found; None if its anchors are not only at its ends."""
    begins, ends = pattern.startswith("^"), pattern.endswith("$") and not pattern.endswith("\\$")
    inner = pattern[begins : len(pattern) - ends]
    if re.search(r"(?<!\\)[$^]", re.sub(r"\[\^", "[", inner)) or ((begins or ends) and "|" in inner):
        return None
    any_text = r"[^\n]*"
    slashes = re.sub(r"(?<!\\)/", r"\/", inner)
    return f"/{'' if begins else any_text}(?:{slashes}){'' if ends else any_text}/"


def _literal(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)
