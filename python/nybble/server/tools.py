"""Calls of functions, found in what a model writes, for the families whose chat templates say how calls are written."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from nybble.server import calls
from nybble.server.calls import Begun, Functions, NoCall, Reader, Steps
from nybble.server.requests import FunctionDefinition


@dataclass(frozen=True)
class Format:
    """How a family writes calls: behind a mark, and with some families before another one."""

    begin: str
    end: str = ""
    form: Callable[[Reader], Steps[None]] = calls.objects
    """What stands behind the mark."""
    arguments: str = "arguments"
    """In objects the key of the arguments, beside "name"."""
    listed: bool = False
    """Objects stand in a list."""
    bare: bool = False
    """An answer that begins with a JSON object is a call, even without the mark."""

    @property
    def marks(self) -> tuple[str, ...]:
        """All marks; in some vocabularies they are tokens without a text."""
        inner = ("[ARGS]", "[CALL_ID]") if self.form is calls.mistral else ()
        return tuple(mark for mark in (self.begin, *inner, self.end) if mark)

    def forced(
        self, functions: Sequence[FunctionDefinition], id_of: Callable[[str], int | None]
    ) -> tuple[str, dict[str, Any]]:
        """What an answer that must be a call begins with, and the sampling options that hold the rest to the form.

        `id_of` gives the ids of marks that are tokens without a text.
        """
        if self.form is calls.objects or self.listed:
            return ("" if self.bare else f"{self.begin}\n" if self.end else self.begin), {
                "schema": self._objects(functions)
            }
        mark = id_of("[ARGS]")
        after = '">"' if self.form is calls.named else '"[ARGS]"' if mark is None else f"<[{mark}]>"
        rules = []
        for index, function in enumerate(functions):
            rule = f"f{index}"
            if self.form is calls.tagged:
                rules += _tagged_rules(rule, function)
            else:
                rules += [f'{rule}: "{function.name}" {after} {rule}_a', f"{rule}_a: {_json(function.parameters)}"]
        rules.append("start: " + " | ".join(f"f{index}" for index in range(len(functions))))
        begin = f"{self.begin}\n<function=" if self.form is calls.tagged else self.begin
        return begin, {"grammar": "\n".join(rules)}

    def _objects(self, functions: Sequence[FunctionDefinition]) -> dict[str, Any]:
        """The JSON Schema of one call."""
        choices = [
            {
                "type": "object",
                "properties": {"name": {"const": f.name}, self.arguments: f.parameters or {"type": "object"}},
                "required": ["name", self.arguments],
                "additionalProperties": False,
            }
            for f in functions
        ]
        call: dict[str, Any] = choices[0] if len(choices) == 1 else {"anyOf": choices}
        return {"type": "array", "items": call, "minItems": 1, "maxItems": 1} if self.listed else call


def _json(schema: Mapping[str, Any] | None) -> str:
    """A JSON Schema within a grammar, with one way to write each value and no arguments that are not listed."""
    form = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
    closed = {"x-guidance": form, **(schema or {"type": "object"})}
    if "properties" in closed and not closed.keys() & {"additionalProperties", "patternProperties", "$ref", "allOf"}:
        closed["additionalProperties"] = False
    return f"%json {json.dumps(closed)}"


def _tagged_rules(rule: str, function: FunctionDefinition) -> list[str]:
    """A grammar of one call, with an element for each argument, in order; what need not be there may be missing."""
    schema = function.parameters or {}
    known, required = schema.get("properties"), schema.get("required")
    rules, parts = [], []
    for index, (key, value) in enumerate(known.items() if isinstance(known, dict) else ()):
        part = f"{rule}_{index}"
        parts.append(part if isinstance(required, list) and key in required else f"{part}?")
        value = value if isinstance(value, dict) else {}
        texts = [value["const"]] if "const" in value else value.get("enum")
        begin, end = _literal(f"<parameter={key}>\n"), _literal("\n</parameter>\n")
        if value.get("type") != "string":
            rules += [f"{part}: {begin} {part}_v {end}", f"{part}_v: {_json(value)}"]
        elif isinstance(texts, list):
            rules.append(f"{part}: {begin} ({' | '.join(_literal(str(text)) for text in texts)}) {end}")
        else:
            rules += [f"{part}: {begin} {part}_v", f'{part}_v[suffix="</parameter>\\n"]: /(?s:.*)/']
    return [*rules, " ".join([f"{rule}:", _literal(f"{function.name}>\n"), *parts, '"</function>"'])]


def _literal(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


_FORMATS = (
    Format("<tool_call>", "</tool_call>"),  # Hermes, Qwen 2.5 and 3, SmolLM2 and 3, Granite 4
    Format("[TOOL_CALLS]", form=calls.mistral, listed=True),  # Mistral
    Format("<|tool_call|>", listed=True),  # Granite 3
    Format("<|python_tag|>", arguments="parameters", bare=True),  # Llama 3.1 and later
)
_ARGS = Format("[TOOL_CALLS]", form=calls.mistral)  # Mistral since the middle of 2025
_TAGGED = Format("<tool_call>", "</tool_call>", calls.tagged)  # Qwen3-Coder
_NAMED = Format("<function=", "</function>", calls.named)  # Functionary on Llama 3.1


def format_of(template: str) -> Format | None:
    """The format that a chat template defines; None if it defines none that is known."""
    if "<arg_key>" in template:
        return None
    if "<parameter=" in template:
        return _TAGGED if "<tool_call>" in template and "<function=" in template else None
    if "<function=" in template:
        return _NAMED
    if "[ARGS]" in template:
        return _ARGS if "[TOOL_CALLS]" in template else None
    return next((known for known in _FORMATS if known.begin in template), None)


@dataclass(frozen=True)
class FoundCall:
    """A call that a model has written."""

    id: str
    name: str
    arguments: str


@dataclass(frozen=True)
class Arguments:
    """A piece of the arguments of the call that began last."""

    text: str


Part = str | FoundCall | Begun | Arguments
"""Of an answer: content, or a call, which in streams is its beginning and then pieces."""


class PlainText:
    """Reads an answer in which there can be no calls."""

    calls = 0

    def push(self, text: str, tokens: Sequence[int]) -> list[Part]:
        """The text."""
        return [text] if text else []

    def finish(self) -> list[Part]:
        """Nothing: nothing is held back."""
        return []


class CallParser:
    """Parts a text that comes in pieces into content and calls. What turns out to be no call is content.

    Args:
        known: the format.
        functions: those that there are.
        marks: texts of the tokens that are marks of the format and decode to nothing.
        stream: give calls as they come, before it is known whether they have an end. Otherwise they are given whole,
            and what has no end is content.
    """

    def __init__(
        self, known: Format, functions: Functions, marks: Mapping[int, str] | None = None, *, stream: bool = False
    ) -> None:
        self._format = known
        self._functions = functions
        self._marks = marks or {}
        self._stream = stream
        self._held = ""
        # Of what is being read as calls: all of its text, and the calls in it.
        self._reader: Reader | None = None
        self._read = ""
        self._news: list[Begun | str] = []
        self._after_call = False
        self._awaits_end = False
        self._began = False
        self.calls = 0

    def push(self, text: str, tokens: Sequence[int]) -> list[Part]:
        """What is certain after one more piece, in the order of the text."""
        found: list[Part] = []
        # A piece has the text of its last token; those before it had none, or marks.
        self._held += "".join(self._marks.get(token, "") for token in tokens) + text
        while self._held and self._step(found):
            pass
        return found

    def finish(self) -> list[Part]:
        """What was held back, now that nothing more comes."""
        if self._after_call and self._format.end.startswith(self._held.strip()):
            return []  # A text may end within the last mark.
        rest = self._held if self._reader is None or self._is_told else self._read
        self._held = self._read = ""
        return [rest] if rest else []

    @property
    def _is_told(self) -> bool:
        """Whether a part of what is being read was given as a call."""
        return self._stream and bool(self._news)

    def _step(self, found: list[Part]) -> bool:
        """One call or one stretch of content. False when more text is needed."""
        if self._reader is not None:
            return self._go_on(self._reader, found)
        if self._after_call and not self._pass_end():
            return False
        if self._format.bare and not self._began and self._held.lstrip().startswith("{"):
            self._enter(found, "", "")
            return True
        before, begin, _ = self._held.partition(self._format.begin)
        if begin:
            self._enter(found, before, begin)
            return True
        self._say(found, self._safe())
        return False

    def _enter(self, found: list[Part], before: str, begin: str) -> None:
        """Begins to read calls behind a mark. The space before it belongs to it."""
        content = len(before.rstrip())
        self._say(found, content)
        length = len(before) - content + len(begin)
        self._read, self._held = self._held[:length], self._held[length:]
        self._reader, self._news = Reader(self._format.form, self._functions), []
        self._after_call = False

    def _go_on(self, reader: Reader, found: list[Part]) -> bool:
        """Reads calls. False when there is no more text and they have not ended."""
        ended = failed = False
        length = 0
        for letter in self._held:
            try:
                ended = reader.push(letter)
            except NoCall:
                failed = True
                break
            length += 1
            if ended:
                break
        self._read, self._held = self._read + self._held[:length], self._held[length:]
        news = reader.take()
        self._news += news
        if self._stream:
            found += [Arguments(part) if isinstance(part, str) else part for part in news]
            self.calls += sum(isinstance(part, Begun) for part in news)
        if failed or ended:
            self._leave(found, failed)
        return failed or ended

    def _leave(self, found: list[Part], failed: bool) -> None:
        self._reader, self._began = None, True
        if not self._is_told:
            whole = None if failed else _whole(self._news)
            if whole is None:
                found.append(self._read)
                return
            found += whole
            self.calls += len(whole)
        self._after_call = self._awaits_end = not failed

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

    def _say(self, found: list[Part], length: int) -> None:
        if length:
            self._began = True
            found.append(self._held[:length])
            self._held = self._held[length:]


def _whole(news: Sequence[Begun | str]) -> list[Part] | None:
    """Calls from their pieces; None when the arguments of one are not JSON."""
    pieces: list[tuple[Begun, list[str]]] = []
    for part in news:
        if isinstance(part, Begun):
            pieces.append((part, []))
        else:
            pieces[-1][1].append(part)
    whole: list[Part] = []
    for begun, texts in pieces:
        text = "".join(texts)
        arguments = text if begun.quoted else calls.normal(text)
        if arguments is None:
            return None
        whole.append(FoundCall(begun.id, begun.name, arguments))
    return whole
