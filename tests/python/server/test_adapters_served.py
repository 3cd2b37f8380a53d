"""LoRA adapters over HTTP: as models of their own, loaded while the server runs."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import adapters
import pytest
import tiny
from serving import Running, served

from nybble import Model, SamplingOptions
from nybble.server.options import ServeOptions

OPTIONS = SamplingOptions(max_tokens=8, temperature=0)
HELLO: Any = [{"role": "user", "content": "Hello"}]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with adapters that clients may load, and one that is not in it."""
    folder = tmp_path_factory.mktemp("served") / "adapters"
    adapters.write_peft(folder / "one", 1)
    adapters.write_gguf(folder / "two.gguf", 2)
    (folder / "broken").mkdir()
    (folder / "broken" / "adapter_config.json").write_text("{", encoding="utf-8")
    adapters.write_peft(folder.parent / "outside", 3)
    (folder / "link").symlink_to(folder.parent / "outside")
    return folder


@pytest.fixture(scope="module")
def model(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Model]:
    file = tiny.write_model(tmp_path_factory.mktemp("model") / "tiny.gguf", llama__context_length=512)
    with Model.load(file, threads=2, adapters={"one": folder / "one", "two": folder / "two.gguf"}) as model:
        yield model


@pytest.fixture
def loading(folder: Path, tmp_path: Path) -> Iterator[Running]:
    """A server that loads adapters from the folder."""
    with (
        Model.load(tiny.write_model(tmp_path / "tiny.gguf"), threads=1) as model,
        served(model, adapter_folder=folder) as running,
    ):
        yield running


def test_each_adapter_is_a_model(server: Running) -> None:
    listed = server.request("GET", "/v1/models").json["data"]
    assert [(each["id"], each["parent"]) for each in listed] == [
        ("tiny", None),
        ("tiny:one", "tiny"),
        ("tiny:two", "tiny"),
    ]
    assert server.request("GET", "/v1/models/tiny:two").json["id"] == "tiny:two"
    assert server.request("GET", "/v1/models/tiny:three").status == 404


def test_requests_for_different_models_are_answered_together(server: Running, model: Model) -> None:
    names = {"tiny": None, "tiny:latest": None, "tiny:one": "one", "tiny:two": "two"}
    texts = {name: model.chat(HELLO, OPTIONS, adapter=adapter).text for name, adapter in names.items()}
    assert len(set(texts.values())) == 3

    def ask(name: str) -> tuple[str, str]:
        body = server.chat(HELLO, model=name, max_tokens=8).json
        return body["model"], body["choices"][0]["message"]["content"]

    asked = [*names] * 4
    with ThreadPoolExecutor(8) as threads:
        answers = list(threads.map(ask, asked))
    assert answers == [(name.removesuffix(":latest"), texts[name]) for name in asked]


def test_every_route_computes_with_the_adapter_of_its_model(server: Running, model: Model) -> None:
    text = model.generate("he", OPTIONS, adapter="one", max_tokens=3).text
    assert server.complete(model="tiny:one").choice["text"] == text
    events = server.complete(model="tiny:one", stream=True).events
    assert "".join(event["choices"][0]["text"] for event in events) == text
    assert {event["model"] for event in events} == {"tiny:one"}
    scored = [
        server.complete(model=name, prompt="hello", echo=True, logprobs=0, max_tokens=1).choice["logprobs"]
        for name in ("tiny", "tiny:one")
    ]
    assert scored[0]["token_logprobs"][1:5] != scored[1]["token_logprobs"][1:5]
    embedded = server.request("POST", "/v1/embeddings", {"model": "tiny:two", "input": "text"}).json
    assert embedded["model"] == "tiny:two"
    assert embedded["data"][0]["embedding"] == pytest.approx(model.embed("text", adapter="two")[0].tolist(), abs=1e-6)
    body = {"model": "tiny:one", "messages": HELLO, "stream": False, "options": {"temperature": 0, "num_predict": 8}}
    answer = server.request("POST", "/api/chat", body).json
    assert (answer["model"], answer["message"]["content"]) == (
        "tiny:one",
        model.chat(HELLO, OPTIONS, adapter="one").text,
    )
    body = {"model": "tiny:one", "input": HELLO, "temperature": 0, "max_output_tokens": 8}
    response = server.request("POST", "/v1/responses", body).json
    assert (response["model"], response["output"][0]["content"][0]["text"]) == (
        "tiny:one",
        answer["message"]["content"],
    )
    body = {"model": "tiny:one", "messages": HELLO, "temperature": 0, "max_tokens": 8}
    said = server.request("POST", "/v1/messages", body).json
    assert (said["model"], said["content"][0]["text"]) == ("tiny:one", answer["message"]["content"])
    found = server.request("POST", "/api/embed", {"model": "tiny:two", "input": "text"}).json
    assert found["embeddings"][0] == pytest.approx(embedded["data"][0]["embedding"], abs=1e-6)


def test_an_unknown_adapter_is_refused_with_the_known_models(server: Running) -> None:
    for name in ("tiny:three", "tiny:one:latest", "one", "other:one", ":one", "tiny:"):
        reply = server.chat(HELLO, model=name)
        assert (reply.status, reply.json["error"]["code"]) == (404, "model_not_found")
        assert "serves 'tiny' and 'tiny:one' and 'tiny:two'" in reply.error


def test_adapters_are_loaded_and_unloaded_over_http(loading: Running, folder: Path) -> None:
    def load(name: str, path: str) -> Any:
        return loading.request("POST", "/v1/load_lora_adapter", {"lora_name": name, "lora_path": path})

    assert load("a", "one").json["id"] == "tiny:a"
    before = loading.chat(HELLO, model="tiny:a").choice
    assert load("b", "two.gguf").status == 200
    assert load("a", "two.gguf").status == 200
    names = [each["id"] for each in loading.request("GET", "/v1/models").json["data"]]
    assert names == ["tiny", "tiny:a", "tiny:b"]
    assert loading.chat(HELLO, model="tiny:a").choice == loading.chat(HELLO, model="tiny:b").choice != before
    reply = loading.request("POST", "/v1/unload_lora_adapter", {"lora_name": "a"})
    assert (reply.status, reply.json) == (200, {"id": "tiny:a", "object": "model", "deleted": True})
    assert loading.request("POST", "/v1/unload_lora_adapter", {"lora_name": "a"}).status == 404
    assert loading.chat(HELLO, model="tiny:a").status == 404


@pytest.mark.parametrize(
    "path", ["../outside", "link", "/etc", "", ".", "..", "a\0b", "x" * 5000, "one/../../outside", "missing"]
)
def test_a_path_outside_the_folder_is_refused(loading: Running, path: str) -> None:
    reply = loading.request("POST", "/v1/load_lora_adapter", {"lora_name": "a", "lora_path": path})
    assert reply.status == (404 if path == "missing" else 400)
    assert reply.json["error"]["param"] == "lora_path"
    assert loading.service.engine.model.adapters == ()


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"lora_name": "latest", "lora_path": "one"}, "latest"),
        ({"lora_name": "a:b", "lora_path": "one"}, "expected 1 to 128 characters"),
        ({"lora_name": "", "lora_path": "one"}, "expected 1 to 128 characters"),
        ({"lora_name": "a", "lora_path": "broken"}, "adapter_config.json"),
        ({"lora_name": "a"}, "lora_path"),
        ({"lora_name": "a", "lora_path": "one", "load_inplace": True}, "load_inplace"),
    ],
)
def test_a_wrong_request_to_load_an_adapter_is_refused(loading: Running, body: Any, message: str) -> None:
    reply = loading.request("POST", "/v1/load_lora_adapter", body)
    assert reply.status == 400
    assert message in reply.error


def test_clients_load_nothing_unless_the_server_allows_it(server: Running, folder: Path) -> None:
    for route, body in (
        ("load", {"lora_name": "a", "lora_path": "one"}),
        ("unload", {"lora_name": "one"}),
    ):
        assert server.request("POST", f"/v1/{route}_lora_adapter", body).status == 404
    assert server.service.engine.model.adapters == ("one", "two")


def test_loading_needs_the_key(tiny_model: Model, folder: Path) -> None:
    with served(tiny_model, adapter_folder=folder, api_key="secret") as running:
        body = {"lora_name": "a", "lora_path": "one"}
        assert running.request("POST", "/v1/load_lora_adapter", body).status == 401
    assert tiny_model.adapters == ()


def test_the_command_takes_adapters_by_name(folder: Path, tmp_path: Path) -> None:
    options = ServeOptions(adapter=[f"one={folder / 'one'}", "x.y=a=b"], adapter_folder=str(folder))
    assert options.adapters() == {"one": folder / "one", "x.y": Path("a=b")}
    assert options.settings(context=1, allowed_hosts=None).adapter_folder == folder
    for adapter in (["one"], ["one="], ["=path"], ["a b=path"], ["latest=path"], ["a=x", "a=y"]):
        with pytest.raises(ValueError, match="adapter: found"):
            ServeOptions(adapter=adapter)
    with pytest.raises(ValueError, match="adapter_folder: found"):
        ServeOptions(adapter_folder=str(tmp_path / "none"))
