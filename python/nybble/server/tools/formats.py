"""Tool-call formats by model family, recognized from the chat template."""

from __future__ import annotations

from collections.abc import Callable, Mapping
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


HERMES = ToolFormat("<tool_call>", "</tool_call>")
"""The format that the server describes to models whose chat template does not know tools."""

_FORMATS = (
    HERMES,  # Hermes, Qwen 2.5 and 3, SmolLM2 and 3, Granite 4
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
