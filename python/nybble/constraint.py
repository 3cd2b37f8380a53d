"""What a text may be held to: a JSON Schema, a regular expression, a grammar."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

if TYPE_CHECKING:
    from nybble import _native
    from nybble.sampling import SamplingOptions
    from nybble.tokenizer.tokenizer import Tokenizer


@runtime_checkable
class HasSchema(Protocol):
    """Whatever describes itself by a JSON Schema, as a model class of pydantic does."""

    def model_json_schema(self) -> dict[str, Any]:
        """The schema."""
        ...


def schema_text(schema: object) -> str:
    """A JSON Schema as JSON text.

    Raises:
        ValueError: it is none of: a dict, a JSON text of an object, a class with `model_json_schema()`.
    """
    if isinstance(schema, HasSchema):
        schema = schema.model_json_schema()
    if isinstance(schema, str):
        try:
            found = json.loads(schema)
        except ValueError as error:
            raise ValueError(f"schema: found a text that is no JSON ({error}), expected a JSON Schema") from None
        if isinstance(found, dict):
            return schema
    elif isinstance(schema, Mapping):
        try:
            return json.dumps(schema, allow_nan=False)
        except (TypeError, ValueError, RecursionError) as error:
            raise ValueError(f"schema: found what JSON cannot hold ({error}), expected a JSON Schema") from None
    raise ValueError(f"schema: found {schema!r:.80}, expected a dict, a JSON text or a pydantic model")


def constraint(tokenizer: Tokenizer, options: SamplingOptions) -> _native.Constraint | None:
    """What `options` hold a text to, if anything.

    Raises:
        ValueError: the grammar is not valid, not supported or too large, or the model knows no token that ends a text.
    """
    for kind in ("schema", "regex", "grammar"):
        if (text := getattr(options, kind)) is not None:
            return tokenizer.grammar_vocabulary.constraint(kind, text)
    return None
