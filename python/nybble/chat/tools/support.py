"""What a chat template knows about tools, found by trying it."""

from __future__ import annotations

import functools
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from nybble.chat.template import ChatTemplate
from nybble.chat.tools.description import Turn, arguments_as_text, calls_as_text, with_tools
from nybble.chat.tools.formats import HERMES, detect_format
from nybble.chat.tools.tool_format import ToolFormat
from nybble.errors import ModelError

_log = logging.getLogger("nybble.chat")

History = Literal["values", "arguments as text", "calls as text", "turns as text"]
"""How earlier calls reach the template: as they are, with arguments as JSON text, or as text of the answer. In the last
case, results are turns of the tool or of the user."""

_NAME, _VALUE, _RESULT = "probed_function", "probed value", "probed result"
_TOOL: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": _NAME,
        "description": "Probes the template",
        "parameters": {
            "type": "object",
            "properties": {"argument": {"type": "string", "description": "A text"}},
            "required": ["argument"],
        },
    },
}
_USER: Turn = {"role": "user", "content": "Question"}


def _conversation(text: str) -> list[Turn]:
    """A call next to a text, and its result."""
    function = {"name": _NAME, "arguments": {"argument": _VALUE}}
    return [
        _USER,
        {
            "role": "assistant",
            "content": text,
            "tool_calls": [{"id": "call00000", "type": "function", "function": function}],
        },
        {"role": "tool", "tool_call_id": "call00000", "name": _NAME, "content": _RESULT},
    ]


@dataclass(frozen=True)
class ToolSupport:
    """What a chat template writes by itself. The rest becomes text of the messages."""

    tool_format: ToolFormat
    """How the model writes calls."""
    lists_tools: bool
    """Whether the template writes the descriptions of tools."""
    history: History

    def prepare(
        self, messages: Sequence[Turn], tools: Sequence[Mapping[str, Any]]
    ) -> tuple[list[Turn], Sequence[Mapping[str, Any]] | None]:
        """A conversation and its tools as the template needs them.

        Args:
            messages: The turns, with the arguments of earlier calls as values.
            tools: The tools; empty if there are none.

        Returns:
            The messages, and the tools for the template.
        """
        prepared = _prepared(messages, self.history, self.tool_format)
        if not tools or self.lists_tools:
            return prepared, tools or None
        return with_tools(prepared, tools, self.tool_format), None


def _prepared(messages: Sequence[Turn], history: History, tool_format: ToolFormat) -> list[Turn]:
    """The messages with earlier calls as `history` says."""
    match history:
        case "values":
            return [*messages]
        case "arguments as text":
            return arguments_as_text(messages)
        case _:
            return calls_as_text(messages, tool_format, results=history == "turns as text")


@functools.lru_cache(maxsize=64)
def tool_support(template: str) -> ToolSupport:
    """What a chat template writes by itself.

    A template that mentions tools, but in no known format, is treated as one that does not know them, and this is
    logged.

    Args:
        template: The source of the template.
    """
    known = detect_format(template)
    if known is None:
        if "tools" in template:
            _log.warning(
                "the chat template writes tool calls in no known format: the prompt describes tools and asks for calls "
                "as JSON within <tool_call></tool_call>"
            )
        return ToolSupport(HERMES, lists_tools=False, history="turns as text")
    compiled = ChatTemplate(template)

    def rendered(messages: Sequence[Turn]) -> str | None:
        try:
            return compiled.render(messages, tools=[_TOOL], add_generation_prompt=True, bos_token="", eos_token="")
        except ModelError:
            return None

    def is_written(text: str, history: History) -> bool:
        """Whether the template writes a call next to this text, and its result."""
        prompt = rendered(_prepared(_conversation(text), history, known))
        return prompt is not None and _VALUE in prompt and _RESULT in prompt

    asked = rendered([_USER])
    lists_tools = "tools" in template if asked is None else _NAME in asked
    kinds: tuple[History, ...] = ("values", "arguments as text", "calls as text")
    history: History = next(
        (kind for kind in kinds if all(is_written(text, kind) for text in ("", "Text"))), "turns as text"
    )
    return ToolSupport(known, lists_tools, history)
