"""Tool calls of the server, as OpenAI's client receives them."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
import tiny
from serving import TOOL_TEMPLATE, Scripted, scripted, serving

from nybble import Model
from nybble.engine import Engine

HELLO: Any = [{"role": "user", "content": "Hello"}]
WEATHER: Any = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather of a city",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}, "days": {"type": "integer", "minimum": 1, "maximum": 9}},
            "required": ["city"],
            "additionalProperties": False,
        },
        "strict": True,
    },
}
TIME: Any = {"type": "function", "function": {"name": "time", "strict": True}}
TALL: Any = {
    "type": "function",
    "function": {
        "name": "is_tall",
        "parameters": {
            "type": "object",
            "properties": {
                "tall": {"type": "boolean"},
                "how": {"type": "string", "enum": ["a bit", 'a "lot"']},
                "tags": {"type": "array", "items": {"enum": [1, 2]}, "maxItems": 2},
            },
            "required": ["tall", "how"],
        },
    },
}
TEMPLATES = {
    "hermes": "<tool_call>",
    "mistral": "[TOOL_CALLS]",
    "mistral-args": "[TOOL_CALLS][ARGS]",
    "granite": "<|tool_call|>",
    "llama": "<|python_tag|>",
    "functionary": "<function=",
    "qwen-coder": "<tool_call><function=<parameter=",
}
CITY = {"city": 'Köln "am Rhein"', "days": 3}
WRITTEN = {
    "hermes": "<tool_call>\n{}\n</tool_call>",
    "mistral": "[TOOL_CALLS][{}]",
    "granite": "<|tool_call|>[{}]",
    "llama": "<|python_tag|>{}",
    "mistral-args": "[TOOL_CALLS]weather[ARGS]{}",
    "functionary": "<function=weather>{}</function>",
    "qwen-coder": "<tool_call>\n<function=weather>\n<parameter=city>\n{city}\n</parameter>\n"
    "<parameter=days>\n{days}\n</parameter>\n</function>\n</tool_call>",
}


def template(name: str) -> str:
    """A chat template that describes a tool-call format."""
    return TOOL_TEMPLATE.replace("Write <tool_call>JSON</tool_call>.", f"Write {TEMPLATES[name]}").replace(
        "<tool_call>{{ c.function | tojson }}</tool_call>", "{{ c.function | tojson }}"
    )


def written(name: str, arguments: dict[str, Any] = CITY) -> str:
    """A call of `weather` in the format of a family."""
    if name == "qwen-coder":
        return WRITTEN[name].format(**arguments)
    if name in ("mistral-args", "functionary"):
        return WRITTEN[name].replace("{}", json.dumps(arguments))
    key = "parameters" if name == "llama" else "arguments"
    return WRITTEN[name].replace("{}", json.dumps({"name": "weather", key: arguments}))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tools")


@contextlib.contextmanager
def client_of(engine: Engine) -> Iterator[openai.OpenAI]:
    with (
        serving(engine) as running,
        openai.OpenAI(base_url=f"{running.url}/v1", api_key="none", max_retries=0, timeout=60) as client,
    ):
        yield client


@contextlib.contextmanager
def saying(model: Model, *answers: str) -> Iterator[tuple[openai.OpenAI, Scripted]]:
    """A client of a server whose model gives these answers."""
    engine, script = scripted(model, *answers)
    with client_of(engine) as client:
        yield client, script


@pytest.fixture(scope="module", params=TEMPLATES)
def family(request: pytest.FixtureRequest, folder: Path) -> Iterator[tuple[str, Model]]:
    name: str = request.param
    markers = [marker for marker in ("[TOOL_CALLS]", "[ARGS]") if marker in TEMPLATES[name]]
    values: dict[str, Any] = {"llama__context_length": 2048, "tokenizer__chat_template": template(name)}
    if markers:  # Special tokens, as in Mistral's vocabularies.
        values |= tiny.with_special_tokens(markers)
    with Model.load(tiny.write_model(folder / f"{name}.gguf", **values), threads=2) as loaded:
        yield name, loaded


def test_tool_calls_of_each_family_are_parsed_whole_and_in_streams(family: tuple[str, Model]) -> None:
    name, model = family
    answer = ("" if name == "llama" else "I look. ") + written(name)
    with saying(model, answer, answer) as (client, script):
        asked: Any = {"model": "tiny", "messages": HELLO, "tools": [WEATHER, TIME]}
        (choice,) = client.chat.completions.create(**asked).choices
        with client.chat.completions.stream(**asked) as stream:
            deltas = [event for event in stream if event.type == "tool_calls.function.arguments.delta"]
            (streamed,) = stream.get_final_completion().choices
    assert script.prompts[0] == script.prompts[1]
    assert TEMPLATES[name] in script.prompts[0]
    assert (choice.finish_reason, choice.message.content) == (
        "tool_calls",
        answer[:7].strip() if answer[0] == "I" else None,
    )
    assert (streamed.finish_reason, streamed.message.content or None) == ("tool_calls", choice.message.content)
    for message in (choice.message, streamed.message):
        (call,) = message.tool_calls or []
        assert call.type == "function"
        assert len(call.id) == 9
        assert (call.function.name, json.loads(call.function.arguments)) == ("weather", CITY)
    (call,) = choice.message.tool_calls or []
    assert call.type == "function"
    assert call.function.arguments == json.dumps(CITY, ensure_ascii=False)
    assert len(deltas) > 10, "in pieces"


def test_each_family_can_be_forced_to_call_a_tool(family: tuple[str, Model]) -> None:
    _, model = family
    choices: list[tuple[Any, list[Any], set[str]]] = [
        ("required", [TALL], {"is_tall"}),
        ("required", [TALL, WEATHER], {"is_tall", "weather"}),
        ({"type": "function", "function": {"name": "is_tall"}}, [TALL, WEATHER], {"is_tall"}),
    ]
    # A model with random weights would not end its strings.
    bias = {
        str(token): -100 for token in range(256) if chr(token) not in ' \n"[]{}()<>/=,:_-abcdefghilmnoprstuwy0123456789'
    }
    bias |= {str(ord(char)): 20 for char in '</"'}
    with Engine(model, max_batch=4) as engine, client_of(engine) as client:
        seen = set()
        for choice, functions, names in choices:
            for seed in range(2):
                asked: Any = {"model": "tiny", "messages": HELLO, "tools": functions, "tool_choice": choice}
                asked |= {"seed": seed, "max_tokens": 400, "logit_bias": bias}
                (done,) = client.chat.completions.create(**asked).choices
                if done.finish_reason == "length":
                    continue  # The client raises if a stream that was cut off is collected.
                with client.chat.completions.stream(**asked) as stream:
                    for _ in stream:
                        pass
                    (streamed,) = stream.get_final_completion().choices
                assert done.finish_reason == streamed.finish_reason == "tool_calls"
                for message in (done.message, streamed.message):
                    (call,) = message.tool_calls or []
                    assert call.type == "function"
                    assert call.function.name in names
                    seen.add(call.function.name)
                    arguments = json.loads(call.function.arguments)
                    if call.function.name == "is_tall":
                        assert arguments["tall"] in (True, False)
                        assert arguments["how"] in ("a bit", 'a "lot"')
                        assert set(arguments) <= {"tall", "how", "tags"}
                    else:
                        assert isinstance(arguments["city"], str)
        assert "is_tall" in seen
        for form in ({"regex": "a"}, {"grammar": 'start: "a"'}):
            with pytest.raises(openai.BadRequestError, match="cannot be combined with a required tool call"):
                client.chat.completions.create(**{**asked, "extra_body": form})


def test_tool_results_go_back_through_the_chat_template(tool_model: Model) -> None:
    answer = 'I look.\n<tool_call>\n{"name": "weather", "arguments": {"city": "Köln"}}\n</tool_call>'
    engine, script = scripted(tool_model, answer, "It rains.")
    with serving(engine) as running, openai.OpenAI(base_url=f"{running.url}/v1", api_key="none") as client:
        first = client.chat.completions.create(model="tiny", messages=HELLO, tools=[WEATHER, TIME])
        (choice,) = first.choices
        assert (choice.finish_reason, choice.message.content) == ("tool_calls", "I look.")
        assert choice.message.tool_calls is not None
        (call,) = choice.message.tool_calls
        assert call.type == "function"
        assert (call.function.name, json.loads(call.function.arguments)) == ("weather", {"city": "Köln"})
        conversation: Any = [*HELLO, choice.message, {"role": "tool", "tool_call_id": call.id, "content": "rain"}]
        second = client.chat.completions.create(model="tiny", messages=conversation, tools=[WEATHER])
    assert (second.choices[0].finish_reason, second.choices[0].message.content) == ("stop", "It rains.")
    assert json.dumps(WEATHER) in script.prompts[0]
    assert '<tool_call>{"name": "weather", "arguments": {"city": "Köln"}}</tool_call>' in script.prompts[1]
    assert "<|im_start|>tool\nrain<|im_end|>" in script.prompts[1]


@pytest.mark.parametrize("kind", [3, 4])
def test_markers_are_found_as_special_and_as_normal_tokens(folder: Path, kind: int) -> None:
    known = tiny.metadata()
    marker = tiny.VOCABULARY
    values: dict[str, Any] = {
        "llama__context_length": 2048,
        "llama__vocab_size": marker + 1,
        "tokenizer__ggml__tokens": [*known["tokenizer.ggml.tokens"], "<tool_call>"],
        "tokenizer__ggml__token_type": [*known["tokenizer.ggml.token_type"], kind],
        "tokenizer__chat_template": TOOL_TEMPLATE,
    }
    call = json.dumps({"name": "time", "arguments": {}})
    asked: Any = {
        "model": "tiny",
        "messages": HELLO,
        "tools": [TIME],
        "logprobs": True,
        "logit_bias": {str(marker): 100},
    }
    begin = f"<[{marker}]>" if kind == 3 else '"<tool_call>"'
    asked["extra_body"] = {"grammar": f"start: {begin} {json.dumps(call)}"}
    with (
        Model.load(tiny.write_model(folder / f"marker{kind}.gguf", **values)) as model,
        Engine(model) as engine,
        client_of(engine) as client,
    ):
        (choice,) = client.chat.completions.create(**asked).choices
        with client.chat.completions.stream(**asked) as stream:
            (streamed,) = stream.get_final_completion().choices
    assert choice.logprobs is not None
    assert len(choice.logprobs.content or []) == 1 + len(call), "the marker was one token"
    for found in (choice, streamed):
        (made,) = found.message.tool_calls or []
        assert made.type == "function"
        assert (made.function.name, made.function.arguments) == ("time", "{}")
        assert not found.message.content


def test_a_stream_starts_a_call_before_its_arguments(tool_model: Model) -> None:
    calls = [{"name": "time", "arguments": {}}, {"name": "weather", "arguments": {"city": "Rome"}}]
    answer = "Well:\n" + "".join(f"<tool_call>\n{json.dumps(call)}\n</tool_call>\n" for call in calls)
    at_once = f"<tool_call>{json.dumps(calls)}</tool_call>"
    asked: Any = {"model": "tiny", "messages": HELLO, "tools": [WEATHER, TIME], "stream": True}
    with saying(tool_model, answer, answer, at_once) as (client, _):
        chunks = [chunk.choices[0] for chunk in client.chat.completions.create(**asked)]
        only_first = [c.choices[0] for c in client.chat.completions.create(**asked, parallel_tool_calls=False)]
        listed = [c.choices[0] for c in client.chat.completions.create(**asked)]
    for found in (chunks, listed):
        deltas = [call for chunk in found for call in chunk.delta.tool_calls or []]
        begins = [call for call in deltas if call.id is not None]
        assert [(call.index, call.type, call.function and call.function.name) for call in begins] == [
            (0, "function", "time"),
            (1, "function", "weather"),
        ]
        assert len({call.id for call in begins}) == 2
        arguments = ["", ""]
        for call in deltas:
            assert call.function is not None
            assert (call.id is None) == (call.function.name is None) == (call.type is None)
            arguments[call.index] += call.function.arguments or ""
        assert arguments == ["{}", '{"city": "Rome"}']
        assert len(deltas) > 10
        assert found[-1].finish_reason == "tool_calls"
    assert "".join(chunk.delta.content or "" for chunk in chunks) == "Well:"
    (first, *rest) = [call for chunk in only_first for call in chunk.delta.tool_calls or []]
    assert (first.function and first.function.name, {call.index for call in rest}) == ("time", {0})
    assert only_first[-1].finish_reason == "tool_calls"


def test_a_stream_cut_off_in_a_call_finishes_with_length(tool_model: Model) -> None:
    with Engine(tool_model) as engine, client_of(engine) as client:
        asked: Any = {
            "model": "tiny",
            "messages": HELLO,
            "tools": [WEATHER],
            "tool_choice": "required",
            "max_tokens": 50,
        }
        chunks = [c.choices[0] for c in client.chat.completions.create(**asked, seed=1, stream=True)]
        (whole,) = client.chat.completions.create(**asked, seed=1).choices
    deltas = [call.function for chunk in chunks for call in chunk.delta.tool_calls or [] if call.function]
    assert [delta.name for delta in deltas if delta.name] == ["weather"]
    arguments = "".join(delta.arguments or "" for delta in deltas)
    assert arguments.startswith('{"city": "')
    assert chunks[-1].finish_reason == whole.finish_reason == "length"
    assert (whole.message.content or "").endswith(arguments)


def test_without_tools_nothing_is_parsed_as_a_call(tool_model: Model) -> None:
    answer = '<tool_call>{"name": "time"}</tool_call>'
    engine, script = scripted(tool_model, answer, answer)
    with serving(engine) as running, openai.OpenAI(base_url=f"{running.url}/v1", api_key="none") as client:
        plain = client.chat.completions.create(model="tiny", messages=HELLO)
        none = client.chat.completions.create(model="tiny", messages=HELLO, tools=[TIME], tool_choice="none")
    assert plain.choices[0].message.content == none.choices[0].message.content == answer
    assert script.prompts[0] == script.prompts[1]


def test_a_template_in_an_unknown_format_does_not_refuse_tools(folder: Path) -> None:
    template = "{{ tools }} <arg_key>" + TOOL_TEMPLATE.replace("<tool_call>", "<call>")
    file = tiny.write_model(folder / "unknown.gguf", tokenizer__chat_template=template, llama__context_length=2048)
    call = json.dumps({"name": "time", "arguments": {}})
    with Model.load(file, threads=1) as loaded:
        engine, script = scripted(loaded, f"<tool_call>\n{call}\n</tool_call>")
        with client_of(engine) as client:
            (choice,) = client.chat.completions.create(model="tiny", messages=HELLO, tools=[TIME]).choices
    (made,) = choice.message.tool_calls or []
    assert made.type == "function"
    assert (made.function.name, made.function.arguments) == ("time", "{}")
    assert f"<tools>\n{json.dumps(TIME)}\n</tools>" in script.prompts[0]


def test_the_server_describes_tools_if_the_template_does_not(folder: Path) -> None:
    file = tiny.write_model(folder / "without.gguf", llama__context_length=2048)
    with Model.load(file, threads=1) as loaded:
        call = json.dumps({"name": "weather", "arguments": {"city": "Rome"}})
        engine, script = scripted(loaded, f"<tool_call>\n{call}\n</tool_call>", call, "Sunny.")
        with client_of(engine) as client:
            asked: Any = {"model": "tiny", "tools": [WEATHER]}
            for _ in range(2):
                (choice,) = client.chat.completions.create(messages=HELLO, **asked).choices
                (made,) = choice.message.tool_calls or []
                assert made.type == "function"
                assert json.loads(made.function.arguments) == {"city": "Rome"}
            turns: Any = [{"role": "system", "content": "Be brief."}, *HELLO, choice.message]
            turns.append({"role": "tool", "tool_call_id": made.id, "content": "sun"})
            assert client.chat.completions.create(messages=turns, **asked).choices[0].message.content == "Sunny."
    assert f"<tools>\n{json.dumps(WEATHER)}\n</tools>" in script.prompts[0]
    assert "<|im_start|>system\nBe brief.\n\n# Tools" in script.prompts[2]
    assert f"<|im_start|>assistant\n<tool_call>\n{call}\n</tool_call><|im_end|>" in script.prompts[2]
    assert "<|im_start|>user\n<tool_response>\nsun\n</tool_response><|im_end|>" in script.prompts[2]
