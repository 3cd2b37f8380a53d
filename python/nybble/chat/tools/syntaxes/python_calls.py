"""Calls as Python writes them: `[NAME(key="value", other=[1, True]), ...]`."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from nybble.chat.tools.reader import MAX_HEAD, Emit, NotACallError, Reader, Steps
from nybble.chat.tools.syntaxes.elements import Element, ElementRules
from nybble.chat.tools.syntaxes.rules import Call, CallRules

_WORDS = {"True": True, "true": True, "False": False, "false": False, "None": None, "null": None}
_CLOSES = {"[": "]", "(": ")"}
_AFTER_STRING = ",)]}:"
"""What may follow a string. A quote before anything else belongs to the string: some templates do not escape quotes."""
_ESCAPES = {"n": "\n", "t": "\t", "r": "\r", "b": "\b", "f": "\f", "a": "\a", "v": "\v", "0": "\0", "\n": ""}
_ESCAPE = re.compile(r"\\(?:x([0-9a-fA-F]{2})|u([0-9a-fA-F]{4})|U([0-9a-fA-F]{8})|(.))", re.DOTALL)
_LONGEST_ESCAPE = 12
"""Characters of the longest escapes that belong together: two for a character beyond the basic plane."""
_MAX_DEPTH = 200


@dataclass(frozen=True)
class PythonCalls:
    """A list of calls with keyword arguments, whose values are literals of Python or JSON."""

    separator: str = ", "
    listed: bool = True
    """The calls are elements of a list. Otherwise each is alone."""
    tokens: tuple[str, ...] = ()

    @property
    def as_list(self) -> bool:
        """Whether several calls share their markers."""
        return self.listed

    @property
    def starts(self) -> str:
        """The characters with which calls without a marker begin."""
        return "[" if self.listed else ""

    def read(self, reader: Reader) -> Steps[None]:
        """Reads the list of calls, or one call."""
        if not self.listed:
            yield from self._call(reader)
            return
        yield from reader.expect("[")
        following = ","
        while following == ",":
            yield from self._call(reader)
            following = yield from reader.next_non_space()
        if following != "]":
            raise NotACallError

    def _call(self, reader: Reader) -> Steps[None]:
        name = ""
        while (char := (yield from reader.next())) != "(":
            name += char
            begun = name.strip()
            if len(name) > MAX_HEAD or not any(known.startswith(begun) for known in reader.functions):
                raise NotACallError
        reader.begin(name.strip())
        before = "{"
        while (first := (yield from reader.next_non_space())) != ")":
            key, _ = yield from reader.until("=", limit=MAX_HEAD)
            key = (first + key).strip()
            if not key.isidentifier() and not re.fullmatch(r"[\w.-]+", key):
                raise NotACallError
            reader.emit(f"{before}{json.dumps(key, ensure_ascii=False)}: ")
            before = ", "
            first = yield from reader.next_non_space()
            if first in "\"'":
                reader.emit('"')
                yield from _pass_string(reader, first, reader.emit_in_string)
                reader.emit('"')
            else:
                reader.emit(json.dumps((yield from _value(reader, first, 0)), ensure_ascii=False))
            following = yield from reader.next_non_space()
            if following == ")":
                break
            if following != ",":
                raise NotACallError
        reader.emit("{}" if before == "{" else "}")

    def rules(self, rules: CallRules, *, several: bool = False) -> list[str]:
        """The rule `named`: a list of one call, or with `several` of any number."""
        words = (("true", "True"), ("false", "False"), ("null", "None"))
        element = Element(lambda key, _: f"{key}=", lambda _: "", self.separator, plain_text=False, words=words)
        repeated = f"called ({rules.text(self.separator)} called)*" if several else "called"
        written = [
            f'named: "[" {repeated} "]"' if self.listed else "named: called",
            "called: " + " | ".join(f"f{index}" for index in range(len(rules.functions))),
        ]
        for index, function in enumerate(rules.functions):
            elements = ElementRules(rules, f"f{index}", function, element)
            written += [f'f{index}: {rules.text(function.name + "(")} {elements.arguments()} ")"', *elements.written]
        return written

    def write(self, calls: Sequence[Call], number: int = 0) -> str:
        """The text of calls between the markers."""
        written = [
            f"{name}({self.separator.join(f'{key}={_literal(value)}' for key, value in arguments.items())})"
            for name, arguments in calls
        ]
        return f"[{', '.join(written)}]" if self.listed else written[0]


def _literal(value: Any) -> str:
    """A value as Python writes it, with double quotes."""
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False)
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{_literal(str(key))}: {_literal(item)}" for key, item in value.items()) + "}"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(map(_literal, value)) + "]"
    return repr(value)


def _value(reader: Reader, first: str, depth: int) -> Steps[Any]:
    """A literal that begins with `first`."""
    if depth > _MAX_DEPTH:
        raise NotACallError
    if first in "\"'":
        return (yield from _string(reader, first))
    if first in "[(":
        items = []
        while (char := (yield from reader.next_non_space())) != _CLOSES[first]:
            items.append((yield from _value(reader, char, depth + 1)))
            if (following := (yield from reader.next_non_space())) == _CLOSES[first]:
                break
            if following != ",":
                raise NotACallError
        return items
    if first == "{":
        return (yield from _mapping(reader, depth))
    return (yield from _word(reader, first))


def _mapping(reader: Reader, depth: int) -> Steps[dict[str, Any]]:
    found: dict[str, Any] = {}
    while (char := (yield from reader.next_non_space())) != "}":
        key = yield from _value(reader, char, depth + 1)
        if not isinstance(key, str | int | float) or (yield from reader.next_non_space()) != ":":
            raise NotACallError
        value = yield from _value(reader, (yield from reader.next_non_space()), depth + 1)
        found[key if isinstance(key, str) else json.dumps(key)] = value
        if (following := (yield from reader.next_non_space())) == "}":
            break
        if following != ",":
            raise NotACallError
    return found


def _word(reader: Reader, first: str) -> Steps[Any]:
    """A number, or the name of a constant."""
    text = first
    while (char := (yield from reader.next())).isalnum() or char in "+-._":
        text += char
    reader.push_back(char)
    return number_or_constant(text)


def number_or_constant(text: str) -> Any:
    """The value of a number, or of a word such as `True` or `null`.

    Raises:
        NotACallError: It is neither.
    """
    if text in _WORDS:
        return _WORDS[text]
    try:
        return json.loads(text)
    except ValueError:
        pass
    try:
        return float(text) if any(char in text for char in ".eE") else int(text)
    except ValueError:
        raise NotACallError from None


def _string(reader: Reader, quote: str) -> Steps[str]:
    """The rest of a string."""
    parts: list[str] = []
    yield from _pass_string(reader, quote, parts.append)
    return "".join(parts)


def _pass_string(reader: Reader, quote: str, emit: Emit) -> Steps[None]:
    """The rest of a string, passed on while it comes. A quote ends it only before a character that may follow it."""
    text = ""
    while True:
        char = yield from reader.next()
        if char == "\\":
            text += char + (yield from reader.next())
        elif char != quote:
            text += char
        else:
            gap = ""
            while (following := (yield from reader.next())).isspace():
                gap += following
            reader.push_back(gap + following)
            if following in _AFTER_STRING:
                emit(_unescaped(text))
                return
            text += char
        if "\\" not in text[-_LONGEST_ESCAPE:]:
            emit(_unescaped(text))
            text = ""


def _unescaped(text: str) -> str:
    """The text with Python's and JSON's escapes resolved; unknown escapes stay."""

    def resolved(found: re.Match[str]) -> str:
        code = found[1] or found[2] or found[3]
        if code is not None:
            return chr(number) if (number := int(code, 16)) < 0x110000 else found[0]
        char = found[4]
        return _ESCAPES[char] if char in _ESCAPES else char if char in "\\'\"/" else found[0]

    plain = _ESCAPE.sub(resolved, text)
    # JSON writes a character beyond the basic plane as two escapes.
    return plain.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
