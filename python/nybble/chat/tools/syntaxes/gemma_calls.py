"""Calls as Gemma writes them: `NAME{key:<|"|>text<|"|>,other:[1,true]}`, with markers instead of quotes."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from nybble.chat.tools.reader import MAX_HEAD, NotACallError, Reader, Steps
from nybble.chat.tools.syntaxes.elements import Element, ElementRules
from nybble.chat.tools.syntaxes.python_calls import number_or_constant
from nybble.chat.tools.syntaxes.rules import Call, CallRules

_MAX_DEPTH = 200


@dataclass(frozen=True)
class GemmaCalls:
    """The name of a function, and its arguments in a syntax like JSON. Strings and keys of JSON are read, too."""

    quote: str
    """The marker on both sides of a string."""
    before: str = "call:"
    """What comes before the name."""

    starts = ""
    as_list = False

    @property
    def tokens(self) -> tuple[str, ...]:
        """Markers within a call."""
        return (self.quote,)

    def read(self, reader: Reader) -> Steps[None]:
        """Reads one call."""
        head = yield from reader.head(self.before)
        reader.begin(head.strip().removeprefix(self.before).strip())
        before = "{"
        while (first := (yield from reader.next_non_space())) != "}":
            key = yield from self._key(reader, first)
            reader.emit(f"{before}{json.dumps(key, ensure_ascii=False)}: ")
            before = ", "
            first = yield from reader.next_non_space()
            if (yield from self._begins_string(reader, first)):
                reader.emit('"')
                yield from reader.text_until(self.quote, reader.emit_in_string)
                reader.emit('"')
            else:
                reader.emit(json.dumps((yield from self._value(reader, first, 0)), ensure_ascii=False))
            if (following := (yield from reader.next_non_space())) == "}":
                break
            if following != ",":
                raise NotACallError
        reader.emit("{}" if before == "{" else "}")

    def _key(self, reader: Reader, first: str) -> Steps[str]:
        """A key that begins with `first`, and the colon after it."""
        if first == '"' or self.quote.startswith(first):
            key = yield from self._string(reader, first)
            if key is not None:
                yield from reader.expect(":")
                return key
        key, _ = yield from reader.until(":", limit=MAX_HEAD)
        return (first + key).strip()

    def _begins_string(self, reader: Reader, first: str) -> Steps[bool]:
        """Reads a quote that begins with `first`. If there is none, its other characters are pushed back."""
        text = first
        while text != self.quote:
            if not self.quote.startswith(text):
                reader.push_back(text[1:])
                return False
            text += yield from reader.next()
        return True

    def _string(self, reader: Reader, first: str) -> Steps[str | None]:
        """A string that begins with `first`; None if there is no quote."""
        if first == '"':
            return (yield from reader.string(first))
        if not (yield from self._begins_string(reader, first)):
            return None
        text, _ = yield from reader.until(self.quote)
        return text

    def _value(self, reader: Reader, first: str, depth: int) -> Steps[Any]:
        if depth > _MAX_DEPTH:
            raise NotACallError
        if first == '"' or self.quote.startswith(first):
            text = yield from self._string(reader, first)
            if text is None:
                raise NotACallError
            return text
        if first == "[":
            items = []
            while (char := (yield from reader.next_non_space())) != "]":
                items.append((yield from self._value(reader, char, depth + 1)))
                if (following := (yield from reader.next_non_space())) == "]":
                    break
                if following != ",":
                    raise NotACallError
            return items
        if first == "{":
            found: dict[str, Any] = {}
            while (char := (yield from reader.next_non_space())) != "}":
                key = yield from self._key(reader, char)
                found[key] = yield from self._value(reader, (yield from reader.next_non_space()), depth + 1)
                if (following := (yield from reader.next_non_space())) == "}":
                    break
                if following != ",":
                    raise NotACallError
            return found
        text = first
        while (char := (yield from reader.next())) not in ",]}":
            text += char
        reader.push_back(char)
        try:
            return number_or_constant(text.strip())
        except NotACallError:
            return text.strip()  # A string without quotes.

    def write(self, calls: Sequence[Call], number: int = 0) -> str:
        """The text of calls between the markers."""
        return "\n".join(f"{self.before}{name}{self._written(arguments)}" for name, arguments in calls)

    def _written(self, value: Any) -> str:
        if isinstance(value, str):
            return f"{self.quote}{value}{self.quote}"
        if isinstance(value, Mapping):
            return "{" + ",".join(f"{key}:{self._written(item)}" for key, item in value.items()) + "}"
        if isinstance(value, (list, tuple)):
            return "[" + ",".join(map(self._written, value)) + "]"
        return json.dumps(value)

    def rules(self, rules: CallRules, *, several: bool = False) -> list[str]:
        """The rule `named`: one call. Objects and lists are JSON."""
        element = Element(
            lambda key, is_text: f"{key}:{self.quote if is_text else ''}",
            lambda is_text: self.quote if is_text else "",
            separator=",",
        )
        written = ["named: " + " | ".join(f"f{index}" for index in range(len(rules.functions)))]
        for index, function in enumerate(rules.functions):
            elements = ElementRules(rules, f"f{index}", function, element)
            head = rules.text(self.before + function.name + "{")
            written += [f'f{index}: {head} {elements.arguments()} "}}"', *elements.written]
        return written
