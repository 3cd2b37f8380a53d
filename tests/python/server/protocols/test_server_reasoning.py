"""Reasoning in the protocols: apart from the answer, in pieces and whole, within a budget, and in the history."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
from serving import Running, scripted, served, serving

from nybble import Model

HI: list[dict[str, Any]] = [{"role": "user", "content": "Hi"}]
WEATHER: dict[str, Any] = {
    "type": "function",
    "function": {"name": "weather", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}},
}
CALL = '<tool_call>{"name": "weather", "arguments": {"city": "Rome"}}</tool_call>'


@pytest.fixture(scope="module")
def server(reasoning_model: Model) -> Iterator[Running]:
    with served(reasoning_model) as running:
        yield running


def asked(model: Model, answer: str, **body: Any) -> tuple[dict[str, Any], str]:
    """The message of a scripted answer, put together from a stream or whole, and the prompt."""
    engine, script = scripted(model, answer)
    with serving(engine) as running:
        reply = running.chat(**{"messages": HI, **body})
    if not body.get("stream"):
        return reply.choice["message"], script.prompts[0]
    joined: dict[str, Any] = {}
    for event in reply.events:
        for key, value in event["choices"][0]["delta"].items():
            joined[key] = joined.get(key, type(value)()) + value
    return joined, script.prompts[0]


@pytest.mark.parametrize("stream", [False, True])
def test_reasoning_comes_apart_from_the_content(stream: bool, reasoning_model: Model) -> None:
    message, prompt = asked(reasoning_model, "One.\n</think>\n\nYes.", stream=stream)
    assert (message["reasoning_content"], message["content"]) == ("One.", "Yes.")
    assert prompt.endswith("<|im_start|>assistant\n<think>\n")


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("body", "reasoning", "content"),
    [
        ({"reasoning_format": "none"}, None, "One.</think>Yes."),
        ({"reasoning_format": "auto"}, "One.", "Yes."),
        ({"include_reasoning": False}, None, "Yes."),
        ({"reasoning": {"exclude": True}}, None, "Yes."),
    ],
)
def test_a_client_chooses_how_reasoning_is_given(
    stream: bool, body: dict[str, Any], reasoning: str | None, content: str, reasoning_model: Model
) -> None:
    message, _ = asked(reasoning_model, "One.</think>Yes.", stream=stream, **body)
    assert (message.get("reasoning_content"), message["content"]) == (reasoning, content)


@pytest.mark.parametrize("stream", [False, True])
def test_calls_after_reasoning_are_calls_and_calls_within_it_are_not(stream: bool, reasoning_model: Model) -> None:
    message, _ = asked(reasoning_model, f"I write {CALL}.</think>{CALL}", stream=stream, tools=[WEATHER])
    assert message["reasoning_content"] == f"I write {CALL}."
    calls = message["tool_calls"]
    assert json.loads("".join(call["function"]["arguments"] for call in calls)) == {"city": "Rome"}
    assert not message["content"]


@pytest.mark.parametrize(
    ("body", "end"),
    [
        ({"enable_thinking": False}, "<think>\n\n</think>\n\n"),
        ({"reasoning_effort": "none"}, "<think>\n\n</think>\n\n"),
        ({"thinking": {"type": "disabled"}}, "<think>\n\n</think>\n\n"),
        ({"chat_template_kwargs": {"enable_thinking": False}}, "<think>\n\n</think>\n\n"),
        ({"reasoning_budget": 0}, "<think>\n\n</think>\n\n"),
        ({"reasoning_effort": "high"}, "Effort: high"),
        ({"reasoning": {"effort": "low"}}, "Effort: low"),
        ({"thinking": {"type": "enabled"}}, "<think>\n"),
        ({"tools": [WEATHER], "tool_choice": "required"}, "</think>\n\n<tool_call>\n"),
    ],
)
def test_switches_reach_the_prompt(body: dict[str, Any], end: str, reasoning_model: Model) -> None:
    answer = CALL if "tools" in body else "Yes."
    _, prompt = asked(reasoning_model, answer, **body)
    if end.startswith("Effort"):
        assert end in prompt
    else:
        assert prompt.endswith(end)


def test_earlier_reasoning_reaches_the_template(reasoning_model: Model) -> None:
    for given in (
        {"content": "Yes.", "reasoning_content": "One."},
        {"content": "Yes.", "reasoning": "One."},
        {"content": [{"type": "thinking", "thinking": "One."}, {"type": "text", "text": "Yes."}]},
    ):
        _, prompt = asked(reasoning_model, "a</think>b", messages=[*HI, {"role": "assistant", **given}, *HI])
        assert "assistant\n<think>\nOne.\n</think>\n\nYes.<|im_end|>" in prompt


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"enable_thinking": True, "thinking": {"type": "disabled"}}, "enable_thinking and thinking.type"),
        ({"reasoning_budget": 1, "thinking_budget": 2}, "reasoning_budget and thinking_budget"),
        ({"reasoning_format": "none", "include_reasoning": False}, "reasoning_format"),
        ({"reasoning_format": "hidden"}, "reasoning_format"),
        ({"reasoning_budget": -2}, "reasoning_budget"),
        ({"reasoning": {"efort": "low"}}, "reasoning.efort"),
        ({"continue_final_message": True}, "continue_final_message"),
        ({"continue_final_message": True, "add_generation_prompt": True}, "add_generation_prompt"),
    ],
)
def test_contradictions_are_refused_by_name(body: dict[str, Any], param: str, server: Running) -> None:
    reply = server.chat(**body)
    assert reply.status == 400
    assert param in reply.error


def test_an_answer_that_is_cut_within_reasoning_has_no_content(server: Running) -> None:
    choice = server.chat(max_tokens=9).choice
    assert (choice["finish_reason"], choice["message"]["content"]) == ("length", "")
    assert choice["message"]["reasoning_content"]


@pytest.mark.parametrize("path", ["chat", "generate", "v1"])
def test_a_budget_ends_reasoning_in_every_protocol(path: str, server: Running, reasoning_model: Model) -> None:
    expected = reasoning_model.chat(HI, temperature=0, max_tokens=40, reasoning_budget=12)
    if path == "v1":
        reply = server.chat(max_tokens=40, reasoning_budget=12)
        message = reply.choice["message"]
        assert (message["reasoning_content"], message["content"]) == (expected.reasoning, expected.text)
        details = reply.json["usage"]["completion_tokens_details"]
        assert 12 < details["reasoning_tokens"] == expected.reasoning_tokens < 40
        return
    body: dict[str, Any] = {"options": {"temperature": 0, "num_predict": 40}, "think": True}
    given = {"messages": HI} if path == "chat" else {"prompt": "Hi"}
    lines = server.request("POST", f"/api/{path}", {**body, **given}).text.splitlines()
    found = [json.loads(line) for line in lines]
    parts = [line["message"] if path == "chat" else line for line in found]
    thinking = "".join(part.get("thinking", "") for part in parts)
    assert thinking == reasoning_model.chat(HI, temperature=0, max_tokens=40).reasoning
    off = server.request("POST", f"/api/{path}", {**body, **given, "think": False, "stream": False}).json
    assert "thinking" not in (off["message"] if path == "chat" else off)


def test_the_last_answer_is_continued_where_a_client_asks_for_it(reasoning_model: Model) -> None:
    turns = [*HI, {"role": "assistant", "content": "It is "}]
    message, prompt = asked(reasoning_model, "warm.", messages=turns, continue_final_message=True)
    assert message["content"] == "warm."
    assert prompt.endswith("<|im_start|>assistant\nIt is ")
