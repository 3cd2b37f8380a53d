"""Items of the Responses API as the messages of a chat."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence, Set
from typing import Any

from nybble.server.errors import ApiError, sendable
from nybble.server.protocols.responses.items import (
    ITEMS,
    CallItem,
    Item,
    Known,
    MessageItem,
    OutputItem,
    ReasoningItem,
    ReferenceItem,
)
from nybble.server.tools.reader import new_id

Json = dict[str, Any]


def new_items(given: str | Sequence[Item] | None, find: Callable[[Set[str]], Mapping[str, Json]]) -> list[Json]:
    """The items of a request as they are stored: with types and ids, references replaced.

    Args:
        given: The input.
        find: Returns the stored items that have one of some ids.

    Raises:
        ApiError: A reference names an item that is not stored.
    """
    if isinstance(given, str):
        given = [MessageItem(role="user", content=given)]
    stored = find({item.id for item in given or () if isinstance(item, ReferenceItem)})
    return [_plain(item, f"input.{index}", stored) for index, item in enumerate(given or ())]


def echoed(value: Any) -> Any:
    """A value of a request as answers repeat it, in text that they can carry.

    Raises:
        RecursionError: The value is nested too deeply.
    """
    if isinstance(value, str):
        return sendable(value)
    if isinstance(value, dict):
        return {echoed(key): echoed(item) for key, item in value.items()}
    return [echoed(item) for item in value] if isinstance(value, list) else value


def _plain(item: Item, where: str, stored: Mapping[str, Json]) -> Json:
    if isinstance(item, ReferenceItem):
        if (found := stored.get(item.id)) is None:
            message = f"{where}: the item {item.id!r} is not stored on this server"
            raise ApiError(400, message, param=where, code="item_not_found")
        return found
    plain = item.model_dump(exclude_none=True)
    kind = item.type or "message"
    if isinstance(item, MessageItem) and isinstance(item.content, str):
        part = "output_text" if item.role == "assistant" else "input_text"
        plain["content"] = [{"type": part, "text": item.content}]
    return {"id": f"{_PREFIXES[kind]}_{new_id()}", "status": "completed", **echoed(plain), "type": kind}


_PREFIXES = {"message": "msg", "function_call": "fc", "function_call_output": "fco", "reasoning": "rs"}


def messages_of(items: Sequence[Json], instructions: str | None) -> list[Json]:
    """The messages of a conversation, as chats have them.

    What the model has written in one turn (reasoning, text and calls) becomes one message. System messages at the
    beginning become one, since most chat templates know only one.

    Args:
        items: The items, as `new_items` returns them.
        instructions: The system message before them.
    """
    turns: list[Json] = [] if instructions is None else [{"role": "system", "content": instructions}]
    for item in ITEMS.validate_python(items):
        _append(turns, item)
    for turn in turns:
        if turn["role"] == "assistant" and "content" not in turn:
            turn["content"] = None
    return turns


def _append(turns: list[Json], item: Known) -> None:
    last = turns[-1] if turns else {}
    is_open = last.get("role") == "assistant"
    if isinstance(item, OutputItem):
        turns.append({"role": "tool", "tool_call_id": item.call_id, "content": _text(item.output)})
    elif isinstance(item, MessageItem) and item.role != "assistant":
        role, text = "system" if item.role == "developer" else item.role, _text(item.content)
        if role == last.get("role") == "system" and len(turns) == 1:
            last["content"] = f"{last['content']}\n\n{text}"
        else:
            turns.append({"role": role, "content": text})
    elif isinstance(item, ReasoningItem):
        if item.text:
            turns.append({"role": "assistant", "reasoning_content": item.text})
    elif isinstance(item, MessageItem):
        if is_open and "content" not in last and "tool_calls" not in last:
            last["content"] = _text(item.content)
        else:
            turns.append({"role": "assistant", "content": _text(item.content)})
    elif isinstance(item, CallItem):
        if not is_open:
            turns.append(last := {"role": "assistant"})
        function = {"name": item.name, "arguments": item.arguments}
        last.setdefault("tool_calls", []).append({"id": item.call_id, "type": "function", "function": function})


def _text(content: Any) -> str:
    return content if isinstance(content, str) else "\n".join(part.content for part in content)
