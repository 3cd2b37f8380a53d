"""The server as OpenAI's client sees it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pydantic
import pytest
import tiny
from serving import Running, served, serving

from nybble import Model
from nybble.engine import Engine

DEEP = {"type": "json_schema", "json_schema": {"name": "x", "schema": json.loads('{"not":' * 900 + "{}" + "}" * 900)}}
WRITE_X = {str(ord("x")): 100}
FORBID_END = {str(tiny.IM_END): -100, str(tiny.END_OF_TEXT): -100}
HELLO: Any = [{"role": "user", "content": "Hello"}]
TIME: Any = {"type": "function", "function": {"name": "time"}}


@pytest.fixture(scope="module")
def server(tool_model: Model) -> Iterator[Running]:
    with served(tool_model, max_batch=4) as running:
        yield running


@pytest.fixture(scope="module")
def client(server: Running) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=60) as made:
        yield made


def test_a_chat_answer_equals_that_of_model_chat(client: openai.OpenAI, tool_model: Model) -> None:
    done = client.chat.completions.create(
        model="tiny", messages=HELLO, max_completion_tokens=8, temperature=0, logit_bias=FORBID_END
    )
    bias = {int(token): value for token, value in FORBID_END.items()}
    alone = tool_model.chat(HELLO, max_tokens=8, temperature=0, logit_bias=bias)
    assert done.object == "chat.completion"
    assert done.choices[0].message.content == alone.text
    assert (done.choices[0].message.role, done.choices[0].finish_reason) == ("assistant", "length")
    assert done.usage is not None
    assert (done.usage.prompt_tokens, done.usage.completion_tokens) == (alone.usage.prompt_tokens, 8)
    assert done.usage.prompt_tokens_details is not None


def test_a_stream_gives_the_same_answer_and_usage_on_request(client: openai.OpenAI) -> None:
    asked: Any = {"model": "tiny", "messages": HELLO, "max_tokens": 20, "seed": 5, "logit_bias": FORBID_END}
    done = client.chat.completions.create(**asked)
    chunks = list(client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1])
    assert text == done.choices[0].message.content
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-2].choices[0].finish_reason == "length"
    assert (chunks[-1].choices, chunks[-1].usage) == ([], done.usage)
    without = list(client.chat.completions.create(**asked, stream=True))
    assert all(chunk.usage is None for chunk in without)


def test_a_seed_repeats_answers_and_several_answers_differ(client: openai.OpenAI) -> None:
    def answers(**more: Any) -> list[str | None]:
        done = client.chat.completions.create(
            model="tiny", messages=HELLO, max_tokens=12, temperature=1.5, logit_bias=FORBID_END, **more
        )
        return [choice.message.content for choice in done.choices]

    three = answers(n=3, seed=1)
    assert len(set(three)) == 3
    assert answers(n=3, seed=1) == three
    # The first answer does not depend on their number, and neighboring seeds share none.
    assert answers(seed=1) == three[:1]
    assert not set(answers(n=3, seed=2)) & set(three)
    asked: Any = {"model": "tiny", "messages": HELLO, "max_tokens": 12, "temperature": 1.5, "logit_bias": FORBID_END}
    streamed = ["", "", ""]
    for chunk in client.chat.completions.create(**asked, n=3, seed=1, stream=True):
        streamed[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    assert streamed == three


def test_usage_reports_tokens_from_the_prefix_cache(client: openai.OpenAI) -> None:
    def cached(words: str) -> int:
        messages: Any = [{"role": "system", "content": "Be brief. " * 20}, {"role": "user", "content": words}]
        done = client.chat.completions.create(model="tiny", messages=messages, max_tokens=1)
        assert done.usage is not None
        assert done.usage.prompt_tokens_details is not None
        return done.usage.prompt_tokens_details.cached_tokens or 0

    assert cached("one") == 0
    assert cached("two") >= 128


def test_stop_strings_and_logit_biases_apply(client: openai.OpenAI) -> None:
    asked: Any = {"model": "tiny", "messages": HELLO, "logit_bias": WRITE_X, "max_tokens": 9}
    assert client.chat.completions.create(**asked).choices[0].message.content == "x" * 9
    stopped = client.chat.completions.create(**asked, stop=["y", "xxx"]).choices[0]
    assert (stopped.message.content, stopped.finish_reason) == ("", "stop")


def test_chat_logprobs_have_the_format_of_openai(client: openai.OpenAI) -> None:
    asked: Any = {"model": "tiny", "messages": HELLO, "logit_bias": WRITE_X, "max_tokens": 3}
    (choice,) = client.chat.completions.create(**asked, logprobs=True, top_logprobs=2).choices
    assert choice.logprobs is not None
    content = choice.logprobs.content
    assert content is not None
    assert [(found.token, found.bytes) for found in content] == [("x", [120])] * 3
    assert all(len(found.top_logprobs) == 2 and found.logprob <= 0 for found in content)
    streamed = [
        found
        for chunk in client.chat.completions.create(**asked, logprobs=True, top_logprobs=2, stream=True)
        for found in (chunk.choices[0].logprobs and chunk.choices[0].logprobs.content) or []
    ]
    assert [found.model_dump() for found in streamed] == [found.model_dump() for found in content]
    assert client.chat.completions.create(**asked).choices[0].logprobs is None


def test_completions_take_one_or_several_strings_or_token_lists(client: openai.OpenAI) -> None:
    asked: Any = {"model": "tiny", "max_tokens": 4, "temperature": 0, "logit_bias": FORBID_END}
    one = client.completions.create(prompt="abc", **asked)
    assert one.choices[0].finish_reason == "length"
    assert client.completions.create(prompt=[97, 98, 99], **asked).choices == one.choices
    two = client.completions.create(prompt=["abc", "de"], n=2, **asked)
    assert [choice.index for choice in two.choices] == [0, 1, 2, 3]
    assert two.choices[1].text == one.choices[0].text
    assert two.usage is not None
    assert (two.usage.prompt_tokens, two.usage.completion_tokens) == (5, 16)
    streamed = client.completions.create(prompt=[[97, 98, 99]], stream=True, **asked)
    assert "".join(chunk.choices[0].text for chunk in streamed) == one.choices[0].text
    assert client.completions.create(model="tiny", prompt="a", logit_bias=WRITE_X).choices[0].text == "x" * 16


def test_completion_logprobs_have_the_format_of_openai(client: openai.OpenAI) -> None:
    asked: Any = {"model": "tiny", "prompt": "abc", "max_tokens": 3, "logit_bias": WRITE_X, "logprobs": 2}
    found = client.completions.create(**asked).choices[0].logprobs
    assert found is not None
    assert (found.tokens, found.text_offset) == (["x"] * 3, [0, 1, 2])
    assert found.top_logprobs is not None
    assert all(len(top) <= 2 for top in found.top_logprobs)
    chunks = [chunk.choices[0].logprobs for chunk in client.completions.create(**asked, stream=True)]
    assert [offset for chunk in chunks if chunk for offset in chunk.text_offset or []] == [0, 1, 2]


def test_models_lists_the_served_model(client: openai.OpenAI) -> None:
    assert [card.id for card in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").owned_by == "nybble"
    with pytest.raises(openai.NotFoundError, match="'gpt-9' does not exist"):
        client.models.retrieve("gpt-9")


# --- Constrained answers

PERSON: Any = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "tags": {"type": "array", "items": {"enum": ["a", "b"]}, "maxItems": 3},
        "tall": {"type": "boolean"},
    },
    "required": ["name", "age", "tags", "tall"],
    "additionalProperties": False,
}


def test_every_answer_follows_its_schema(client: openai.OpenAI) -> None:
    response_format: Any = {"type": "json_schema", "json_schema": {"name": "person", "schema": PERSON, "strict": True}}
    for index in range(50):
        done = client.chat.completions.create(
            model="tiny",
            messages=[{"role": "user", "content": f"Person {index}"}],
            response_format=response_format,
            temperature=1.5,
            seed=index,
            n=4,
        )
        for choice in done.choices:
            person = json.loads(choice.message.content or "")
            assert list(person) == ["name", "age", "tags", "tall"]
            assert 0 <= person["age"] <= 120
            assert choice.finish_reason == "stop"


def test_a_pydantic_class_is_a_schema(client: openai.OpenAI) -> None:
    class Flag(pydantic.BaseModel):
        up: bool

    done = client.chat.completions.parse(model="tiny", messages=HELLO, response_format=Flag)
    assert done.choices[0].message.parsed in (Flag(up=True), Flag(up=False))


def test_json_objects_regexes_and_grammars_constrain_answers(client: openai.OpenAI) -> None:
    asked: Any = {"model": "tiny", "messages": HELLO, "seed": 1}
    object_only = client.chat.completions.create(**asked, response_format={"type": "json_object"}, max_tokens=2)
    assert (object_only.choices[0].message.content or "").startswith("{")
    text = client.chat.completions.create(**asked, response_format={"type": "text"}, max_tokens=2)
    assert text.choices[0].message.content != object_only.choices[0].message.content
    digits = client.chat.completions.create(**asked, extra_body={"regex": "[0-9]{3}"})
    assert (digits.choices[0].message.content or "").isdecimal()
    word = client.completions.create(model="tiny", prompt="x", extra_body={"grammar": 'start: "yes" | "no"'})
    assert word.choices[0].text in ("yes", "no")


@pytest.mark.parametrize(
    ("constraint", "param"),
    [
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "wombat"}}}},
            "response_format",
        ),
        ({"regex": "("}, "regex"),
        ({"grammar": "start: nothing"}, "grammar"),
        ({"regex": "a", "grammar": 'start: "a"'}, None),
    ],
)
def test_invalid_constraints_are_refused(client: openai.OpenAI, constraint: dict[str, Any], param: str | None) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        client.chat.completions.create(model="tiny", messages=HELLO, extra_body=constraint)
    assert param is None or refused.value.param == param


# --- Embeddings


def test_embeddings_equal_those_of_model_embed(client: openai.OpenAI, tool_model: Model) -> None:
    done = client.embeddings.create(model="tiny", input=["one", "another"])
    rows = np.array([found.embedding for found in done.data])
    assert np.array_equal(rows.astype(np.float32), tool_model.embed(["one", "another"]))
    assert (done.usage.prompt_tokens, [found.index for found in done.data]) == (10, [0, 1])
    as_numbers = client.embeddings.create(model="tiny", input="one", encoding_format="float")
    assert np.allclose(as_numbers.data[0].embedding, rows[0])
    wrong: Any
    for wrong in ("", [], [1, 2], "x" * 3000):
        with pytest.raises(openai.BadRequestError) as refused:
            client.embeddings.create(model="tiny", input=wrong)
        assert refused.value.param in ("input", "input.0")


# --- Errors


@pytest.mark.parametrize(
    ("asked", "param", "message"),
    [
        ({"messages": []}, "messages", "at least 1"),
        ({"temperature": "hot"}, "temperature", "valid number"),
        ({"temperature": 3}, "temperature", "less than or equal to 2"),
        ({"n": 99}, "n", "less than or equal"),
        ({"stop": [""]}, "stop.0", "at least 1"),
        ({"frobnicate": 1}, "frobnicate", "unsupported parameter: frobnicate"),
        ({"audio": {"voice": "x"}}, "audio", "unsupported parameter: audio"),
        ({"top_logprobs": 2}, None, "top_logprobs requires logprobs=true"),
        ({"stream_options": {"include_usage": True}}, None, "stream_options requires stream=true"),
        ({"messages": [{"role": "wizard", "content": "x"}]}, "messages.0.role", "'user'"),
        ({"messages": [{"role": "user"}]}, "messages.0", "content is missing"),
        ({"messages": [{"role": "user", "content": "x" * 3000}]}, "messages", "the prompt has 3"),
        ({"logit_bias": {"x": 1}}, "logit_bias", "logit_bias: found 'x'"),
        ({"logit_bias": {"99999": 1}}, "logit_bias", "99999"),
        (
            {"tools": [TIME], "tool_choice": {"type": "function", "function": {"name": "no"}}},
            None,
            "not among the tools",
        ),
        ({"response_format": {"type": "json_schema"}}, "response_format", "type json_schema requires json_schema"),
        ({"chat_template_kwargs": {"messages": []}}, None, "must not contain"),
        ({"chat_template_kwargs": {"self": 1, "template": {}}}, None, "must not contain"),
        ({"chat_template_kwargs": {"continue_final_message": True}}, None, "must not contain"),
        ({"response_format": DEEP}, "response_format", "nested too deeply"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:"}}]}]},
            "messages.0.content",
            "this model reads text only, found a part of type 'image_url'",
        ),
    ],
)
def test_an_invalid_request_names_the_parameter_and_the_fault(
    client: openai.OpenAI, asked: dict[str, Any], param: str | None, message: str
) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        client.chat.completions.create(model="tiny", messages=HELLO, extra_body=asked)
    assert message in refused.value.message
    assert refused.value.param == param
    assert refused.value.type == "invalid_request_error"


def test_unknown_models_and_paths_are_not_found(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as refused:
        client.chat.completions.create(model="gpt-9", messages=HELLO)
    assert (refused.value.param, refused.value.code) == ("model", "model_not_found")
    with pytest.raises(openai.NotFoundError):
        client.images.generate(model="tiny", prompt="x")


def test_text_parts_are_joined_by_line_breaks(client: openai.OpenAI) -> None:
    def tokens(content: Any) -> int:
        done = client.chat.completions.create(
            model="tiny", messages=[{"role": "user", "content": content}], max_tokens=1
        )
        assert done.usage is not None
        return done.usage.prompt_tokens

    assert tokens([{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]) == tokens("one\ntwo")


def test_a_client_timeout_frees_the_slot(server: Running) -> None:
    impatient = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=0.001)
    with impatient as client, pytest.raises(openai.APITimeoutError):
        client.chat.completions.create(model="tiny", messages=HELLO)
    server.wait(lambda: server.service.engine.stats().running == 0)


def test_an_answer_over_the_time_limit_is_an_error_without_retry(tool_model: Model) -> None:
    asked: Any = {"model": "tiny", "messages": HELLO, "logit_bias": FORBID_END}
    with served(tool_model, request_seconds=0.0) as running:
        with openai.OpenAI(base_url=f"{running.url}/v1", api_key="none", max_retries=5) as client:
            with pytest.raises(openai.APIStatusError) as refused:
                client.chat.completions.create(**asked)
            assert (refused.value.status_code, refused.value.code) == (408, "timeout")
            with pytest.raises(openai.APIError, match="not complete after"):
                list(client.chat.completions.create(**asked, stream=True))
        running.wait(lambda: running.service.engine.stats().running == 0)


def test_the_server_continues_after_a_failing_chat_template(tmp_path: Path, tiny_model: Model) -> None:
    refusing = "{{ raise_exception('only odd turns') }}"
    file = tiny.write_model(tmp_path / "refusing.gguf", tokenizer__chat_template=refusing)
    with (
        Model.load(file) as model,
        Engine(model) as engine,
        serving(engine) as running,
        openai.OpenAI(base_url=f"{running.url}/v1", api_key="none", max_retries=0) as client,
    ):
        with pytest.raises(openai.BadRequestError, match="only odd turns"):
            client.chat.completions.create(model="tiny", messages=HELLO)
        assert client.completions.create(model="tiny", prompt="x", logit_bias=WRITE_X).choices[0].text == "x" * 16
