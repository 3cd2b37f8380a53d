"""What a chat template does not write about tools: their descriptions, earlier calls and results, as text."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from nybble.chat.tools.formats import HERMES
from nybble.chat.tools.tool_format import ToolFormat

_INSTRUCTIONS = """\
# Tools

You may call one or more functions to assist with the user query.

You are provided with function signatures within <tools></tools> XML tags:
<tools>
{tools}
</tools>

"""
"""The words of Hermes, which Qwen's and other templates use, so that many models were trained on them."""

_AS_HERMES = """\
For each function call, return a json object with function name and arguments within <tool_call></tool_call> XML tags:
<tool_call>
{"name": <function-name>, "arguments": <args-json-object>}
</tool_call>"""

_AS_FORMAT = """\
To call a function, write exactly this, with the name of the function and its arguments:
"""

Turn = Mapping[str, Any]


def with_tools(
    messages: Sequence[Turn], tools: Sequence[Mapping[str, Any]], tool_format: ToolFormat = HERMES
) -> list[Turn]:
    """A conversation whose system message describes tools.

    Args:
        messages: The turns, as chat templates receive them.
        tools: The tools, as chat templates receive them.
        tool_format: How the model is to write calls.
    """
    listed = "\n".join(json.dumps(tool, ensure_ascii=False) for tool in tools)
    if tool_format is HERMES:
        form = _AS_HERMES
    else:
        form = _AS_FORMAT + tool_format.write([("function-name", {"argument": "value"})])
    instructions = _INSTRUCTIONS.format(tools=listed) + form
    if messages and messages[0]["role"] == "system":
        first = messages[0]
        content = f"{first['content']}\n\n{instructions}" if first["content"] else instructions
        return [{**first, "content": content}, *messages[1:]]
    return [{"role": "system", "content": instructions}, *messages]


def calls_as_text(messages: Sequence[Turn], tool_format: ToolFormat, *, results: bool = True) -> list[Turn]:
    """A conversation whose earlier calls are text.

    Args:
        messages: The turns, as chat templates receive them.
        tool_format: How calls are written.
        results: Write the results of tools as turns of the user, too.
    """
    return [_as_text(turn, tool_format, results) for turn in messages]


def _as_text(turn: Turn, tool_format: ToolFormat, results: bool) -> Turn:
    if turn["role"] == "tool" and results:
        return {"role": "user", "content": f"<tool_response>\n{turn['content']}\n</tool_response>"}
    calls = [call["function"] for call in turn.get("tool_calls") or ()]
    if not calls:
        return turn
    written = tool_format.write([(call["name"], call["arguments"]) for call in calls])
    kept = {key: value for key, value in turn.items() if key != "tool_calls"}
    return {**kept, "content": "\n".join(filter(None, [turn.get("content"), written]))}


def arguments_as_text(messages: Sequence[Turn]) -> list[Turn]:
    """A conversation whose earlier calls have their arguments as JSON text, which some templates expect."""
    return [_with_text(turn) if turn.get("tool_calls") else turn for turn in messages]


def _with_text(turn: Turn) -> Turn:
    calls = [
        {**call, "function": {**call["function"], "arguments": json.dumps(arguments, ensure_ascii=False)}}
        for call in turn["tool_calls"]
        for arguments in [call["function"]["arguments"]]
    ]
    return {**turn, "tool_calls": calls}
