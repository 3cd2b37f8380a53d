"""The official clients of the Responses API and of Anthropic's Messages, against the server."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import clients
import pytest
from clients import CALLS, Trip, needed
from serving import Running, scripted, served, serving

from nybble import Model

pytestmark = clients.IGNORED

PARAMETERS: dict[str, Any] = {
    "type": "object",
    "properties": {"city": {"type": "string"}},
    "required": ["city"],
    "additionalProperties": False,
}
FUNCTION: dict[str, Any] = {"type": "function", "name": "weather", "parameters": PARAMETERS, "strict": True}
TOOL: dict[str, Any] = {"name": "weather", "input_schema": PARAMETERS}
THINK: dict[str, Any] = {"type": "enabled", "budget_tokens": 1024}


@pytest.fixture(scope="module")
def server(chat_model: Model) -> Iterator[Running]:
    with served(chat_model) as running:
        yield running


def openai_client(running: Running) -> Any:
    return needed("openai").OpenAI(base_url=f"{running.url}/v1", api_key="none", max_retries=0)


def anthropic_client(running: Running) -> Any:
    return needed("anthropic").Anthropic(base_url=running.url, api_key="none", max_retries=0)


@pytest.mark.parametrize("stream", [False, True])
def test_openai_responses_reason_call_and_continue(stream: bool, reasoning_model: Model) -> None:
    engine, script = scripted(reasoning_model, f"One.</think>{CALLS['marked']}", "Two.</think>It is warm.")
    with serving(engine) as running, openai_client(running) as client:

        def ask(**given: Any) -> Any:
            if not stream:
                return client.responses.create(model="tiny", tools=[FUNCTION], **given)
            with client.responses.stream(model="tiny", tools=[FUNCTION], **given) as events:
                kinds = [event.type for event in events]
                assert (kinds[0], kinds[-1]) == ("response.created", "response.completed")
                return events.get_final_response()

        first = ask(input="How is Rome?")
        reasoning, call = first.output
        assert reasoning.content[0].text == "One."
        assert (call.name, call.arguments) == ("weather", '{"city": "Rome"}')
        result = {"type": "function_call_output", "call_id": call.call_id, "output": "sun"}
        second = ask(input=[result], previous_response_id=first.id)
        assert second.output_text == "It is warm."
        assert client.responses.retrieve(second.id).output_text == "It is warm."
        assert [item.type for item in client.responses.input_items.list(second.id, order="asc")][-1] == result["type"]
        client.responses.delete(second.id)
        with pytest.raises(needed("openai").NotFoundError):
            client.responses.retrieve(second.id)
        assert client.responses.input_tokens.count(input="Hi").input_tokens > 0
    assert "tool\nsun" in script.prompts[1]


def test_openai_responses_parse_structured_text(server: Running) -> None:
    with openai_client(server) as client:
        found = client.responses.parse(model="tiny", input="Plan a trip.", text_format=Trip).output_parsed
        assert isinstance(found, Trip)
        with client.responses.stream(model="tiny", input="Plan a trip.", text_format=Trip) as stream:
            for event in stream:
                if event.type == "response.output_text.done":
                    assert isinstance(event.parsed, Trip)
            assert isinstance(stream.get_final_response().output_parsed, Trip)


def test_openai_responses_are_cut_and_refused(server: Running) -> None:
    openai = needed("openai")
    with openai_client(server) as client:
        cut = client.responses.create(model="tiny", input="Hi", max_output_tokens=2)
        assert (cut.status, cut.incomplete_details.reason) == ("incomplete", "max_output_tokens")
        with pytest.raises(openai.BadRequestError, match="web_search"):
            client.responses.create(model="tiny", input="Hi", tools=[{"type": "web_search"}])


@pytest.mark.parametrize("stream", [False, True])
def test_anthropic_messages_think_call_and_continue(stream: bool, reasoning_model: Model) -> None:
    engine, script = scripted(reasoning_model, f"One.</think>Well. {CALLS['marked']}", "Two.</think>It is warm.")
    with serving(engine) as running, anthropic_client(running) as client:

        def ask(messages: list[Any]) -> Any:
            given: dict[str, Any] = {
                "model": "tiny", "messages": messages, "max_tokens": 2000, "tools": [TOOL], "system": "Be kind.",
                "thinking": THINK,
            }  # fmt: skip
            if not stream:
                return client.messages.create(**given)
            with client.messages.stream(**given) as events:
                for _ in events:
                    pass
                return events.get_final_message()

        turns: list[Any] = [{"role": "user", "content": "How is Rome?"}]
        first = ask(turns)
        thinking, text, call = first.content
        assert (thinking.thinking, text.text, call.name, call.input) == ("One.", "Well.", "weather", {"city": "Rome"})
        assert first.stop_reason == "tool_use"
        result = {"type": "tool_result", "tool_use_id": call.id, "content": "sun"}
        turns += [{"role": "assistant", "content": first.content}, {"role": "user", "content": [result]}]
        second = ask(turns)
        assert (second.content[-1].text, second.stop_reason) == ("It is warm.", "end_turn")
        assert client.messages.count_tokens(model="tiny", messages=turns, tools=[TOOL]).input_tokens > 0
    assert "<think>\nOne.\n</think>\n\nWell." in script.prompts[1]
    assert "tool\nsun" in script.prompts[1]


def test_anthropic_errors_are_exceptions_of_the_client(server: Running) -> None:
    anthropic = needed("anthropic")
    turns: list[Any] = [{"role": "user", "content": "Hi"}]
    with anthropic_client(server) as client:
        with pytest.raises(anthropic.NotFoundError, match="does not exist"):
            client.messages.create(model="other", messages=turns, max_tokens=1)
        with pytest.raises(anthropic.BadRequestError, match="max_tokens"):
            client.messages.create(model="tiny", messages=turns, max_tokens=-1)
        cut = client.messages.create(model="tiny", messages=turns, max_tokens=2)
        assert (cut.stop_reason, cut.usage.output_tokens) == ("max_tokens", 2)


def test_both_clients_talk_to_a_real_model(default_model: Model) -> None:
    question = "What is the capital of France?"
    with served(default_model) as running, openai_client(running) as openai, anthropic_client(running) as anthropic:
        given: dict[str, Any] = {"model": "tiny", "extra_body": {"temperature": 0}}
        response = openai.responses.create(input=question, max_output_tokens=30, **given)
        turns: list[Any] = [{"role": "user", "content": question}]
        message = anthropic.messages.create(messages=turns, max_tokens=30, **given)
        expected = default_model.chat(turns, temperature=0, max_tokens=30).text
        assert (response.output_text, message.content[0].text) == (expected, expected)
