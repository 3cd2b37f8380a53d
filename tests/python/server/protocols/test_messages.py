"""Conversations: clients return earlier answers and tool calls with more or fewer fields than they received."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import openai
import pytest
from serving import Reply, Running, scripted, served, serving

from nybble import Model
from nybble.server.protocols.messages import Message

Json = dict[str, Any]
HI: Any = [{"role": "user", "content": "Hi"}]
TOOLS: list[Json] = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}]


@pytest.fixture(scope="module")
def server(tool_model: Model) -> Iterator[Running]:
    with served(tool_model) as running:
        yield running


def with_answer(server: Running, **fields: Any) -> Reply:
    return server.chat([*HI, {"role": "assistant", "content": "Hello", **fields}, *HI])


def prompt_tokens(reply: Reply) -> int:
    assert reply.status == 200, reply.text
    return int(reply.json["usage"]["prompt_tokens"])


@pytest.mark.parametrize(
    "fields",
    [
        {"annotations": None},
        {"annotations": []},
        {"function_call": None},
        {"audio": None},
        {"type": "text"},
        {"refusal": None},
        {"tool_calls": None},
        {"tool_calls": []},
        {"reasoning": "x", "parsed": {"a": 1}, "id": "m1", "index": 0},
        {"provider_specific_fields": {"a": 1}, "cache_control": {"type": "ephemeral"}},
        {"anything_null": None},
        {"content": None, "refusal": "Hello"},
        {"content": [{"type": "text", "text": "Hello", "cache_control": {"type": "ephemeral"}}]},
        {"content": [{"type": "refusal", "refusal": "Hello"}]},
        {"content": [{"type": "output_text", "text": "Hello", "annotations": []}]},
        {"content": [{"type": "thinking", "thinking": "Hm", "signature": "s"}, {"type": "text", "text": "Hello"}]},
        {"reasoning_details": [{"type": "x"}], "thinking_blocks": [], "extra_content": {"a": 1}},
    ],
    ids=str,
)
def test_fields_without_effect_are_taken(fields: Json, server: Running) -> None:
    assert prompt_tokens(with_answer(server, **fields)) == prompt_tokens(with_answer(server))


def test_every_answer_comes_back_as_the_client_dumps_it(tool_model: Model) -> None:
    call = '<tool_call>{"name": "weather", "arguments": {"city": "Köln"}}</tool_call>'
    engine, script = scripted(tool_model, call, "It rains.", *["Done."] * 6)
    turn: Any
    with serving(engine) as running, openai.OpenAI(base_url=f"{running.url}/v1", api_key="none") as client:
        ask: Any = {"model": "tiny", "tools": TOOLS}
        called = client.chat.completions.create(messages=HI, **ask).choices[0].message
        said = client.chat.completions.create(messages=HI, **ask).choices[0].message
        for answer in (called, said):
            for turn in (answer, answer.model_dump(), answer.model_dump(exclude_none=True)):
                client.chat.completions.create(messages=[*HI, turn, *HI], **ask)
    prompts = script.prompts[2:]
    assert prompts[0] == prompts[1] == prompts[2]
    assert '"city": "Köln"' in prompts[0]
    assert prompts[3] == prompts[4] == prompts[5]


@pytest.mark.parametrize(
    ("arguments", "read"),
    [
        ('{"city": "Rome"}', {"city": "Rome"}),
        ({"city": "Rome"}, {"city": "Rome"}),
        ('"{\\"city\\": \\"Rome\\"}"', {"city": "Rome"}),
        (None, {}),
        ("", {}),
        ("  ", {}),
        ("null", {}),
        ('{"city": "Ro', {"city": "Ro"}),
        ('{"city": ', {}),
        ('{"a": [1, 2', {"a": [1, 2]}),
        ("[1]", {"arguments": [1]}),
        ("Rome", {"arguments": "Rome"}),
    ],
    ids=str,
)
def test_arguments_of_earlier_calls_are_read_as_far_as_possible(arguments: Any, read: Json, server: Running) -> None:
    function = {"name": "weather", "arguments": arguments}
    turn = {"role": "assistant", "content": None, "tool_calls": [{"function": function, "index": 0}]}
    (call,) = Message.model_validate(turn).for_template()["tool_calls"]
    assert call["function"] == {"name": "weather", "arguments": read}
    assert len(call["id"]) == 9
    result = {"role": "tool", "tool_call_id": "abcdefghi", "content": None}
    assert server.chat([*HI, turn, result], tools=TOOLS).status == 200


def test_results_may_be_null_text_or_parts(server: Running) -> None:
    def asked(content: Any) -> int:
        calls = [{"id": "abcdefghi", "function": {"name": "weather", "arguments": "{}"}}]
        turns = [*HI, {"role": "assistant", "tool_calls": calls}, {"role": "tool", "content": content}]
        return prompt_tokens(server.chat(turns, tools=TOOLS))

    assert asked(None) == asked("") == asked([])
    assert asked([{"type": "text", "text": "18 C"}]) == asked("18 C")


def test_earlier_function_calls_are_tool_calls() -> None:
    turn = {"role": "assistant", "content": None, "function_call": {"name": "f", "arguments": '{"a": 1}'}}
    (call,) = Message.model_validate(turn).for_template()["tool_calls"]
    assert call["function"] == {"name": "f", "arguments": {"a": 1}}
    result = Message.model_validate({"role": "function", "name": "f", "content": "1"})
    assert result.for_template() == {"role": "tool", "content": "1", "name": "f"}


@pytest.mark.parametrize(
    ("turn", "message"),
    [
        ({"role": "user", "content": [{"type": "image_url", "image_url": {}}]}, "found a part of type 'image_url'"),
        ({"role": "user", "content": [{"type": "text"}]}, "text is missing"),
        ({"role": "user"}, "content is missing"),
        ({"role": "user", "content": "x", "tool_calls": [{"function": {"name": "f"}}]}, "requires the role assistant"),
        ({"role": "assistant", "content": "x", "prefix": True}, "unsupported parameter: messages.0.prefix"),
        ({"role": "assistant", "audio": {"id": "a"}}, "unsupported parameter: messages.0.audio"),
    ],
    ids=str,
)
def test_what_cannot_be_read_is_refused_by_name(turn: Json, message: str, server: Running) -> None:
    reply = server.chat([turn])
    assert (reply.status, message in reply.error) == (400, True), reply.text
