"""Tool calls are found in answers that come in any pieces."""

from __future__ import annotations

import itertools
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nybble.chat.tools.formats import detect_format
from nybble.chat.tools.grammar import CallGrammar
from nybble.chat.tools.parser import Part, ToolCallParser
from nybble.chat.tools.reader import CallArguments, CallStart
from nybble.chat.tools.tool_format import ToolFormat
from nybble.server.protocols.chat_schema import FunctionDefinition

HERMES = detect_format("... <tool_call> ... </tool_call> ...")
MISTRAL = detect_format("... [TOOL_CALLS] ...")
ARGS = detect_format("... [TOOL_CALLS] ... [ARGS] ...")
LLAMA = detect_format("... <|python_tag|> ...")
GRANITE = detect_format("... <|tool_call|> ...")
NAMED = detect_format("... <function= ... </function> ...")
CODER = detect_format("... <tool_call> ... <function= ... <parameter= ...")
GEMMA = detect_format("... <|tool_call> ... <tool_call|> ...")
LFM2 = detect_format("... <|tool_call_start|> ...")
CALL = {"name": "f", "arguments": {"x": [1, {"y": "}]</tool_call>"}]}}
TEXT = json.dumps(CALL)
RAW = json.dumps(CALL["arguments"])
FUNCTIONS: dict[str, Any] = {
    "f": None,
    "g": {"properties": {"s": {"type": "string"}, "n": {"type": "integer"}, "b": {"type": "boolean"}}},
}
SPECIAL_TOKENS = {99: "<tool_call>", 98: "[TOOL_CALLS]", 97: "<|python_tag|>", 96: "[ARGS]", 95: "[CALL_ID]"}


def read(
    known: ToolFormat | None, pieces: list[str | int], *, stream: bool = False
) -> tuple[str, list[tuple[str, Any]]]:
    """The content and the calls of an answer. Numbers are tokens that decode to no text."""
    assert known is not None
    parser = ToolCallParser(known, FUNCTIONS, SPECIAL_TOKENS, stream=stream)
    parts: list[Part] = []
    for piece in pieces:
        parts += parser.push("", [piece]) if isinstance(piece, int) else parser.push(piece, [1])
    parts += parser.finish()
    content, calls = [], list[tuple[str, list[str]]]()
    for part in parts:
        if isinstance(part, str):
            content.append(part)
        elif isinstance(part, CallStart):
            calls.append((part.name, []))
        else:
            assert part.text
            calls[-1][1].append(part.text)
    assert parser.calls == len(calls)
    assert stream or all(len(pieces) == 1 for _, pieces in calls), "the arguments of a whole call are one piece"
    return "".join(content), [(name, json.loads("".join(pieces))) for name, pieces in calls]


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
        (HERMES, '<tool_call>{"arguments": {"a": 1}, "id": 7, "name": "g"}</tool_call>', "", [("g", {"a": 1})]),
        (HERMES, '<tool_call>{"name": "g", "arguments": "{\\"a\\": 1}"}</tool_call>', "", [("g", {"a": 1})]),
        (HERMES, '<tool_call>{"name": "g", "parameters": -1.5e3}</tool_call>', "", [("g", -1500.0)]),
        (HERMES, '<tool_call>{"name": "g", "arguments": null}</tool_call>', "", [("g", {})]),
        (HERMES, f"<tool_call>{{}}</tool_call>\n<tool_call>{TEXT}</tool_call>", "<tool_call>{}</tool_call>", [F]),
        (HERMES, f"<tool_call> oops <tool_call>{TEXT}", "<tool_call> oops", [F]),
        (MISTRAL, f'[TOOL_CALLS][{{"id": "123456789", {TEXT[1:]}]', "", [F]),
        (ARGS, f"[TOOL_CALLS]f[ARGS]{RAW}", "", [F]),
        (ARGS, f"Look: [TOOL_CALLS]f[ARGS]{RAW}[TOOL_CALLS]g[ARGS]{{}}", "Look:", [F, ("g", {})]),
        (ARGS, f"[TOOL_CALLS]f[CALL_ID]123456789[ARGS]{RAW}", "", [F]),
        (ARGS, f"[TOOL_CALLS]f{RAW}", "", [F]),
        (ARGS, f"[TOOL_CALLS] [{TEXT}]", "", [F]),
        (ARGS, "[TOOL_CALLS]stranger[ARGS]{}", "[TOOL_CALLS]stranger[ARGS]{}", []),
        (ARGS, f"[TOOL_CALLS]{'x' * 300}", f"[TOOL_CALLS]{'x' * 300}", []),
        (NAMED, f"<function=f>{RAW}</function>", "", [F]),
        (NAMED, f"So: <function=f>{RAW}</function>\n<function=g>{{}}</function>", "So:", [F, ("g", {})]),
        (NAMED, "<function=h>{}</function> <", "<function=h>{}</function> <", []),
        (NAMED, "<function=f>print()</function>", "<function=f>print()</function>", []),
        (CODER, "<tool_call>\n<function=f>\n</function>\n</tool_call>", "", [("f", {})]),
        (
            CODER,
            'Look:\n<tool_call>\n<function=g>\n<parameter=s>\n 4\n</param é"\n\n</parameter>\n'
            "<parameter=n>\n4\n</parameter>\n<parameter=b>\nmaybe\n</parameter>\n</function>\n</tool_call>\nDone.",
            "Look:Done.",
            [("g", {"s": ' 4\n</param é"\n', "n": 4, "b": "maybe"})],
        ),
        (
            CODER,
            "<tool_call><function=g><parameter=s></parameter><parameter=x>[1]</parameter></function></tool_call>"
            "<tool_call>\n<function=g>\n<parameter=s>\nx</parameter>\n</function>",
            "",
            [("g", {"s": "", "x": [1]}), ("g", {"s": "x"})],
        ),
        (CODER, "<tool_call>\n<function=h>\n", "<tool_call>\n<function=h>\n", []),
        (CODER, f"<tool_call>{TEXT}</tool_call>", f"<tool_call>{TEXT}</tool_call>", []),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_calls_are_found_wherever_the_pieces_end(
    known: ToolFormat, text: str, content: str, calls: list[Any], stream: bool
) -> None:
    for size in (1, 2, 3, 7):
        pieces: list[str | int] = [text[i : i + size] for i in range(0, len(text), size)]
        assert read(known, pieces, stream=stream) == (content, calls)
    for cut in range(len(text)) if len(text) < 1000 else (0,):
        assert read(known, [text[:cut], text[cut:]], stream=stream) == (content, calls)


def test_a_special_token_without_text_begins_a_call() -> None:
    for stream in (False, True):
        assert read(MISTRAL, [98, f"[{TEXT}]"], stream=stream) == ("", [F])
        assert read(LLAMA, ["Sure. ", 97, '{"name": "g", "parameters": {}}'], stream=stream) == ("Sure.", [("g", {})])
        assert read(ARGS, [98, "f", 96, RAW, 98, "g", 95, "123456789", 96, "{}"], stream=stream) == (
            "",
            [F, ("g", {})],
        )
        assert read(ARGS, [98, "never"], stream=stream) == ("[TOOL_CALLS]never", [])


def test_arguments_are_passed_on_as_they_are_written() -> None:
    def pieces(known: ToolFormat | None, text: str) -> list[Part]:
        assert known is not None
        parser = ToolCallParser(known, FUNCTIONS, stream=True)
        return [part for char in text for part in parser.push(char, [1])]

    begun, *rest = pieces(HERMES, '<tool_call>{"name": "f", "arguments": {"x":  1.50}}</tool_call>')
    assert isinstance(begun, CallStart)
    assert rest == [CallArguments(char) for char in '{"x":  1.50}']
    for known, text, expected in (
        (HERMES, '<tool_call>{"name": "f", "arguments": {"x": "ab', '{"x": "ab'),
        (MISTRAL, '[TOOL_CALLS][{"name": "f", "arguments": {"x": "ab', '{"x": "ab'),
        (ARGS, '[TOOL_CALLS]f[ARGS]{"x": "ab', '{"x": "ab'),
        (NAMED, '<function=f>{"x": "ab', '{"x": "ab'),
        (LLAMA, '{"name": "f", "parameters": {"x": "ab', '{"x": "ab'),
        # The last characters may begin the closing tag.
        (CODER, "<tool_call><function=g><parameter=s>one, two\n</param", '{"s": "one, two'),
        (GEMMA, '<|tool_call>call:g{s:<|"|>one, two<|"', '{"s": "one, two'),
        (LFM2, "<|tool_call_start|>[g(s='one, two", '{"s": "one, two'),
    ):
        _, *rest = pieces(known, text)
        assert "".join(part.text for part in rest if isinstance(part, CallArguments)) == expected


def test_a_call_without_an_end_stays_a_call_only_in_a_stream() -> None:
    text = '<tool_call>{"name": "f", "arguments": {"x": "ab'
    assert read(HERMES, [text]) == (text, [])
    assert HERMES is not None
    parser = ToolCallParser(HERMES, FUNCTIONS, stream=True)
    begun, arguments = parser.push(text, [1])
    assert isinstance(begun, CallStart)
    assert (arguments, parser.finish()) == (CallArguments('{"x": "ab'), [])
    # A stream has already reported the first call of a list when an unknown function follows.
    mixed = f'<tool_call>[{TEXT}, {{"name": "stranger"}}]</tool_call>'
    assert read(HERMES, [mixed]) == (mixed, [])
    assert read(HERMES, [mixed], stream=True)[1] == [F]


@given(
    st.lists(st.sampled_from(["<tool_call>", "</tool_call>", TEXT, "<tool", "_call>", "{", "}", " ", "\n", "é", "]"]))
)
def test_without_a_call_no_character_is_lost(parts: list[str | int]) -> None:
    content, calls = read(HERMES, parts)
    text = "".join(map(str, parts))
    if not calls:
        assert content == text
    else:
        assert "<tool_call>" in text


SCRAPS = ["<tool_call>", "</tool_call>", "[TOOL_CALLS]", "[ARGS]", "<function=", "</function>", "<parameter=s>"]
SCRAPS += ["<|tool_call>", "<tool_call|>", "call:f{", 's:<|"|>', '<|"|>', "<|tool_call_start|>[", "f(s=", "'", ")]"]
SCRAPS += [
    "</parameter>",
    "<|python_tag|>",
    TEXT,
    RAW,
    "f",
    "g",
    ">",
    "{",
    "}",
    "[",
    "]",
    '"',
    ":",
    ",",
    " ",
    "\n",
    "\\",
]


@given(st.lists(st.sampled_from(SCRAPS)), st.lists(st.integers(0, 500)), st.booleans())
def test_results_do_not_depend_on_how_the_text_is_split(parts: list[str], cuts: list[int], stream: bool) -> None:
    text = "".join(parts)
    ends = sorted({0, *(cut for cut in cuts if cut < len(text)), len(text)})
    pieces = [text[a:b] for a, b in itertools.pairwise(ends)]

    def parts_of(known: ToolFormat | None, pieces: list[str]) -> list[Any]:
        assert known is not None
        parser = ToolCallParser(known, FUNCTIONS, stream=stream)
        found = [part for piece in pieces for part in parser.push(piece, [1])] + parser.finish()
        merged: list[Any] = []
        for part in found:
            if isinstance(part, str):
                kind, text = "content", part
            elif isinstance(part, CallStart):
                kind, text = "call", part.name
            else:
                kind, text = "arguments", part.text
            if merged and merged[-1][0] == kind != "call":
                merged[-1][1] += text
            else:
                merged.append([kind, text])
        return merged

    for known in (HERMES, MISTRAL, ARGS, LLAMA, GRANITE, NAMED, CODER, GEMMA, LFM2):
        assert parts_of(known, pieces) == parts_of(known, [text])


def test_unsupported_templates_have_no_tool_format() -> None:
    for template in ("", "plain", "[ARGS]", "<tools> <tool_cal>", "{{ tools }} <call>", "]<]minimax[>[<tool_call>"):
        assert detect_format(template) is None


def test_a_forced_call_has_the_schema_of_its_function() -> None:
    f = FunctionDefinition(name="f", parameters={"type": "object", "properties": {"x": {"type": "integer"}}})
    g = FunctionDefinition(name="g")

    def schema_of(known: ToolFormat | None, *functions: FunctionDefinition) -> tuple[str, Any]:
        assert known is not None
        grammar = CallGrammar(known, functions, [function.name for function in functions], lambda _: None)
        prefix, text = grammar.forced()
        return prefix, json.loads(text.removeprefix("start: named\nnamed: %json "))

    closed = {**(f.parameters or {}), "additionalProperties": False}
    prefix, schema = schema_of(HERMES, f, g)
    assert prefix == "<tool_call>\n"
    assert [choice["properties"]["name"]["const"] for choice in schema["anyOf"]] == ["f", "g"]
    prefix, schema = schema_of(MISTRAL, f)
    assert (prefix, schema["items"]["properties"]["arguments"]) == ("[TOOL_CALLS]", closed)
    prefix, schema = schema_of(LLAMA, f)
    assert (prefix, schema["properties"]["parameters"]) == ("", closed)
