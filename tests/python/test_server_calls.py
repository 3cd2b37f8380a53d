"""Calls of functions, found in texts that come in any pieces."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nybble.server import tools
from nybble.server.requests import FunctionDefinition

HERMES = tools.format_of("... <tool_call> ... </tool_call> ...")
MISTRAL = tools.format_of("... [TOOL_CALLS] ...")
LLAMA = tools.format_of("... <|python_tag|> ...")
GRANITE = tools.format_of("... <|tool_call|> ...")
CALL = {"name": "f", "arguments": {"x": [1, {"y": "}]</tool_call>"}]}}
TEXT = json.dumps(CALL)


def read(known: tools.Format | None, pieces: list[str], marks: tuple[int, ...] = ()) -> tuple[str, list[Any]]:
    """The content and the calls of an answer; the pieces whose number is among `marks` are marks and have no text."""
    assert known is not None
    parser = tools.CallParser(known, ["f", "g"], 99)
    parts = []
    for index, piece in enumerate(pieces):
        parts += parser.push("", [99]) if index in marks else parser.push(piece, [1])
    parts += parser.finish()
    calls = [(part.name, json.loads(part.arguments)) for part in parts if not isinstance(part, str)]
    assert parser.calls == len(calls)
    return "".join(part for part in parts if isinstance(part, str)), calls


F = ("f", CALL["arguments"])


@pytest.mark.parametrize(
    ("known", "text", "content", "calls"),
    [
        (HERMES, f"<tool_call>\n{TEXT}\n</tool_call>", "", [F]),
        (HERMES, f"Look:\n\n<tool_call>{TEXT}</tool_call>", "Look:", [F]),
        (HERMES, f"<tool_call>{TEXT}</tool_call>\n<tool_call>{TEXT}</tool_call>", "", [F, F]),
        (HERMES, f"<tool_call>[{TEXT}, {TEXT}]</tool_call>", "", [F, F]),
        (HERMES, f"<tool_call>{TEXT}", "", [F]),
        (HERMES, f"<tool_call>{TEXT}</tool", "", [F]),
        (HERMES, '<tool_call>{"name": "g"}</tool_call> Done.', "Done.", [("g", {})]),
        (HERMES, "no call at all, 3 < 4 <tool", "no call at all, 3 < 4 <tool", []),
        (HERMES, '<tool_call>{"name": "stranger"}</tool_call>', '<tool_call>{"name": "stranger"}</tool_call>', []),
        (HERMES, '<tool_call>{"name": "f", ', '<tool_call>{"name": "f", ', []),
        (HERMES, "<tool_call>[]</tool_call>", "<tool_call>[]</tool_call>", []),
        (HERMES, f"<tool_call>{'[' * 5000}{']' * 5000}", f"<tool_call>{'[' * 5000}{']' * 5000}", []),
        (HERMES, " spaces \n", " spaces \n", []),
        (MISTRAL, f"[TOOL_CALLS][{TEXT}]", "", [F]),
        (MISTRAL, f"[TOOL_CALLS] [{TEXT}, {TEXT}]", "", [F, F]),
        (GRANITE, f"<|tool_call|>[{TEXT}]", "", [F]),
        (LLAMA, '{"name": "g", "parameters": {"a": 1}}', "", [("g", {"a": 1})]),
        (LLAMA, '<|python_tag|>{"name": "g", "parameters": {"a": 1}}', "", [("g", {"a": 1})]),
        (LLAMA, '{"answer": 42}', '{"answer": 42}', []),
        (LLAMA, 'Say {"name": "g"}', 'Say {"name": "g"}', []),
    ],
)
def test_calls_are_found_wherever_the_pieces_end(
    known: tools.Format, text: str, content: str, calls: list[Any]
) -> None:
    if len(text) > 1000:
        assert read(known, [text]) == (content, calls)
        return
    for size in (1, 2, 3, 7, len(text)):
        pieces = [text[i : i + size] for i in range(0, len(text), size)]
        assert read(known, pieces) == (content, calls)


def test_a_mark_that_decodes_to_nothing_begins_a_call() -> None:
    assert read(MISTRAL, ["", f"[{TEXT}]"], marks=(0,)) == ("", [F])
    assert read(LLAMA, ["Sure. ", "", '{"name": "g", "parameters": {}}'], marks=(1,)) == ("Sure.", [("g", {})])


@given(
    st.lists(st.sampled_from(["<tool_call>", "</tool_call>", TEXT, "<tool", "_call>", "{", "}", " ", "\n", "é", "]"]))
)
def test_without_a_call_no_letter_is_lost(parts: list[str]) -> None:
    content, calls = read(HERMES, parts)
    text = "".join(parts)
    if not calls:
        assert content == text
    else:
        assert "<tool_call>" in text


def test_formats_that_are_not_known_are_not_guessed() -> None:
    for template in ("", "plain", "<tool_call><function=", "[TOOL_CALLS]name[ARGS]"):
        assert tools.format_of(template) is None


def test_a_forced_call_has_the_schema_of_its_function() -> None:
    f = FunctionDefinition(name="f", parameters={"type": "object", "properties": {"x": {"type": "integer"}}})
    g = FunctionDefinition(name="g")
    assert HERMES is not None
    assert MISTRAL is not None
    assert LLAMA is not None
    begin, schema = HERMES.forced([f, g])
    assert begin == "<tool_call>\n"
    assert [choice["properties"]["name"]["const"] for choice in schema["anyOf"]] == ["f", "g"]
    begin, schema = MISTRAL.forced([f])
    assert (begin, schema["items"]["properties"]["arguments"]) == ("[TOOL_CALLS]", f.parameters)
    begin, schema = LLAMA.forced([f])
    assert (begin, schema["properties"]["parameters"]) == ("", f.parameters)
    parser = tools.CallParser(HERMES, ["f"], None, forced=True)
    (call,) = parser.push('{"name": "f", "arguments": {"x": 1}}', [])
    assert not isinstance(call, str)
    assert call.arguments == '{"x": 1}'
    assert parser.finish() == []
