"""Calls that a family's chat template has written are read back: whole, and in pieces of any size."""

from __future__ import annotations

import codecs
import itertools
import json
import os
import random
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
from tool_conversations import Conversation, Family, Generator, parsed, pieces_of
from tool_families import FAMILIES

from nybble.chat.tools.formats import FORMATS
from nybble.chat.tools.parser import ToolCallParser

CONVERSATIONS = 200 if os.environ.get("NYBBLE_ALL_CONVERSATIONS") else 6
each_family = pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.template)


def conversations(family: Family) -> Iterator[tuple[Conversation, str]]:
    """Generated conversations, each with the answer of the model."""
    for seed in range(CONVERSATIONS):
        conversation = Generator(family, seed).conversation()
        answer = family.answer(conversation)
        if conversation.text_after:
            answer += f"\n{family.after}{conversation.text_after}"
        yield conversation, answer


def without_space(text: str) -> str:
    """Text as it is compared: formats have white space of their own around calls."""
    return "".join(text.split())


def characters_of_bytes(text: str) -> Iterator[str]:
    """What a decoder gives for each byte of a text."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    return (decoder.decode(bytes([byte])) for byte in text.encode())


@each_family
def test_calls_are_read_as_the_template_wrote_them(family: Family) -> None:
    assert family.tool_format.name == family.format
    for seed, (conversation, answer) in enumerate(conversations(family)):
        randint = random.Random(seed).randint
        cuts = (
            [answer],
            [*answer],
            [*characters_of_bytes(answer)],
            [*pieces_of(answer, itertools.repeat(2))],
            [*pieces_of(answer, iter(partial(randint, 1, 30), None))],
        )
        for pieces, stream in itertools.product(cuts, (False, True)):
            parser = ToolCallParser(family.tool_format, conversation.functions, stream=stream)
            content, calls = parsed(parser, pieces)
            assert calls == [*conversation.calls], f"conversation {seed}: {answer}"
            # Python counts 1, 1.0 and True as equal.
            assert json.dumps(calls, sort_keys=True) == json.dumps([*conversation.calls], sort_keys=True)
            text = without_space(conversation.text + conversation.text_after)
            assert without_space(content) == text, f"conversation {seed}: {answer}"


@each_family
def test_a_format_reads_what_it_writes(family: Family) -> None:
    for conversation, _ in conversations(family):
        written = family.tool_format.write(conversation.calls)
        content, calls = parsed(ToolCallParser(family.tool_format, conversation.functions), [*written])
        assert (content, calls) == ("", [*conversation.calls]), written


@each_family
def test_without_parallel_calls_only_the_first_is_reported(family: Family) -> None:
    for conversation, answer in conversations(family):
        for stream in (False, True):
            parser = ToolCallParser(family.tool_format, conversation.functions, stream=stream, parallel=False)
            content, calls = parsed(parser, [*answer])
            assert calls == [conversation.calls[0]]
            assert without_space(content) in ("", without_space(conversation.text))


@each_family
def test_calls_of_unknown_functions_and_broken_calls_are_text(family: Family) -> None:
    for conversation, _ in conversations(family):
        answer = family.answer(conversation)
        content, calls = parsed(ToolCallParser(family.tool_format, {"other": None}), [*answer])
        assert calls == []
        assert all(name in content for name, _ in conversation.calls)


def test_every_format_has_a_template_that_is_tested() -> None:
    assert {known.name for known in FORMATS} == {family.format for family in FAMILIES}


def test_the_documentation_lists_every_format() -> None:
    page = (Path(__file__).parents[3] / "docs" / "serving.md").read_text(encoding="utf-8")
    rows = {}
    for known in FORMATS:
        call = "".join(known.write([("NAME", {"KEY": "VALUE"})]).splitlines()).replace("|", r"\|")
        fence = "`` " if "`" in call else "`"
        rows[known.name] = f"| {known.families} | {fence}{call}{fence[::-1]} |"
    listed = sorted(rows.values(), key=str.lower)
    table = "\n".join(["| families | a call |", "| --- | --- |", *listed])
    assert table in page, f"docs/serving.md should have this table:\n{table}"
