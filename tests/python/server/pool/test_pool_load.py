"""Many clients of three models. Two of them fit into memory together."""

from __future__ import annotations

import random
import socket
import struct
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import tiny
from serving import RunningPool, serving_several, spec, wait

from nybble import Model, SamplingOptions
from nybble.server.pool.entry import Entry
from nybble.server.pool.needs import Limits, read_needs
from nybble.server.pool.pool import Pool

NAMES = ("one", "two", "three")
REQUESTS = 200
CLIENTS = 12
GREEDY = SamplingOptions(max_tokens=4, temperature=0)
HELLO: Any = [{"role": "user", "content": "Hello"}]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Models with different answers: each has a layer more than the one before."""
    folder = tmp_path_factory.mktemp("several")
    return {name: tiny.write_model(folder / f"{name}.gguf", layers=count) for count, name in enumerate(NAMES, 1)}


@pytest.fixture(scope="module")
def answers(files: dict[str, Path]) -> dict[str, tuple[str, str, list[float]]]:
    """The chat answer, the completion and the embedding of each model."""
    found = {}
    for name, file in files.items():
        with Model.load(file, threads=1) as model:
            chat = model.chat(HELLO, GREEDY).text
            found[name] = chat, model.generate("he", GREEDY).text, model.embed("text")[0].tolist()
    assert len({chat for chat, _, _ in found.values()}) == len(NAMES)
    return found


@pytest.fixture(params=["memory", "count"])
def several(
    files: dict[str, Path], request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> Iterator[RunningPool]:
    """A server with memory for two of the models, which checks its bound whenever it takes memory."""
    specs = [spec(name, file, cache_gb=0.001) for name, file in files.items()]
    sizes = sorted(read_needs(each, Limits()).total_bytes for each in specs)
    limits: dict[str, dict[str, Any]] = {
        "memory": {"max_memory": f"{sizes[1] + sizes[2]}B"},
        "count": {"max_loaded": 2},
    }
    load = Pool._load
    counts = []

    def checked(pool: Pool, entry: Entry) -> None:
        load(pool, entry)
        counts.append(sum(each.is_in_memory for each in pool.entries))
        assert counts[-1] <= 2
        assert pool.limits.max_bytes is None or pool.used_bytes <= pool.limits.max_bytes

    monkeypatch.setattr(Pool, "_load", checked)
    with serving_several(specs, **limits[request.param]) as running:
        yield running
        assert not running.pool.waiting
        wait(lambda: not any(entry.users for entry in running.pool.entries))
    assert max(counts) == 2


def ask(server: RunningPool, path: str, body: dict[str, Any]) -> Any:
    """The answer to a request, which must succeed: JSON, or the lines of a stream."""
    reply = server.request("POST", path, body)
    assert reply.status == 200, f"{path}: {reply.status}: {reply.text}"
    return reply if body.get("stream") else reply.json


def chat(server: RunningPool, model: str) -> str:
    body = {"model": model, "messages": HELLO, "max_tokens": 4, "temperature": 0}
    answer = ask(server, "/v1/chat/completions", body)
    assert answer["model"] == model
    return str(answer["choices"][0]["message"]["content"])


def streamed_chat(server: RunningPool, model: str) -> str:
    body = {"model": model, "messages": HELLO, "max_tokens": 4, "temperature": 0, "stream": True}
    events = ask(server, "/v1/chat/completions", body).events
    return "".join(event["choices"][0]["delta"].get("content") or "" for event in events)


def message(server: RunningPool, model: str) -> str:
    body = {"model": model, "messages": HELLO, "max_tokens": 4, "temperature": 0}
    return "".join(block["text"] for block in ask(server, "/v1/messages", body)["content"])


def response(server: RunningPool, model: str) -> str:
    body = {"model": model, "input": "Hello", "max_output_tokens": 4, "temperature": 0}
    items = ask(server, "/v1/responses", body)["output"]
    return "".join(part["text"] for item in items for part in item["content"])


def ollama_chat(server: RunningPool, model: str) -> str:
    body = {
        "model": model,
        "messages": HELLO,
        "options": {"num_predict": 4, "temperature": 0},
        "stream": False,
        "keep_alive": -1,
    }
    return str(ask(server, "/api/chat", body)["message"]["content"])


def completion(server: RunningPool, model: str) -> str:
    body = {"model": model, "prompt": "he", "max_tokens": 4, "temperature": 0}
    return str(ask(server, "/v1/completions", body)["choices"][0]["text"])


def embedding(server: RunningPool, model: str) -> list[float]:
    found = ask(server, "/v1/embeddings", {"model": model, "input": "text"})["data"][0]["embedding"]
    return [float(value) for value in found]


def left(server: RunningPool, model: str) -> None:
    """A client that leaves, sometimes before its model is loaded."""
    body = {"model": model, "messages": HELLO, "max_tokens": 100, "stream": True}
    with server.connection() as connection:
        # The end of the connection is a reset, which the server learns of at once.
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        connection.sendall(server.post("/v1/chat/completions", body))
        if len(model) == 3:  # The others leave at once.
            connection.recv(1)


KINDS: list[Callable[[RunningPool, str], Any]] = [
    chat, streamed_chat, message, response, ollama_chat, completion, embedding, left,
]  # fmt: skip


def test_200_mixed_requests_are_answered_with_memory_for_two_of_three_models(
    several: RunningPool, answers: dict[str, tuple[str, str, list[float]]]
) -> None:
    dice = random.Random(5)
    asked = [(dice.choice(KINDS), dice.choice(NAMES)) for _ in range(REQUESTS)]

    def run(kind: Callable[[RunningPool, str], Any], model: str) -> Any:
        return kind(several, model)

    with ThreadPoolExecutor(CLIENTS) as threads:
        found = list(threads.map(run, *zip(*asked, strict=True)))
    for (kind, model), answer in zip(asked, found, strict=True):
        text, completed, vector = answers[model]
        if kind is embedding:
            assert answer == pytest.approx(vector, abs=1e-6)
        elif kind is not left:
            assert answer == (completed if kind is completion else text), kind
    loads = {entry.name: entry.loads for entry in several.pool.entries}
    assert all(loads.values())
    assert sum(loads.values()) > len(NAMES)
    text = several.request("GET", "/metrics").text
    assert f'nybble_model_loads_total{{model="one"}} {float(loads["one"])}' in text
