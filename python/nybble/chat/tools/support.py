"""What a chat template knows about tools, found by trying it."""

from __future__ import annotations

import functools
import hashlib
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


_SHORT = "call00000"
"""An id as Mistral's templates require it: nine alphanumeric characters."""
_LONG = "call_Zm9vYmFyYmF6cXV4cXV1eA"
"""An id as OpenAI writes it."""
_NO_PARAMETERS: dict[str, Any] = {"type": "object", "properties": {}}


def _conversation(text: str, ids: Sequence[str] = (_SHORT,)) -> list[Turn]:
    """Calls with these ids next to a text, and their results."""
    function = {"name": _NAME, "arguments": {"argument": _VALUE}}
    calls = [{"id": id, "type": "function", "function": function} for id in ids]
    results: list[Turn] = [{"role": "tool", "tool_call_id": id, "name": _NAME, "content": _RESULT} for id in ids]
    return [_USER, {"role": "assistant", "content": text, "tool_calls": calls}, *results]


@dataclass(frozen=True)
class ToolSupport:
    """What a chat template writes by itself. The rest becomes text of the messages."""

    tool_format: ToolFormat
    """How the model writes calls."""
    lists_tools: bool
    """Whether the template writes the descriptions of tools."""
    history: History
    fills: tuple[str, ...] = ()
    """The members of a function that the template needs, and that OpenAI's protocol lets clients leave out."""
    one_call: bool = False
    """Whether the template writes only one call of a turn. Others become turns of their own."""
    short_ids: bool = False
    """Whether the template refuses ids that do not have nine alphanumeric characters."""

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
        if self.one_call:
            messages = one_call_a_turn(messages)
        if self.short_ids:
            messages = _with_short_ids(messages)
        prepared = _prepared(messages, self.history, self.tool_format)
        tools = [_filled(tool, self.fills) for tool in tools]
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


def one_call_a_turn(messages: Sequence[Turn]) -> list[Turn]:
    """The conversation with a turn of its own for each call, followed by its result."""
    turns: list[Turn] = []
    rest = [*messages]
    while rest:
        turn = rest.pop(0)
        calls = turn.get("tool_calls") or []
        if len(calls) < 2:
            turns.append(turn)
            continue
        results: list[Turn] = []
        while rest and rest[0].get("role") == "tool":
            results.append(rest.pop(0))
        for number, call in enumerate(calls):
            said = turn if number == 0 else {"role": turn["role"], "content": ""}
            turns.append({**said, "tool_calls": [call]})
            own = [result for result in results if result.get("tool_call_id") in (None, call.get("id"))]
            if own:
                turns.append(own[0])
                results = [result for result in results if result is not own[0]]
        turns += results
    return turns


def _with_short_ids(messages: Sequence[Turn]) -> list[Turn]:
    """The conversation with ids of nine alphanumeric characters, the same for a call and its result."""

    def short(id: Any) -> Any:
        if not isinstance(id, str) or (len(id) == len(_SHORT) and id.isascii() and id.isalnum()):
            return id
        return hashlib.blake2b(id.encode("utf-8", "surrogatepass"), digest_size=8).hexdigest()[: len(_SHORT)]

    turns: list[Turn] = []
    for turn in messages:
        changed = dict(turn)
        if calls := turn.get("tool_calls"):
            changed["tool_calls"] = [{**call, "id": short(call.get("id"))} for call in calls]
        if "tool_call_id" in turn:
            changed["tool_call_id"] = short(turn["tool_call_id"])
        turns.append(changed)
    return turns


def _filled(tool: Mapping[str, Any], names: Sequence[str]) -> Mapping[str, Any]:
    """The tool with those of these members that its function lacks."""
    function = {
        name: value for name, value in tool.get("function", {}).items() if name not in names or value is not None
    }
    if "description" in names:
        function.setdefault("description", "")
    if "parameters" in names:
        function["parameters"] = {**_NO_PARAMETERS, **function.get("parameters", {})}
    return {**tool, "function": function} if names else tool


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

    def rendered(messages: Sequence[Turn], tool: Mapping[str, Any] = _TOOL) -> str | None:
        try:
            return compiled.render(messages, tools=[tool], add_generation_prompt=True, bos_token="", eos_token="")
        except ModelError:
            return None

    def is_written(text: str, history: History, ids: Sequence[str] = (_SHORT,)) -> bool:
        """Whether the template writes calls with these ids next to this text, and their results."""
        prompt = rendered(_prepared(_conversation(text, ids), history, known))
        return prompt is not None and min(prompt.count(_VALUE), prompt.count(_RESULT)) >= len(ids)

    def needs(name: str, *values: Any) -> bool:
        """Whether the template fails for functions without this member, or with one of these values."""
        function = {key: value for key, value in _TOOL["function"].items() if key != name}
        functions = [function, *({**function, name: value} for value in values)]
        return any(rendered([_USER], {**_TOOL, "function": function}) is None for function in functions)

    asked = rendered([_USER])
    lists_tools = "tools" in template if asked is None else _NAME in asked
    kinds: tuple[History, ...] = ("values", "arguments as text", "calls as text")
    history: History = next(
        (kind for kind in kinds if all(is_written(text, kind) for text in ("", "Text"))), "turns as text"
    )
    fills = (
        ()
        if asked is None
        else tuple(
            name
            for name, values in (("description", ()), ("parameters", ({}, {"type": "object"})))
            if needs(name, *values)
        )
    )
    is_call = history in ("values", "arguments as text")
    return ToolSupport(
        known,
        lists_tools,
        history,
        fills,
        one_call=is_call and not is_written("", history, (_SHORT, _SHORT.replace("0", "1"))),
        short_ids=is_call and not is_written("", history, (_LONG,)),
    )
