"""Schemas of tools: references, no parameters, values of tagged calls, and tools together with a form."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any, Literal

import jsonschema_rs
import openai
import pytest
import tiny
from drawing import DIGIT, END_STRINGS, EVERY_TOKEN, Json, closed
from pydantic import BaseModel, Field
from serving import Reply, Running, scripted, serving

from nybble import Model
from nybble.chat.tools import formats
from nybble.engine import Engine

HI: Any = [{"role": "user", "content": "Hi"}]
TURNS = (
    "{% for t in tools or [] %}{{ t.function.name }} {% endfor %}{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{{ m.content or '' }}<|im_end|>\n{% endfor %}{# FORMAT #}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
FORMATS = {known.name: " ".join(known.needles) for known in formats.FORMATS}
"""What chat templates of each format contain."""
MARKERS = {known.name: known.markers for known in formats.FORMATS}
OF_EACH_KIND = (
    "hermes",
    "qwen3-coder",
    "mistral",
    "mistral-args",
    "granite",
    "llama",
    "functionary",
    "gemma4",
    "lfm2",
    "glm",
)
"""A format of each kind. Some tests try only these."""


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], Running]]:
    """Serves the uniform model with a tool-call format."""
    running: dict[tuple[str, bool], Running] = {}
    with ExitStack() as stack:

        def start(name: str, special_markers: bool = False) -> Running:
            key = name, special_markers
            if key not in running:
                file = tmp_path_factory.mktemp("tools") / "tiny.gguf"
                template = TURNS.replace("FORMAT", FORMATS[name])
                changes: Json = {"llama__context_length": 4096, "tokenizer__chat_template": template}
                if special_markers:
                    changes |= tiny.with_special_tokens(MARKERS[name])
                tiny.write_model(file, layers=1, uniform=True, **changes)
                model = stack.enter_context(Model.load(file, threads=1))
                running[key] = stack.enter_context(serving(stack.enter_context(Engine(model))))
            return running[key]

        yield start


@pytest.fixture(scope="module")
def hermes(served: Callable[[str], Running]) -> Running:
    return served("hermes")


def tool(parameters: Json | None, name: str = "f") -> Json:
    function = {"name": name} if parameters is None else {"name": name, "parameters": parameters}
    return {"type": "function", "function": function}


def ask(server: Running, *tools: Json, choice: Any = "required", **parameters: Any) -> Reply:
    """Draws one of all calls that the schemas allow."""
    bias = {str(token): value for token, value in END_STRINGS.items()}
    drawn: Json = {"seed": 1, "max_tokens": 800, "logit_bias": bias, **EVERY_TOKEN}
    return server.chat(HI, tools=list(tools), tool_choice=choice, **{**drawn, **parameters})


class City(BaseModel):
    name: str = Field(max_length=3)


class Trip(BaseModel):
    city: City
    mode: Literal["train", "bus"]
    via: list[City] = Field(max_length=1)


TREE = closed({"label": DIGIT, "children": {"type": "array", "items": {"$ref": "#"}, "maxItems": 1}})
PARAMETERS: dict[str, Json] = {
    "$defs": closed({"a": {"$ref": "#/$defs/A"}}, **{"$defs": {"A": closed({"x": DIGIT})}}),
    "definitions": closed({"a": {"$ref": "#/definitions/A"}}, definitions={"A": {"enum": ["x", "y"]}}),
    "array of references": closed(
        {"a": {"type": "array", "items": {"$ref": "#/$defs/A"}, "minItems": 1, "maxItems": 2}},
        **{"$defs": {"A": DIGIT}},
    ),
    "pydantic": Trip.model_json_schema(),
    "root reference": TREE,
    "reference at the root": {"$ref": "#/$defs/A", "$defs": {"A": closed({"x": DIGIT})}},
    "composition": {"type": "object", "properties": {"k": DIGIT}, "required": ["k"], "anyOf": [closed({"k": DIGIT})]},
    "strings": closed(
        {
            "a": {"type": "string", "maxLength": 3},
            "b": {"enum": ["x", "y"]},
            "c": {"const": "1"},
            "d": {"type": "string", "pattern": "^[A-C]{2}/x$"},
            "e": {"type": "string", "pattern": "[0-9]", "minLength": 2, "maxLength": 3},
        }
    ),
}


@pytest.mark.parametrize(
    ("template", "name"),
    [
        (each, name)
        for each in FORMATS
        for name in PARAMETERS
        if each in OF_EACH_KIND or name in ("strings", "pydantic")
    ],
)
def test_required_calls_follow_their_schema(name: str, template: str, served: Callable[[str], Running]) -> None:
    named = {"type": "function", "function": {"name": "f"}}
    for choice, seed in (("required", 1), (named, 2)):
        reply = ask(served(template), tool(PARAMETERS[name]), tool(None, "g"), choice=choice, seed=seed)
        assert reply.choice["finish_reason"] == "tool_calls", reply.text
        for called, arguments in reply.calls:
            assert called == "f" or (choice == "required" and called == "g")
            jsonschema_rs.validate(PARAMETERS[name] if called == "f" else closed({}), arguments)


@pytest.mark.parametrize("template", FORMATS)
def test_required_calls_follow_their_schema_if_markers_are_special_tokens(
    template: str, served: Callable[..., Running]
) -> None:
    reply = ask(served(template, special_markers=True), tool(PARAMETERS["strings"]))
    assert reply.choice["finish_reason"] == "tool_calls", reply.text
    ((name, arguments),) = reply.calls
    assert name == "f"
    jsonschema_rs.validate(PARAMETERS["strings"], arguments)


@pytest.mark.parametrize("template", OF_EACH_KIND)
@pytest.mark.parametrize("parameters", [None, {}, {"type": "object", "properties": {}}], ids=str)
def test_functions_without_parameters_get_no_arguments(
    parameters: Json | None, template: str, served: Callable[[str], Running]
) -> None:
    for seed in range(2):
        assert ask(served(template), tool(parameters, "now"), seed=seed).calls == [("now", {})]


def test_every_function_is_reachable(hermes: Running) -> None:
    tools = [tool(closed({"x": DIGIT}), name) for name in ("f", "g")]
    assert {ask(hermes, *tools, seed=seed).calls[0][0] for seed in range(16)} == {"f", "g"}


@pytest.mark.parametrize("template", OF_EACH_KIND)
def test_streams_give_the_same_call_as_responses(template: str, served: Callable[[str], Running]) -> None:
    asked: Json = {"temperature": 0, "max_tokens": 400}
    tools = tool(closed({"x": DIGIT, "y": {"type": "boolean"}}))
    expected = ask(served(template), tools, **asked).calls
    deltas = [
        call["function"]
        for event in ask(served(template), tools, stream=True, **asked).events
        for call in event["choices"][0]["delta"].get("tool_calls", [])
    ]
    name = "".join(delta.get("name", "") for delta in deltas)
    assert [(name, json.loads("".join(delta["arguments"] for delta in deltas)))] == expected


# --- Tools together with a form

FORM = closed({"done": {"type": "boolean"}})
FORMS: list[Json] = [
    {"response_format": {"type": "json_schema", "json_schema": {"name": "result", "schema": FORM}}},
    {"structured_outputs": {"json": FORM}},
]


@pytest.mark.parametrize("template", FORMATS)
@pytest.mark.parametrize("stream", [False, True])
def test_answers_with_tools_are_calls_or_have_the_form(
    template: str, stream: bool, served: Callable[[str], Running]
) -> None:
    parameters, kinds = closed({"x": DIGIT}), set()
    for seed in range(8):
        asked: Json = {**FORMS[seed % 2], "seed": seed, "parallel_tool_calls": False, "stream": stream}
        reply = ask(served(template), tool(parameters), choice="auto", **asked)
        choices = [event["choices"][0] for event in reply.events] if stream else [reply.choice]
        messages = [choice["delta" if stream else "message"] for choice in choices]
        content = "".join(message.get("content") or "" for message in messages)
        calls = [call["function"] for message in messages for call in message.get("tool_calls", [])]
        arguments = "".join(call["arguments"] for call in calls)
        reason = choices[-1]["finish_reason"]
        kinds.add(reason)
        assert (reason == "tool_calls") == bool(arguments)
        if arguments:
            assert content == ""
            jsonschema_rs.validate(parameters, json.loads(arguments))
        else:
            jsonschema_rs.validate(FORM, json.loads(content))
    assert kinds == {"tool_calls", "stop"}


def test_a_required_call_comes_before_the_form(hermes: Running) -> None:
    for seed in range(3):
        assert ask(hermes, tool(closed({"x": DIGIT})), seed=seed, **FORMS[0]).calls


def test_without_a_choice_of_tools_the_form_is_followed(hermes: Running) -> None:
    reply = ask(hermes, tool(closed({"x": DIGIT})), choice="none", **FORMS[0])
    jsonschema_rs.validate(FORM, json.loads(reply.choice["message"]["content"]))


# --- Errors


@pytest.mark.parametrize("template", OF_EACH_KIND)
def test_errors_name_the_tool_and_the_place(template: str, served: Callable[[str], Running]) -> None:
    bad = closed({"a": {"type": "array", "uniqueItems": True}})
    reply = ask(served(template), tool(closed({}), "g"), tool(bad))
    assert (reply.status, reply.json["error"]["param"]) == (400, "tools")
    assert reply.error.startswith("tools.1.function.parameters: #/properties/a: uniqueItems: the grammar can enforce")
    reply = ask(served(template), tool(closed({"x": {"$ref": "#/nowhere"}})))
    assert reply.error.startswith("tools.0.function.parameters: #/properties/x: $ref: '#/nowhere' does not exist")


# --- Values of tagged calls

DEFINITIONS: Json = {"Code": {"type": "string"}, "Point": {"type": "object", "properties": {"x": {"type": "integer"}}}}
OPTIONAL: Json = {"anyOf": [{"type": "string"}, {"type": "null"}]}


@pytest.mark.parametrize(
    ("schema", "text", "value"),
    [
        *(({"type": "string"}, text, text) for text in ("1.10", "true", "two\nlines", "")),
        *((OPTIONAL, text, text) for text in ("1.10", "true", '"quoted"', "[1]")),
        (OPTIONAL, "null", None),
        ({"type": ["string", "null"]}, "1.10", "1.10"),
        ({"type": ["string", "integer"]}, "5", "5"),
        ({"$ref": "#/$defs/Code"}, "true", "true"),
        ({"allOf": [{"$ref": "#/$defs/Code"}]}, "1", "1"),
        ({"enum": ["1", "2"]}, "1", "1"),
        ({"const": "1"}, "1", "1"),
        ({"enum": ["a", 1, None]}, "1", 1),
        ({"enum": ["a", 1, None]}, "a", "a"),
        ({"type": "integer"}, "5", 5),
        ({"type": ["integer", "null"]}, "null", None),
        ({"$ref": "#/$defs/Point"}, '{"x": 1}', {"x": 1}),
        ({"anyOf": [{"type": "integer"}, {"type": "array"}]}, "[1]", [1]),
        ({"type": "integer"}, "five", "five"),
    ],
    ids=str,
)
def test_values_that_may_be_strings_keep_their_text(
    schema: Json, text: str, value: Any, served: Callable[[str], Running]
) -> None:
    written = f"<tool_call>\n<function=f>\n<parameter=p>\n{text}\n</parameter>\n</function>\n</tool_call>"
    parameters = {"type": "object", "properties": {"p": schema}, "$defs": DEFINITIONS}
    model = served("qwen3-coder").service.engine.model
    engine, _ = scripted(model, written, written)
    with serving(engine) as running:
        assert ask(running, tool(parameters), choice="auto").calls == [("f", {"p": value})]
        deltas = [
            call["function"].get("arguments", "")
            for event in ask(running, tool(parameters), choice="auto", stream=True).events
            for call in event["choices"][0]["delta"].get("tool_calls", [])
        ]
    assert json.loads("".join(deltas)) == {"p": value}


# --- Unmarked calls, and the predecessor of tools

BARE = '{"name": "f", "arguments": {"x": 1}}'


@pytest.mark.parametrize("template", OF_EACH_KIND)
def test_calls_without_markers_are_calls_unless_turned_off(template: str, served: Callable[[str], Running]) -> None:
    model = served(template).service.engine.model
    for text in (f"[{BARE}]", f"```json\n{BARE}\n```"):
        engine, _ = scripted(model, *[text] * 3)
        with serving(engine) as running:
            assert ask(running, tool(None), choice="auto").calls == [("f", {"x": 1})]
            chunks = [event["choices"][0] for event in ask(running, tool(None), choice="auto", stream=True).events]
            assert chunks[-1]["finish_reason"] == "tool_calls"
            assert not any(chunk["delta"].get("content") for chunk in chunks)
        with serving(engine, bare_calls=False) as running:
            assert ask(running, tool(None), choice="auto").choice["message"]["content"] == text


def test_functions_are_called_as_before_tools(served: Callable[[str], Running]) -> None:
    model = served("hermes").service.engine.model
    engine, script = scripted(model, *[f"<tool_call>{BARE}</tool_call>"] * 2)
    asked: Any = {"model": "tiny", "messages": HI, "functions": [{"name": "f"}, {"name": "g"}]}
    with serving(engine) as running, openai.OpenAI(base_url=f"{running.url}/v1", api_key="none") as client:
        (choice,) = client.chat.completions.create(**asked).choices
        chunks = [chunk.choices[0] for chunk in client.chat.completions.create(**asked, stream=True)]
    assert (choice.finish_reason, chunks[-1].finish_reason) == ("function_call", "function_call")
    assert choice.message.function_call is not None
    assert (choice.message.function_call.name, json.loads(choice.message.function_call.arguments)) == ("f", {"x": 1})
    deltas = [chunk.delta.function_call for chunk in chunks if chunk.delta.function_call]
    assert deltas[0].name == "f"
    assert json.loads("".join(delta.arguments or "" for delta in deltas)) == {"x": 1}
    assert "f g " in script.prompts[0]


@pytest.mark.parametrize("mode", ["auto", "required"])
def test_a_chat_may_allow_some_of_its_functions(mode: str, hermes: Running) -> None:
    tools = [{"type": "function", "function": {"name": name}} for name in ("f", "g", "h")]
    allowed = {"mode": mode, "tools": [tools[1]]}
    body: Json = {"tools": tools, "tool_choice": {"type": "allowed_tools", "allowed_tools": allowed}, "max_tokens": 100}
    message = hermes.chat(HI, **body).choice["message"]
    if mode == "required":
        assert [call["function"]["name"] for call in message["tool_calls"]] == ["g"]
    allowed["tools"] = [{"type": "function", "function": {"name": "other"}}]
    assert "names a function that is not among the tools" in hermes.chat(HI, **body).error


def test_a_named_function_must_be_called(hermes: Running) -> None:
    body: Json = {"functions": [{"name": "f"}, {"name": "g"}], "function_call": {"name": "g"}, "max_tokens": 100}
    assert hermes.chat(HI, **body).choice["message"]["function_call"] == {"name": "g", "arguments": "{}"}
