"""Tool calls without markers: small models often write a call as plain JSON, bare or in a code fence."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from typing import Any

from nybble.chat.tools.reader import CallArguments, CallStart, NotACallError, Reader, Schemas, Steps, new_id

_FENCES = "`~"
_LEAST_FENCE = 3
"""Characters of the shortest code fence."""
_MAX_INFO = 20
"""Characters of a code fence's length, and of its language."""
_KEYS = ("name", "arguments", "parameters", "function", "id", "type")
"""The keys of a call. An object with any other key is content."""


class UnmarkedCalls:
    """Decides, character by character, whether a whole answer is a call, or several, without markers.

    Such an answer is one JSON object, an array of them, or one code fence around either, in which each object names a
    function. A fence has three backticks or tildes, or more. Around the answer there may be white space, and behind it
    the closing marker of the format.

    Args:
        functions: The functions that may be called.
        closing: The closing marker of the model's format, if it has one.
        reads_objects: Whether a single object without a fence counts. False for formats that read it themselves.
    """

    def __init__(self, functions: Schemas, closing: str = "", *, reads_objects: bool = True) -> None:
        self._closing = closing
        self._reads_objects = reads_objects
        self._calls: list[tuple[str, str]] = []
        self._rest: str | None = None
        """The text after the calls; None before their end."""
        self._reader = Reader(self._syntax, functions)

    def push(self, text: str) -> bool:
        """Reads the next piece of the answer. Returns False once the answer cannot be a call."""
        for char in text:
            if self._rest is not None:
                self._rest = (self._rest + char).lstrip()
                if not self._closing.startswith(self._rest.rstrip()):
                    return False
                continue
            try:
                if self._reader.push(char):
                    self._rest = ""
            except NotACallError:
                return False
        return True

    def finish(self) -> list[CallStart | CallArguments]:
        """The calls of the answer, which has ended; empty if it is not a call."""
        if self._rest is None:
            return []
        return [
            part for name, arguments in self._calls for part in (CallStart(new_id(), name), CallArguments(arguments))
        ]

    def _syntax(self, reader: Reader) -> Steps[None]:
        fence = ""
        first = yield from reader.next_non_space()
        if first in _FENCES:
            fence, first = yield from _opening_fence(reader, first)
        if first == "{" and not (fence or self._reads_objects):
            raise NotACallError
        yield from reader.objects(first, self._object)
        if fence:
            yield from reader.expect(fence)

    def _object(self, reader: Reader, first: str) -> Steps[None]:
        if first != "{":
            raise NotACallError
        found: dict[str, Any] = {}
        following = ","
        while following == ",":
            key = yield from _one_of(reader, (yield from reader.next_non_space()), _KEYS)
            if key in found or (yield from reader.next_non_space()) != ":":
                raise NotACallError
            value = yield from reader.next_non_space()
            if key == "name":
                found[key] = yield from _one_of(reader, value, reader.functions)
            else:
                parts: list[str] = []
                yield from reader.value(value, parts.append)
                found[key] = _parsed("".join(parts))
            following = yield from reader.next_non_space()
        if following != "}":
            raise NotACallError
        self._calls.append(_call_of(found, reader.functions))


def _opening_fence(reader: Reader, first: str) -> Steps[tuple[str, str]]:
    """The rest of an opening fence with its language. Returns the fence and the first character of the content."""
    fence = first
    while (char := (yield from reader.next())) == first and len(fence) < _MAX_INFO:
        fence += char
    if len(fence) < _LEAST_FENCE:
        raise NotACallError
    while char in " \t":
        char = yield from reader.next()
    length = 0
    while char.isalnum() or char in "_-+.":
        length += 1
        if length > _MAX_INFO:
            raise NotACallError
        char = yield from reader.next()
    return fence, ((yield from reader.next_non_space()) if char.isspace() else char)


def _one_of(reader: Reader, first: str, options: Collection[str]) -> Steps[str]:
    """A JSON string that is one of `options`. Ends with an error as soon as it cannot be."""
    if first != '"':
        raise NotACallError
    text = ""
    while (char := (yield from reader.next())) != '"':
        text += char
        if not any(option.startswith(text) for option in options):
            raise NotACallError
    if text not in options:
        raise NotACallError
    return text


def _call_of(found: Mapping[str, Any], functions: Collection[str]) -> tuple[str, str]:
    """The name and the arguments, as JSON, of an object that may be a call."""
    function = found.get("function")
    if isinstance(function, dict):  # {"type": "function", "function": {"name": ..., "arguments": ...}}
        if not function.keys() <= {"name", "arguments", "parameters"}:
            raise NotACallError
        found, function = {**found, **function}, None
    name = found.get("name", function)
    arguments = found.get("parameters") if found.get("arguments") is None else found["arguments"]
    if isinstance(arguments, str):
        arguments = _parsed(arguments or "{}")
    if not isinstance(name, str) or name not in functions or not isinstance(arguments, dict | None):
        raise NotACallError
    return name, json.dumps(arguments or {}, ensure_ascii=False)


def _parsed(text: str) -> Any:
    try:
        return json.loads(text, strict=False)
    except (ValueError, RecursionError):
        raise NotACallError from None
