"""Draws random values of a JSON Schema from a model that predicts all tokens with the same probability."""

from __future__ import annotations

import json
from typing import Any

import jsonschema_rs

from nybble import Model

Json = dict[str, Any]

DIGIT: Json = {"type": "integer", "minimum": 0, "maximum": 9}
SHORT: Json = {"type": "string", "maxLength": 3}
EVERY_TOKEN: Json = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0}
"""Sampling options that filter no token."""
END_STRINGS = {ord('"'): 5.0}
"""A bias that keeps strings short."""


def draw(model: Model, schema: Any, count: int = 8) -> list[Any]:
    """Returns values that the model writes under a schema, one for each seed."""
    options = {"max_tokens": 600, "logit_bias": END_STRINGS, **EVERY_TOKEN}
    found = [model.generate("x", schema=schema, seed=seed, **options) for seed in range(count)]
    for done in found:
        assert done.finish_reason == "stop", f"unfinished: {done.text}"
    return [json.loads(done.text) for done in found]


def follow(model: Model, schema: Json, count: int = 8) -> list[Any]:
    """Draws values and validates them against the schema."""
    values = draw(model, schema, count)
    for value in values:
        jsonschema_rs.validate(schema, value)
    return values


def object_of(properties: Json, *required: str, **more: Any) -> Json:
    """The schema of an object."""
    return {"type": "object", "properties": properties, "required": list(required), **more}


def closed(properties: Json, **more: Any) -> Json:
    """The schema of an object with exactly these properties."""
    return object_of(properties, *properties, additionalProperties=False, **more)
