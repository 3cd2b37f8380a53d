"""Rewrites keywords that the grammar does not know into those that it does."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Collection, Iterator, Sequence
from typing import Any

from nybble.constraints.document import FORMATS, TYPES, Document, Json, Schema, SchemaError
from nybble.constraints.logic import CannotNegateError, Names, disjoint, negation

_MAX_ALTERNATIVES = 2000
"""Alternatives that a keyword may be written as."""
_MAX_POSITION = 32
"""Items among which the first that `contains` asks for is."""

_REFUSED = {
    "$dynamicRef": "use $ref",
    "$recursiveRef": "use $ref",
    "unevaluatedItems": "use items",
    "unevaluatedProperties": "use additionalProperties",
    "maxContains": "limit the array with maxItems",
}
"""Keywords that cannot be enforced, with what to do instead."""


def rewritten(document: Document, schema: Json, place: str, names: Names, others: Collection[str]) -> Json:
    """A schema with the same values whose own keywords the grammar supports.

    Parts in `properties`, `items` and so on stay as they are, and so do those of `anyOf` and `allOf`.

    Args:
        document: The document of the schema.
        schema: The schema.
        place: Where it is, for errors.
        names: The property names that objects may have there; None for any.
        others: Those of them that the schemas next to it list.

    Raises:
        SchemaError: A keyword cannot be enforced.
    """
    for key, advice in _REFUSED.items():
        if key in schema and schema[key] is not True and not (key == "unevaluatedProperties" and schema[key] is False):
            raise SchemaError(place, f"{key}: the grammar cannot enforce it; {advice}")
    _check_bounds(schema, place)
    found = {key: value for key, value in schema.items() if key not in _REWRITTEN}
    if found.get("unevaluatedProperties") is True:
        del found["unevaluatedProperties"]
    if schema.get("format") not in FORMATS:
        found.pop("format", None)
    extra: list[Schema] = []
    if "not" in schema:
        extra.append(_negated(document, schema["not"], place, "not", names, found))
    if "if" in schema and ("then" in schema or "else" in schema):
        extra.append(_conditional(document, schema, place, names))
    if "oneOf" in schema:
        around = {key: value for key, value in schema.items() if key != "oneOf"}
        own = None if names is None else [*others, *names_of(document, around)]
        extra.append(_exclusive(document, schema["oneOf"], place, own))
    extra += _dependencies(schema)
    extra += _contains(schema, place)
    if schema.get("uniqueItems"):
        extra += _unique(document, schema, place)
    if "propertyNames" in schema:
        found = _with_named_properties(document, found, schema["propertyNames"], place, names)
    if extra:
        found["allOf"] = [*schema.get("allOf", ()), *extra]
    return found


def _check_bounds(schema: Json, place: str) -> None:
    """Refuses integers of more than 64 bits, which the grammar would cut to the nearest integer of 64 bits."""
    kind = schema.get("type")
    if "integer" not in (kind if isinstance(kind, list) else [kind]):
        return
    for key, limit, sign in _BOUNDS:
        bound = schema.get(key)
        if isinstance(bound, int | float) and not isinstance(bound, bool) and sign * bound > sign * limit:
            raise SchemaError(place, f"{key}: found {bound}, expected an integer of 64 bits")


_BOUNDS = (
    ("minimum", 2**63 - 1, 1),
    ("exclusiveMinimum", 2**63 - 1, 1),
    ("maximum", -(2**63), -1),
    ("exclusiveMaximum", -(2**63), -1),
)
"""The bounds of integers that the grammar cannot write, with the limit and the direction beyond it."""

_REWRITTEN = frozenset({
    "not", "if", "then", "else", "oneOf", "dependentRequired", "dependentSchemas", "dependencies", "contains",
    "minContains", "maxContains", "uniqueItems", "propertyNames", "unevaluatedItems",
})  # fmt: skip


def _negated(document: Document, schema: Schema, place: str, keyword: str, names: Names, given: Schema) -> Schema:
    try:
        parts = negation(document, schema, names, given)
    except CannotNegateError as error:
        raise SchemaError(place, f"{keyword}: the grammar cannot enforce the opposite of {error}") from None
    return {"anyOf": parts} if parts else False


def _conditional(document: Document, schema: Json, place: str, names: Names) -> Schema:
    condition = schema["if"]
    positive = {"allOf": [condition, schema.get("then", True)]}
    given = {key: value for key, value in schema.items() if key not in _REWRITTEN}
    negative = _negated(document, condition, place, "if", names, given)
    return {"anyOf": [positive, {"allOf": [negative, schema.get("else", True)]}]}


def _exclusive(document: Document, parts: Sequence[Schema], place: str, names: Names) -> Schema:
    """`oneOf` as alternatives that exclude each other."""
    alternatives: list[Schema] = []
    for index, part in enumerate(parts):
        if (values := document.values(part)) is not None:
            kept = _values_of_one(document, parts, index, values, place)
            alternatives += [{"enum": kept}] if kept else []
            continue
        own = None if names is None else [*names, *names_of(document, part)]
        excluded = []
        for other_index, other in enumerate(parts):
            if other_index == index or disjoint(document, part, other, own):
                continue
            if (values := document.values(other)) is not None:
                other = {"enum": [value for value in values if document.accepts(part, value) is not False]}
            try:
                excluded.append({"anyOf": negation(document, other, own, part) or [False]})
            except CannotNegateError as error:
                raise SchemaError(
                    place,
                    f"oneOf: alternatives {index} and {other_index} may both match, and the grammar cannot enforce the "
                    f"opposite of {error}; use anyOf, or give them a property with different constants",
                ) from None
        alternatives.append({"allOf": [part, *excluded]} if excluded else part)
    return {"anyOf": alternatives} if alternatives else False


def _values_of_one(
    document: Document, parts: Sequence[Schema], index: int, values: Sequence[Any], place: str
) -> list[Any]:
    kept = []
    for value in values:
        answers = [document.accepts(part, value) for other, part in enumerate(parts) if other != index]
        if None in answers and True not in answers:
            raise SchemaError(
                place, f"oneOf: it is not certain whether {value!r:.60} matches only one alternative; use anyOf"
            )
        if True not in answers:
            kept.append(value)
    return kept


def names_of(document: Document, schema: Schema, *, listed: bool = False) -> dict[str, None]:
    """The property names that a schema and the schemas that it combines mention, in their order.

    Args:
        document: The document of the schema.
        schema: The schema.
        listed: Only those in `properties`, which are evaluated in the sense of `unevaluatedProperties`.
    """
    found: dict[str, None] = {}
    for part in group_of(document, schema):
        found.update(dict.fromkeys(part.get("properties", ())))
        if listed:
            continue
        found.update(dict.fromkeys(part.get("required", ())))
        for key in ("dependentRequired", "dependencies"):
            for name, each in part.get(key, {}).items():
                found.update(dict.fromkeys([name, *(each if isinstance(each, list) else ())]))
        found.update(dict.fromkeys(part.get("dependentSchemas", ())))
    return found


def group_of(document: Document, schema: Schema) -> Iterator[Json]:
    """A schema and all schemas that may apply to the same value."""
    seen: set[str] = set()

    def visit(part: Schema) -> Iterator[Json]:
        if not isinstance(part, dict):
            return
        document.count_question()
        yield part
        if "$ref" in part and (pointer := document.pointer_of(part["$ref"], "#")) not in seen:
            seen.add(pointer)
            yield from visit(document.at(pointer, "#"))
        for key in ("allOf", "anyOf", "oneOf"):
            for each in part.get(key, ()):
                yield from visit(each)
        for key in ("if", "then", "else"):
            yield from visit(part.get(key))
        for key in ("dependentSchemas", "dependencies"):
            for each in part.get(key, {}).values():
                yield from visit(each)

    return visit(schema)


def _dependencies(schema: Json) -> Iterator[Schema]:
    for key in ("dependentRequired", "dependentSchemas", "dependencies"):
        for name, wanted in schema.get(key, {}).items():
            then = (
                {"required": [name, *wanted]} if isinstance(wanted, list) else {"allOf": [{"required": [name]}, wanted]}
            )
            others = [other for other in TYPES if other != "object"]
            yield {
                "anyOf": [{"type": "object", "properties": {name: False}}, {"type": "object", **then}, {"type": others}]
            }


def _contains(schema: Json, place: str) -> Iterator[Schema]:
    if "contains" not in schema or (count := int(schema.get("minContains", 1))) == 0:
        return
    last = min(int(schema.get("maxItems", _MAX_POSITION)), _MAX_POSITION)
    if math.comb(last, min(count, last)) > _MAX_ALTERNATIVES:
        raise SchemaError(place, f"minContains: found {count}, which is too many for the grammar; limit maxItems")
    alternatives: list[Schema] = [
        {
            "type": "array",
            "prefixItems": [schema["contains"] if i in chosen else True for i in range(chosen[-1] + 1)],
            "minItems": chosen[-1] + 1,
        }
        for chosen in itertools.combinations(range(last), count)
    ]
    yield {"anyOf": [*alternatives, {"type": [name for name in TYPES if name != "array"]}]}


def _unique(document: Document, schema: Json, place: str) -> Iterator[Schema]:
    """`uniqueItems` as a list of all arrays without repetition."""
    longest, shortest = schema.get("maxItems"), int(schema.get("minItems", 0))
    if longest is not None and longest <= 1:
        return
    values = None if "prefixItems" in schema else document.values(schema.get("items", True))
    if values is None:
        raise SchemaError(
            place, "uniqueItems: the grammar can enforce it only for items with few possible values, such as an enum"
        )
    sizes = range(shortest, (len(values) if longest is None else min(int(longest), len(values))) + 1)
    if sum(math.perm(len(values), size) for size in sizes) <= _MAX_ALTERNATIVES:
        rows = [row for size in sizes for row in itertools.permutations(values, size)]
    elif sum(math.comb(len(values), size) for size in sizes) <= _MAX_ALTERNATIVES:
        # All sets, each in the order of the schema.
        rows = [row for size in sizes for row in itertools.combinations(values, size)]
    else:
        raise SchemaError(
            place, f"uniqueItems: {len(values)} possible items are too many for the grammar; limit maxItems"
        )
    others = {"type": [name for name in TYPES if name != "array"]}
    yield {"anyOf": [*({"const": list(row)} for row in rows), others]}


def _with_named_properties(document: Document, schema: Json, rule: Schema, place: str, names: Names) -> Json:
    """`propertyNames` as properties or patterns of names."""
    rule = document.resolved(rule, place)
    if rule is True or (isinstance(rule, dict) and not rule.keys() & (_NAME_KEYWORDS | {"$ref"})):
        return schema
    if names is not None:
        decided = {name: document.accepts(rule, name) for name in names}
        if None in decided.values():
            raise SchemaError(place, "propertyNames: it is not certain which of the listed names it allows")
        refused = {name: False for name, fits in decided.items() if not fits}
        return {**schema, "properties": {**schema.get("properties", {}), **refused}} if refused else schema
    others: Schema = schema.get("additionalProperties", True)
    known = dict(schema.get("properties", {}))
    kept = {name: part if document.accepts(rule, name) is not False else False for name, part in known.items()}
    if (values := document.values(rule)) is not None:
        if "patternProperties" in schema:
            raise SchemaError(place, "propertyNames: the grammar cannot enforce it together with patternProperties")
        listed = {name: others for name in values if isinstance(name, str)}
        return {**schema, "properties": {**listed, **kept}, "additionalProperties": False}
    pattern = _name_pattern(rule, place)
    if "patternProperties" in schema:
        raise SchemaError(place, "propertyNames: the grammar cannot enforce it together with patternProperties")
    if pattern is None:
        return schema
    return {**schema, "properties": kept, "patternProperties": {pattern: others}, "additionalProperties": False}


_NAME_KEYWORDS = frozenset({
    "const", "enum", "pattern", "minLength", "maxLength", "format", "anyOf", "oneOf", "allOf", "not", "if",
})  # fmt: skip


def _name_pattern(rule: Schema, place: str) -> str | None:
    """A regular expression for property names; None if every name is right."""
    given = {
        key: rule[key] for key in rule if key in _NAME_KEYWORDS and not (key == "format" and rule[key] not in FORMATS)
    }
    if given.keys() == {"pattern"}:
        return str(given["pattern"])
    if given.keys() <= {"minLength", "maxLength"}:
        low, high = int(given.get("minLength", 0)), given.get("maxLength")
        return f"^[^\\x00]{{{low},{'' if high is None else int(high)}}}$"
    if given.keys() <= {"pattern", "minLength", "maxLength"} and (
        plain := re.fullmatch(r"\^(\[[^\]]+\])[+*]\$", given["pattern"])
    ):
        # A repeated class of characters, such as ^[a-z_]+$, with a length.
        low = max(int(given.get("minLength", 0)), given["pattern"].endswith("+$"))
        high = given.get("maxLength")
        return f"^{plain[1]}{{{low},{'' if high is None else int(high)}}}$"
    raise SchemaError(place, f"propertyNames: the grammar cannot enforce {', '.join(sorted(given))} of names")


def with_counts(schema: Json, names: Collection[str], place: str) -> Json:
    """`minProperties` and `maxProperties` of a closed object as alternatives that list its properties.

    Args:
        schema: A rewritten schema without other properties than those that it lists.
        names: The names of its properties that are possible.
        place: Where it is, for errors.
    """
    required = list(dict.fromkeys(schema.get("required", ())))
    optional = [name for name in names if name not in required]
    low = max(0, int(schema.get("minProperties", 0)) - len(required))
    high = min(
        len(optional),
        int(schema.get("maxProperties", math.inf) if "maxProperties" in schema else len(optional) + len(required))
        - len(required),
    )
    rest = {key: value for key, value in schema.items() if key not in ("minProperties", "maxProperties")}
    if high < low:
        return {**rest, "required": required, "allOf": [*schema.get("allOf", ()), False]}
    if low == 0 and high == len(optional):
        return rest
    sizes = range(low, high + 1)
    if sum(math.comb(len(optional), size) for size in sizes) > _MAX_ALTERNATIVES:
        raise SchemaError(place, "minProperties, maxProperties: too many combinations of properties for the grammar")
    alternatives = []
    for chosen in (chosen for size in sizes for chosen in itertools.combinations(optional, size)):
        left_out = {name: False for name in optional if name not in chosen}
        alternatives.append(
            {
                "type": "object",
                "properties": {**schema["properties"], **left_out},
                "required": [*required, *chosen],
                "additionalProperties": False,
            }
        )
    if schema.get("type") != "object":
        alternatives.append({"type": [name for name in TYPES if name != "object"]})
    kept = {key: value for key, value in rest.items() if key not in ("properties", "required", "additionalProperties")}
    return {**kept, "allOf": [*kept.get("allOf", ()), {"anyOf": alternatives}]}
