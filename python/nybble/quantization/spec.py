"""The names of recipes and formats, and the parser of `Model.load(quantize="int4:g128:gptq")`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, get_args

Recipe = Literal["auto", "rtn", "gptq", "gptq+tune", "awq", "awq+gptq", "signround"]
Format = Literal["q2_0", "q4_0", "q4_1", "iq4_nl"]
SparsityPattern = Literal["unstructured", "2:4"]

RECIPES: tuple[str, ...] = get_args(Recipe)
FORMATS: tuple[str, ...] = get_args(Format)
PATTERNS: tuple[str, ...] = get_args(SparsityPattern)


@dataclass(frozen=True)
class Spec:
    """A recipe, a group size and a format."""

    recipe: Recipe = "rtn"
    group: int = 32
    format: Format = "q4_0"

    @classmethod
    def parse(cls, text: str) -> Spec:
        """Parses `int4`, followed by parts in any order, separated by colons.

        A part is a recipe, a group size such as `g128`, a format, or `sym` or `asym` for q4_0 or q4_1.

        Raises:
            ValueError: A part is none of these, or occurs twice.
        """
        kind, *parts = text.split(":")
        values: dict[str, Any] = {}
        for part in parts:
            key, value = _parse_part(part)
            if not key or key in values or kind != "int4":
                raise ValueError(
                    f"quantize: found {text!r}, expected auto, stored, int4, int8, or int4 with parts such as "
                    "int4:g128:gptq (a group, a recipe, a format, each once)"
                )
            values[key] = value
        return cls(**values)


def _parse_part(part: str) -> tuple[str, Any]:
    if part in RECIPES and part != "auto":
        return "recipe", part
    if part in ("q4_0", "q4_1", "iq4_nl", "sym", "asym"):
        return "format", {"sym": "q4_0", "asym": "q4_1"}.get(part, part)
    if part[:1] == "g" and part[1:].isascii() and part[1:].isdigit() and int(part[1:]) % 32 == 0:
        return "group", int(part[1:])
    return "", part
