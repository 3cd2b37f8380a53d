"""Grammar rules for calls that write their arguments one by one, each with its key."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from nybble.chat.tools.arguments import Arguments, required_names
from nybble.chat.tools.syntaxes.rules import AllowedFunction, CallRules
from nybble.constraints.document import Schema
from nybble.constraints.schema import grammar_schema

_MAX_LENGTH = 1000
"""The longest `maxLength` that the grammar of a text counts."""
_ANY_KEY = "/[A-Za-z0-9_.-]+/"


@dataclass(frozen=True)
class Element:
    """How a syntax writes an argument."""

    opening: Callable[[str, bool], str]
    """What comes before a value, by the key and by whether the value is plain text."""
    closing: Callable[[bool], str]
    """What comes after a value, by whether it is plain text."""
    separator: str = ""
    """What is between two arguments."""
    plain_text: bool = True
    """Strings are written as they are. Otherwise they are JSON strings."""
    words: tuple[tuple[str, str], ...] = ()
    """The words for JSON's true, false and null, if they are others."""


class ElementRules:
    """Writes the rules of the arguments of one function.

    Args:
        rules: The functions, and how the grammar writes text.
        rule: The beginning of the names of rules.
        function: The function.
        element: How arguments are written.
    """

    def __init__(self, rules: CallRules, rule: str, function: AllowedFunction, element: Element) -> None:
        self._rules = rules
        self._rule = rule
        self._function = function
        self._element = element
        self.written: list[str] = []

    def arguments(self) -> str:
        """The rule of all arguments, in their order; optional ones may be missing. `written` holds the others.

        Raises:
            SchemaError: The schema is invalid or cannot be enforced.
        """
        schema, rule = self._function.schema, self._rule
        grammar_schema(schema, self._function.parameter)  # Refuses what is invalid.
        known = Arguments(schema)
        required = required_names(known.document, schema)
        for key in required:
            known.properties.setdefault(key, True)
        parts: list[tuple[str, bool]] = []
        for index, key in enumerate(known.properties):
            parts.append((f"{rule}_{index}", key in required))
            self._add(f"{rule}_{index}", known, key)
        if not known.properties and "properties" not in schema and schema.get("additionalProperties") is not False:
            return self._any_arguments()
        if not self._element.separator:
            return " ".join(part if is_required else f"{part}?" for part, is_required in parts) or '""'
        return self._separated(parts)

    def _separated(self, parts: list[tuple[str, bool]]) -> str:
        """Arguments with separators: `RULE_bN` has the Nth and later ones after one has been written."""
        rule, separator = self._rule, self._rules.text(self._element.separator)
        for index, (part, is_required) in reversed([*enumerate(parts)]):
            rest = [f"{rule}_b{index + 1}"] if index + 1 < len(parts) else []
            skipped = [] if is_required else [" ".join(rest) or '""']
            first = [f"{rule}_a{index + 1}" if rest else '""'] if not is_required else []
            self.written.append(f"{rule}_b{index}: {' | '.join([' '.join([separator, part, *rest]), *skipped])}")
            self.written.append(f"{rule}_a{index}: {' | '.join([' '.join([part, *rest]), *first])}")
        return f"{rule}_a0" if parts else '""'

    def _any_arguments(self) -> str:
        """Any arguments with plain keys, for a schema that lists none."""
        rule, element = self._rule, self._element
        key = "\0"
        before, after = element.opening(key, element.plain_text).split(key)
        parts = [self._rules.text(before) if before else "", _ANY_KEY, self._rules.text(after)]
        self.written.append(f"{rule}_x: {' '.join(filter(None, parts))} {self._value(f'{rule}_xv')}")
        if not element.separator:
            return f"{rule}_x*"
        return f"({rule}_x ({self._rules.text(element.separator)} {rule}_x)*)?"

    def _value(self, rule: str) -> str:
        """Any text to the closing marker, or any JSON. The rule is added."""
        if not self._element.plain_text:
            self.written.append(f"{rule}: %json {{}}")
            return " ".join(filter(None, [rule, self._text(self._element.closing(False))]))
        return self._any_text(rule)

    def _any_text(self, rule: str) -> str:
        """Any text, and what closes it."""
        # The line break before a closing marker belongs to the text here, so that the text may be empty.
        closing = self._element.closing(True).lstrip("\n")
        begun = self._rules.before_token(closing)
        if begun is None:
            self.written.append(f"{rule}[suffix={json.dumps(closing, ensure_ascii=False)}]: /(?s:.*)/")
            return rule
        # Text never contains special tokens, so it ends where the first one comes.
        end = re.sub(r"[^\w\s<>｜]", r"\\\g<0>", begun)
        self.written.append(f"{rule.upper()}: /(?s:{'.*' if begun else '.+'}){end}/")
        return f"{rule.upper()}{'' if begun else '?'} {self._text(closing.removeprefix(begun))}"

    def _text(self, text: str) -> str:
        return self._rules.text(text) if text else ""

    def _add(self, part: str, known: Arguments, key: str) -> None:
        """Adds the rules of one argument."""
        element, value = self._element, known.properties[key]
        types = known.document.types(value)
        is_text = element.plain_text and "string" in types
        opening, closing = self._text(element.opening(key, is_text)), self._text(element.closing(is_text))

        def add(body: str) -> None:
            self.written.append(" ".join(filter(None, [f"{part}: {opening}", body, closing])))

        if not is_text:
            words = dict(element.words)
            if words and types and types <= {"boolean", "null"}:
                values = known.document.values(value)
                allowed = [True, False, None] if values is None else values
                spelled = [json.dumps(each) for each in allowed if _type_of(each) in types]
                add("(" + " | ".join(self._text(words.get(word, word)) for word in spelled) + ")")
                return
            pointer, parameter = known.pointers.get(key), self._function.parameter
            body = {} if pointer is None else grammar_schema(self._function.schema, parameter, pointer)
            self.written.append(f"{part}_v: %json {json.dumps(body)}")
            add(f"{part}_v")
            return
        values = known.document.values(value)
        if values is not None:
            spelled = [*dict.fromkeys(each if isinstance(each, str) else json.dumps(each) for each in values)]
            add(f"({' | '.join(self._rules.text(each) or _EMPTY for each in spelled)})")
            return
        excluded = closing_character(element.closing(True))
        if (
            types == {"string"}
            and (pattern := _limited_text(known.document.resolved(value, "#"), excluded)) is not None
        ):
            self.written.append(f"{part.upper()}: {pattern}")
            add(part.upper())
            return
        self.written.append(f"{part}: {opening} {self._any_text(f'{part}_v')}")


_EMPTY = '""'


def closing_character(closing: str) -> str:
    """The first character of a closing marker, which a text of limited length on one line does not contain."""
    return "" if closing.startswith("\n") else closing[:1]


def _type_of(value: Any) -> str:
    return "null" if value is None else "boolean" if isinstance(value, bool) else ""


def _limited_text(value: Schema, excluded: str) -> str | None:
    """A terminal for a text of limited length or of a pattern, on one line; None if it is not limited."""
    low, high = int(value.get("minLength", 0)), value.get("maxLength")
    if max(low, high or 0) > _MAX_LENGTH:
        return None
    others = re.escape(excluded) if excluded in "\\]^-" else excluded
    any_character = f"[^\\n{others}]"
    length = f"/{any_character}{{{low},{'' if high is None else int(high)}}}/" if low or high is not None else None
    pattern = _line_pattern(value["pattern"], any_character) if "pattern" in value else None
    return " & ".join(filter(None, (length or f"/{any_character}*/", pattern))) if length or pattern else None


def _line_pattern(pattern: str, any_character: str) -> str | None:
    """A terminal for the lines in which a pattern is found; None if its anchors are not only at its ends."""
    begins, ends = pattern.startswith("^"), pattern.endswith("$") and not pattern.endswith("\\$")
    inner = pattern[begins : len(pattern) - ends]
    if re.search(r"(?<!\\)[$^]", re.sub(r"\[\^", "[", inner)) or ((begins or ends) and "|" in inner):
        return None
    slashes = re.sub(r"(?<!\\)/", r"\/", inner)
    return f"/{'' if begins else any_character + '*'}(?:{slashes}){'' if ends else any_character + '*'}/"
