"""JSON Schemas: every completion is valid, and every kind of valid value is reachable."""

from __future__ import annotations

import enum
import json
import pathlib
from typing import Any, Literal

import jsonschema_rs
import pytest
from drawing import DIGIT, SHORT, Json, closed, draw, follow, object_of
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BaseModel, Field, SecretStr, create_model

from nybble import Model
from nybble.constraints.schema import grammar_schema

KIND: Json = {"enum": ["a", "b"]}
X, Y = object_of({"x": DIGIT}, "x"), object_of({"y": DIGIT}, "y")

# --- Composition ------------------------------------------------------------------------------------------------------

COMPOSED: dict[str, Json] = {
    "anyOf": object_of({"kind": KIND}, "kind", anyOf=[X, Y]),
    "oneOf": object_of(
        {"kind": KIND},
        "kind",
        oneOf=[
            object_of({"kind": {"const": "a"}, "x": DIGIT}, "kind", "x"),
            object_of({"kind": {"const": "b"}, "y": DIGIT}, "kind", "y"),
        ],
    ),
    "anyOf of references": object_of(
        {"kind": KIND},
        "kind",
        anyOf=[{"$ref": "#/$defs/X"}, {"$ref": "#/$defs/Y"}],
        **{"$defs": {"X": X, "Y": Y}},
    ),
    "reference with properties": {
        "$ref": "#/$defs/Base",
        "properties": {"own": DIGIT},
        "required": ["own"],
        "anyOf": [X, Y],
        "$defs": {"Base": object_of({"kind": KIND}, "kind")},
    },
    "allOf of references": {
        "allOf": [{"$ref": "#/$defs/Base"}, {"anyOf": [X, Y]}, object_of({"own": DIGIT}, "own")],
        "$defs": {"Base": object_of({"kind": KIND}, "kind")},
    },
    "closed by unevaluatedProperties": object_of({"kind": KIND}, "kind", anyOf=[X, Y], unevaluatedProperties=False),
    "required names that are not listed": object_of(
        {"kind": KIND}, "kind", anyOf=[object_of({"x": DIGIT}, "x", "kind"), object_of({"y": DIGIT}, "y", "kind")]
    ),
    "nested": object_of({"in": object_of({"kind": KIND}, "kind", anyOf=[X, Y])}, "in"),
}


@pytest.mark.parametrize("name", COMPOSED)
def test_properties_and_alternatives_apply_together(name: str, uniform_model: Model) -> None:
    values = follow(uniform_model, COMPOSED[name], 12)
    values = [value.get("in", value) for value in values]
    assert {"x" in value for value in values} == {True, False}, "one alternative is unreachable"
    assert all(value.keys() <= {"kind", "x", "y", "own"} for value in values), "objects are closed"


def test_optional_properties_stay_reachable_with_alternatives(uniform_model: Model) -> None:
    schema = object_of({"note": DIGIT}, anyOf=[object_of({"x": DIGIT, "note": DIGIT}, "x"), object_of({"y": DIGIT})])
    values = follow(uniform_model, schema, 24)
    assert any("note" in value for value in values)
    assert any("x" in value for value in values)


def test_required_properties_that_are_not_listed_are_written(uniform_model: Model) -> None:
    for value in follow(uniform_model, object_of({"a": DIGIT}, "a", "b", maxProperties=2)):
        assert value.keys() == {"a", "b"}


@pytest.mark.parametrize(
    "more", [{"additionalProperties": DIGIT}, {"patternProperties": {"^z": DIGIT}}, {"additionalProperties": True}]
)
def test_objects_stay_open_where_the_schema_says_so(more: Json, uniform_model: Model) -> None:
    schema = object_of({"a": DIGIT}, "a", **more)
    assert grammar_schema(schema).get("additionalProperties", True) is not False
    done = uniform_model.generate("x", schema=schema, max_tokens=9, logit_bias={ord(","): 50.0})
    assert done.text.endswith(", "), "more properties may follow"


# --- References -------------------------------------------------------------------------------------------------------


class Tree(BaseModel):
    value: int = Field(ge=0, le=9)
    children: list[Tree] = Field(max_length=1)


REFERENCES: dict[str, Json] = {
    "recursion": Tree.model_json_schema(),
    "root": closed({"x": DIGIT, "next": {"anyOf": [{"$ref": "#"}, {"type": "null"}]}}),
    "any place": closed({"a": DIGIT, "b": {"$ref": "#/properties/a"}}),
    "escaped names": closed({"a": {"$ref": "#/$defs/x~1y%20z"}}, **{"$defs": {"x/y z": DIGIT}}),
    "anchor": closed({"a": {"$ref": "#here"}}, **{"$defs": {"any": {"$anchor": "here", **DIGIT}}}),
    "own address": {
        "$id": "https://e.org/s",
        **closed({"a": {"$ref": "https://e.org/s#/$defs/A"}}, **{"$defs": {"A": DIGIT}}),
    },
    "draft 7": closed({"a": {"$ref": "#/definitions/A"}}, definitions={"A": {"enum": ["x", "y"]}}),
    "chain": closed({"a": {"$ref": "#/$defs/A"}}, **{"$defs": {"A": {"$ref": "#/$defs/B"}, "B": DIGIT}}),
}


@pytest.mark.parametrize("name", REFERENCES)
def test_references_are_followed(name: str, uniform_model: Model) -> None:
    follow(uniform_model, REFERENCES[name])


@pytest.mark.parametrize(
    ("schema", "message"),
    [
        (closed({"a": {"$ref": "#/$defs/B"}}), r"schema: #/properties/a: \$ref: '#/\$defs/B' does not exist"),
        (closed({"a": {"$ref": "other.json"}}), r"schema: #/properties/a: \$ref: found 'other.json', expected"),
        (closed({"a": {"$ref": "#nowhere"}}), r"schema: #/properties/a: \$ref: '#nowhere' does not exist"),
        (closed({"a": {"$dynamicRef": "#a"}}), r"schema: #/properties/a: \$dynamicRef: the grammar cannot"),
    ],
)
def test_references_that_lead_nowhere_are_refused(schema: Json, message: str, uniform_model: Model) -> None:
    with pytest.raises(ValueError, match=message):
        uniform_model.generate("x", schema=schema)


# --- oneOf ------------------------------------------------------------------------------------------------------------

EXCLUSIVE: dict[str, Json] = {
    "no constants": object_of(
        {"pet": {"oneOf": [{"$ref": "#/$defs/Cat"}, {"$ref": "#/$defs/Dog"}]}},
        "pet",
        **{"$defs": {"Cat": closed({"meow": DIGIT}), "Dog": closed({"bark": DIGIT})}},
    ),
    "open objects": {"oneOf": [X, Y]},
    "overlapping strings": {"oneOf": [SHORT, {"enum": ["auto", "me"]}]},
    "overlapping constants": {"oneOf": [{"enum": [1, 2, 3]}, {"enum": [3, 4]}]},
    "ranges": {
        "oneOf": [{"type": "integer", "minimum": 0, "maximum": 5}, {"type": "integer", "minimum": 4, "maximum": 9}]
    },
    "subset of properties": {
        "oneOf": [object_of({"x": DIGIT, "y": DIGIT}, "x"), object_of({"x": DIGIT, "y": DIGIT}, "y")]
    },
    "types": {"oneOf": [SHORT, DIGIT, {"type": "null"}, {"type": "boolean"}]},
    "lengths": {"oneOf": [{"type": "string", "maxLength": 1}, {"type": "string", "minLength": 1, "maxLength": 3}]},
}


@pytest.mark.parametrize("name", EXCLUSIVE)
def test_exactly_one_alternative_matches(name: str, uniform_model: Model) -> None:
    values = follow(uniform_model, EXCLUSIVE[name], 16)
    assert len({json.dumps(value) for value in values}) > 2


def test_a_one_of_that_cannot_be_enforced_is_refused_by_name(uniform_model: Model) -> None:
    schema = object_of({"a": {"oneOf": [{"type": "string", "pattern": "^a"}, {"type": "string", "pattern": "b$"}]}})
    with pytest.raises(ValueError, match=r"schema: #/properties/a: oneOf: alternatives 0 and 1 may both match"):
        uniform_model.generate("x", schema=schema)


# --- Formats and keywords ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["path", "password", "binary", "byte", "int64", "phone", "json-pointer", "unknown"])
def test_unknown_formats_assert_nothing(name: str, uniform_model: Model) -> None:
    values = follow(uniform_model, object_of({"a": {**SHORT, "format": name}}, "a"))
    assert len({value["a"] for value in values}) > 2


def test_known_formats_are_enforced(uniform_model: Model) -> None:
    for value in draw(uniform_model, {"type": "string", "format": "date"}):
        jsonschema_rs.validate({"pattern": r"^\d{4}-\d\d-\d\d$"}, value)


KEYWORDS: dict[str, Json] = {
    "uniqueItems": {"type": "array", "items": {"enum": [1, 2, 3]}, "minItems": 2, "maxItems": 3, "uniqueItems": True},
    "uniqueItems of many": {"type": "array", "items": {"enum": list("abcdefg")}, "maxItems": 3, "uniqueItems": True},
    "uniqueItems of references": {
        "type": "array",
        "items": {"$ref": "#/$defs/C"},
        "uniqueItems": True,
        "$defs": {"C": {"enum": ["r", "g"]}},
    },
    "propertyNames": {
        "type": "object",
        "propertyNames": {"enum": ["a", "b"]},
        "additionalProperties": DIGIT,
        "minProperties": 1,
        "maxProperties": 2,
    },
    "propertyNames of a pattern": {
        "type": "object",
        "propertyNames": {"pattern": "^[a-c]$"},
        "additionalProperties": DIGIT,
    },
    "propertyNames of a length": {
        "type": "object",
        "propertyNames": {"minLength": 1, "maxLength": 2},
        "additionalProperties": DIGIT,
    },
    "propertyNames of a closed object": object_of(
        {"a": DIGIT, "bb": DIGIT, "c": DIGIT}, "a", propertyNames={"maxLength": 1}, unevaluatedProperties=False
    ),
    "unevaluatedProperties of a part": object_of(
        {"a": DIGIT}, anyOf=[object_of({"b": DIGIT, "a": DIGIT}, "b", unevaluatedProperties=False), X]
    ),
    "minProperties": object_of({"a": DIGIT, "b": DIGIT, "c": DIGIT}, minProperties=2),
    "maxProperties": object_of({"a": DIGIT, "b": DIGIT, "c": DIGIT}, maxProperties=2),
    "if": object_of(
        {"k": KIND, "x": DIGIT}, "k", **{"if": {"properties": {"k": {"const": "a"}}}, "then": {"required": ["x"]}}
    ),
    "if and else": object_of(
        {"k": KIND, "x": DIGIT},
        "k",
        **{
            "if": {"properties": {"k": {"const": "a"}}},
            "then": {"required": ["x"]},
            "else": {"properties": {"x": False}},
        },
    ),
    "not": {**DIGIT, "not": {"const": 3}},
    "not of strings": {"type": "string", "maxLength": 2, "not": {"enum": ["a", "ab", ""]}},
    "not of types": {"type": ["integer", "boolean", "null"], "minimum": 0, "maximum": 9, "not": {"type": "null"}},
    "not of properties": object_of({"a": DIGIT, "b": DIGIT}, "a", **{"not": {"required": ["b"]}}),
    "contains": {"type": "array", "items": DIGIT, "contains": {"const": 3}, "maxItems": 3},
    "contains without an end": {"type": "array", "items": {"enum": [1, 3]}, "contains": {"const": 3}},
    "minContains": {"type": "array", "items": DIGIT, "contains": {"const": 3}, "minContains": 2, "maxItems": 4},
    "dependentRequired": object_of({"a": DIGIT, "b": DIGIT}, dependentRequired={"a": ["b"]}),
    "dependentSchemas": object_of(
        {"a": DIGIT, "b": DIGIT}, dependentSchemas={"a": {"properties": {"b": {"const": 1}}}}
    ),
    "range": {"type": "integer", "minimum": -13, "maximum": 250},
    "pattern": {"type": "string", "pattern": "^[A-Z]{2}\\d{3}$"},
    "prefixItems": {"type": "array", "prefixItems": [DIGIT, {"enum": ["x"]}], "items": False},
    "patternProperties": {"type": "object", "patternProperties": {"^k_[a-z]$": DIGIT}, "additionalProperties": False},
}


@pytest.mark.parametrize("keyword", KEYWORDS)
def test_the_keyword_is_enforced(keyword: str, uniform_model: Model) -> None:
    values = follow(uniform_model, KEYWORDS[keyword], 16)
    assert len({json.dumps(value) for value in values}) > 1


def test_constants_of_all_types_are_reachable(uniform_model: Model) -> None:
    schema = {"enum": [1, "1", None, True, 1.5, [1], {"b": 2}]}
    options: Json = {"temperature": 1.0, "top_k": 0, "min_p": 0.0}
    found = [json.loads(uniform_model.generate("x", schema=schema, seed=seed, **options).text) for seed in range(40)]
    assert len({json.dumps(value) for value in found}) == 7


class Color(str, enum.Enum):
    RED = "red"
    GREEN = "green"


@pytest.mark.parametrize(
    "kind",
    [
        set[Literal[1, 2, 3]],
        dict[Color, Literal[0, 1]],
        dict[Literal["a", "b"], bool],
        pathlib.Path,
        SecretStr,
        bytes,
        Tree | None,
        tuple[Literal["a"], bool],
    ],
    ids=str,
)
def test_schemas_of_pydantic_are_enforced(kind: Any, uniform_model: Model) -> None:
    model = create_model("M", a=(kind, ...))
    for value in draw(uniform_model, model):
        model.model_validate(value)


@pytest.mark.parametrize(
    ("schema", "message"),
    [
        (
            object_of({"a": {"type": "array", "uniqueItems": True}}),
            "#/properties/a: uniqueItems: .* few possible values",
        ),
        (object_of({"a": {**SHORT, "not": {"pattern": "x"}}}), "#/properties/a: not: .* opposite of pattern"),
        (object_of({"a": {"if": {"format": "date"}, "then": DIGIT}}), "#/properties/a: if: .* opposite of format"),
        ({"type": "array", "contains": DIGIT, "maxContains": 2}, "schema: maxContains: .* use|limit"),
        (
            {"type": "object", "unevaluatedProperties": DIGIT},
            "schema: unevaluatedProperties: .* use additionalProperties",
        ),
        ({"type": "object", "minProperties": 2}, "schema: minProperties: .* only for properties that are listed"),
        (object_of({}, "a", unevaluatedProperties=False), "required property 'a' is unsatisfiable"),
        ({"type": "objekt"}, "schema: type: found 'objekt', expected one or several of array, boolean"),
        ({"properties": {"a": 5}}, "schema: #/properties/a: found 5, expected a JSON Schema"),
        ({"required": "a"}, "schema: required: found 'a', expected a list of property names"),
        ({"type": "integer", "minimum": 10**20}, "schema: minimum: found 1.*0, expected an integer of 64 bits"),
        ({"type": ["integer", "null"], "exclusiveMaximum": -(2**64)}, "schema: exclusiveMaximum: found -1844"),
        ({"anyOf": []}, r"schema: anyOf: found \[\], expected a list of schemas that is not empty"),
        ({"items": {"minLength": -1}}, "schema: #/items: minLength: found -1, expected a whole number"),
        ({"items": {"pattern": "(?=a)b"}}, "schema: #/items: pattern: .* look-ahead and look-behind are not supported"),
        ({"items": {"pattern": "(a"}}, "schema: #/items: pattern: found '\\(a': missing \\)"),
        (json.loads('{"not":' * 900 + "{}" + "}" * 900), "nested too deeply"),
    ],
)
def test_what_the_grammar_cannot_enforce_is_refused_by_place(schema: Json, message: str, uniform_model: Model) -> None:
    with pytest.raises(ValueError, match=message):
        uniform_model.generate("x", schema=schema)


LEAVES = st.sampled_from([DIGIT, SHORT, {"const": 3}, {"enum": ["a", 1]}, {"type": "boolean"}, {"type": "null"}, True])
NAMES = st.sampled_from(["a", "b", "c"])
SCHEMAS = st.recursive(
    LEAVES,
    lambda inner: (
        st.fixed_dictionaries(
            {"type": st.just("object"), "properties": st.dictionaries(NAMES, inner, max_size=3)},
            optional={
                "required": st.lists(NAMES, unique=True, max_size=2),
                "anyOf": st.lists(inner, min_size=1, max_size=2),
                "oneOf": st.lists(inner, min_size=1, max_size=2),
                "not": inner,
                "dependentRequired": st.dictionaries(NAMES, st.lists(NAMES, max_size=1), max_size=1),
                "minProperties": st.integers(0, 2),
            },
        )
        | st.fixed_dictionaries(
            {"type": st.just("array"), "items": inner, "maxItems": st.integers(0, 3)},
            optional={"contains": inner, "uniqueItems": st.booleans(), "minItems": st.integers(0, 1)},
        )
        | st.fixed_dictionaries({"anyOf": st.lists(inner, min_size=1, max_size=3)}, optional={"not": inner})
        | st.fixed_dictionaries({"oneOf": st.lists(inner, min_size=1, max_size=3)})
        | st.fixed_dictionaries({"if": inner, "then": inner}, optional={"else": inner})
    ),
    max_leaves=6,
)


@given(SCHEMAS)
@settings(max_examples=150)
def test_any_combination_of_keywords_is_enforced_or_refused(uniform_model: Model, schema: Any) -> None:
    schema = schema if isinstance(schema, dict) else {"anyOf": [schema]}
    options: Json = {"seed": 1, "max_tokens": 150, "temperature": 1.0, "top_k": 0, "logit_bias": {ord('"'): 5.0}}
    try:
        done = uniform_model.generate("x", schema=schema, **options)
    except ValueError:
        return
    if done.finish_reason == "stop":
        jsonschema_rs.validate(schema, json.loads(done.text))


@pytest.mark.parametrize("count", [float("inf"), 1.5, -1])
def test_counts_that_are_not_whole_numbers_are_refused(count: float) -> None:
    with pytest.raises(ValueError, match="maxLength"):
        grammar_schema({"type": "string", "maxLength": count})
