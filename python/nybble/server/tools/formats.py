"""Tool-call formats by model family, recognized from the chat template."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from nybble.server.tools import reader
from nybble.server.tools.reader import Reader, Steps


class Function(Protocol):
    """A function that the model may call."""

    @property
    def name(self) -> str:
        """The name that the model writes."""

    @property
    def parameters(self) -> Mapping[str, Any] | None:
        """The JSON Schema of the arguments; None for any object."""


@dataclass(frozen=True)
class ToolFormat:
    """How a model family writes tool calls: after an opening marker, and in some families before a closing one."""

    opening: str
    closing: str = ""
    syntax: Callable[[Reader], Steps[None]] = reader.json_objects
    """The syntax of the text after the opening marker."""
    arguments_key: str = "arguments"
    """The key of the arguments in JSON objects, next to "name"."""
    as_list: bool = False
    """The JSON objects are elements of a list."""
    bare: bool = False
    """An answer that begins with a JSON object is a call, even without the opening marker."""

    @property
    def markers(self) -> tuple[str, ...]:
        """All markers. In some vocabularies they are special tokens, which decode to no text."""
        inner = ("[ARGS]", "[CALL_ID]") if self.syntax is reader.mistral else ()
        return tuple(marker for marker in (self.opening, *inner, self.closing) if marker)

    def forced_call(
        self, functions: Sequence[Function], special_token: Callable[[str], int | None]
    ) -> tuple[str, dict[str, Any]]:
        """Returns the constraint that makes an answer a call of one of `functions`.

        Args:
            functions: The functions to choose from.
            special_token: Gives the id of a marker that is a special token, or None.

        Returns:
            The text that the answer begins with, and the sampling options that constrain the rest.
        """
        if self.syntax is reader.json_objects or self.as_list:
            prefix = "" if self.bare else f"{self.opening}\n" if self.closing else self.opening
            return prefix, {"schema": self._call_schema(functions)}
        args_token = special_token("[ARGS]")
        if self.syntax is reader.name_then_json:
            after_name = '">"'
        else:
            after_name = '"[ARGS]"' if args_token is None else f"<[{args_token}]>"
        rules = []
        for index, function in enumerate(functions):
            rule = f"f{index}"
            if self.syntax is reader.tagged:
                rules += _tagged_rules(rule, function)
            else:
                rules += [
                    f'{rule}: "{function.name}" {after_name} {rule}_a',
                    f"{rule}_a: {_json_rule(function.parameters)}",
                ]
        rules.append("start: " + " | ".join(f"f{index}" for index in range(len(functions))))
        prefix = f"{self.opening}\n<function=" if self.syntax is reader.tagged else self.opening
        return prefix, {"grammar": "\n".join(rules)}

    def _call_schema(self, functions: Sequence[Function]) -> dict[str, Any]:
        """The JSON Schema of one call."""
        choices = [
            {
                "type": "object",
                "properties": {"name": {"const": f.name}, self.arguments_key: f.parameters or {"type": "object"}},
                "required": ["name", self.arguments_key],
                "additionalProperties": False,
            }
            for f in functions
        ]
        call: dict[str, Any] = choices[0] if len(choices) == 1 else {"anyOf": choices}
        return {"type": "array", "items": call, "minItems": 1, "maxItems": 1} if self.as_list else call


def _json_rule(schema: Mapping[str, Any] | None) -> str:
    """A grammar rule for a JSON Schema, with one spelling per value and without unlisted properties."""
    spacing = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
    closed = {"x-guidance": spacing, **(schema or {"type": "object"})}
    if "properties" in closed and not closed.keys() & {"additionalProperties", "patternProperties", "$ref", "allOf"}:
        closed["additionalProperties"] = False
    return f"%json {json.dumps(closed)}"


def _tagged_rules(rule: str, function: Function) -> list[str]:
    """Grammar rules of one tagged call: an element per argument, in order; optional arguments may be missing."""
    schema = function.parameters or {}
    properties, required = schema.get("properties"), schema.get("required")
    rules, parts = [], []
    for index, (key, value) in enumerate(properties.items() if isinstance(properties, dict) else ()):
        part = f"{rule}_{index}"
        parts.append(part if isinstance(required, list) and key in required else f"{part}?")
        value = value if isinstance(value, dict) else {}
        choices = [value["const"]] if "const" in value else value.get("enum")
        opening, closing = _literal(f"<parameter={key}>\n"), _literal("\n</parameter>\n")
        if value.get("type") != "string":
            rules += [f"{part}: {opening} {part}_v {closing}", f"{part}_v: {_json_rule(value)}"]
        elif isinstance(choices, list):
            rules.append(f"{part}: {opening} ({' | '.join(_literal(str(choice)) for choice in choices)}) {closing}")
        else:
            rules += [f"{part}: {opening} {part}_v", f'{part}_v[suffix="</parameter>\\n"]: /(?s:.*)/']
    return [*rules, " ".join([f"{rule}:", _literal(f"{function.name}>\n"), *parts, '"</function>"'])]


def _literal(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


_FORMATS = (
    ToolFormat("<tool_call>", "</tool_call>"),  # Hermes, Qwen 2.5 and 3, SmolLM2 and 3, Granite 4
    ToolFormat("[TOOL_CALLS]", syntax=reader.mistral, as_list=True),  # Mistral
    ToolFormat("<|tool_call|>", as_list=True),  # Granite 3
    ToolFormat("<|python_tag|>", arguments_key="parameters", bare=True),  # Llama 3.1 and later
)
_MISTRAL_ARGS = ToolFormat("[TOOL_CALLS]", syntax=reader.mistral)  # Mistral since the middle of 2025
_TAGGED = ToolFormat("<tool_call>", "</tool_call>", reader.tagged)  # Qwen3-Coder
_NAMED = ToolFormat("<function=", "</function>", reader.name_then_json)  # Functionary on Llama 3.1


def detect_format(template: str) -> ToolFormat | None:
    """The tool-call format that a chat template uses, or None if it uses none that is supported."""
    if "<arg_key>" in template:
        return None
    if "<parameter=" in template:
        return _TAGGED if "<tool_call>" in template and "<function=" in template else None
    if "<function=" in template:
        return _NAMED
    if "[ARGS]" in template:
        return _MISTRAL_ARGS if "[TOOL_CALLS]" in template else None
    return next((known for known in _FORMATS if known.opening in template), None)
