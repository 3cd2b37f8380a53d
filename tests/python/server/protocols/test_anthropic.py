"""`/v1/messages`: blocks in and out, events, tokens counted, and errors in Anthropic's format."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
from serving import Reply, Running, scripted, served, serving

from nybble import Model

HI: list[dict[str, Any]] = [{"role": "user", "content": "Hi"}]
WEATHER: dict[str, Any] = {
    "name": "weather",
    "description": "The weather.",
    "input_schema": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
}
CALL = '<tool_call>{"name": "weather", "arguments": {"city": "Rome"}}</tool_call>'
THINK: dict[str, Any] = {"type": "enabled", "budget_tokens": 2000}


@pytest.fixture(scope="module")
def server(reasoning_model: Model) -> Iterator[Running]:
    with served(reasoning_model) as running:
        yield running


def ask(server: Running, **body: Any) -> Reply:
    given = {"messages": HI, "max_tokens": 30, "temperature": 0, **body}
    return server.request("POST", "/v1/messages", {name: value for name, value in given.items() if value is not None})


def answered(model: Model, answer: str, **body: Any) -> tuple[Any, list[Any], str]:
    """The message of a scripted answer, put together from a stream or whole; the events; and the prompt."""
    engine, script = scripted(model, answer)
    with serving(engine) as running:
        reply = ask(running, **body)
    assert reply.status == 200, reply.text
    if not body.get("stream"):
        return reply.json, [], script.prompts[0]
    return added_up(reply.events), reply.events, script.prompts[0]


def added_up(events: list[Any]) -> Any:
    """The message that a client puts together."""
    message = events[0]["message"]
    for event in events[1:]:
        if event["type"] == "content_block_start":
            assert event["index"] == len(message["content"])
            message["content"].append(event["content_block"])
        elif event["type"] == "content_block_delta":
            block, delta = message["content"][event["index"]], event["delta"]
            name = delta["type"].removesuffix("_delta").replace("input_json", "partial_json")
            key = "partial" if name == "partial_json" else name
            block[key] = block.get(key, "") + delta[name]
        elif event["type"] == "content_block_stop":
            block = message["content"][event["index"]]
            if "partial" in block:
                block["input"] = json.loads(block.pop("partial"))
        elif event["type"] == "message_delta":
            message |= event["delta"]
            message["usage"] = event["usage"]
    return message


@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_is_blocks_of_thinking_text_and_calls(stream: bool, reasoning_model: Model) -> None:
    text = f"One.</think>\n\nI call. {CALL}"
    message, events, prompt = answered(reasoning_model, text, tools=[WEATHER], thinking=THINK, stream=stream)
    thinking, said, call = message["content"]
    assert (thinking["type"], thinking["thinking"]) == ("thinking", "One.")
    assert thinking["signature"]
    assert (said["type"], said["text"]) == ("text", "I call.")
    assert (call["type"], call["name"], call["input"]) == ("tool_use", "weather", {"city": "Rome"})
    assert (message["role"], message["stop_reason"], message["stop_sequence"]) == ("assistant", "tool_use", None)
    assert '"description": "The weather."' in prompt
    if stream:
        kinds = [event["type"] for event in events]
        assert (kinds[0], kinds[-2:]) == ("message_start", ["message_delta", "message_stop"])
        assert kinds.count("content_block_start") == kinds.count("content_block_stop") == 3


@pytest.mark.parametrize(
    ("body", "kinds"),
    [
        ({}, ["text"]),
        ({"thinking": {"type": "adaptive"}}, ["thinking", "text"]),
        ({"thinking": {"type": "adaptive", "display": "omitted"}}, ["text"]),
    ],
)
def test_thinking_is_shown_where_a_client_asks_for_it(
    body: dict[str, Any], kinds: list[str], reasoning_model: Model
) -> None:
    message, _, prompt = answered(reasoning_model, "One.</think>Yes.", **body)
    assert [block["type"] for block in message["content"]] == kinds
    assert message["content"][-1]["text"] == "Yes."
    assert prompt.endswith("<think>\n")


def test_a_conversation_with_calls_and_results_reaches_the_template(reasoning_model: Model) -> None:
    turns = [
        {"role": "user", "content": [{"type": "text", "text": "How is Rome?", "cache_control": {"type": "ephemeral"}}]},
        {"role": "assistant", "content": [
            {"type": "thinking", "thinking": "One.", "signature": "s"},
            {"type": "redacted_thinking", "data": "x"},
            {"type": "text", "text": "I call."},
            {"type": "tool_use", "id": "t1", "name": "weather", "input": {"city": "Rome"}},
            {"type": "tool_use", "id": "t2", "name": "weather", "input": {"city": "Oslo"}},
        ]},
        {"role": "user", "content": [
            {"type": "tool_result", "tool_use_id": "t1", "content": "sun"},
            {"type": "tool_result", "tool_use_id": "t2", "content": [{"type": "text", "text": "rain"}]},
            {"type": "text", "text": "Well?"},
        ]},
        {"role": "user", "content": "Say."},
    ]  # fmt: skip
    system = [{"type": "text", "text": "Be brief."}, {"type": "text", "text": "Be kind."}]
    _, _, prompt = answered(reasoning_model, "a</think>b", messages=turns, system=system, tools=[WEATHER])
    calls = "".join(
        f'<tool_call>{{"name": "weather", "arguments": {{"city": "{city}"}}}}</tool_call>' for city in ("Rome", "Oslo")
    )
    assert prompt.endswith(
        "<|im_start|>system\nBe brief.\nBe kind.<|im_end|>\n<|im_start|>user\nHow is Rome?<|im_end|>\n"
        f"<|im_start|>assistant\n<think>\nOne.\n</think>\n\nI call.{calls}<|im_end|>\n"
        "<|im_start|>tool\nsun<|im_end|>\n<|im_start|>tool\nrain<|im_end|>\n<|im_start|>user\nWell?\nSay.<|im_end|>\n"
        "<|im_start|>assistant\n<think>\n"
    )


def test_parameters_that_change_nothing_are_accepted(reasoning_model: Model) -> None:
    ignored: dict[str, Any] = {
        "metadata": {"user_id": "u"},
        "service_tier": "auto",
        "context_management": {"edits": [{"type": "clear_thinking_20251015", "keep": "all"}]},
        "cache_control": {"type": "ephemeral"},
        "tool_choice": {"type": "auto", "disable_parallel_tool_use": True},
        "tools": [{**WEATHER, "type": "custom", "strict": True, "cache_control": {"type": "ephemeral"}}],
        "container": None,
    }
    message, _, prompt = answered(reasoning_model, "a</think>b", **ignored)
    assert message["content"] == [{"type": "text", "text": "b", "citations": None}]
    assert prompt == answered(reasoning_model, "a</think>b", tools=[WEATHER])[2]


def test_an_answer_that_a_client_has_begun_is_continued(reasoning_model: Model) -> None:
    turns = [*HI, {"role": "assistant", "content": "It is "}]
    message, _, prompt = answered(reasoning_model, "warm.", messages=turns)
    assert message["content"][0]["text"] == "warm."
    assert prompt.endswith("<|im_start|>assistant\nIt is ")


@pytest.mark.parametrize("stream", [False, True])
def test_the_reason_of_an_end_names_the_stop_sequence(stream: bool, server: Running) -> None:
    off = {"type": "disabled"}

    def end(**body: Any) -> tuple[str, str, str | None]:
        reply = ask(server, thinking=off, stream=stream, **body)
        message = added_up(reply.events) if stream else reply.json
        return message["content"][0]["text"], message["stop_reason"], message["stop_sequence"]

    text, reason, stop = end()
    assert (reason, stop) == ("max_tokens", None)
    wanted = text[4:7]
    start = text.index(wanted)
    assert end(stop_sequences=["~~~~", wanted]) == (text[:start], "stop_sequence", wanted)


def test_a_message_is_the_answer_of_a_chat(server: Running) -> None:
    options: dict[str, Any] = {"seed": 5, "temperature": 1.5, "top_k": 30}
    budget = {"type": "enabled", "budget_tokens": 6}
    message = ask(server, max_tokens=40, thinking=budget, **options).json
    chat = server.chat(max_tokens=40, reasoning_budget=6, **options)
    answer = chat.choice["message"]
    assert [block.get("thinking", block.get("text")) for block in message["content"]] == [
        answer["reasoning_content"], answer["content"],
    ]  # fmt: skip
    usage = message["usage"]
    assert usage["output_tokens"] == 40
    assert usage["input_tokens"] + usage["cache_read_input_tokens"] == chat.json["usage"]["prompt_tokens"]
    counted = server.request("POST", "/v1/messages/count_tokens", {"messages": HI}).json
    assert counted == {"input_tokens": chat.json["usage"]["prompt_tokens"]}
    form = {"type": "json_schema", "schema": {"type": "object", "properties": {"a": {"const": 1}}, "required": ["a"]}}
    off = {"type": "disabled"}
    formed = ask(server, max_tokens=60, thinking=off, output_config={"format": form, "effort": "low"}).json
    assert json.loads(formed["content"][0]["text"]) == {"a": 1}


@pytest.mark.parametrize("choice", [{"type": "any"}, {"type": "tool", "name": "weather"}])
def test_a_required_call_follows_the_schema(choice: dict[str, Any], chat_model: Model) -> None:
    with served(chat_model) as running:
        message = ask(running, tools=[WEATHER], tool_choice=choice, max_tokens=4000, temperature=1, seed=1).json
    (call,) = message["content"]
    assert (call["name"], [*call["input"]]) == ("weather", ["city"])


@pytest.mark.parametrize(
    ("body", "status", "kind", "message"),
    [
        ({"max_tokens": None}, 400, "invalid_request_error", "max_tokens: Field required"),
        ({"messages": []}, 400, "invalid_request_error", "messages: "),
        ({"tools": [{"type": "web_search_20250305", "name": "w"}]}, 400, "invalid_request_error",
         "tools of type 'web_search_20250305' are not supported"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, 400, "invalid_request_error",
         "messages.0.content: found a block of type 'image'"),
        ({"messages": [{"role": "assistant", "content": [{"type": "tool_result", "tool_use_id": "a"}]}]}, 400,
         "invalid_request_error", "require the role user"),
        ({"tool_choice": {"type": "any"}}, 400, "invalid_request_error", "tool_choice requires tools"),
        ({"tool_choice": {"type": "tool", "name": "x"}, "tools": [WEATHER]}, 400, "invalid_request_error",
         "tool_choice names a tool"),
        ({"context_management": {"edits": [{"type": "clear_tool_uses_1"}]}}, 400, "invalid_request_error",
         "context_management.edits.0.type"),
        ({"mcp_servers": []}, 400, "invalid_request_error", "unsupported parameter: mcp_servers"),
        ({"tools": [{**WEATHER, "input_schema": {"type": "x"}}], "tool_choice": {"type": "any"}}, 400,
         "invalid_request_error", "tools.0.input_schema: type"),
        ({"messages": [{"role": "user", "content": "a" * 5000}]}, 400, "invalid_request_error", "the context holds"),
        ({"model": "other"}, 404, "not_found_error", "does not exist"),
    ],
)  # fmt: skip
def test_errors_have_the_format_of_anthropic(
    body: dict[str, Any], status: int, kind: str, message: str, server: Running
) -> None:
    reply = ask(server, **body)
    assert (reply.status, reply.json["type"], reply.json["error"]["type"]) == (status, "error", kind)
    assert message in reply.error


def test_keys_and_errors_in_streams_are_those_of_anthropic(reasoning_model: Model) -> None:
    with served(reasoning_model, api_key="secret") as running:
        body = {"messages": HI, "max_tokens": 1}
        for headers, status in (({}, 401), ({"x-api-key": "no"}, 401), ({"x-api-key": "secret"}, 200)):
            reply = running.request("POST", "/v1/messages", body, headers)
            assert reply.status == status
            assert status == 200 or reply.json["error"]["type"] == "authentication_error"
    engine, _ = scripted(reasoning_model, "One.")
    with serving(engine, request_seconds=1e-9) as running:
        reply = ask(running, stream=True)
    assert reply.text.rpartition("event: ")[2].startswith("error\n")
    assert reply.events[-1]["error"]["type"] == "timeout_error"
