"""Reads tool calls one character at a time, so that a stream can pass on arguments while the model writes them."""

from __future__ import annotations

import json
import secrets
import string
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

T = TypeVar("T")
Steps = Generator[None, str, T]
"""A coroutine that receives one character per step and returns its result."""
Emit = Callable[[str], object]

Schemas = Mapping[str, Mapping[str, Any] | None]
"""The functions that may be called: name to the JSON Schema of the arguments."""

MAX_HEAD = 200
"""Characters before the arguments (a name and markers). A longer head is not a call."""


class NotACallError(Exception):
    """The text is not a tool call. The last character is not part of what was read."""


@dataclass(frozen=True)
class CallStart:
    """The start of a tool call. The pieces of text that follow are its arguments."""

    id: str
    name: str
    quoted: bool = False
    """The arguments were written as a JSON string, whose content is passed on unparsed."""


@dataclass(frozen=True)
class CallArguments:
    """A piece of the arguments of the call that started last."""

    text: str


def new_id() -> str:
    """A random id of nine alphanumeric characters."""
    # Mistral's templates require this form; the other templates accept any.
    return "".join(secrets.choice(string.ascii_letters + string.digits) for _ in range(9))


class Reader:
    """Reads the text after an opening marker: one call or a list of calls.

    Args:
        syntax: Reads the text: the method `read` of a syntax.
        functions: The functions that may be called.
    """

    def __init__(self, syntax: Callable[[Reader], Steps[None]], functions: Schemas) -> None:
        self.functions = functions
        self._found: list[CallStart | str] = []
        self._pushed_back = ""
        self._steps = syntax(self)
        next(self._steps)

    def push(self, char: str) -> bool:
        """Reads one more character. Returns True if it ended the call or the list.

        Raises:
            NotACallError: The character does not fit the syntax.
        """
        try:
            self._steps.send(char)
        except StopIteration:
            return True
        return False

    def take(self) -> list[CallStart | str]:
        """The call starts and pieces of arguments found since the last `take`."""
        found, self._found = self._found, []
        return found

    # --- For the syntaxes

    def begin(self, name: str, quoted: bool = False, id: str | None = None) -> None:
        """Starts a call of a function. Without an id that the model has written, the call gets a new one."""
        if name not in self.functions:
            raise NotACallError
        self._found.append(CallStart(id or new_id(), name, quoted))

    def emit(self, text: str) -> None:
        """Adds a piece of the arguments."""
        if not text:
            return
        if self._found and isinstance(self._found[-1], str):
            self._found[-1] += text
        else:
            self._found.append(text)

    def emit_in_string(self, text: str) -> None:
        """Adds a part of a JSON string."""
        self.emit(json.dumps(text, ensure_ascii=False)[1:-1])

    def next(self) -> Steps[str]:
        """The next character."""
        if self._pushed_back:
            char, self._pushed_back = self._pushed_back[0], self._pushed_back[1:]
            return char
        return (yield)

    def push_back(self, text: str) -> None:
        """Makes `text` the next characters, before those that were not read yet."""
        self._pushed_back = text + self._pushed_back

    def next_non_space(self) -> Steps[str]:
        """The next character that is not white space."""
        while (char := (yield from self.next())).isspace():
            pass
        return char

    def value(self, first: str, emit: Emit) -> Steps[None]:
        """A JSON value that begins with `first`. Only brackets and quotes are checked."""
        if first in "{[":
            emit(first)
            depth = 1
            while depth:
                emit(char := (yield from self.next()))
                if char == '"':
                    yield from self._rest_of_string(emit)
                depth += (char in "{[") - (char in "}]")
        elif first == '"':
            emit(first)
            yield from self._rest_of_string(emit)
        elif first.isalnum() or first == "-":
            emit(first)
            while (char := (yield from self.next())).isalnum() or char in "+-.":
                emit(char)
            self.push_back(char)
        else:
            raise NotACallError

    def objects(self, first: str, read: Callable[[Reader, str], Steps[None]]) -> Steps[None]:
        """Reads an object, or a list of objects that is not empty.

        Args:
            first: The first character.
            read: Reads an object, given its first character.

        Raises:
            NotACallError: It is neither.
        """
        if first != "[":
            yield from read(self, first)
            return
        following = ","
        while following == ",":
            yield from read(self, (yield from self.next_non_space()))
            following = yield from self.next_non_space()
        if following != "]":
            raise NotACallError

    def _rest_of_string(self, emit: Emit) -> Steps[None]:
        escaped = False
        while (char := (yield from self.next())) != '"' or escaped:
            emit(char)
            escaped = char == "\\" and not escaped
        emit(char)

    def string(self, first: str) -> Steps[str]:
        """A JSON string that begins with `first`."""
        if first != '"':
            raise NotACallError
        parts: list[str] = []
        yield from self.value(first, parts.append)
        try:
            return str(json.loads("".join(parts), strict=False))
        except ValueError:
            raise NotACallError from None

    def until(self, *ends: str, limit: int | None = None) -> Steps[tuple[str, str]]:
        """The text before the first of `ends`, and that end. At most `limit` characters are read."""
        text = ""
        while True:
            text += yield from self.next()
            for end in ends:
                if text.endswith(end):
                    return text[: -len(end)], end
            if limit is not None and len(text) > limit:
                raise NotACallError

    def text_until(self, end: str, emit: Emit) -> Steps[None]:
        """The text before `end`, passed on while it comes."""
        pending = ""
        while True:
            pending += yield from self.next()
            held = next((size for size in range(len(end), 0, -1) if pending.endswith(end[:size])), 0)
            if certain := pending[: len(pending) - held]:
                emit(certain)
            if held == len(end):
                return
            pending = pending[len(certain) :]

    def head(self, before: str, limit: int = MAX_HEAD) -> Steps[str]:
        """The text before the arguments, which begin with `{`: the name of a function and markers.

        Args:
            before: What may come before the name.
            limit: The largest number of characters.
        """
        text = ""
        while (char := (yield from self.next())) != "{":
            text += char
            begun = text.lstrip()
            name = begun.removeprefix(before)
            possible = before.startswith(begun) or any(known.startswith(name[: len(known)]) for known in self.functions)
            if not possible or len(text) > limit:
                raise NotACallError
        return text

    def expect(self, text: str) -> Steps[None]:
        """Exactly `text`, after optional white space."""
        for index, expected in enumerate(text):
            if (yield from (self.next() if index else self.next_non_space())) != expected:
                raise NotACallError


def normalized_json(text: str) -> str | None:
    """JSON with Python's spacing, or None if `text` is not valid JSON."""
    try:
        return json.dumps(json.loads(text), ensure_ascii=False)
    except (ValueError, RecursionError):
        return None
