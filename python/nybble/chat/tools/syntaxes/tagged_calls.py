"""Calls with a tag per argument, such as `<function=NAME><parameter=KEY>VALUE</parameter></function>`."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from nybble.chat.tools.arguments import Arguments
from nybble.chat.tools.reader import MAX_HEAD, Emit, NotACallError, Reader, Steps
from nybble.chat.tools.syntaxes.elements import Element, ElementRules
from nybble.chat.tools.syntaxes.rules import Call, CallRules


@dataclass(frozen=True)
class TaggedCalls:
    """A value is text if its schema allows a string, and JSON otherwise.

    White space around tags is optional. A line break at the inner side of the tags of a value belongs to the value only
    if the model does not write one there itself. A closing tag ends a value only before another tag of the call, so
    that a value may contain it.
    """

    opening: str
    """What comes before the name of the function."""
    after_name: str
    before_key: str
    after_key: str
    closing_value: str
    closing: str
    """What ends a call."""
    typed: bool = False
    """The tag of an argument says whether its value is text: `after_key` is followed by `true` or `false`."""
    after_type: str = ""
    """The end of such a tag."""
    tokens: tuple[str, ...] = ()
    """Markers within a call."""

    starts = ""
    as_list = False

    def read(self, reader: Reader) -> Steps[None]:
        """Reads one call."""
        if self.opening:
            yield from reader.expect(self.opening)
        name = yield from self._name(reader)
        reader.begin(name)
        arguments = Arguments(reader.functions[name])
        before = "{"
        while (yield from self._tag(reader)):
            key, is_text = yield from self._key(reader)
            reader.emit(f"{before}{json.dumps(key, ensure_ascii=False)}: ")
            before = ", "
            if is_text or (is_text is None and arguments.is_text(key)):
                reader.emit('"')
                yield from self._value(reader, reader.emit_in_string)
                reader.emit('"')
            else:
                parts: list[str] = []
                yield from self._value(reader, parts.append)
                value = "".join(parts)
                reader.emit(arguments.json_of(key, value) if is_text is None else _json_or_text(value))
        reader.emit("{}" if before == "{" else "}")

    def _name(self, reader: Reader) -> Steps[str]:
        """The name of the function, which must be known, and the end of its tag."""
        end = self.after_name.strip()
        name = ""
        while True:
            char = yield from reader.next()
            if end and char == end[0]:
                reader.push_back(char)
                yield from reader.expect(end)
                break
            if not end and (char == "<" or (char.isspace() and name.strip())):
                reader.push_back(char)
                break
            name += char
            begun = name.lstrip()
            if len(name) > MAX_HEAD or not any(known.startswith(begun.rstrip()) for known in reader.functions):
                raise NotACallError
        return name.strip()

    def _tag(self, reader: Reader) -> Steps[bool]:
        """Whether another argument comes. Reads up to its key, or to the end of the call."""
        text = yield from reader.next_non_space()
        while True:
            if text == self.before_key:
                return True
            if text == self.closing:
                return False
            if not (self.before_key.startswith(text) or self.closing.startswith(text)):
                raise NotACallError
            text += yield from reader.next()

    def _key(self, reader: Reader) -> Steps[tuple[str, bool | None]]:
        """The key of an argument, and whether its value is text; None if the tag does not say so."""
        first, *others = self.after_key.split() if not self.typed else [self.after_key]
        key, _ = yield from reader.until(first, limit=MAX_HEAD)
        for other in others:
            yield from reader.expect(other)
        if not self.typed:
            return key.strip(), None
        kind, _ = yield from reader.until(self.after_type, limit=MAX_HEAD)
        return key.strip(), kind.strip() == "true"

    def _value(self, reader: Reader, emit: Emit) -> Steps[None]:
        """The text up to the closing tag of a value, passed on while it comes."""
        end = self.closing_value.strip()
        followers = (self.before_key, self.closing)
        skips_break, ends_with_break = self._opening_breaks, self.closing_value.startswith("\n")
        pending, is_first = "", True
        while True:
            pending += yield from reader.next()
            if is_first and skips_break:
                pending = pending.removeprefix("\n")
            is_first = False
            value, tag, after = pending.partition(end)
            while tag:
                begun = after.lstrip()
                if any(begun.startswith(follower) for follower in followers):
                    emit(value.removesuffix("\n") if ends_with_break else value)
                    reader.push_back(after)
                    return
                if any(follower.startswith(begun) for follower in followers):
                    break  # The next characters decide.
                more, tag, after = after.partition(end)
                value += end + more
            if tag:
                continue
            # What may be the beginning of the closing tag, and the line break before it, are held back.
            held = next((size for size in range(len(end) - 1, 0, -1) if pending.endswith(end[:size])), 0)
            certain = len(pending) - held
            if ends_with_break and pending[:certain].endswith("\n"):
                certain -= 1
            if certain > 0:
                emit(pending[:certain])
                pending = pending[certain:]

    @property
    def _opening_breaks(self) -> bool:
        return (self.after_type or self.after_key).endswith("\n")

    def write(self, calls: Sequence[Call], number: int = 0) -> str:
        """The text of calls between the markers."""
        return "\n".join(self._written(name, arguments) for name, arguments in calls)

    def _written(self, name: str, arguments: Mapping[str, Any]) -> str:
        parts = [self.opening, name, self.after_name]
        for key, value in arguments.items():
            text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
            parts += [self._before_value(key, isinstance(value, str)), text, self.closing_value]
        return "".join([*parts, self.closing])

    def _before_value(self, key: str, is_text: bool) -> str:
        """The tag of an argument."""
        kind = ("true" if is_text else "false") + self.after_type if self.typed else ""
        return f"{self.before_key}{key}{self.after_key}{kind}"

    def rules(self, rules: CallRules, *, several: bool = False) -> list[str]:
        """The rule `named`: one call."""
        element = Element(self._before_value, lambda is_text: self.closing_value)
        written = ["named: " + " | ".join(f"f{index}" for index in range(len(rules.functions)))]
        for index, function in enumerate(rules.functions):
            elements = ElementRules(rules, f"f{index}", function, element)
            arguments = elements.arguments()
            head, end = rules.text(self.opening + function.name + self.after_name), rules.text(self.closing)
            written += [" ".join(filter(None, [f"f{index}: {head}", arguments, end])), *elements.written]
        return written


def _json_or_text(text: str) -> str:
    """JSON as it is; any other text as a string."""
    try:
        return json.dumps(json.loads(text), ensure_ascii=False)
    except (ValueError, RecursionError):
        return json.dumps(text, ensure_ascii=False)
