"""Tool calls that a model writes as plain JSON, without the markers of its format."""

from __future__ import annotations

import itertools
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nybble.chat.tools.formats import detect_format
from nybble.chat.tools.parser import Part, ToolCallParser
from nybble.chat.tools.reader import CallArguments, CallStart
from nybble.chat.tools.tool_format import ToolFormat

FORMATS: dict[str, ToolFormat | None] = {
    "hermes": detect_format("<tool_call>"),
    "mistral": detect_format("[TOOL_CALLS]"),
    "mistral-args": detect_format("[TOOL_CALLS] [ARGS]"),
    "granite": detect_format("<|tool_call|>"),
    "llama": detect_format("<|python_tag|>"),
    "functionary": detect_format("<function="),
    "qwen-coder": detect_format("<tool_call> <function= <parameter="),
}
FUNCTIONS: dict[str, Any] = {"weather": None, "now": {"type": "object", "properties": {}}}
ROME = {"city": 'Rome "<tool_call>{[`'}
CALL = json.dumps({"name": "weather", "arguments": ROME})
NOW = '{"name": "now"}'

CALLS: dict[str, list[tuple[str, Any]]] = {
    CALL: [("weather", ROME)],
    f"\n  {CALL}\n\n": [("weather", ROME)],
    json.dumps({"name": "weather", "arguments": ROME}, indent=2): [("weather", ROME)],
    f"[{CALL}, {NOW}]": [("weather", ROME), ("now", {})],
    f"```json\n{CALL}\n```": [("weather", ROME)],
    f"```\n[{NOW},\n {CALL}]\n```\n": [("now", {}), ("weather", ROME)],
    f"```{NOW}```": [("now", {})],
    f"~~~JSON\r\n{CALL}\r\n~~~\r\n": [("weather", ROME)],
    f"````tool_call\n{CALL}\n````": [("weather", ROME)],
    f"``` json5\n{CALL} ```": [("weather", ROME)],
    '{"arguments": {"a": 1}, "name": "weather", "id": 7}': [("weather", {"a": 1})],
    '{"name": "weather", "arguments": "{\\"a\\": 1}"}': [("weather", {"a": 1})],
    '{"name": "now", "arguments": null}': [("now", {})],
    '{"name": "now", "parameters": {}}': [("now", {})],
    '{"name": "weather", "arguments": null, "parameters": {"a": 1}}': [("weather", {"a": 1})],
    '{"type": "function", "name": "weather", "parameters": {"a": 1}}': [("weather", {"a": 1})],
    '{"type": "function", "function": {"name": "weather", "arguments": {"a": 1}}}': [("weather", {"a": 1})],
    '{"id": 7, "function": {"parameters": "{\\"a\\": 1}", "name": "weather"}}': [("weather", {"a": 1})],
    '{"function": "weather", "arguments": {"a": 1}}': [("weather", {"a": 1})],
}
CONTENT = [
    "",
    "It is 18 C.",
    "{}",
    "[]",
    "```json\n{}\n```",
    "```python\nprint(1)\n```",
    '{"name": "stranger", "arguments": {}}',
    '{"name": "weather", "temperature": 18}',
    '{"name": "weather", "arguments": 5}',
    '{"name": "weather", "arguments": [1]}',
    '{"name": "weather", "arguments": {1}}',
    '{"name": ["weather"]}',
    '{"function": ["weather"]}',
    '{"arguments": {}}',
    f"{CALL[:-1]}",
    f"[{CALL}, ",
    f"```json\n{CALL}",
    f"```json\n{CALL}\n~~~",
    f"``\n{CALL}\n``",
    f"````json\n{CALL}\n```",
    f"```json\n{CALL}\n```\n```json\n{CALL}\n```",
    f"```json\n{CALL}\n{CALL}\n```",
    f"```call: json\n{CALL}\n```",
    f"Sure:\n```json\n{CALL}\n```",
    f"{CALL},",
    f"[{CALL},]",
    f"[{CALL}]]",
    f'["{CALL}"]',
    f'[{CALL}, {{"name": "stranger"}}]',
    f"{CALL} That is the call.",
    f"{CALL}\n{CALL}",
    f"Look: {CALL}",
    f"`{CALL}`",
    f"```json\n{CALL}\n``` Done.",
    f"{'[' * 3000}{']' * 3000}",
]


def parts_of(known: ToolFormat | None, pieces: list[str], *, stream: bool, **options: Any) -> list[Part]:
    assert known is not None
    parser = ToolCallParser(known, FUNCTIONS, stream=stream, unmarked=True, **options)
    parts = [part for piece in pieces for part in parser.push(piece, [1])] + parser.finish()
    assert bool(parser.calls) == any(isinstance(part, CallStart) for part in parts)
    return parts


def read(known: ToolFormat | None, pieces: list[str], *, stream: bool) -> tuple[str, list[tuple[str, Any]]]:
    content, calls = "", list[tuple[str, str]]()
    for part in parts_of(known, pieces, stream=stream):
        if isinstance(part, str):
            content += part
        elif isinstance(part, CallStart):
            calls.append((part.name, ""))
        else:
            calls[-1] = (calls[-1][0], calls[-1][1] + part.text)
    return content, [(name, json.loads(arguments)) for name, arguments in calls]


def cuts(text: str) -> list[list[str]]:
    """The text in pieces of several sizes."""
    return [[text[i : i + size] for i in range(0, len(text), size)] for size in (1, 3, 8, len(text) or 1)]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("name", FORMATS)
def test_an_answer_that_is_only_a_call_is_a_call(name: str, stream: bool) -> None:
    for text, calls in CALLS.items():
        for pieces in cuts(text):
            content, found = read(FORMATS[name], pieces, stream=stream)
            assert (content.strip(), found) == ("", calls), text


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("name", sorted(FORMATS.keys() - {"llama"}))
def test_any_other_answer_stays_content(name: str, stream: bool) -> None:
    for text in CONTENT:
        for pieces in cuts(text):
            assert read(FORMATS[name], pieces, stream=stream) == (text, []), text


def test_marked_calls_are_found_after_other_text_that_looks_like_one() -> None:
    for text in (f"{{}} <tool_call>{NOW}</tool_call>", f"[1] <tool_call>{NOW}</tool_call>"):
        for stream, pieces in itertools.product((False, True), cuts(text)):
            assert read(FORMATS["hermes"], pieces, stream=stream) == (text.partition(" ")[0], [("now", {})])
    assert read(FORMATS["mistral"], [f"[TOOL_CALLS][{NOW}]"], stream=True) == ("", [("now", {})])
    assert read(FORMATS["hermes"], [f"{CALL}\n</tool_call>"], stream=True) == ("", [("weather", ROME)])


@pytest.mark.parametrize(
    ("text", "until"),
    [
        ("It is", "I"),
        ('{"city": "Rome"}', '{"c'),
        ('{"name": "winter"}', '{"name": "wi'),
        ("```python\n", "```python\np"),
        ("[1, 2]", "[1"),
        ('{"name": "weather", "x": 1}', '{"name": "weather", "x'),
    ],
)
def test_text_is_held_back_only_while_it_can_be_a_call(text: str, until: str) -> None:
    known = FORMATS["hermes"]
    assert known is not None
    parser = ToolCallParser(known, FUNCTIONS, stream=True, unmarked=True)
    assert [part for char in until[:-1] for part in parser.push(char, [1])] == []
    assert "".join(str(part) for part in parser.push(until[-1], [1])) == until.rstrip()


def test_only_the_first_call_counts_without_parallel_calls() -> None:
    for stream in (False, True):
        start, arguments = parts_of(FORMATS["hermes"], [f"[{CALL}, {NOW}]"], stream=stream, parallel=False)
        assert isinstance(start, CallStart)
        assert start.name == "weather"
        assert isinstance(arguments, CallArguments)


SCRAPS = ["```", "json", "\n", CALL, NOW, "[", "]", "{", "}", ",", '"name"', ": ", '"weather"', " ", "x", "<tool_call>"]


@given(st.lists(st.sampled_from(SCRAPS)), st.lists(st.integers(0, 300)), st.booleans())
def test_results_do_not_depend_on_how_the_text_is_split(scraps: list[str], at: list[int], stream: bool) -> None:
    text = "".join(scraps)
    ends = sorted({0, *(cut for cut in at if cut < len(text)), len(text)})
    pieces = [text[a:b] for a, b in itertools.pairwise(ends)]
    for known in FORMATS.values():
        whole = read_or_cut(known, [text], stream=stream)
        assert read_or_cut(known, pieces, stream=stream) == whole
        if not whole[1]:
            assert whole[0] == text


def read_or_cut(known: ToolFormat | None, pieces: list[str], *, stream: bool) -> tuple[str, list[str]]:
    """The content, and the names and arguments of the calls, whose arguments may be cut off in a stream."""
    parts = parts_of(known, pieces, stream=stream)
    content = "".join(part for part in parts if isinstance(part, str))
    named = [part.name if isinstance(part, CallStart) else part.text for part in parts if not isinstance(part, str)]
    return content, ["".join(named)] if named else []
