"""Calls of functions, found in texts that come in any pieces."""

from __future__ import annotations

import itertools
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nybble.server import tools
from nybble.server.calls import Begun
from nybble.server.requests import FunctionDefinition

HERMES = tools.format_of("... <tool_call> ... </tool_call> ...")
MISTRAL = tools.format_of("... [TOOL_CALLS] ...")
ARGS = tools.format_of("... [TOOL_CALLS] ... [ARGS] ...")
LLAMA = tools.format_of("... <|python_tag|> ...")
GRANITE = tools.format_of("... <|tool_call|> ...")
NAMED = tools.format_of("... <function= ... </function> ...")
CODER = tools.format_of("... <tool_call> ... <function= ... <parameter= ...")
CALL = {"name": "f", "arguments": {"x": [1, {"y": "}]</tool_call>"}]}}
TEXT = json.dumps(CALL)
RAW = json.dumps(CALL["arguments"])
FUNCTIONS: dict[str, Any] = {
    "f": None,
    "g": {"properties": {"s": {"type": "string"}, "n": {"type": "integer"}, "b": {"type": "boolean"}}},
}
MARKS = {99: "<tool_call>", 98: "[TOOL_CALLS]", 97: "<|python_tag|>", 96: "[ARGS]", 95: "[CALL_ID]"}


def read(
    known: tools.Format | None, pieces: list[str | int], *, stream: bool = False
) -> tuple[str, list[tuple[str, Any]]]:
    """The content and the calls of an answer. Numbers are tokens without a text."""
    assert known is not None
    parser = tools.CallParser(known, FUNCTIONS, MARKS, stream=stream)
    parts: list[tools.Part] = []
    for piece in pieces:
        parts += parser.push("", [piece]) if isinstance(piece, int) else parser.push(piece, [1])
    parts += parser.finish()
    content, calls = [], list[tuple[str, list[str]]]()
    for part in parts:
        if isinstance(part, str):
            content.append(part)
        elif isinstance(part, Begun):
            assert stream
            calls.append((part.name, []))
        elif isinstance(part, tools.Arguments):
            assert part.text
            calls[-1][1].append(part.text)
        else:
            assert not stream
            calls.append((part.name, [part.arguments]))
    assert parser.calls == len(calls)
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
    known: tools.Format, text: str, content: str, calls: list[Any], stream: bool
) -> None:
    for size in (1, 2, 3, 7):
        pieces: list[str | int] = [text[i : i + size] for i in range(0, len(text), size)]
        assert read(known, pieces, stream=stream) == (content, calls)
    for cut in range(len(text)) if len(text) < 1000 else (0,):
        assert read(known, [text[:cut], text[cut:]], stream=stream) == (content, calls)


def test_a_mark_that_decodes_to_nothing_begins_a_call() -> None:
    for stream in (False, True):
        assert read(MISTRAL, [98, f"[{TEXT}]"], stream=stream) == ("", [F])
        assert read(LLAMA, ["Sure. ", 97, '{"name": "g", "parameters": {}}'], stream=stream) == ("Sure.", [("g", {})])
        assert read(ARGS, [98, "f", 96, RAW, 98, "g", 95, "123456789", 96, "{}"], stream=stream) == (
            "",
            [F, ("g", {})],
        )
        assert read(ARGS, [98, "never"], stream=stream) == ("[TOOL_CALLS]never", [])


def test_arguments_are_passed_on_as_they_are_written() -> None:
    def pieces(known: tools.Format | None, text: str) -> list[tools.Part]:
        assert known is not None
        parser = tools.CallParser(known, FUNCTIONS, stream=True)
        return [part for letter in text for part in parser.push(letter, [1])]

    begun, *rest = pieces(HERMES, '<tool_call>{"name": "f", "arguments": {"x":  1.50}}</tool_call>')
    assert isinstance(begun, Begun)
    assert rest == [tools.Arguments(letter) for letter in '{"x":  1.50}']
    for known, text, said in (
        (HERMES, '<tool_call>{"name": "f", "arguments": {"x": "ab', '{"x": "ab'),
        (MISTRAL, '[TOOL_CALLS][{"name": "f", "arguments": {"x": "ab', '{"x": "ab'),
        (ARGS, '[TOOL_CALLS]f[ARGS]{"x": "ab', '{"x": "ab'),
        (NAMED, '<function=f>{"x": "ab', '{"x": "ab'),
        (LLAMA, '{"name": "f", "parameters": {"x": "ab', '{"x": "ab'),
        # So many letters may be the end of the value.
        (CODER, "<tool_call><function=g><parameter=s>one, two, three, four", '{"s": "one, two'),
    ):
        _, *rest = pieces(known, text)
        assert "".join(part.text for part in rest if isinstance(part, tools.Arguments)) == said


def test_a_call_without_an_end_stays_a_call_only_in_a_stream() -> None:
    text = '<tool_call>{"name": "f", "arguments": {"x": "ab'
    assert read(HERMES, [text]) == (text, [])
    assert HERMES is not None
    parser = tools.CallParser(HERMES, FUNCTIONS, stream=True)
    begun, arguments = parser.push(text, [1])
    assert isinstance(begun, Begun)
    assert (arguments, parser.finish()) == (tools.Arguments('{"x": "ab'), [])
    # Of a list with a call of nobody's, a stream has told the first one by then.
    mixed = f'<tool_call>[{TEXT}, {{"name": "stranger"}}]</tool_call>'
    assert read(HERMES, [mixed]) == (mixed, [])
    assert read(HERMES, [mixed], stream=True)[1] == [F]


@given(
    st.lists(st.sampled_from(["<tool_call>", "</tool_call>", TEXT, "<tool", "_call>", "{", "}", " ", "\n", "é", "]"]))
)
def test_without_a_call_no_letter_is_lost(parts: list[str | int]) -> None:
    content, calls = read(HERMES, parts)
    text = "".join(map(str, parts))
    if not calls:
        assert content == text
    else:
        assert "<tool_call>" in text


SCRAPS = ["<tool_call>", "</tool_call>", "[TOOL_CALLS]", "[ARGS]", "<function=", "</function>", "<parameter=s>"]
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
def test_what_is_found_does_not_depend_on_the_pieces(parts: list[str], cuts: list[int], stream: bool) -> None:
    text = "".join(parts)
    places = sorted({0, *(cut for cut in cuts if cut < len(text)), len(text)})
    pieces = [text[a:b] for a, b in itertools.pairwise(places)]

    def told(known: tools.Format | None, pieces: list[str]) -> list[Any]:
        assert known is not None
        parser = tools.CallParser(known, FUNCTIONS, stream=stream)
        found = [part for piece in pieces for part in parser.push(piece, [1])] + parser.finish()
        merged: list[Any] = []
        for part in found:
            kind, text = ("call", part.name) if isinstance(part, Begun | tools.FoundCall) else ("arguments", "")
            if isinstance(part, str):
                kind, text = "content", part
            elif not isinstance(part, Begun):
                kind, text = "arguments", part.text if isinstance(part, tools.Arguments) else part.arguments
            if merged and merged[-1][0] == kind != "call":
                merged[-1][1] += text
            else:
                merged.append([kind, text])
        return merged

    for known in (HERMES, MISTRAL, ARGS, LLAMA, GRANITE, NAMED, CODER):
        assert told(known, pieces) == told(known, [text])


def test_formats_that_are_not_known_are_not_guessed() -> None:
    for template in ("", "plain", "<tool_call>{name}<arg_key>", "<seed:tool_call><function=f><parameter=x>", "[ARGS]"):
        assert tools.format_of(template) is None


def test_a_forced_call_has_the_schema_of_its_function() -> None:
    f = FunctionDefinition(name="f", parameters={"type": "object", "properties": {"x": {"type": "integer"}}})
    g = FunctionDefinition(name="g")
    assert HERMES is not None
    assert MISTRAL is not None
    assert LLAMA is not None
    begin, held = HERMES.forced([f, g], lambda _: None)
    assert begin == "<tool_call>\n"
    assert [choice["properties"]["name"]["const"] for choice in held["schema"]["anyOf"]] == ["f", "g"]
    begin, held = MISTRAL.forced([f], lambda _: None)
    assert (begin, held["schema"]["items"]["properties"]["arguments"]) == ("[TOOL_CALLS]", f.parameters)
    begin, held = LLAMA.forced([f], lambda _: None)
    assert (begin, held["schema"]["properties"]["parameters"]) == ("", f.parameters)
