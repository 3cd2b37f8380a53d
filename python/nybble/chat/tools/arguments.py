"""What the schema of a function says about its arguments, for syntaxes that do not write them as JSON."""

from __future__ import annotations

import ast
import json
from collections.abc import Iterator, Mapping
from typing import Any

from nybble.constraints.document import TYPES, Document, Schema, SchemaError, equal, step


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
            return json.dumps(text if "string" in types else _python_value(text), ensure_ascii=False)
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


def _python_value(text: str) -> Any:
    """A value that some templates write as Python does, `{'a': True}`; the text itself if it is none."""
    if not text.strip().startswith(("{", "[", "True", "False", "None", "'")):
        return text
    try:
        value = ast.literal_eval(text.strip())
        json.dumps(value)
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
        return text
    return value


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


def required_names(document: Document, schema: Schema) -> dict[str, None]:
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
