"""Several models over HTTP: names, lists, errors, adapters, metrics and the end of the server."""

from __future__ import annotations

import json
import re
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import adapters
import pytest
import tiny
from fake_hub import FakeHub
from goldens import GOLDENS
from serving import Client, Reply, RunningPool, serving_several, spec, wait

from nybble import LoadOptions, Model, SamplingOptions
from nybble.server import ServeOptions, http_server
from nybble.server.errors import ApiError
from nybble.server.pool import pool as pool_module
from nybble.server.pool.entry import Loaded
from nybble.server.pool.job import Job
from nybble.server.pool.pool import Pool
from nybble.server.pool.sources import models_in
from nybble.server.protocols.ollama.schema import keep_alive_seconds

HELLO: Any = [{"role": "user", "content": "Hello"}]
GREEDY = SamplingOptions(max_tokens=4, temperature=0)
SMALL = {"max_tokens": 4, "temperature": 0}
TEMPLATE = "{% for m in messages %}[{{ m.content }}]{% endfor %}"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    for count, name in enumerate(("small", "large"), 1):
        tiny.write_model(folder / f"{name}.gguf", layers=2 * count, llama__context_length=128 * count)
    adapters.write_peft(folder / "loras" / "one", 1)
    adapters.write_gguf(folder / "loras" / "two.gguf", 2)
    return folder


@pytest.fixture
def server(folder: Path) -> Iterator[RunningPool]:
    """Two models, one at a time: the first with an adapter and an alias."""
    first = spec("small", folder / "small.gguf", aliases=("gpt-4o", "s"), adapters={"one": folder / "loras" / "one"})
    with serving_several(
        [first, spec("large", folder / "large.gguf", chat_template=TEMPLATE)],
        max_loaded=1,
        adapter_folder=str(folder / "loras"),
    ) as running:
        yield running


def test_lists_say_which_models_are_loaded(server: RunningPool) -> None:
    def listed() -> dict[str, Any]:
        return {card["id"]: card for card in server.request("GET", "/v1/models").json["data"]}

    assert {name: card["loaded"] for name, card in listed().items()} == {
        "small": False,
        "small:one": False,
        "large": False,
    }
    assert {name: card["context_length"] for name, card in listed().items()} == {
        "small": 128,
        "small:one": 128,
        "large": 256,
    }
    assert listed()["small"]["aliases"] == ["gpt-4o", "s"]
    assert listed()["small:one"]["parent"] == "small"
    tags = server.request("GET", "/api/tags").json["models"]
    assert [card["name"] for card in tags] == ["small", "large"]
    assert server.request("GET", "/api/ps").json == {"models": []}
    assert server.request("GET", "/health").json == {"status": "ok"}
    server.chat(HELLO, model="large")
    assert {name: card["loaded"] for name, card in listed().items()} == {
        "small": False,
        "small:one": False,
        "large": True,
    }
    assert server.request("GET", "/v1/models/gpt-4o").json == listed()["small"]
    assert server.request("GET", "/v1/models/other").status == 404
    (running,) = server.request("GET", "/api/ps").json["models"]
    assert (running["name"], running["context_length"]) == ("large", 256)
    assert server.request("GET", "/api/tags").json["models"] == tags  # The same digests as before.
    props = server.request("GET", "/props").json
    assert (props["model_path"], props["default_generation_settings"]["n_ctx"]) == ("small", 128)
    assert [card["id"] for card in props["models"]] == ["small", "small:one", "large"]
    assert server.request("GET", "/props?model=large").json["chat_template"] == TEMPLATE
    assert server.loaded() == ["large"]  # None of this loads a model.


def test_the_model_of_a_request_answers(server: RunningPool, folder: Path) -> None:
    with Model.load(folder / "small.gguf", threads=1, adapters={"one": folder / "loras" / "one"}) as model:
        own, changed = (model.chat(HELLO, GREEDY, adapter=adapter).text for adapter in (None, "one"))
    with Model.load(folder / "large.gguf", threads=1) as model:
        large = model.generate("[Hello]", GREEDY).text  # Its own chat template is replaced.
    expected = {
        "small": ("small", own),
        "small:latest": ("small", own),
        "gpt-4o": ("small", own),
        "small:one": ("small:one", changed),
        "s:one": ("small:one", changed),
        "large": ("large", large),
    }
    for name, answer in expected.items():
        found = server.chat(HELLO, model=name).json
        assert (found["model"], found["choices"][0]["message"]["content"]) == answer
    assert server.chat(HELLO).json["model"] == "small"  # The first one.
    assert server.request("POST", "/tokenize", {"model": "large", "prompt": "abc"}).json["max_model_len"] == 256
    assert server.loaded() == ["large"]
    assert server.request("GET", "/tokenizer_info?model=large").json["chat_template"] == TEMPLATE
    body = {"model": "large", "messages": HELLO}
    assert server.request("POST", "/v1/messages/count_tokens", body).json == {"input_tokens": 7}
    assert server.request("POST", "/api/show", {"model": "large"}).json["template"] == TEMPLATE
    assert server.loaded() == ["large"]


def test_a_response_may_continue_with_another_model(server: RunningPool) -> None:
    def respond(model: str, text: str, **more: Any) -> Any:
        body = {"model": model, "input": text, "max_output_tokens": 4, "temperature": 0, **more}
        return server.request("POST", "/v1/responses", body).json

    first = respond("small", "a")
    second = respond("large", "b", previous_response_id=first["id"])
    assert (first["model"], second["model"]) == ("small", "large")
    alone = respond("large", "b")
    assert second["usage"]["input_tokens"] > alone["usage"]["input_tokens"]
    assert server.request("GET", f"/v1/responses/{first['id']}").json["model"] == "small"


ROUTES: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {"messages": HELLO},
    "/v1/completions": {"prompt": "a"},
    "/v1/embeddings": {"input": "a"},
    "/v1/rerank": {"query": "a", "documents": ["b"]},
    "/v1/responses": {"input": "a"},
    "/v1/responses/input_tokens": {"input": "a"},
    "/v1/messages": {"messages": HELLO, "max_tokens": 1},
    "/v1/messages/count_tokens": {"messages": HELLO},
    "/tokenize": {"prompt": "a"},
    "/detokenize": {"tokens": [1]},
    "/api/chat": {"messages": HELLO},
    "/api/generate": {"prompt": "a"},
    "/api/embed": {"input": "a"},
    "/api/show": {},
}


def error_of(path: str, reply: Any) -> str:
    """The message of an error in the format of the route."""
    if path.startswith("/api/"):
        (message,) = reply.json.values()
        return str(message)
    if path.startswith("/v1/messages"):
        assert reply.json["type"] == "error"
    return str(reply.json["error"]["message"])


@pytest.mark.parametrize("path", ROUTES)
def test_an_unknown_model_is_refused_with_all_names(server: RunningPool, path: str) -> None:
    for model in ("other", "large:one", "small:two", ":one", "small:one:latest"):
        reply = server.request("POST", path, {"model": model, **ROUTES[path]})
        assert reply.status == 404
        expected = f"the model {model!r} does not exist; this server serves 'small' and 'small:one' and 'large'"
        assert error_of(path, reply) == expected
    assert server.loaded() == []


@pytest.fixture
def broken(folder: Path, tmp_path: Path) -> Iterator[tuple[RunningPool, Path]]:
    """A model, and one whose file is damaged after the server has started."""
    file = tmp_path / "broken.gguf"
    shutil.copy(folder / "small.gguf", file)
    with serving_several([spec("good", folder / "small.gguf"), spec("broken", file)]) as running:
        file.write_bytes(file.read_bytes()[:-1000])
        yield running, file


def test_a_load_error_is_an_error_in_the_format_of_each_route(broken: tuple[RunningPool, Path], folder: Path) -> None:
    server, file = broken
    loading = {path: body for path, body in ROUTES.items() if path != "/api/show"}  # Shows what a file's header says.
    for path, body in loading.items():
        reply = server.request("POST", path, {"model": "broken", **body})
        assert reply.status == 500
        message = error_of(path, reply)
        assert message.startswith("the model 'broken' could not be loaded: ")
        assert str(file) in message
        assert reply.headers["x-should-retry"] == "false"
    assert server.chat(HELLO, model="good").status == 200
    assert server.request("GET", "/health").status == 200
    text = server.request("GET", "/metrics").text
    assert f'nybble_model_load_failures_total{{model="broken"}} {float(len(loading))}' in text
    shutil.copy(folder / "small.gguf", file)
    assert server.chat(HELLO, model="broken").status == 200


def test_metrics_have_the_label_of_the_model(server: RunningPool) -> None:
    for model in ("small", "small:one", "large"):
        server.chat(HELLO, model=model)
    server.wait(lambda: not any(entry.users for entry in server.pool.entries))
    text = server.request("GET", "/metrics").text
    for line in (
        'nybble_finished_total{model="small"} 2.0',  # Those of an engine that is closed.
        'nybble_finished_total{model="large"} 1.0',
        'nybble_first_token_seconds_count{model="small"} 2.0',
        'nybble_model_loaded{model="small"} 0.0',
        'nybble_model_loaded{model="large"} 1.0',
        'nybble_model_unloads_total{model="small"} 1.0',
        'nybble_model_requests_in_progress{model="large"} 0.0',
        'nybble_model_requests_waiting{model="large"} 0.0',
        'nybble_http_requests_total{path="/v1/chat/completions",status="200"} 3.0',
    ):
        assert line in text.splitlines()
    assert 'nybble_cache_bytes{model="small"} 0.0' in text
    (taken,) = re.findall(r'nybble_model_bytes\{model="large"\} (\S+)', text)
    assert float(taken) == server.pool.used_bytes > 0


def test_adapters_are_loaded_into_the_model_that_is_named(server: RunningPool) -> None:
    def post(path: str, **body: Any) -> Any:
        return server.request("POST", f"/v1/{path}", body)

    card = post("load_lora_adapter", lora_name="new", lora_path="two.gguf", model="large").json
    assert (card["id"], card["parent"], card["loaded"]) == ("large:new", "large", True)
    answer = server.chat(HELLO, model="large:new").choice
    assert answer != server.chat(HELLO, model="large").choice
    # The model has its adapter again after it was unloaded.
    server.chat(HELLO, model="small")
    assert server.loaded() == ["small"]
    assert server.chat(HELLO, model="large:new").choice == answer
    assert post("load_lora_adapter", lora_name="new", lora_path="one").json["id"] == "small:new"
    assert post("unload_lora_adapter", lora_name="new", model="other").status == 404
    assert post("unload_lora_adapter", lora_name="new", model="large").json["id"] == "large:new"  # While unloaded.
    assert server.loaded() == ["small"]
    assert server.chat(HELLO, model="large:new").status == 404
    assert post("unload_lora_adapter", lora_name="new", model="large").status == 404
    assert server.chat(HELLO, model="gpt-4o:new").json["model"] == "small:new"
    assert server.request("GET", "/v1/models/gpt-4o:new").json["id"] == "small:new"
    assert server.request("GET", "/v1/models/s:latest").json["id"] == "small"
    assert server.request("GET", "/v1/models/s:other").status == 404


def test_an_adapter_whose_file_is_gone_does_not_keep_its_model_away(folder: Path, tmp_path: Path) -> None:
    adapters.write_gguf(tmp_path / "two.gguf", 2)
    specs = [spec(name, folder / f"{name}.gguf") for name in ("small", "large")]
    with serving_several(specs, max_loaded=1, adapter_folder=str(tmp_path)) as server:
        body = {"lora_name": "new", "lora_path": "two.gguf"}
        assert server.request("POST", "/v1/load_lora_adapter", body).status == 200
        assert server.chat(HELLO, model="large").status == 200
        (tmp_path / "two.gguf").unlink()
        assert server.chat(HELLO, model="small").status == 200
        assert server.chat(HELLO, model="small:new").status == 404


def test_a_failed_model_that_is_unloaded_meanwhile_leaves_the_server_healthy(server: RunningPool) -> None:
    server.chat(HELLO, model="small")
    entry = server.entry("small")
    service = entry.service
    assert service is not None
    service.engine._loop.failure = RuntimeError("a step has failed")
    leaves = True

    async def recovers() -> bool:
        if leaves:
            server.pool._unload(entry)
        return False

    service.recovers = recovers  # type: ignore[method-assign]
    assert server.request("GET", "/health").json == {"status": "ok"}
    wait(lambda: entry.state == "unloaded")
    server.chat(HELLO, model="small")
    leaves = False
    service = entry.service
    assert service is not None
    service.engine._loop.failure = RuntimeError("a step has failed")
    service.recovers = recovers  # type: ignore[method-assign]
    assert server.request("GET", "/health").json == {"status": "failed"}


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/completions", {"prompt": "he", "max_tokens": 100}),
        ("/v1/completions", {"prompt": "he", "max_tokens": 100, "stream": True}),
        ("/v1/embeddings", {"input": "he"}),
        ("/api/embed", {"input": "he"}),
    ],
)
def test_loading_and_answering_have_one_time_limit(
    server: RunningPool, monkeypatch: pytest.MonkeyPatch, path: str, body: dict[str, Any]
) -> None:
    lease = Pool.lease

    async def slow(pool: Pool, http: Any, model: str | None) -> Any:
        service = await lease(pool, http, model)
        http.state.deadline -= pool.settings.request_seconds  # As if loading had taken all of the time.
        return service

    monkeypatch.setattr(Pool, "lease", slow)
    reply = server.request("POST", path, {"model": "small", **body})
    assert reply.status == (200 if "stream" in body else 408)
    assert "the answer was not complete after 600 seconds" in reply.text


def test_ollama_keeps_models_and_lets_them_go(server: RunningPool) -> None:
    def post(path: str, **body: Any) -> Any:
        return server.request("POST", f"/api/{path}", body)

    assert post("generate", model="small").json["done_reason"] == "load"
    assert server.loaded() == ["small"]
    assert server.request("GET", "/api/ps").json["models"][0]["expires_at"].startswith("2318")
    post("chat", model="small", messages=HELLO, stream=False, keep_alive="1h30m", options={"num_predict": 1})
    server.wait(lambda: not server.entry("small").users)
    assert not server.request("GET", "/api/ps").json["models"][0]["expires_at"].startswith("2318")
    post("chat", model="small", messages=HELLO, stream=False, keep_alive=1e20, options={"num_predict": 1})
    assert server.request("GET", "/api/ps").json["models"][0]["expires_at"].startswith("2318")
    shown = [post("show", model=name).json["details"]["family"] for name in ("small", "large")]
    assert (shown, server.loaded()) == (["llama"] * 2, ["small"])
    assert post("generate", model="small", keep_alive=0).json["done_reason"] == "unload"
    server.wait(lambda: server.loaded() == [])
    post("embed", model="large", input="a", keep_alive="0s")
    server.wait(lambda: server.entry("large").unloads == 1)
    reply = post("chat", model="small", messages=HELLO, keep_alive="soon")
    assert (reply.status, reply.json) == (
        400,
        {"error": "keep_alive: found 'soon', expected seconds or a duration such as 5m or 1h30m"},
    )


def test_models_of_all_kinds_are_served_together(folder: Path) -> None:
    options, load = ServeOptions(), LoadOptions(threads=1)
    specs = [spec("text", folder / "small.gguf"), *models_in(GOLDENS.parent / "encoders" / "gguf", options, load)]
    with serving_several(specs, max_loaded=2) as server:
        assert len(server.pool.entries) == 10
        reply = server.chat(HELLO, model="bert")
        assert (reply.status, "generates no text" in reply.error) == (400, True)
        assert server.chat(HELLO, model="text").status == 200
        for name in ("bert", "gemma3-embedding", "text"):
            answer = server.request("POST", "/v1/embeddings", {"model": name, "input": "a"}).json
            assert (answer["model"], len(answer["data"])) == (name, 1)
        assert len(server.loaded()) == 2


@pytest.mark.parametrize("signals", [1, 2])
def test_the_server_ends_while_a_model_loads(folder: Path, monkeypatch: pytest.MonkeyPatch, signals: int) -> None:
    loads = threading.Event()

    def load(*arguments: Any) -> Loaded:
        job: Job[Loaded] = arguments[-1]
        loads.set()
        while True:
            job.report(0, 1)

    monkeypatch.setattr(pool_module, "load", load)
    servers: list[Any] = []
    make_server = http_server.make_server

    def made(*given: Any) -> Any:
        servers.append(make_server(*given))
        return servers[-1]

    monkeypatch.setattr(http_server, "make_server", made)
    with serving_several([spec("small", folder / "small.gguf"), spec("large", folder / "large.gguf")]) as server:
        replies = []
        client = threading.Thread(target=lambda: replies.append(server.chat(HELLO, model="large")))
        client.start()
        assert loads.wait(60)
        for _ in range(signals):
            servers[0].handle_exit(signal.SIGTERM, None)
        client.join()
        assert (replies[0].status, replies[0].json["error"]["code"]) == (503, "shutting_down")
        wait(lambda: servers[0].should_exit)
    assert server.entry("large").loaded is None
    assert not [thread for thread in threading.enumerate() if thread.name == "nybble-loading"]


def test_closing_a_pool_frees_its_models(folder: Path) -> None:
    with serving_several([spec("small", folder / "small.gguf"), spec("large", folder / "large.gguf")]) as server:
        server.chat(HELLO, model="small")
        engine = server.pool.services()[0].engine
        pool: Pool = server.pool
    assert pool.services() == []
    with pytest.raises(ValueError, match="closed"):
        engine.submit([1])
    assert json.dumps([entry.stats().finished for entry in pool.entries]) == "[1, 0]"


@pytest.mark.parametrize(
    ("given", "seconds"),
    [
        (None, None),
        ("", None),
        (0, 0),
        ("0s", 0),
        (5.5, 5.5),
        ("90", 90),
        ("5m", 300),
        ("1h30m", 5400),
        ("250ms", 0.25),
        ("1.5h", 5400),
        (-1, float("inf")),
        ("-5m", float("inf")),
        *((text, "error") for text in ("soon", "5 m", "m", "1d", "--5m", "nan", "1h30")),
        (float("nan"), "error"),
    ],
)
def test_keep_alive_is_a_duration(given: float | str | None, seconds: float | str | None) -> None:
    if seconds == "error":
        with pytest.raises(ApiError, match="keep_alive: found"):
            keep_alive_seconds(given)
    else:
        assert keep_alive_seconds(given) == seconds


@pytest.mark.parametrize("kind", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_command_while_a_model_is_downloaded(
    folder: Path, fake_hub: FakeHub, kind: signal.Signals
) -> None:
    repository = f"org/{kind.name}"
    data = (folder / "small.gguf").read_bytes()
    fake_hub.repositories[repository] = {"model.gguf": data}
    fake_hub.stall_after = len(data) // 2
    command = [sys.executable, "-m", "nybble", "serve", str(folder / "large.gguf"), repository, "--port", "0"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        output = ""
        while "API" not in output:
            line = process.stderr.readline()
            assert line, output
            output += line
        assert f"large\n{repository}\n" in output
        client = Client(re.findall(r"http://\S+", output)[0])
        assert client.chat(HELLO, model="large").status == 200
        replies: list[Reply] = []
        request = threading.Thread(target=lambda: replies.append(client.chat(HELLO, model=repository)))
        request.start()
        assert fake_hub.stalling.wait(60)
        assert client.chat(HELLO, model="large").status == 200  # The download does not hold it up.
        process.send_signal(kind)
        request.join()
        assert (replies[0].status, replies[0].json["error"]["code"]) == (503, "shutting_down")
        fake_hub.stalled.set()
        rest = process.stderr.read()
        assert process.wait(60) == 0, rest
        assert "Traceback" not in rest
