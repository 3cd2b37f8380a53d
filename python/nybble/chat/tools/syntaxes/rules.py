"""What the syntaxes need to write grammars: the functions, their schemas, and literals with special tokens."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from nybble.constraints.schema import combined

Json = dict[str, Any]
Schema = Any
Call = tuple[str, Mapping[str, Any]]
"""The name of a function and its arguments."""


@dataclass(frozen=True)
class AllowedFunction:
    """A function that the grammar lets the model call."""

    name: str
    schema: Json
    """The JSON Schema of the arguments."""
    parameter: str
    """The parameter of the request that holds the schema, for errors."""


class CallRules:
    """The functions of a grammar, and how it writes text.

    Args:
        functions: The functions that may be called.
        special_tokens: The markers of the format that are special tokens, with their ids.
    """

    def __init__(self, functions: Sequence[AllowedFunction], special_tokens: Mapping[str, int]) -> None:
        self.functions = functions
        self._tokens = special_tokens
        longest_first = sorted(special_tokens, key=len, reverse=True)
        self._pattern = re.compile("(" + "|".join(map(re.escape, longest_first)) + ")") if longest_first else None

    def text(self, text: str) -> str:
        """Exactly this text, in which markers that are special tokens are tokens."""
        return " ".join(
            f"<[{self._tokens[part]}]>" if part in self._tokens else json.dumps(part, ensure_ascii=False)
            for part in self._parts(text)
            if part
        )

    def before_token(self, text: str) -> str | None:
        """The beginning of a text up to its first special token; None if it has none."""
        first, *rest = self._parts(text)
        return first if rest else None

    def _parts(self, text: str) -> list[str]:
        """A text, split at its special tokens."""
        return [text] if self._pattern is None else self._pattern.split(text)


def arguments_schema(parameters: Mapping[str, Any] | None) -> Json:
    """The JSON Schema of the arguments of a function. Without parameters it has no arguments."""
    if not parameters:
        return {"type": "object", "properties": {}}
    return {**parameters, "type": parameters.get("type", "object")}


def json_rule(schemas: Sequence[tuple[Schema, str]], build: Callable[[list[Schema]], Schema]) -> str:
    """The body of a rule for JSON by a schema that `build` makes of others."""
    return f"%json {json.dumps(combined(schemas, build))}"
