"""Completions constrained by a JSON Schema, a regular expression or a grammar."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nybble import Model, SamplingOptions

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 6},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "tags": {"type": "array", "items": {"enum": ["a", "b"]}, "maxItems": 2},
    },
    "required": ["name", "age", "tags"],
}


class Pydantic:
    """A class with the method of a pydantic model class."""

    @staticmethod
    def model_json_schema() -> dict[str, Any]:
        return PERSON


@pytest.mark.parametrize("schema", [PERSON, json.dumps(PERSON), Pydantic], ids=["dict", "text", "class"])
def test_a_schema_is_followed_for_any_seed(tiny_model: Model, schema: Any) -> None:
    for seed in range(10):
        done = tiny_model.generate("x", schema=schema, seed=seed, temperature=1.5, top_k=0, top_p=1, min_p=0)
        assert done.finish_reason == "stop"
        person = json.loads(done.text)
        assert set(person) == {"name", "age", "tags"}
        assert len(person["name"]) <= 6
        assert 0 <= person["age"] <= 120
        assert set(person["tags"]) <= {"a", "b"}


def test_chats_streams_and_batches_follow_constraints(tiny_model: Model) -> None:
    options = SamplingOptions(regex="[ab]{3}", seed=3)
    alone = tiny_model.generate("x", options)
    assert re.fullmatch("[ab]{3}", alone.text)
    assert "".join(tiny_model.stream("x", options)) == alone.text
    assert [done.text for done in tiny_model.generate(["x", "y", "x"], options)][::2] == [alone.text] * 2
    chat = tiny_model.chat([{"role": "user", "content": "Hi"}], grammar='start: "yes" | "no"')
    assert chat.text in ("yes", "no")


def test_a_constraint_does_not_affect_other_calls(tiny_model: Model) -> None:
    alone = tiny_model.generate("x", seed=1, max_tokens=20)
    assert tiny_model.generate("x", schema={}, seed=1, max_tokens=20).text != alone.text
    assert tiny_model.generate("x", seed=1, max_tokens=20).text == alone.text


def test_log_probabilities_ignore_the_constraint(tiny_model: Model) -> None:
    (first,) = tiny_model.generate("x", regex="a", logprobs=1, max_tokens=1).logprobs or ()
    free = tiny_model.generate("x", logprobs=259, temperature=0, max_tokens=1).logprobs or ()
    assert first.text == "a"
    assert first.logprob == next(logprob for _, text, logprob in free[0].top if text == "a")


def test_max_tokens_ends_a_constrained_completion(tiny_model: Model) -> None:
    done = tiny_model.generate("x", regex="a{50}", max_tokens=7)
    assert (done.text, done.finish_reason) == ("a" * 7, "length")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"schema": {"type": "objekt"}}, "schema: type: found 'objekt', expected one or several of"),
        ({"schema": "[1]"}, r"schema: found '\[1\]', expected a dict, JSON text or a pydantic model"),
        ({"schema": "{"}, "schema: found text that is not valid JSON"),
        ({"schema": 5}, "schema: found 5, expected a dict"),
        ({"schema": {"enum": [float("nan")]}}, "schema: found a value that JSON cannot represent"),
        ({"regex": "("}, "regex: found "),
        ({"regex": ""}, "regex: found '', expected a string that is not empty"),
        ({"grammar": "start: other"}, "grammar: found "),
        ({"regex": "a", "schema": {}}, "at most one of schema, regex and grammar"),
    ],
)
def test_an_invalid_constraint_is_refused(tiny_model: Model, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny_model.generate("x", **options)


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(max_size=3),
        lambda x: (
            st.lists(x)
            | st.dictionaries(
                st.sampled_from(
                    [
                        "type",
                        "properties",
                        "items",
                        "enum",
                        "$ref",
                        "anyOf",
                        "allOf",
                        "pattern",
                        "minimum",
                        "x-guidance",
                    ]
                ),
                x,
            )
        ),
        max_leaves=8,
    )
)
@settings(max_examples=200)
def test_any_schema_is_followed_or_refused(tiny_model: Model, schema: Any) -> None:
    if not isinstance(schema, dict):
        schema = {"enum": [schema]}
    try:
        done = tiny_model.generate("x", schema=schema, max_tokens=40, seed=0)
    except ValueError:
        return
    if done.finish_reason == "stop":
        json.loads(done.text)
