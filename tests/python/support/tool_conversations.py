"""Conversations with tool calls, generated, and written by the chat templates of model families."""

from __future__ import annotations

import dataclasses
import functools
import json
import random
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from nybble.chat.template import ChatTemplate
from nybble.chat.tools.formats import detect_format
from nybble.chat.tools.parser import Part, ToolCallParser
from nybble.chat.tools.reader import CallStart
from nybble.chat.tools.support import tool_support
from nybble.chat.tools.tool_format import ToolFormat

Json = dict[str, Any]
Call = tuple[str, Json]

TEMPLATES = Path(__file__).parents[2] / "data" / "templates"
USER: Json = {"role": "user", "content": "Question?"}
_THOUGHT = re.compile(
    r"\s*(?:<think>.*?</think>|</think>|</?mm:think>|<\|START_THINKING\|>.*?<\|END_THINKING\|>|<think:opensource></think:opensource>)\s*",
    re.DOTALL,
)
"""Reasoning before an answer, which does not reach the parser."""
_REASONING = {"<think>": "</think>", "<|START_THINKING|>": "<|END_THINKING|>"}
"""The markers around reasoning."""


@dataclasses.dataclass(frozen=True)
class Family:
    """A chat template, and what it does not write."""

    template: str
    """The name of a file in `tests/data/templates`, without its ending."""
    format: str
    """The name of the tool-call format."""
    ends: tuple[str, ...]
    """The tokens that end an answer."""
    start: str = ""
    """What comes before an answer, if that is not the end of the prompt."""
    one_call: bool = False
    """An answer has one call; the template refuses others or leaves them out."""
    no_text: bool = False
    """The template leaves out the text next to calls."""
    no_null: bool = False
    """The template leaves out arguments that are null."""
    no_break: bool = False
    """Strings lose line breaks at their beginning and end."""
    after: str | None = ""
    """What the model writes before text that follows calls; None where calls end the answer."""
    never: str = ""
    """A regular expression of what strings cannot contain, since it cannot be told from what comes after a string."""
    without: tuple[str, ...] = ()
    """The types of arguments for which the template fails."""

    @functools.cached_property
    def source(self) -> str:
        """The template."""
        return (TEMPLATES / f"{self.template}.jinja").read_text(encoding="utf-8")

    @functools.cached_property
    def tool_format(self) -> ToolFormat:
        """The format that is found by the template."""
        found = detect_format(self.source)
        assert found is not None
        return found

    @functools.cached_property
    def _compiled(self) -> ChatTemplate:
        return ChatTemplate(self.source)

    def render(self, messages: Sequence[Json], tools: Sequence[Json], prompt: bool = False, **variables: Any) -> str:
        """A conversation as text."""
        names: dict[str, Any] = {"bos_token": "", "eos_token": self.ends[0], **variables}
        turns, listed = tool_support(self.source).prepare(messages, tools)
        return self._compiled.render(turns, tools=listed, add_generation_prompt=prompt, **names)

    def after_reasoning(self, tools: Sequence[Json]) -> str:
        """What an answer begins with if the prompt has begun reasoning."""
        prompt = self.render([USER], tools, prompt=True).rstrip()
        return next((f"So.{end}\n\n" for opening, end in _REASONING.items() if prompt.endswith(opening)), "")

    def answer(self, conversation: Conversation) -> str:
        """The answer with the calls, as the model would write it after the prompt."""
        whole = self.render([USER, conversation.turn], conversation.tools, enable_thinking=False)
        if self.start:
            length = whole.index(self.start, whole.rindex(USER["content"])) + len(self.start)
        else:
            prompt = self.render([USER], conversation.tools, prompt=True, enable_thinking=False)
            length = next((i for i, (a, b) in enumerate(zip(prompt, whole, strict=False)) if a != b), len(prompt))
        answer = _THOUGHT.sub("", whole[length:], count=1) if _THOUGHT.match(whole[length:]) else whole[length:]
        end = next((end for end in self.ends if end in answer), None)
        answer = answer if end is None else answer[: answer.rindex(end)]
        while answer.endswith((*self.ends, " ", "\n")):
            answer = answer.rstrip()
            for end in self.ends:
                answer = answer.removesuffix(end)
        return answer


@dataclasses.dataclass(frozen=True)
class Conversation:
    """An answer with calls, and the functions that may be called."""

    functions: dict[str, Json]
    """The schemas of the arguments, by name."""
    text: str
    """The text before the calls."""
    calls: tuple[Call, ...]
    text_after: str

    @property
    def tools(self) -> list[Json]:
        """The functions for a chat template."""
        return [
            {"type": "function", "function": {"name": name, "description": f"About {name}", "parameters": schema}}
            for name, schema in self.functions.items()
        ]

    @property
    def turn(self) -> Json:
        """The answer as a message."""
        return {
            "role": "assistant",
            "content": self.text,
            "tool_calls": [
                {"id": f"call{index:05}", "type": "function", "function": {"name": name, "arguments": given}}
                for index, (name, given) in enumerate(self.calls)
            ],
        }


_NAMES = ("get", "get_weather", "search-web", "f", "Add_2_numbers", "run", "a", "call", "name", "functions_3")
_KEYS = ("city", "n", "is_ok", "text", "data", "max-results", "items", "a", "name", "parameters", "arguments")
_SCRAPS = (
    *("a", "Zürich", "日本", "🙂", "end.", "#", "%", "$", "|", "&amp;", "​"),
    *(" ", "  ", "\n", "\n\n", "\t", "\r\n", "\\", "\\n"),
    *(
        '"',
        "'",
        "{",
        "}",
        "[",
        "]",
        "(",
        ")",
        "<",
        ">",
        "</",
        "=",
        ",",
        ", ",
        ":",
        '": ',
        "]}",
        '"}',
        "')",
        '")',
        "```",
    ),
    *("null", "true", "None", "12", "1.50", "{}", '{"name": "f"}', "<b>", "</b>", "x=1, ", "{{ x }}", "f(a=1)"),
)
_WORDS = (
    "Look:",
    "I will ask.",
    "Größe 3 < 4",
    "日本",
    "🙂",
    "a > b",
    '"quoted"',
    "(so)",
    "first\n\nsecond",
    "1. one",
    "it's",
)


class Generator:
    """Generates conversations for a family.

    Args:
        family: The family.
        seed: The number of the conversation.
    """

    def __init__(self, family: Family, seed: int) -> None:
        self._family = family
        self._random = random.Random(f"{family.template} {seed}")
        markers = [marker for marker in family.tool_format.markers if len(marker) > 2]
        self._scraps = [*_SCRAPS, *markers, *(marker[:-1] for marker in markers), *(marker[1:] for marker in markers)]

    def conversation(self) -> Conversation:
        """One conversation."""
        random = self._random
        names = random.sample(_NAMES, random.randint(1, 3))
        functions = {name: self._schema() for name in names}
        count = 1 if self._family.one_call else random.choice((1, 1, 2, 3))
        calls = tuple(self._call(functions) for _ in range(count))
        text = "" if self._family.no_text else self._text()
        after = "" if self._family.after is None else self._text()
        return Conversation(functions, text, calls, after)

    def _text(self) -> str:
        if self._random.random() < 0.5:
            return ""
        return " ".join(self._random.choices(_WORDS, k=self._random.randint(1, 4)))

    def _schema(self) -> Json:
        random = self._random
        keys = random.sample(_KEYS, random.choice((0, 1, 2, 3, 5)))
        properties = {key: {**self._kind(), "description": f"The {key}"} for key in keys}
        return {"type": "object", "properties": properties, "required": [key for key in keys if random.random() < 0.5]}

    def _kind(self) -> Json:
        kinds: list[Json] = [{"type": each} for each in ("string", "integer", "number", "boolean", "array", "object")]
        kinds += [{"type": "string"}, {"type": "string"}, {"type": "string", "enum": ["red", "12", "é"]}]
        if not self._family.no_null:
            kinds += [{"type": "null"}, {"type": ["integer", "null"]}, {"type": ["object", "null"]}]
        return self._random.choice([kind for kind in kinds if not {*self._family.without} & {*_types(kind)}])

    def _call(self, functions: dict[str, Json]) -> Call:
        name = self._random.choice([*functions])
        schema = functions[name]
        required = schema["required"]
        given = {
            key: self._value(kind)
            for key, kind in schema["properties"].items()
            if key in required or self._random.random() < 0.7
        }
        return name, given

    def _value(self, kind: Json, depth: int = 0) -> Any:
        random = self._random
        if "enum" in kind:
            return random.choice(kind["enum"])
        match random.choice(_types(kind)):
            case "string":
                return self._string()
            case "integer":
                return random.choice((0, 1, -7, 42, 10**15))
            case "number":
                return random.choice((0, 1.5, -2.25, 1e-7, 3, 1e21))
            case "boolean":
                return random.random() < 0.5
            case "array":
                return [self._any(depth + 1) for _ in range(random.randint(0, 3))]
            case "object":
                return {self._random.choice(_KEYS): self._any(depth + 1) for _ in range(random.randint(0, 3))}
        return None

    def _any(self, depth: int) -> Any:
        names = ["string", "integer", "number", "boolean", *([] if self._family.no_null else ["null"])]
        names += ["array", "object"] if depth < 3 else []
        return self._value({"type": self._random.choice(names)}, depth)

    def _string(self) -> str:
        while True:
            text = "".join(self._random.choices(self._scraps, k=self._random.choice((0, 1, 2, 4, 8))))
            if self._family.no_break:
                text = text.strip()
            if not self._family.never or not re.search(self._family.never, text):
                return text


def _types(kind: Json) -> list[str]:
    """The types that a schema allows."""
    return kind["type"] if isinstance(kind["type"], list) else [kind["type"]]


def pieces_of(text: str, sizes: Iterator[int]) -> Iterator[str]:
    """The text in pieces of these sizes."""
    position = 0
    while position < len(text):
        size = next(sizes)
        yield text[position : position + size]
        position += size


def parsed(parser: ToolCallParser, pieces: Sequence[str]) -> tuple[str, list[Call]]:
    """The content and the calls of an answer that comes in pieces."""
    parts: list[Part] = [part for piece in pieces for part in parser.push(piece, ())]
    parts += parser.finish()
    content = ""
    calls: list[tuple[str, list[str]]] = []
    for part in parts:
        if isinstance(part, str):
            content += part
        elif isinstance(part, CallStart):
            calls.append((part.name, []))
        else:
            calls[-1][1].append(part.text)
    return content, [(name, json.loads("".join(texts))) for name, texts in calls]
