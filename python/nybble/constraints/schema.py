"""Rewrites a JSON Schema into one that the grammar enforces: closed objects, supported keywords, own definitions.

An object that lists properties is closed: it has no others unless the schema says something about them. Callers expect
only the properties that they listed, but models add others if they may. Where schemas are combined (`allOf`, `anyOf`,
`oneOf`, `if`, `$ref` with other keywords), each part allows the properties that the others list.
"""

from __future__ import annotations

import functools
import itertools
import json
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from nybble.constraints.document import CONSTRAINING, Document, Json, Schema, SchemaError, step
from nybble.constraints.keywords import group_of, names_of, rewritten, with_counts
from nybble.constraints.shape import check

LAYOUT: dict[str, object] = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
"""One spelling per value: with free white space, a model can degenerate into writing only spaces."""

_OBJECT_KEYWORDS = frozenset({"properties", "required", "minProperties", "maxProperties", "propertyNames"})
_MAX_DEFINITIONS = 2000

Names = tuple[str, ...]
"""Names of properties in their order, each once."""


def grammar_schema(schema: Json, parameter: str = "schema", pointer: str = "#") -> Json:
    """A schema for the grammar.

    Args:
        schema: A JSON Schema.
        parameter: The argument or parameter that holds it, for errors.
        pointer: The part of the schema to return, which may refer to the other parts.

    Raises:
        SchemaError: The schema is invalid, or has a part that the grammar cannot enforce.
    """
    return combined([(schema, parameter)], lambda parts: parts[0], pointer)


def combined(
    schemas: Sequence[tuple[Schema, str]], build: Callable[[list[Schema]], Schema], pointer: str = "#"
) -> Json:
    """One schema that contains several, each with its own references.

    Args:
        schemas: JSON Schemas, each with the parameter that holds it, for errors.
        build: Gets the rewritten schemas and returns the schema that contains them.
        pointer: The part of each schema to rewrite.

    Raises:
        SchemaError: A schema is invalid, or has a part that the grammar cannot enforce.
    """
    definitions: Json = {}
    parts = []
    for index, (schema, parameter) in enumerate(schemas):
        try:
            check(schema)
            parts.append(_Rewriter(schema, f"s{index}_" if len(schemas) > 1 else "", definitions).run(pointer))
        except SchemaError as error:
            raise SchemaError(error.place, error.reason, parameter) from None
        except RecursionError:
            raise SchemaError("#", "the schema is nested too deeply, beyond the recursion limit", parameter) from None
    whole = build(parts)
    if whole is False:
        raise SchemaError("#", "the schema allows no value", schemas[0][1])
    if whole is True:
        whole = {}
    settings = {"$defs": definitions} if definitions else {}
    return {**whole, **settings, "x-guidance": _layout(schemas[0][0])}


def _layout(schema: Schema) -> Any:
    return schema.get("x-guidance", LAYOUT) if isinstance(schema, dict) else LAYOUT


@functools.lru_cache(maxsize=32)
def grammar_text(text: str) -> str:
    """A schema for the grammar as JSON text, from a schema as JSON text.

    Raises:
        SchemaError: The schema is invalid, or has a part that the grammar cannot enforce.
    """
    return json.dumps(grammar_schema(json.loads(text)))


class _Rewriter:
    """Rewrites one schema.

    Args:
        root: The schema.
        prefix: The start of the names of its definitions.
        definitions: The definitions of the result, which are added to.
    """

    def __init__(self, root: Json, prefix: str, definitions: Json) -> None:
        self._document = Document(root if isinstance(root, dict) else {})
        self._root = root
        self._prefix = prefix
        self._definitions = definitions
        self._known: dict[tuple[str, Names | None], str] = {}

    def run(self, pointer: str) -> Schema:
        """The rewritten part of the schema that a JSON pointer names."""
        if pointer == "#":
            return self._rewrite(self._root, "#")
        return self._rewrite(self._document.at(pointer, pointer), pointer)

    def _rewrite(self, schema: Schema, place: str, others: Names | None = None, is_open: bool = False) -> Schema:
        """A schema with all of its parts.

        Args:
            schema: The schema.
            place: Where it is.
            others: The properties that the schemas next to it list; None if it stands alone.
            is_open: Whether a schema next to it says something about other properties.
        """
        if not isinstance(schema, dict):
            return schema
        self._document.count_question()
        if "$ref" in schema and not schema.keys() & (CONSTRAINING - {"$ref"}):
            return self._reference(schema["$ref"], place, others, is_open)
        if schema.get("unevaluatedProperties") is False:
            # It sees what this schema combines, and neither required names nor the schemas next to it.
            listed, others = names_of(self._document, schema, listed=True), others and ()
        else:
            listed = names_of(self._document, schema)
        opened = is_open or self._is_open(schema)
        closes = not opened and (others is not None or self._lists_properties(schema))
        names = _joined(others or (), listed) if closes else None
        found = rewritten(self._document, schema, place, names, others or ())
        units = self._units(found, place)
        result = {key: value for key, value in found.items() if key in CONSTRAINING and key not in _COMBINING}
        self._rewrite_parts(result, place)
        if closes:
            self._close(result, names or (), others)
        elif result.keys() & _OBJECT_KEYWORDS or "unevaluatedProperties" in result:
            result.setdefault("additionalProperties", result.pop("unevaluatedProperties", True))
        if units:
            self._combine(result, found, units, place, others, opened)
        if result.get("additionalProperties") is False and "patternProperties" not in result:
            possible = [name for name, part in result.get("properties", {}).items() if part is not False]
            if result.keys() & {"minProperties", "maxProperties"}:
                result = with_counts({"properties": {}, **result}, possible, place)
        elif result.get("minProperties", 0) > len(result.get("required", ())) + 1:
            # The grammar would count properties of the same name.
            raise SchemaError(place, "minProperties: the grammar can enforce it only for properties that are listed")
        return result

    def _rewrite_parts(self, result: Json, place: str) -> None:
        """Rewrites the schemas of properties and items."""
        for key in ("properties", "patternProperties"):
            if key in result:
                result[key] = {name: self._rewrite(part, step(place, key, name)) for name, part in result[key].items()}
        for key in ("additionalProperties", "additionalItems", "items"):
            if key in result and not isinstance(result[key], list):
                result[key] = self._rewrite(result[key], step(place, key))
        for key in ("prefixItems", "items"):
            if isinstance(result.get(key), list):
                result[key] = [self._rewrite(part, step(place, key, i)) for i, part in enumerate(result[key])]

    def _close(self, result: Json, names: Names, others: Names | None) -> None:
        """Forbids properties that neither the schema nor those next to it list."""
        if result.pop("unevaluatedProperties", None) is False:
            result.setdefault("properties", {})
        concerned = result.keys() & _OBJECT_KEYWORDS
        if not concerned or (others is None and "properties" not in result) or "additionalProperties" in result:
            if concerned:
                result.setdefault("additionalProperties", True)
            return
        own = result.get("properties", {})
        result["properties"] = {**own, **{name: True for name in names if name not in own}}
        result["additionalProperties"] = False

    def _units(self, found: Json, place: str) -> list[tuple[str, list[tuple[Schema, str]]]]:
        """The schemas that apply to the same value: each with its place, alternatives together."""
        units: list[tuple[str, list[tuple[Schema, str]]]] = []
        if "$ref" in found:
            units.append(("$ref", [({"$ref": found["$ref"]}, place)]))
        units += [("allOf", [(part, step(place, "allOf", i))]) for i, part in enumerate(found.get("allOf", ()))]
        if "anyOf" in found:
            units.append(("anyOf", [(part, step(place, "anyOf", i)) for i, part in enumerate(found["anyOf"])]))
        return units

    def _combine(
        self,
        result: Json,
        found: Json,
        units: list[tuple[str, list[tuple[Schema, str]]]],
        place: str,
        others: Names | None,
        opened: bool,
    ) -> None:
        """Adds the combined schemas, each with the names that the others list."""
        listed = [self._names(part for part, _ in parts) for _, parts in units]
        own = self._names([{key: value for key, value in found.items() if key not in _COMBINING}])
        all_of: list[Schema] = []
        for index, (key, parts) in enumerate(units):
            around = _joined(own, others or (), *(names for i, names in enumerate(listed) if i != index))
            alone = others is None and not around and len(units) == 1 and not result.keys() & _OBJECT_KEYWORDS
            rewritten_parts = [self._rewrite(part, where, None if alone else around, opened) for part, where in parts]
            if key == "anyOf" and "anyOf" not in result:
                result["anyOf"] = rewritten_parts
            elif key == "anyOf":
                all_of.append({"anyOf": rewritten_parts})
            else:
                all_of += rewritten_parts
        if all_of:
            result["allOf"] = all_of

    def _names(self, parts: Iterable[Schema]) -> Names:
        return _joined(*(names_of(self._document, part) for part in parts))

    def _reference(self, ref: str, place: str, others: Names | None, is_open: bool) -> Schema:
        """A reference to a definition of the result, which is written on first use."""
        pointer = self._document.pointer_of(ref, place)
        target = self._document.at(pointer, place)
        if others is not None and not is_open and names_of(self._document, target).keys() >= {*others}:
            others = None
        key = (f"{pointer} open" if is_open else pointer, others)
        if key not in self._known:
            if len(self._definitions) >= _MAX_DEFINITIONS:
                raise SchemaError(place, f"$ref: found more than {_MAX_DEFINITIONS} different references")
            name = self._known[key] = f"{self._prefix}d{len(self._known)}"
            self._definitions[name] = True  # Keeps its place while its parts are rewritten.
            self._definitions[name] = self._rewrite(target, pointer, others, is_open)
        return {"$ref": f"#/$defs/{self._known[key]}"}

    def _is_open(self, schema: Schema) -> bool:
        """Whether a schema, or one that it combines, says something about unlisted properties."""
        for part in group_of(self._document, schema):
            if part.get("additionalProperties", False) is not False or "patternProperties" in part:
                return True
            if part.get("unevaluatedProperties", False) is not False:
                return True
        return False

    def _lists_properties(self, schema: Schema) -> bool:
        return any(part.keys() & {"properties", "unevaluatedProperties"} for part in group_of(self._document, schema))


_COMBINING = frozenset({"$ref", "allOf", "anyOf"})


def _joined(*several: Iterable[str]) -> Names:
    return tuple(dict.fromkeys(itertools.chain(*several)))
