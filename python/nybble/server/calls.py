"""Reads calls of functions in the forms in which models write them, letter by letter, so that streams need not wait."""

from __future__ import annotations

import json
import secrets
import string
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

T = TypeVar("T")
Steps = Generator[None, str, T]
"""Takes letters until it has its result."""
Say = Callable[[str], object]

Functions = Mapping[str, Mapping[str, Any] | None]
"""The functions that there are: the JSON Schemas of their arguments by their names."""

_LONGEST_HEAD = 200
"""Letters before the arguments, a name and marks; more are no call."""


class NoCall(Exception):  # noqa: N818  No error: models may write what they like.
    """What looked like a call is none. The last letter is not part of it."""


@dataclass(frozen=True)
class Begun:
    """The beginning of a call; what is said next are its arguments."""

    id: str
    name: str
    quoted: bool = False
    """The arguments came as a string, which is not looked into."""


def new_id() -> str:
    """An id that nobody has had."""
    # Mistral's templates want nine letters and digits, and the others take any.
    return "".join(secrets.choice(string.ascii_letters + string.digits) for _ in range(9))


class Reader:
    """Reads what stands behind a mark: one call, or a list of them.

    Args:
        form: how calls are written, one of the functions below.
        functions: those that may be called.
    """

    def __init__(self, form: Callable[[Reader], Steps[None]], functions: Functions) -> None:
        self.functions = functions
        self._found: list[Begun | str] = []
        self._again = ""
        self._steps = form(self)
        next(self._steps)

    def push(self, letter: str) -> bool:
        """Takes one more letter. True when it was the last of the call, or of the list.

        Raises:
            NoCall: it fits no call.
        """
        try:
            self._steps.send(letter)
        except StopIteration:
            return True
        return False

    def take(self) -> list[Begun | str]:
        """What was found since the last time: beginnings of calls, and pieces of their arguments."""
        found, self._found = self._found, []
        return found

    # --- For the forms

    def begin(self, name: str, quoted: bool = False) -> None:
        """A call of a function begins."""
        if name not in self.functions:
            raise NoCall
        self._found.append(Begun(new_id(), name, quoted))

    def say(self, text: str) -> None:
        """A piece of the arguments."""
        if self._found and isinstance(self._found[-1], str):
            self._found[-1] += text
        else:
            self._found.append(text)

    def next(self) -> Steps[str]:
        """The next letter."""
        if letter := self._again:
            self._again = ""
            return letter
        return (yield)

    def solid(self) -> Steps[str]:
        """The next letter that is no space."""
        while (letter := (yield from self.next())).isspace():
            pass
        return letter

    def value(self, first: str, say: Say) -> Steps[None]:
        """A JSON value, as far as brackets and quotes tell, that begins with `first`."""
        if first in "{[":
            say(first)
            depth = 1
            while depth:
                say(letter := (yield))
                if letter == '"':
                    yield from self._rest_of_string(say)
                depth += (letter in "{[") - (letter in "}]")
        elif first == '"':
            say(first)
            yield from self._rest_of_string(say)
        elif first.isalnum() or first == "-":
            say(first)
            while (letter := (yield)).isalnum() or letter in "+-.":
                say(letter)
            self._again = letter
        else:
            raise NoCall

    def _rest_of_string(self, say: Say) -> Steps[None]:
        escaped = False
        while (letter := (yield)) != '"' or escaped:
            say(letter)
            escaped = letter == "\\" and not escaped
        say(letter)

    def string(self, first: str) -> Steps[str]:
        """A JSON string."""
        if first != '"':
            raise NoCall
        parts: list[str] = []
        yield from self.value(first, parts.append)
        try:
            return str(json.loads("".join(parts), strict=False))
        except ValueError:
            raise NoCall from None

    def until(self, *ends: str, most: int | None = None) -> Steps[tuple[str, str]]:
        """What stands before the first of `ends`, and that."""
        text = ""
        while True:
            text += yield from self.next()
            for end in ends:
                if text.endswith(end):
                    return text[: -len(end)], end
            if most is not None and len(text) > most:
                raise NoCall

    def exactly(self, text: str) -> Steps[None]:
        """This text, after any space."""
        for place, expected in enumerate(text):
            if (yield from (self.next() if place else self.solid())) != expected:
                raise NoCall


def objects(reader: Reader, first: str = "") -> Steps[None]:
    """`{"name": ..., "arguments": {...}}`, or a list of such objects."""
    first = first or (yield from reader.solid())
    if first != "[":
        yield from _object(reader, first)
        return
    following = ","
    while following == ",":
        yield from _object(reader, (yield from reader.solid()))
        following = yield from reader.solid()
    if following != "]":
        raise NoCall


def _object(reader: Reader, first: str) -> Steps[None]:
    if first != "{":
        raise NoCall
    name: str | None = None
    early: str | None = None  # Arguments that cannot be said yet.
    said = quoted = False
    following = ","
    while following == ",":
        key = yield from reader.string((yield from reader.solid()))
        if (yield from reader.solid()) != ":":
            raise NoCall
        value = yield from reader.solid()
        if key == "name" and name is None:
            name = yield from reader.string(value)
        elif key in ("arguments", "parameters") and not said and early is None:
            if value == '"':
                early, quoted = (yield from reader.string(value)), True
            elif name is None:
                parts: list[str] = []
                yield from reader.value(value, parts.append)
                early = "".join(parts)
            else:
                reader.begin(name)
                yield from reader.value(value, reader.say)
                said = True
        else:
            yield from reader.value(value, len)
        if name is not None and early is not None and not said:
            reader.begin(name, quoted)
            reader.say(early)
            said = True
        following = yield from reader.solid()
    if following != "}" or name is None:
        raise NoCall
    if not said:
        reader.begin(name)
        reader.say("{}")


def named(reader: Reader) -> Steps[None]:
    """`NAME>{...}`: a name, and a JSON object as its arguments."""
    name, _ = yield from reader.until(">", most=_LONGEST_HEAD)
    yield from _arguments(reader, name, (yield from reader.solid()))


def mistral(reader: Reader) -> Steps[None]:
    """`NAME[ARGS]{...}`, with or without `[CALL_ID]...` in between; or objects, as earlier versions write them."""
    first = yield from reader.solid()
    if first in "[{":
        yield from objects(reader, first)
        return
    head, end = yield from reader.until("[ARGS]", "{", most=_LONGEST_HEAD)
    name = (first + head).partition("[CALL_ID]")[0]
    yield from _arguments(reader, name, end if end == "{" else (yield from reader.solid()))


def _arguments(reader: Reader, name: str, first: str) -> Steps[None]:
    if first != "{":
        raise NoCall
    reader.begin(name.strip())
    yield from reader.value(first, reader.say)


def tagged(reader: Reader) -> Steps[None]:
    """`<function=NAME><parameter=KEY>VALUE</parameter>...</function>`; what is no string by its schema is JSON."""
    yield from reader.exactly("<function=")
    name, _ = yield from reader.until(">", most=_LONGEST_HEAD)
    reader.begin(name)
    known = (reader.functions[name] or {}).get("properties")
    before = "{"
    while True:
        tag, _ = yield from reader.until(">", most=_LONGEST_HEAD)
        tag = tag.strip()
        if tag == "</function":
            reader.say("{}" if before == "{" else "}")
            return
        if not tag.startswith("<parameter="):
            raise NoCall
        key = tag.removeprefix("<parameter=")
        reader.say(f"{before}{json.dumps(key, ensure_ascii=False)}: ")
        before = ", "
        schema = known.get(key) if isinstance(known, dict) else None
        if isinstance(schema, dict) and schema.get("type") == "string":
            yield from _text(reader)
        else:
            value, _ = yield from reader.until("</parameter>")
            value = value.removeprefix("\n").removesuffix("\n")
            reader.say(normal(value) or json.dumps(value, ensure_ascii=False))


def _text(reader: Reader) -> Steps[None]:
    """A string as a parameter, passed on as it comes."""
    end = "</parameter>"
    held, is_first = "", True
    reader.say('"')
    while not held.endswith(end):
        held += yield from reader.next()
        if is_first:
            held, is_first = held.removeprefix("\n"), False
        # The line break before the end is not part of it.
        if len(held) > len(end) + 1 and not held.endswith(end):
            reader.say(json.dumps(held[0], ensure_ascii=False)[1:-1])
            held = held[1:]
    reader.say(json.dumps(held.removesuffix(end).removesuffix("\n"), ensure_ascii=False)[1:])


def normal(text: str) -> str | None:
    """JSON as Python writes it; None for what is no JSON."""
    try:
        return json.dumps(json.loads(text), ensure_ascii=False)
    except (ValueError, RecursionError):
        return None
