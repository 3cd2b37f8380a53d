"""Creates the native constraint of a request."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from nybble.constraints.schema import grammar_text

if TYPE_CHECKING:
    from nybble import _native


def constraint(
    vocabulary: _native.Vocabulary, kind: Literal["schema", "regex", "grammar"], text: str
) -> _native.Constraint:
    """The constraint of an empty completion.

    Args:
        vocabulary: The vocabulary of the model.
        kind: What `text` is: JSON Schema as JSON, a regular expression, or a Lark grammar.
        text: The source of the constraint.

    Raises:
        ValueError: The text is invalid, or has a part that cannot be enforced.
    """
    if kind == "schema":
        text = grammar_text(text)
    return vocabulary.constraint(kind, text)
