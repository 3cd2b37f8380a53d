"""Conversations as `transformers` passes them to a chat template: plain data, without keys that are None."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

_INSTEAD_OF_CONTENT = {"tool_calls", "function_call", "reasoning_content", "thinking", "reasoning", "tool_responses"}
"""Keys of messages that may have no content."""
_MEDIA = ("image", "audio", "video", "file")
"""The beginnings of the types of parts that are not text."""
_REASONING = ("reasoning_content", "thinking", "reasoning")
"""The names under which templates and programs pass a message's reasoning. The first is the usual one."""
_END = "CONTINUE_FINAL_MESSAGE_TAG "
"""Marks the place at which the model continues. Templates that trim content remove the space, which shows it."""


def turns(messages: object) -> list[dict[str, Any]]:
    """Returns the messages as a template sees them.

    The values are copied as plain data. Keys whose value is None are left out, since many templates would write "None".
    Reasoning has all the names under which templates look for it.

    Raises:
        TypeError: `messages` is not a list of dicts, or a value in a message has the wrong type.
        ValueError: A message has no role or no content.
    """
    if isinstance(messages, (str, bytes)) or not isinstance(messages, Sequence):
        raise TypeError(f"messages: found {type(messages).__name__}, expected a list of messages")
    return [_turn(message, f"messages[{number}]") for number, message in enumerate(messages)]


def check_text_only(messages: Sequence[Mapping[str, Any]]) -> None:
    """Refuses images, audio, video and files: a model would see no more than a placeholder for them.

    Raises:
        ValueError: A message has such a part.
    """
    for number, message in enumerate(messages):
        content = message.get("content") if isinstance(message, Mapping) else None
        for index, part in enumerate(content if isinstance(content, (list, tuple)) else ()):
            kind = part.get("type") if isinstance(part, Mapping) else None
            if isinstance(kind, str) and kind.removeprefix("input_").startswith(_MEDIA):
                where = f"messages[{number}]: content[{index}]"
                raise ValueError(f"{where}: found a part of type {kind!r}, expected text: models read nothing else")


def _turn(message: object, where: str) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise TypeError(f'{where}: found {type(message).__name__}, expected a dict with "role" and "content"')
    for key in ("role", "content"):
        if key not in message and not (key == "content" and _INSTEAD_OF_CONTENT & message.keys()):
            keys = ", ".join(repr(each) for each in message) or "none"
            raise ValueError(f"{where}: found no {key!r} (keys: {keys}), expected a role and content")
    role, content = message["role"], message.get("content")
    if not isinstance(role, str):
        raise TypeError(f"{where}: role: found {type(role).__name__}, expected str")
    if content is not None and not isinstance(content, (str, Sequence, Mapping)):
        raise TypeError(f"{where}: content: found {type(content).__name__}, expected str or a list of parts")
    turn = {key: plain(value, where) for key, value in message.items() if value is not None}
    reasoning = next((turn[name] for name in _REASONING if name in turn), None)
    return turn if reasoning is None else {"thinking": reasoning, **turn, "reasoning_content": reasoning}


def plain(value: object, where: str) -> Any:
    """Returns a copy that consists of dicts, lists, tuples, strings, numbers, booleans and None.

    A template is untrusted, and the methods of other objects may write files. An object that is none of these, such as
    an image, becomes its type in angle brackets: templates ask only whether it is there.

    Raises:
        ValueError: The value is nested too deeply.
    """
    try:
        return _plain(value)
    except RecursionError:
        raise ValueError(f"{where}: found a value that contains itself or is nested too deeply") from None


def _plain(value: Any) -> Any:
    if value is None or type(value) in (str, int, float, bool):
        return value
    for kind, copy in _COPIES.items():
        if isinstance(value, kind):
            return copy(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: _plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if callable(dump := getattr(value, "model_dump", None)):  # A message of a client built on pydantic.
        return _plain(dump())
    return f"<{type(value).__name__}>"


_COPIES: dict[type, Any] = {
    # Subclasses, such as enums, may have methods of their own.
    str: str.__str__,
    int: int.__int__,
    float: float.__float__,
    Mapping: lambda value: {_plain(key): _plain(item) for key, item in value.items()},
    list: lambda value: [_plain(item) for item in value],
    tuple: lambda value: tuple(_plain(item) for item in value),
    np.generic: lambda value: _plain(value.item()),
}


def mark_end(messages: list[dict[str, Any]], field: str, source: str) -> str:
    """Marks the end of a field of the last message, for `cut_after_end`.

    Args:
        messages: The messages, as `turns` returns them. They are changed.
        field: The field that the model continues.
        source: The template.

    Returns:
        The text that the model continues.

    Raises:
        ValueError: There is no such text, or the template does not write the field.
    """
    if not messages:
        raise ValueError("continue_final_message: found no messages, expected one to continue")
    last, where = messages[-1], f"messages[{len(messages) - 1}]: {field}"
    text: Any = last.get(field)
    if text is None:
        raise ValueError(f"{where}: found nothing, expected the text that continue_final_message continues")
    # Reasoning is there under several names. The template may read each of them.
    fields = [name for name in _REASONING if last.get(name) == text] if field in _REASONING else [field]
    if not any(name in source for name in fields):
        raise ValueError(f"continue_final_message: found {field!r}, expected a field that the chat template writes")
    if isinstance(text, str):
        last.update(dict.fromkeys(fields, text + _END))
        return text
    parts = text if isinstance(text, (list, tuple)) else ()
    for part in reversed(parts):
        if isinstance(part, dict) and isinstance(written := part.get("text"), str):
            part["text"] = written + _END
            return written
    raise ValueError(f"{where}: found no text, expected the text that continue_final_message continues")


def cut_after_end(prompt: str, text: str) -> str | None:
    """Ends a prompt where `mark_end` has marked it. None if the template has not written the text or the mark.

    Args:
        prompt: The prompt.
        text: What `mark_end` has returned.
    """
    end = prompt.rfind(_END.strip())
    if end < 0 or text.strip() not in prompt:
        return None
    return prompt[:end] if prompt.startswith(_END, end) else prompt[:end].rstrip()
