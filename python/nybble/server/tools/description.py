"""Tools for models whose chat template does not know them: described in the conversation, in the format of Hermes."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

_INSTRUCTIONS = """\
# Tools

You may call one or more functions to assist with the user query.

You are provided with function signatures within <tools></tools> XML tags:
<tools>
{tools}
</tools>

For each function call, return a json object with function name and arguments within <tool_call></tool_call> XML tags:
<tool_call>
{{"name": <function-name>, "arguments": <args-json-object>}}
</tool_call>"""
"""The words of Hermes, which Qwen's and other templates use, so that many models were trained on them."""

Turn = Mapping[str, Any]


def with_tools(messages: Sequence[Turn], tools: Sequence[Mapping[str, Any]]) -> list[Turn]:
    """A conversation whose system message describes tools, and whose calls and results are text.

    Args:
        messages: The turns, as chat templates receive them.
        tools: The tools, as chat templates receive them.
    """
    listed = "\n".join(json.dumps(tool, ensure_ascii=False) for tool in tools)
    instructions = _INSTRUCTIONS.format(tools=listed)
    turns = [_as_text(turn) for turn in messages]
    if turns and turns[0]["role"] == "system":
        first = f"{turns[0]['content']}\n\n{instructions}" if turns[0]["content"] else instructions
        return [{**turns[0], "content": first}, *turns[1:]]
    return [{"role": "system", "content": instructions}, *turns]


def _as_text(turn: Turn) -> Turn:
    if turn["role"] == "tool":
        return {"role": "user", "content": f"<tool_response>\n{turn['content']}\n</tool_response>"}
    calls = turn.get("tool_calls")
    if not calls:
        return turn
    written = [f"<tool_call>\n{json.dumps(call['function'], ensure_ascii=False)}\n</tool_call>" for call in calls]
    return {"role": turn["role"], "content": "\n".join(filter(None, [turn["content"], *written]))}
