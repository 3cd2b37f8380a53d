"""Calls of functions, found in what a model writes, for the families whose chat templates say how calls are written."""

from __future__ import annotations

import json
import secrets
import string
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from nybble.server.requests import FunctionDefinition


@dataclass(frozen=True)
class Format:
    """How a family writes a call: a JSON object, or a list of them, between two marks."""

    begin: str
    end: str = ""
    arguments: str = "arguments"
    """The key of the arguments, beside "name"."""
    listed: bool = False
    """Calls stand in a list."""
    bare: bool = False
    """An answer that begins with a JSON object is a call, even without the mark."""

    def forced(self, functions: Sequence[FunctionDefinition]) -> tuple[str, dict[str, Any]]:
        """What an answer that must be a call begins with, and the JSON Schema of how it goes on."""
        calls = [
            {
                "type": "object",
                "properties": {"name": {"const": f.name}, self.arguments: f.parameters or {"type": "object"}},
                "required": ["name", self.arguments],
                "additionalProperties": False,
            }
            for f in functions
        ]
        call: dict[str, Any] = calls[0] if len(calls) == 1 else {"anyOf": calls}
        if self.listed:
            call = {"type": "array", "items": call, "minItems": 1, "maxItems": 1}
        return ("" if self.bare else f"{self.begin}\n" if self.end else self.begin), call


_FORMATS = (
    Format("<tool_call>", "</tool_call>"),  # Hermes, Qwen 2.5 and 3, SmolLM2 and 3
    Format("[TOOL_CALLS]", listed=True),  # Mistral
    Format("<|tool_call|>", listed=True),  # Granite 3
    Format("<|python_tag|>", arguments="parameters", bare=True),  # Llama 3.1 and later
)
# Newer templates of these families write arguments that are no JSON, or names outside of it.
_OTHERS = ("<function=", "<arg_key>", "[ARGS]")


def format_of(template: str) -> Format | None:
    """The format that a chat template defines; None if it defines none that is known."""
    if any(mark in template for mark in _OTHERS):
        return None
    return next((known for known in _FORMATS if known.begin in template), None)


@dataclass(frozen=True)
class FoundCall:
    """A call that a model has written."""

    id: str
    name: str
    arguments: str


class PlainText:
    """Reads an answer in which there can be no calls."""

    calls = 0

    def push(self, text: str, tokens: Sequence[int]) -> list[str | FoundCall]:
        """The text."""
        return [text] if text else []

    def finish(self) -> list[str | FoundCall]:
        """Nothing: nothing is held back."""
        return []


class CallParser:
    """Parts a text that comes in pieces into content and calls. What turns out to be no call is content.

    Args:
        known: the format.
        names: the functions that there are.
        mark: the id of the token of `known.begin`, for vocabularies in which that is a mark that decodes to nothing.
        forced: the text is the rest of a call that the prompt has begun.
    """

    def __init__(self, known: Format, names: Sequence[str], mark: int | None, forced: bool = False) -> None:
        self._format = known
        self._names = frozenset(names)
        self._mark = mark
        self._held = ""
        self._in_call = forced
        self._after_call = False
        self._awaits_end = False
        self._began = False
        self._bare = False
        self.calls = 0

    def push(self, text: str, tokens: Sequence[int]) -> list[str | FoundCall]:
        """What is certain after one more piece, in the order of the text."""
        found: list[str | FoundCall] = []
        if not self._in_call and self._mark is not None and self._mark in tokens:
            self._enter(found, self._held)
            self._held = ""
        self._held += text
        while self._step(found, text):
            pass
        return found

    def finish(self) -> list[str | FoundCall]:
        """What was held back, now that nothing more comes."""
        if self._after_call and self._format.end.startswith(self._held.strip()):
            return []  # A text may end within the last mark.
        rest = f"{self._format.begin}{self._held}" if self._in_call and not self._bare else self._held
        self._held = ""
        return [rest] if rest else []

    def _step(self, found: list[str | FoundCall], news: str) -> bool:
        """One call or one stretch of content. False when more text is needed."""
        if self._in_call:
            return ("}" in news or "]" in news) and self._leave(found)
        if self._after_call and not self._pass_end():
            return False
        if self._format.bare and not self._began and self._held.lstrip().startswith("{"):
            self._enter(found, "", bare=True)
            return True
        before, begin, after = self._held.partition(self._format.begin)
        if begin:
            self._enter(found, before)
            self._held = after
            return True
        self._say(found, self._safe())
        return False

    def _enter(self, found: list[str | FoundCall], before: str, bare: bool = False) -> None:
        if before.strip():
            self._say(found, len(before.rstrip()))
        self._in_call, self._bare, self._after_call = True, bare, False

    def _leave(self, found: list[str | FoundCall]) -> bool:
        text = self._held.lstrip()
        try:
            value, length = json.JSONDecoder().raw_decode(text)
        except (ValueError, RecursionError):
            return False
        calls = [self._call(item) for item in (value if isinstance(value, list) else [value])]
        self._in_call = False
        if not calls or None in calls:
            self._held = self._held if self._bare else f"{self._format.begin}{self._held}"
            self._say(found, len(self._held))
            return False
        found.extend(call for call in calls if call is not None)
        self.calls += len(calls)
        self._held, self._began = text[length:], True
        self._after_call = self._awaits_end = True
        return True

    def _call(self, value: Any) -> FoundCall | None:
        name = value.get("name") if isinstance(value, dict) else None
        if name not in self._names:
            return None
        arguments = value.get("arguments", value.get("parameters", {}))
        text = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
        return FoundCall(new_id(), name, text)

    def _pass_end(self) -> bool:
        """Leaves out the mark that ends a call, and the space around it. False while more of that may come."""
        rest, end = self._held.lstrip(), self._format.end
        if self._awaits_end and end.startswith(rest[: len(end)]):
            if len(rest) < len(end):
                self._held = rest
                return False
            rest, self._awaits_end = rest[len(end) :].lstrip(), False
        self._held, self._after_call = rest, not rest
        return bool(rest)

    def _safe(self) -> int:
        """How many of the characters that are held can be no part of a mark, nor the space before one."""
        text, begin = self._held, self._format.begin
        for length in range(min(len(begin) - 1, len(text)), 0, -1):
            if begin.startswith(text[-length:]):
                text = text[:-length]
                break
        return len(text.rstrip())

    def _say(self, found: list[str | FoundCall], length: int) -> None:
        if length:
            self._began = True
            found.append(self._held[:length])
            self._held = self._held[length:]


def new_id() -> str:
    """An id that nobody has had."""
    # Mistral's templates want nine letters and digits, and the others take any.
    return "".join(secrets.choice(string.ascii_letters + string.digits) for _ in range(9))
