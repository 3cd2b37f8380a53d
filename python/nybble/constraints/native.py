"""Creates the native constraint of a request."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Literal

from nybble.constraints.document import SchemaError, step
from nybble.constraints.gbnf import is_gbnf, lark_of_gbnf
from nybble.constraints.regex import mistake, unsupported
from nybble.constraints.schema import grammar_text

if TYPE_CHECKING:
    from nybble import _native

_TERMINAL = re.compile(r"/((?:\\.|[^/\\\n])+)/")
"""A regular expression in a Lark grammar."""


def constraint(
    vocabulary: _native.Vocabulary, kind: Literal["schema", "regex", "grammar"], text: str
) -> _native.Constraint:
    """The constraint of an empty completion.

    Args:
        vocabulary: The vocabulary of the model.
        kind: What `text` is: JSON Schema as JSON, a regular expression, or a grammar in Lark's syntax or GBNF.
        text: The source of the constraint.

    Raises:
        ValueError: The text is invalid, or has a part that cannot be enforced.
    """
    source = text
    if kind == "schema":
        text = grammar_text(text)
    elif kind == "grammar" and is_gbnf(text):
        try:
            text = lark_of_gbnf(text)
        except ValueError as error:
            raise ValueError(f"grammar: {error}") from None
    elif kind == "regex" and (reason := unsupported(text)) is not None:
        raise ValueError(f"regex: {reason}")
    try:
        return vocabulary.constraint(kind, text)
    except ValueError as error:
        if kind == "regex" and (reason := mistake(text)) is not None:
            raise ValueError(f"regex: found {text!r:.100}: {reason}") from error
        for pattern in _TERMINAL.findall(text) if kind == "grammar" else ():
            if (reason := unsupported(pattern) or mistake(pattern)) is not None:
                raise ValueError(f"grammar: found /{pattern:.100}/: {reason}") from error
        for place, pattern in _patterns(json.loads(source), "#") if kind == "schema" else ():
            if (reason := mistake(pattern)) is not None:
                raise SchemaError(place, f"pattern: found {pattern!r:.100}: {reason}") from error
        raise


def _patterns(schema: Any, place: str) -> Iterator[tuple[str, str]]:
    """The regular expressions of a schema, each with its place."""
    if isinstance(schema, dict):
        for key, value in schema.items():
            if key == "pattern" and isinstance(value, str):
                yield place, value
            elif key == "patternProperties" and isinstance(value, dict):
                yield from ((place, pattern) for pattern in value)
            yield from _patterns(value, step(place, key))
    elif isinstance(schema, list):
        for index, value in enumerate(schema):
            yield from _patterns(value, step(place, index))
