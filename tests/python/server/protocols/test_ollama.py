"""Ollama's API, as Ollama's own client and plain HTTP requests see it."""

from __future__ import annotations

import contextlib
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
SHORT: dict[str, Any] = {"num_predict": 5, "temperature": 0}


@pytest.fixture(scope="module")
def server(tool_model: Model) -> Iterator[Running]:
    with served(tool_model) as running:
        yield running


def post(server: Running, path: str, **body: Any) -> list[Any]:
    """The lines of an answer."""
    reply = server.request("POST", f"/api/{path}", {"model": "tiny", **body})
    assert reply.status == 200, reply.text
    if body.get("stream", True) and path in ("chat", "generate") and (body.get("messages") or body.get("prompt")):
        assert reply.headers["content-type"].startswith("application/x-ndjson")
    return [json.loads(line) for line in reply.text.splitlines()]


def test_a_chat_is_a_stream_of_lines_or_one_object(server: Running) -> None:
    (whole,) = post(server, "chat", messages=HI, options=SHORT, stream=False)
    *pieces, last = post(server, "chat", messages=HI, options=SHORT)
    openai = server.chat(HI, max_tokens=5).choice
    assert whole["message"] == {"role": "assistant", "content": openai["message"]["content"]}
    assert "".join(piece["message"]["content"] for piece in pieces) == whole["message"]["content"]
    assert not any(piece["done"] for piece in pieces)
    for end in (whole, last):
        assert (end["done"], end["done_reason"], end["eval_count"], end["model"]) == (True, "length", 5, "tiny")
        assert end["total_duration"] >= end["eval_duration"] >= 0
        assert end["prompt_eval_count"] > 0


def test_generate_uses_the_chat_template_unless_raw(server: Running) -> None:
    (chat,) = post(server, "generate", prompt="Hi", system="Be brief", options=SHORT, stream=False)
    turns = [{"role": "system", "content": "Be brief"}, *HI]
    assert chat["response"] == server.chat(turns, max_tokens=5).choice["message"]["content"]
    *pieces, _ = post(server, "generate", prompt="Hi", raw=True, options=SHORT)
    assert "".join(piece["response"] for piece in pieces) == server.complete(prompt="Hi", max_tokens=5).choice["text"]


def test_options_have_the_names_of_ollama(server: Running) -> None:
    def said(**options: Any) -> str:
        (answer,) = post(server, "chat", messages=HI, options={"num_predict": 12, **options}, stream=False)
        return str(answer["message"]["content"])

    same: dict[str, Any] = {"seed": 7, "temperature": 1.5, "top_k": 20, "top_p": 0.9}
    assert said(**same) == server.chat(max_tokens=12, **same).choice["message"]["content"]
    repeated = said(temperature=0, repeat_penalty=1.8, repeat_last_n=-1)
    assert repeated == server.chat(max_tokens=12, repetition_penalty=1.8, penalty_window=0).choice["message"]["content"]
    assert said(temperature=0, repeat_penalty=1.8, repeat_last_n=0) == said(temperature=0)
    assert said(temperature=0, num_ctx=4096, num_gpu=1, low_vram=True) == said(temperature=0)


@pytest.mark.parametrize("stream", [False, True])
def test_a_format_is_followed(stream: bool, server: Running) -> None:
    schema = {"type": "object", "properties": {"a": {"enum": [1, 2]}}, "required": ["a"]}
    for path, given in (("chat", {"messages": HI}), ("generate", {"prompt": "Hi"})):
        lines = post(server, path, **given, format=schema, stream=stream)
        text = "".join(line["message"]["content"] if path == "chat" else line["response"] for line in lines)
        assert json.loads(text)["a"] in (1, 2)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    "text",
    [
        'Look: <tool_call>{"name": "weather", "arguments": {"city": "Rome"}}</tool_call>',
        '{"name": "weather", "arguments": {"city": "Rome"}}',
    ],
)
def test_tool_calls_have_arguments_as_objects(text: str, stream: bool, tool_model: Model) -> None:
    engine, script = scripted(tool_model, text, "Sunny.")
    with serving(engine) as running:
        lines = post(running, "chat", messages=HI, tools=[WEATHER], stream=stream)
        (call,) = [call for line in lines for call in line["message"].get("tool_calls", [])]
        assert call["function"] == {"name": "weather", "arguments": {"city": "Rome"}}
        assert lines[-1]["done_reason"] == "stop"
        answer = {"role": "assistant", "content": "", "tool_calls": [call]}
        result = {"role": "tool", "content": "sun", "tool_name": "weather"}
        post(running, "chat", messages=[*HI, answer, result], tools=[WEATHER], stream=stream)
    assert '"city": "Rome"' in script.prompts[1]
    assert "<|im_start|>tool\nsun" in script.prompts[1]


def test_log_probabilities_come_with_the_text(server: Running) -> None:
    (whole,) = post(server, "chat", messages=HI, options=SHORT, stream=False, logprobs=True, top_logprobs=2)
    assert [len(token["top_logprobs"]) for token in whole["logprobs"]] == [2] * 5
    lines = post(server, "chat", messages=HI, options=SHORT, logprobs=True)
    assert sum(len(line.get("logprobs", [])) for line in lines) == 5


def test_inputs_become_vectors(server: Running, tool_model: Model) -> None:
    (found,) = post(server, "embed", input=["a", "b" * 5000])
    assert len(found["embeddings"]) == 2
    assert found["embeddings"][0] == pytest.approx(tool_model.embed("a")[0].tolist())
    assert found["prompt_eval_count"] == 2049, "too long an input is cut"
    (old,) = post(server, "embeddings", prompt="a")
    assert old["embedding"] == pytest.approx(found["embeddings"][0])
    reply = server.request("POST", "/api/embed", {"input": "b" * 5000, "truncate": False})
    assert "the context holds 2048" in reply.json["error"]


def test_the_model_is_listed_and_described(server: Running, tool_model: Model) -> None:
    for path in ("tags", "ps"):
        (card,) = server.request("GET", f"/api/{path}").json["models"]
        assert (card["name"], card["model"], card["details"]["family"]) == ("tiny", "tiny", "llama")
    shown = server.request("POST", "/api/show", {"model": "tiny"}).json
    assert shown["model_info"]["llama.context_length"] == tool_model.info.context
    assert "tools" in shown["capabilities"]
    assert server.request("GET", "/api/version").json["version"]
    assert server.request("HEAD", "/").status == 200


def test_unknown_parameters_are_ignored_as_in_ollama(server: Running) -> None:
    plain = post(server, "chat", messages=HI, options=SHORT, stream=False)[0]["message"]
    assert post(server, "chat", messages=HI, options=SHORT, stream=False, unknown=1)[0]["message"] == plain


def test_unknown_fields_of_messages_are_ignored_as_in_ollama(server: Running) -> None:
    plain = post(server, "chat", messages=HI, options=SHORT, stream=False)[0]["message"]
    turns = [{**turn, "name": "x", "unknown": 1, "images": []} for turn in HI]
    assert post(server, "chat", messages=turns, options=SHORT, stream=False)[0]["message"] == plain
    options = {"num_predict": 5, "temperature": -1, "top_k": -5}
    assert post(server, "chat", messages=HI, options=options, stream=False)[0]["message"] == plain


def test_an_empty_prompt_loads_the_model(server: Running) -> None:
    for path, body in (("chat", {"messages": []}), ("generate", {"prompt": ""}), ("generate", {})):
        (line,) = post(server, path, **body)
        assert (line["done"], line["done_reason"]) == (True, "load")
    (line,) = post(server, "generate", keep_alive=0)
    assert line["done_reason"] == "unload"


@pytest.mark.parametrize(
    ("path", "body", "status", "message"),
    [
        ("chat", {"model": "other", "messages": HI}, 404, "the model 'other' does not exist"),
        ("show", {"model": "other"}, 404, "the model 'other' does not exist"),
        ("pull", {"model": "x"}, 501, "nybble serve MODEL"),
        ("push", {"model": "x"}, 501, "nybble serve MODEL"),
        ("create", {"model": "x"}, 501, "nybble serve MODEL"),
        ("copy", {"source": "x"}, 501, "nybble serve MODEL"),
        ("chat", {"messages": [{"role": "user", "content": "x", "images": ["AA"]}]}, 400, "found images"),
        ("chat", {"messages": HI, "options": {"temperature": "x"}}, 400, "options.temperature"),
        ("chat", {"messages": HI, "options": {"mirostat": 1}}, 400, "options.mirostat"),
        ("chat", {"messages": HI, "format": {"type": "wombat"}}, 400, "format: type: found 'wombat'"),
        ("generate", {"prompt": "x", "suffix": "y"}, 400, "suffix"),
    ],
    ids=str,
)
def test_errors_have_the_format_of_ollama(
    path: str, body: dict[str, Any], status: int, message: str, server: Running
) -> None:
    reply = server.request("POST", f"/api/{path}", body)
    assert reply.status == status
    assert message in reply.json["error"]


def test_deleting_says_what_to_do_instead(server: Running) -> None:
    assert "nybble serve MODEL" in server.request("DELETE", "/api/delete", {"model": "tiny"}).json["error"]


def test_the_routes_need_the_key(tool_model: Model) -> None:
    engine, _ = scripted(tool_model)
    with serving(engine, api_key="key") as running:
        reply = running.request("GET", "/api/tags")
        assert (reply.status, reply.json["error"]) == (401, "the API key is missing: send Authorization: Bearer KEY")
        assert running.request("GET", "/api/tags", headers={"Authorization": "Bearer key"}).status == 200


# Python may find here what the clients of earlier tests have left open.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_the_client_of_ollama_works(server: Running, tool_model: Model) -> None:
    ollama = pytest.importorskip("ollama", reason="install the dependency group test-clients")
    with contextlib.ExitStack() as stack:

        def client_of(running: Running) -> Any:
            client = ollama.Client(host=running.url)
            stack.callback(client._client.close)
            return client

        client = client_of(server)
        (card,) = client.list().models
        assert card.model == "tiny"
        assert client.show("tiny").capabilities
        said = client.chat("tiny", messages=HI, options=SHORT).message.content
        pieces = client.chat("tiny", messages=HI, options=SHORT, stream=True)
        assert "".join(piece.message.content or "" for piece in pieces) == said
        assert client.generate("tiny", "Hi", options=SHORT).response == said
        assert len(client.embed("tiny", ["a", "b"]).embeddings) == 2
        with pytest.raises(ollama.ResponseError, match="nybble serve MODEL"):
            client.pull("other")
        engine, _ = scripted(tool_model, '{"name": "weather", "arguments": {"city": "Rome"}}')
        with serving(engine) as running:
            (call,) = client_of(running).chat("tiny", messages=HI, tools=[WEATHER]).message.tool_calls
        assert (call.function.name, call.function.arguments) == ("weather", {"city": "Rome"})
