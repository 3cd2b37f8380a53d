"""A request that goes wrong never changes the answer of another one."""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
import math
import socket
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import tiny
from serving import TOOL_TEMPLATE, Running, serving

from nybble import Model
from nybble.engine import Engine
from nybble.errors import ModelError
from nybble.generation.driver import Driver
from nybble.tokenizer.tokenizer import Tokenizer

Json = dict[str, Any]
CHAT = "/v1/chat/completions"
HI = [{"role": "user", "content": "Hi"}]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Model]:
    file = tmp_path_factory.mktemp("isolation") / "tiny.gguf"
    tiny.write_model(file, llama__context_length=1024, tokenizer__chat_template=TOOL_TEMPLATE)
    with Model.load(file, threads=2) as loaded:
        yield loaded


def good(number: int) -> Json:
    """One of the requests whose answers must not change."""
    body: Json = {"messages": [{"role": "user", "content": f"Count to {number}"}], "max_tokens": 40, "seed": number}
    match number % 4:
        case 1:
            body["temperature"] = 0
        case 2:
            body["response_format"] = {"type": "json_schema", "json_schema": {"schema": {"enum": [number, "x", None]}}}
        case 3:
            body["stream"] = True
    return body


def invalid(number: int) -> Json:
    """One of the requests that the server refuses, at once or in the middle of the answer."""
    choices: list[Json] = [
        {"regex": "(?=a)b"},
        {"regex": "("},
        {"regex": "((a|b|ab|ba){1,100}){1,100}c", "temperature": 1, "top_k": 0, "top_p": 1.0, "min_p": 0.0},
        {"grammar": "start: /((a|b|ab|ba){1,100}){1,100}c/", "temperature": 1, "top_k": 0, "top_p": 1.0, "min_p": 0.0,
         "logit_bias": {str(ord("c")): -100}, "max_tokens": 200},
        {"grammar": "start: nowhere"},
        {"json_schema": {"$ref": "#/nowhere"}},
        {"json_schema": {"type": "array", "uniqueItems": True}},
        {"logit_bias": {"9999": 1}},
        {"stop": 5},
        {"messages": [{"role": "user", "content": "x" * 3000}]},
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
        {"tools": [{"type": "function", "function": {"name": "f", "parameters": {"$ref": "#/no"}}}],
         "tool_choice": "required"},
        {"chat_template_kwargs": {"messages": []}},
        {"model": "another"},
        {"nonsense": 1},
        {"min_tokens": 100},
        {"stop": ["e", "t", "a", " "], "stop_token_ids": [*range(97, 110)], "max_tokens": 500},
        {"messages": [{"role": "user", "content": "x" * 1000}], "max_tokens": 900},
    ]  # fmt: skip
    return {"messages": HI, "max_tokens": 60, **choices[number % len(choices)]}


def too_late(running: Running, number: int) -> int:
    """Sends a request to a server whose time for answers has passed."""
    body = {"messages": HI, "max_tokens": 900, "seed": number, "min_tokens": 800}
    return running.request("POST", CHAT, body).status


def cancelled(engine: Engine, number: int) -> str:
    """Submits a request, and cancels it after its first text."""
    request = engine.submit("x", max_tokens=900, min_tokens=800, seed=number)
    next(iter(request))
    request.cancel()
    return request.result().finish_reason


def without_choice(engine: Engine) -> str:
    """Submits a request for which no token can be sampled."""
    with pytest.raises(ModelError) as caught:
        engine.submit("x", logit_bias=dict.fromkeys(range(tiny.VOCABULARY), -math.inf)).result()
    return str(caught.value)


def leave(running: Running, number: int) -> None:
    """Sends a request and closes the connection in the middle of the answer."""
    with socket.create_connection(running.address, timeout=60) as connection:
        body = {"messages": HI, "max_tokens": 900, "seed": number, "stream": True, "n": 2}
        connection.sendall(running.post(CHAT, body))
        connection.recv(100)


def text_of(running: Running, body: Json) -> str:
    reply = running.request("POST", CHAT, body)
    if not body.get("stream"):
        return str(reply.choice["message"]["content"])
    return "".join(event["choices"][0]["delta"].get("content", "") for event in reply.events)


def together(works: list[Callable[[], Any]]) -> list[Any]:
    """Runs all works at the same time."""
    barrier = threading.Barrier(len(works))

    def run(work: Callable[[], Any]) -> Any:
        barrier.wait()
        return work()

    with ThreadPoolExecutor(len(works)) as pool:
        return list(pool.map(run, works))


def test_32_running_requests_do_not_notice_failures_among_them(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    with contextlib.ExitStack() as stack:
        engine = stack.enter_context(Engine(model, max_batch=32, max_queue=200))
        running = stack.enter_context(serving(engine, max_answers=232))
        hasty = stack.enter_context(serving(engine, max_answers=232, request_seconds=0.0))
        expected = [text_of(running, good(number)) for number in range(32)]
        poison = model.tokenizer.encode("\x07")[0]
        found = Tokenizer.token_bytes

        def fails(self: Tokenizer, token: int) -> bytes:
            if token == poison and threading.current_thread() is not threading.main_thread():
                raise RuntimeError("an error in the text of one request")
            return found(self, token)

        def broken() -> int:
            body = {"prompt": "x", "logit_bias": {str(poison): 100}, "max_tokens": 20, "temperature": 0}
            return running.request("POST", "/v1/completions", body).status

        works: list[Callable[[], Any]] = [functools.partial(text_of, running, good(number)) for number in range(32)]
        works += [functools.partial(running.request, "POST", CHAT, invalid(number)) for number in range(36)]
        works += [functools.partial(leave, running, number) for number in range(8)]
        late = len(works)
        works += [functools.partial(too_late, hasty, number) for number in range(4)]
        works += [functools.partial(cancelled, engine, number) for number in range(4)]
        works += [functools.partial(without_choice, engine)] * 4
        works += [lambda: running.request("POST", CHAT, b'{"messages":', {"Content-Type": "application/json"})] * 2
        works += [lambda: running.request("POST", "/v1/embeddings", {"input": "x" * 2000})] * 2
        if not any("\x07" in text for text in expected):
            monkeypatch.setattr(Tokenizer, "token_bytes", fails)
            works += [broken] * 2
        done = together(works)
        assert done[:32] == expected
        for number, reply in enumerate(done[32:68]):
            assert reply.status in (200, 400, 404), reply.text
            if reply.status != 200:
                assert json.loads(reply.text)["error"]["type"] == "invalid_request_error", (number, reply.text)
        assert done[late : late + 8] == [408] * 4 + ["cancelled"] * 4
        assert all("logits" in message for message in done[late + 8 : late + 12])
        monkeypatch.undo()
        assert running.request("GET", "/health").json == {"status": "ok"}
        assert [text_of(running, good(number)) for number in range(4)] == expected[:4]


def test_a_failed_step_loses_answers_and_changes_none(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    step, steps = Driver.step, itertools.count()
    fails_at = 25
    with Engine(model, max_batch=8, max_queue=200) as engine, serving(engine, max_answers=208) as running:
        expected = [text_of(running, good(number)) for number in range(32)]
        monkeypatch.setattr(
            Driver, "step", lambda self, **how: 1 // 0 if next(steps) == fails_at else step(self, **how)
        )
        lost = 0
        for reply, text in zip(
            together([functools.partial(running.request, "POST", CHAT, good(number)) for number in range(32)]),
            expected,
            strict=True,
        ):
            if reply.status == 503:
                lost += 1
                assert reply.json["error"]["code"] == "engine_failed"
            elif "chat.completion.chunk" not in reply.text:
                assert reply.choice["message"]["content"] == text
            else:
                events = reply.events
                deltas = [event["choices"][0]["delta"] for event in events if "choices" in event]
                pieces = [delta.get("content", "") for delta in deltas]
                errors = [event["error"]["code"] for event in events if "error" in event]
                lost += len(errors)
                assert errors in ([], ["engine_failed"])
                assert text.startswith("".join(pieces))
                assert errors or "".join(pieces) == text
        assert lost > 0
        assert [text_of(running, good(number)) for number in range(32)] == expected
