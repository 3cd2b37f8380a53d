"""Reads tool calls one character at a time, so that a stream can pass on arguments while the model writes them."""

from __future__ import annotations

import json
import secrets
import string
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from nybble.server.tools.arguments import Arguments

T = TypeVar("T")
Steps = Generator[None, str, T]
"""A coroutine that receives one character per step and returns its result."""
Emit = Callable[[str], object]

Schemas = Mapping[str, Mapping[str, Any] | None]
"""The functions that may be called: name to the JSON Schema of the arguments."""

_MAX_HEAD = 200
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
        syntax: How calls are written; one of the functions below.
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

    def begin(self, name: str, quoted: bool = False) -> None:
        """Starts a call of a function."""
        if name not in self.functions:
            raise NotACallError
        self._found.append(CallStart(new_id(), name, quoted))

    def emit(self, text: str) -> None:
        """Adds a piece of the arguments."""
        if self._found and isinstance(self._found[-1], str):
            self._found[-1] += text
        else:
            self._found.append(text)

    def next(self) -> Steps[str]:
        """The next character."""
        if char := self._pushed_back:
            self._pushed_back = ""
            return char
        return (yield)

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
                emit(char := (yield))
                if char == '"':
                    yield from self._rest_of_string(emit)
                depth += (char in "{[") - (char in "}]")
        elif first == '"':
            emit(first)
            yield from self._rest_of_string(emit)
        elif first.isalnum() or first == "-":
            emit(first)
            while (char := (yield)).isalnum() or char in "+-.":
                emit(char)
            self._pushed_back = char
        else:
            raise NotACallError

    def _rest_of_string(self, emit: Emit) -> Steps[None]:
        escaped = False
        while (char := (yield)) != '"' or escaped:
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

    def expect(self, text: str) -> Steps[None]:
        """Exactly `text`, after optional white space."""
        for index, expected in enumerate(text):
            if (yield from (self.next() if index else self.next_non_space())) != expected:
                raise NotACallError


def json_objects(reader: Reader, first: str = "") -> Steps[None]:
    """`{"name": ..., "arguments": {...}}`, or a list of such objects."""
    first = first or (yield from reader.next_non_space())
    if first != "[":
        yield from _object(reader, first)
        return
    following = ","
    while following == ",":
        yield from _object(reader, (yield from reader.next_non_space()))
        following = yield from reader.next_non_space()
    if following != "]":
        raise NotACallError


def _object(reader: Reader, first: str) -> Steps[None]:
    if first != "{":
        raise NotACallError
    name: str | None = None
    early: str | None = None  # Arguments that come before the name are kept until the name is known.
    emitted = quoted = False
    following = ","
    while following == ",":
        key = yield from reader.string((yield from reader.next_non_space()))
        if (yield from reader.next_non_space()) != ":":
            raise NotACallError
        value = yield from reader.next_non_space()
        if key == "name" and name is None:
            name = yield from reader.string(value)
        elif key == "function" and name is None and early is None and value in '"{':
            name, early = yield from _function(reader, value)
        elif key in ("arguments", "parameters") and not emitted and early is None and value != "n":
            if value == '"':
                early, quoted = (yield from reader.string(value)), True
            elif name is None:
                parts: list[str] = []
                yield from reader.value(value, parts.append)
                early = "".join(parts)
            else:
                reader.begin(name)
                yield from reader.value(value, reader.emit)
                emitted = True
        else:  # Also null, which stands for no arguments.
            yield from reader.value(value, len)
        if name is not None and early is not None and not emitted:
            reader.begin(name, quoted)
            reader.emit(early)
            emitted = True
        following = yield from reader.next_non_space()
    if following != "}" or name is None:
        raise NotACallError
    if not emitted:
        reader.begin(name)
        reader.emit("{}")


def _function(reader: Reader, first: str) -> Steps[tuple[str | None, str | None]]:
    """The name and perhaps the arguments under the key `function`: `"NAME"` or `{"name": ..., "arguments": {...}}`."""
    parts: list[str] = []
    yield from reader.value(first, parts.append)
    try:
        value = json.loads("".join(parts), strict=False)
    except (ValueError, RecursionError):
        raise NotACallError from None
    if not isinstance(value, dict):
        return value, None
    name, arguments = value.get("name"), value.get("arguments", value.get("parameters"))
    if not isinstance(name, str):
        return None, None
    if isinstance(arguments, str):
        return name, arguments or "{}"
    return name, None if arguments is None else json.dumps(arguments, ensure_ascii=False)


def name_then_json(reader: Reader) -> Steps[None]:
    """`NAME>{...}`: the name of the function, then its arguments as a JSON object."""
    name, _ = yield from reader.until(">", limit=_MAX_HEAD)
    yield from _arguments(reader, name, (yield from reader.next_non_space()))


def mistral(reader: Reader) -> Steps[None]:
    """`NAME[ARGS]{...}` with an optional `[CALL_ID]...` in between, or JSON objects as earlier versions write them."""
    first = yield from reader.next_non_space()
    if first in "[{":
        yield from json_objects(reader, first)
        return
    head, end = yield from reader.until("[ARGS]", "{", limit=_MAX_HEAD)
    name = (first + head).partition("[CALL_ID]")[0]
    yield from _arguments(reader, name, end if end == "{" else (yield from reader.next_non_space()))


def _arguments(reader: Reader, name: str, first: str) -> Steps[None]:
    if first != "{":
        raise NotACallError
    reader.begin(name.strip())
    yield from reader.value(first, reader.emit)


def tagged(reader: Reader) -> Steps[None]:
    """`<function=NAME><parameter=KEY>VALUE</parameter>...</function>`.

    A value is text if its schema allows a string, and JSON otherwise.
    """
    yield from reader.expect("<function=")
    name, _ = yield from reader.until(">", limit=_MAX_HEAD)
    reader.begin(name)
    arguments = Arguments(reader.functions[name])
    before = "{"
    while True:
        tag, _ = yield from reader.until(">", limit=_MAX_HEAD)
        tag = tag.strip()
        if tag == "</function":
            reader.emit("{}" if before == "{" else "}")
            return
        if not tag.startswith("<parameter="):
            raise NotACallError
        key = tag.removeprefix("<parameter=")
        reader.emit(f"{before}{json.dumps(key, ensure_ascii=False)}: ")
        before = ", "
        if arguments.is_text(key):
            yield from _plain_text(reader)
        else:
            value, _ = yield from reader.until("</parameter>")
            reader.emit(arguments.json_of(key, value.removeprefix("\n").removesuffix("\n")))


def _plain_text(reader: Reader) -> Steps[None]:
    """A string parameter, passed on as a JSON string while it comes."""
    end = "</parameter>"
    pending, is_first = "", True
    reader.emit('"')
    while not pending.endswith(end):
        pending += yield from reader.next()
        if is_first:
            pending, is_first = pending.removeprefix("\n"), False
        # The line break before the closing tag does not belong to the value.
        if len(pending) > len(end) + 1 and not pending.endswith(end):
            reader.emit(json.dumps(pending[0], ensure_ascii=False)[1:-1])
            pending = pending[1:]
    reader.emit(json.dumps(pending.removesuffix(end).removesuffix("\n"), ensure_ascii=False)[1:])


def normalized_json(text: str) -> str | None:
    """JSON with Python's spacing, or None if `text` is not valid JSON."""
    try:
        return json.dumps(json.loads(text), ensure_ascii=False)
    except (ValueError, RecursionError):
        return None
