"""`/v1/responses`: items in and out, events, stored conversations, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
from serving import Reply, Running, scripted, served, serving

from nybble import Model
from nybble.server.protocols.responses.store import ResponseStore, Stored

WEATHER: dict[str, Any] = {
    "type": "function",
    "name": "weather",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    "strict": True,
}
CALL = '<tool_call>{"name": "weather", "arguments": {"city": "Rome"}}</tool_call>'
SCHEMA: dict[str, Any] = {"type": "object", "properties": {"a": {"enum": [1, 2]}}, "required": ["a"]}


@pytest.fixture(scope="module")
def server(reasoning_model: Model) -> Iterator[Running]:
    with served(reasoning_model) as running:
        yield running


def ask(server: Running, **body: Any) -> Reply:
    return server.request("POST", "/v1/responses", {"input": "Hi", "temperature": 0, **body})


def answered(model: Model, *answers: str, **body: Any) -> tuple[list[Any], str]:
    """The events of a stream or the one response to a scripted answer, and the prompt."""
    engine, script = scripted(model, *answers)
    with serving(engine) as running:
        reply = ask(running, **body)
        assert reply.status == 200, reply.text
        found = reply.events if body.get("stream") else [reply.json]
    return found, script.prompts[0]


def without_ids(output: list[Any]) -> list[Any]:
    return [{key: value for key, value in item.items() if key not in ("id", "call_id")} for item in output]


def test_an_answer_is_items_of_reasoning_text_and_calls(reasoning_model: Model) -> None:
    (found,), prompt = answered(reasoning_model, f"One.</think>\n\nI call. {CALL}", tools=[WEATHER])
    assert without_ids(found["output"]) == [
        {"type": "reasoning", "status": "completed", "summary": [], "encrypted_content": None,
         "content": [{"type": "reasoning_text", "text": "One."}]},
        {"type": "message", "status": "completed", "role": "assistant",
         "content": [{"type": "output_text", "text": "I call.", "annotations": [], "logprobs": []}]},
        {"type": "function_call", "status": "completed", "name": "weather", "arguments": '{"city": "Rome"}'},
    ]  # fmt: skip
    assert (found["object"], found["status"], found["error"]) == ("response", "completed", None)
    assert found["tools"][0]["name"] == "weather"
    assert '"name": "weather"' in prompt


def test_a_stream_has_the_events_of_each_item_in_order(reasoning_model: Model) -> None:
    events, _ = answered(reasoning_model, f"O.</think>Y.{CALL}", tools=[WEATHER], stream=True)
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    kinds = [event["type"].removeprefix("response.") for event in events]
    unique = [kind for index, kind in enumerate(kinds) if index == 0 or kinds[index - 1] != kind]
    assert unique == [
        "created", "in_progress",
        "output_item.added", "content_part.added", "reasoning_text.delta", "reasoning_text.done", "content_part.done",
        "output_item.done",
        "output_item.added", "content_part.added", "output_text.delta", "output_text.done", "content_part.done",
        "output_item.done",
        "output_item.added", "function_call_arguments.delta", "function_call_arguments.done", "output_item.done",
        "completed",
    ]  # fmt: skip
    done = events[-1]["response"]
    for index, item in enumerate(done["output"]):
        own = [event for event in events if event.get("output_index") == index]
        assert own[0]["item"]["status"] == "in_progress"
        assert own[-1]["item"] == item
        deltas = "".join(event["delta"] for event in own if event["type"].endswith(".delta"))
        whole = item["arguments"] if item["type"] == "function_call" else item["content"][0]["text"]
        assert deltas == whole
        assert {event.get("item_id", item["id"]) for event in own} == {item["id"]}
    (whole_response,), _ = answered(reasoning_model, f"O.</think>Y.{CALL}", tools=[WEATHER])
    assert without_ids(whole_response["output"]) == without_ids(done["output"])


def test_a_conversation_continues_from_a_stored_response(server: Running, reasoning_model: Model) -> None:
    engine, script = scripted(reasoning_model, f"One.</think>{CALL}", "Two.</think>Sunny.", "Three.</think>Yes.")
    with serving(engine) as running:
        first = ask(running, input="How is Rome?", instructions="Be brief", tools=[WEATHER]).json
        (call,) = [item for item in first["output"] if item["type"] == "function_call"]
        result = {"type": "function_call_output", "call_id": call["call_id"], "output": "sun"}
        second = ask(running, input=[result], previous_response_id=first["id"], tools=[WEATHER]).json
        third = ask(running, input="Sure?", previous_response_id=second["id"], stream=True).events[-1]["response"]
        assert second["previous_response_id"] == first["id"]
        path = f"/v1/responses/{third['id']}"
        assert running.request("GET", path).json == third
        assert running.request("GET", f"{path}?stream=false").json == third
        refused = running.request("GET", f"{path}?stream=true")
        assert (refused.status, refused.json["error"]["param"]) == (400, "stream")
        listed = running.request("GET", f"{path}/input_items?order=asc").json
        assert [item["type"] for item in listed["data"]] == [
            "message", "reasoning", "function_call", "function_call_output", "reasoning", "message", "message",
        ]  # fmt: skip
        assert listed["has_more"] is False
        page = running.request("GET", f"{path}/input_items?limit=2&after={listed['data'][4]['id']}").json
        assert [item["id"] for item in page["data"]] == [listed["data"][3]["id"], listed["data"][2]["id"]]
        assert page["has_more"] is True
        assert running.request("DELETE", path).json == {"id": third["id"], "object": "response", "deleted": True}
        for method in ("GET", "DELETE"):
            gone = running.request(method, path)
            assert (gone.status, gone.json["error"]["code"]) == (404, "response_not_found")
        gone = ask(running, previous_response_id=third["id"])
        assert (gone.status, gone.json["error"]["code"]) == (400, "previous_response_not_found")
    assert "system\nBe brief" in script.prompts[0]
    assert "Be brief" not in script.prompts[1]
    assert "<think>\nOne.\n</think>\n\n" in script.prompts[1]
    assert '<tool_call>{"name": "weather", "arguments": {"city": "Rome"}}</tool_call>' in script.prompts[1]
    assert "<|im_start|>tool\nsun<|im_end|>" in script.prompts[1]
    assert "Sunny.<|im_end|>\n<|im_start|>user\nSure?" in script.prompts[2]


def test_items_that_a_client_keeps_itself_give_the_same_prompt(reasoning_model: Model) -> None:
    include = ["reasoning.encrypted_content"]
    engine, script = scripted(
        reasoning_model, "One.</think>Yes.", "a</think>a", "a</think>a", "a</think>b", "a</think>a"
    )
    with serving(engine) as running:
        first = ask(running, include=include, store=False).json
        user = {"role": "user", "content": [{"type": "input_text", "text": "Hi"}]}
        reasoning, message = first["output"]
        ask(running, input=[user, *first["output"], user])
        opaque = {"type": "reasoning", "summary": [], "encrypted_content": reasoning["encrypted_content"]}
        ask(running, input=[user, opaque, {"role": "assistant", "content": "Yes."}, user])
        assert ask(running, previous_response_id=first["id"]).status == 400, "it was not to be stored"
        stored = ask(running, input="a").json
        reference = {"type": "item_reference", "id": stored["output"][1]["id"]}
        assert ask(running, input=[user, {**reference, "id": "x"}]).json["error"]["code"] == "item_not_found"
        ask(running, input=[user, reference, user])
    assert script.prompts[1] == script.prompts[2]
    assert "assistant\nb<|im_end|>" in script.prompts[4]
    assert "<think>\nOne.\n</think>\n\nYes.<|im_end|>" in script.prompts[1]
    assert message["content"][0]["text"] == "Yes."


def test_system_messages_at_the_beginning_become_one(reasoning_model: Model) -> None:
    items = [
        {"role": "developer", "content": "Be kind."},
        {"role": "system", "content": [{"type": "input_text", "text": "Be brief."}]},
        {"role": "user", "content": "Hi"},
    ]
    _, prompt = answered(reasoning_model, "a</think>b", input=items, instructions="You help.")
    assert prompt.startswith("<|im_start|>system\nYou help.\n\nBe kind.\n\nBe brief.<|im_end|>\n<|im_start|>user\nHi")


@pytest.mark.parametrize("stream", [False, True])
def test_text_follows_a_schema_and_is_cut_at_the_limit(stream: bool, server: Running) -> None:
    form = {"format": {"type": "json_schema", "name": "a", "schema": SCHEMA, "strict": True}}
    body: dict[str, Any] = {"text": form, "reasoning_budget": 3, "stream": stream}
    reply = ask(server, **body)
    found = reply.events[-1]["response"] if stream else reply.json
    assert json.loads(found["output"][-1]["content"][0]["text"])["a"] in (1, 2)
    assert found["text"]["format"]["schema"] == SCHEMA
    reply = ask(server, max_output_tokens=4, stream=stream)
    found = reply.events[-1]["response"] if stream else reply.json
    assert (found["status"], found["incomplete_details"]) == ("incomplete", {"reason": "max_output_tokens"})
    assert [(item["type"], item["status"]) for item in found["output"]] == [("reasoning", "incomplete")]
    usage = found["usage"]
    assert (usage["output_tokens"], usage["output_tokens_details"]["reasoning_tokens"]) == (4, 4)
    assert usage["total_tokens"] == usage["input_tokens"] + 4


def turn(number: int, words: int = 60) -> list[dict[str, Any]]:
    """A turn with a call and its result."""
    return [
        {"role": "user", "content": f"Question {number}. " + "word " * words},
        {"type": "function_call", "call_id": f"c{number}", "name": "weather", "arguments": '{"city": "Rome"}'},
        {"type": "function_call_output", "call_id": f"c{number}", "output": f"result {number}."},
        {"role": "assistant", "content": f"Answer {number}."},
    ]


@pytest.mark.parametrize("stream", [False, True])
def test_a_conversation_that_does_not_fit_loses_its_oldest_turns(stream: bool, reasoning_model: Model) -> None:
    last = {"role": "user", "content": "And now?"}
    conversation = [{"role": "developer", "content": "Be kind."}, *(item for n in range(30) for item in turn(n)), last]
    more: dict[str, Any] = {"truncation": "auto", "max_output_tokens": 100, "tools": [WEATHER], "stream": stream}
    found, prompt = answered(reasoning_model, f"No.</think>{CALL}", input=conversation, **more)
    response = found[-1]["response"] if stream else found[0]
    assert response["truncation"] == "auto"
    assert [item["type"] for item in response["output"]] == ["reasoning", "function_call"]
    kept = [number for number in range(30) if f"Question {number}." in prompt]
    assert kept == list(range(kept[0], 30)), "the latest turns are left, whole"
    assert all((f"result {number}." in prompt) == (number in kept) for number in range(30))
    assert "Be kind." in prompt
    assert "And now?" in prompt
    used = len(reasoning_model.tokenize(prompt))
    assert used <= 2048 - 100 < used + len(reasoning_model.tokenize(json.dumps(turn(0)))), "no more than needed"
    _, prompt = answered(reasoning_model, "No.</think>Yes", input=[*turn(1), last], **more)
    assert "Question 1." in prompt, "nothing is lost where all fits"


def test_a_last_turn_that_does_not_fit_is_an_error(server: Running) -> None:
    reply = ask(server, input=[*turn(0), {"role": "user", "content": "x" * 5000}], truncation="auto")
    assert reply.status == 400
    assert reply.json["error"]["code"] == "context_length_exceeded"


@pytest.mark.parametrize(("mode", "called"), [("auto", False), ("required", True)])
def test_only_allowed_functions_are_called(mode: str, called: bool, server: Running, reasoning_model: Model) -> None:
    choice = {"type": "allowed_tools", "mode": mode, "tools": [{"type": "function", "name": "weather"}]}
    city = {"type": "object", "properties": {"city": {"enum": ["Rome"]}}, "required": ["city"]}
    tools = [{**WEATHER, "name": name, "parameters": city} for name in ("time", "weather", "news")]
    if called:
        reply = ask(server, tools=tools, tool_choice=choice, max_output_tokens=100, temperature=1.0, seed=1)
        assert [item["name"] for item in reply.json["output"] if item["type"] == "function_call"] == ["weather"]
    other = CALL.replace("weather", "time")
    (found,), prompt = answered(reasoning_model, f"No.</think>{other}{CALL}", tools=tools, tool_choice=choice)
    assert [item["name"] for item in found["output"] if item["type"] == "function_call"] == ["weather"]
    assert '"name": "weather"' in prompt
    assert '"name": "time"' not in prompt
    assert found["tool_choice"] == choice


def test_a_response_is_the_answer_of_a_chat(server: Running) -> None:
    options: dict[str, Any] = {"seed": 5, "temperature": 1.5, "top_k": 30, "reasoning_budget": 5}
    found = ask(server, max_output_tokens=40, include=["message.output_text.logprobs"], top_logprobs=2, **options).json
    chat = server.chat(max_tokens=40, **options).choice["message"]
    assert found["output"][0]["content"][0]["text"] == chat["reasoning_content"]
    (text,) = found["output"][1]["content"]
    assert text["text"] == chat["content"]
    assert {len(token["top_logprobs"]) for token in text["logprobs"]} == {2}
    counted = server.request("POST", "/v1/responses/input_tokens", {"input": "Hi"}).json
    assert counted["input_tokens"] == found["usage"]["input_tokens"]


@pytest.mark.parametrize(
    ("body", "param", "message"),
    [
        ({"tools": [{"type": "web_search"}]}, "tools", "tools of type 'web_search' are not supported"),
        ({"input": [{"type": "computer_call"}]}, "input", "items of type 'computer_call' are not supported"),
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "input.0.content", "reads text only"),
        ({"input": [{"type": "function_call", "name": "f"}]}, "input.0.call_id", "Field required"),
        ({"background": True}, "background", "Input should be False"),
        ({"conversation": "c"}, "conversation", "unsupported parameter: conversation"),
        ({"truncation": "end"}, "truncation", "Input should be 'disabled' or 'auto'"),
        ({"max_output_tokens": 0}, "max_output_tokens", ""),
        ({"tool_choice": "required"}, None, "tool_choice requires tools"),
        ({"tools": [WEATHER], "tool_choice": {"type": "allowed_tools", "mode": "auto", "tools": [
            {"type": "function", "name": "time"}]}}, None, "tool_choice names a function that is not among the tools"),
        ({"tools": [{**WEATHER, "parameters": {"type": "strin"}}], "tool_choice": "required"}, "tools",
         "tools.0.parameters: type"),
        ({"text": {"format": {"type": "json_schema", "name": "a", "schema": {"type": "x"}}}}, "text",
         "text.format.schema: type"),
        ({"text": {"format": {"type": "json_schema", "name": "a"}}}, "text.format", "requires schema"),
        ({"input": None}, "input", "input is missing"),
        ({"model": "other"}, "model", "does not exist"),
        ({"stream_options": {}}, None, "stream_options requires stream=true"),
    ],
)  # fmt: skip
def test_what_cannot_be_done_is_refused_by_name(
    body: dict[str, Any], param: str | None, message: str, server: Running
) -> None:
    reply = ask(server, **body)
    assert reply.status in (400, 404)
    assert message in reply.error
    assert reply.json["error"]["param"] == param


@pytest.mark.parametrize("stream", [False, True])
def test_answers_repeat_any_request(stream: bool, server: Running) -> None:
    nested: Any = {"type": "object"}
    for _ in range(400):
        nested = {"type": "object", "properties": {"a": nested}}
    deep = {"tools": [{**WEATHER, "parameters": nested}], "tool_choice": "none"}
    reply = ask(server, max_output_tokens=1, stream=stream, **deep)
    assert (reply.status, reply.error) == (400, "the request is nested too deeply")
    lone = "a\ud800b"
    for body in (
        {"instructions": lone}, {"metadata": {lone: lone}}, {"user": lone}, {"prompt_cache_key": lone}, {"input": lone},
        {"tools": [{**WEATHER, "description": lone}]},
    ):  # fmt: skip
        reply = ask(server, max_output_tokens=1, stream=stream, **body)
        assert reply.status == 200, reply.text
        found = reply.events[-1]["response"] if stream else reply.json
        assert found["status"] == "incomplete"
        for path in ("", "/input_items"):
            assert server.request("GET", f"/v1/responses/{found['id']}{path}").status == 200


def test_an_error_within_a_stream_is_its_last_events(reasoning_model: Model) -> None:
    engine, _ = scripted(reasoning_model, "One.")
    with serving(engine, request_seconds=1e-9) as running:
        error, failed = ask(running, stream=True).events[-2:]
    assert (error["type"], error["code"]) == ("error", "timeout")
    assert (failed["type"], failed["response"]["status"]) == ("response.failed", "failed")
    assert failed["sequence_number"] == error["sequence_number"] + 1


def test_a_server_forgets_the_oldest_responses(reasoning_model: Model) -> None:
    engine, _ = scripted(reasoning_model, *["One.</think>Yes."] * 5)
    with serving(engine, store_bytes=5000) as running:
        ids = [ask(running).json["id"] for _ in range(5)]
        found = [running.request("GET", f"/v1/responses/{id}").status for id in ids]
    assert (found[0], found[-1]) == (404, 200)
    assert found == sorted(found, reverse=True)


def test_the_store_keeps_the_latest_responses_within_its_limit() -> None:
    def stored(name: str, size: int) -> Stored:
        return Stored({"id": name, "output": [{"id": f"{name}-item", "text": "x" * size}]}, [])

    store = ResponseStore(1000)
    for name in "abc":
        store.add(stored(name, 300))
    assert [store.get(name) is not None for name in "abc"] == [False, True, True]
    store.get("b")
    store.add(stored("d", 300))
    assert [store.get(name) is not None for name in "bcd"] == [True, False, True]
    store.add(stored("e", 3000))
    assert (store.get("e"), len(store)) == (None, 2)
    assert [*store.items({"c-item", "d-item"})] == ["d-item"]
    assert (store.remove("d"), store.remove("d")) == (True, False)
    none = ResponseStore(0)
    none.add(stored("a", 1))
    assert len(none) == 0
