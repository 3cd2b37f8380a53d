"""The server among untrusted clients: keys, hosts, limits, slow clients, and a shutdown without broken answers."""

from __future__ import annotations

import contextlib
import json
import re
import signal
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny
from serving import Running, serving, wait

from nybble import Model
from nybble.cli import main
from nybble.engine import Engine
from nybble.generation.driver import Driver
from nybble.server import http_server

FORBID_END = {str(tiny.IM_END): -100.0, str(tiny.END_OF_TEXT): -100.0}
ENDLESS: dict[str, Any] = {"messages": [{"role": "user", "content": "x"}], "logit_bias": FORBID_END, "stream": True}
LONG = {**ENDLESS, "max_tokens": 4000, "logprobs": True, "top_logprobs": 20}
"""Some megabytes, more than socket buffers hold, so the server has to wait for the reader."""
SHORT = {"messages": [{"role": "user", "content": "x"}], "max_tokens": 1}


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_model(tmp_path_factory.mktemp("endless") / "tiny.gguf", llama__context_length=1_000_000)


@pytest.fixture(scope="module")
def model(file: Path) -> Iterator[Model]:
    with Model.load(file, threads=1) as loaded:
        yield loaded


@pytest.fixture(scope="module")
def engine(model: Model) -> Iterator[Engine]:
    with Engine(model, max_batch=4) as made:
        yield made


def ask(
    running: Running, path: str, body: dict[str, Any] | bytes | None = None, **headers: str
) -> tuple[int, dict[str, Any]]:
    """Sends one request. In names of headers, _ stands for -."""
    data = body if isinstance(body, bytes | None) else json.dumps(body).encode()
    request = urllib.request.Request(running.url + path, data, {"Content-Type": "application/json"})
    for name, value in headers.items():
        request.add_header(name.replace("_", "-"), value)
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status, json.loads(answer.read())
    except urllib.error.HTTPError as error:
        with error:
            return error.code, json.loads(error.read())


def code(answer: tuple[int, dict[str, Any]]) -> tuple[int, str | None]:
    return answer[0], answer[1]["error"]["code"]


# --- Access


def test_all_routes_but_health_and_the_page_need_the_key(engine: Engine) -> None:
    with serving(engine, api_key="s3cret") as running:
        paths = ["/v1/models", "/v1/models/tiny", "/metrics", "/openapi.json", "/v1/chat/completions", "/nowhere"]
        for path in paths:
            assert code(ask(running, path)) == (401, "invalid_api_key")
            assert code(ask(running, path, Authorization="Bearer wrong")) == (401, "invalid_api_key")
            assert code(ask(running, path, Authorization="Basic s3cret")) == (401, "invalid_api_key")
            assert code(ask(running, path, Authorization="Bearer s3cre\u00ff")) == (401, "invalid_api_key")
        assert ask(running, "/health") == (200, {"status": "ok"})
        assert ask(running, "/v1/models", Authorization="Bearer s3cret")[0] == 200
        assert ask(running, "/v1/chat/completions", SHORT, Authorization="bearer s3cret")[0] == 200
        with urllib.request.urlopen(running.url) as page:
            assert b"s3cret" not in page.read()


def test_foreign_host_names_are_refused_on_loopback(engine: Engine) -> None:
    with serving(engine) as running:
        port = running.address[1]
        for name in (f"localhost:{port}", f"127.0.0.1:{port}", "[::1]:80", "LOCALHOST"):
            assert ask(running, "/health", Host=name)[0] == 200
        for name in ("evil.example", "localhost.evil.example", "127.0.0.1.nip.io", "[::1", "[", ""):
            assert code(ask(running, "/health", Host=name)) == (403, "unknown_host")
    with serving(engine, allowed_hosts=None) as running:
        assert ask(running, "/health", Host="evil.example")[0] == 200


def test_allowed_hosts_depend_on_the_address() -> None:
    with http_server.bind("127.0.0.1", 0) as loopback, http_server.bind("0.0.0.0", 0) as network:
        assert http_server.allowed_hosts(loopback, []) == frozenset({"localhost", "127.0.0.1", "::1"})
        assert "me.example" in (http_server.allowed_hosts(loopback, ["Me.Example"]) or ())
        assert http_server.allowed_hosts(network, []) is None
        assert "me.example" in (http_server.allowed_hosts(network, ["me.example"]) or ())


def test_requests_from_other_origins_are_refused(engine: Engine) -> None:
    with serving(engine) as running:
        for origin in ("http://evil.example", "null", "http://127.0.0.1:1"):
            assert code(ask(running, "/v1/chat/completions", SHORT, Origin=origin)) == (403, "foreign_origin")
        assert ask(running, "/v1/chat/completions", SHORT, Origin=running.url)[0] == 200
        with urllib.request.urlopen(running.url + "/health") as answer:
            assert not [name for name in answer.headers if name.lower().startswith("access-control")]
            assert answer.headers["X-Content-Type-Options"] == "nosniff"


def test_the_page_may_run_only_its_own_scripts(engine: Engine) -> None:
    with serving(engine) as running, urllib.request.urlopen(running.url) as page:
        policy = page.headers["Content-Security-Policy"]
        text = page.read().decode()
    assert policy.startswith("default-src 'none'; script-src 'self'; style-src 'self'; ")
    assert "unsafe" not in policy
    assert not re.search(r"""<script(?![^>]*\bsrc=)|\son\w+=|(?:src|href)=["'](?:\w+:)?//""", text)


# --- Limits


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"null",
        b"[]",
        b"\xff\xfe",
        b"[" * 100_000,
        b'{"messages": ' + b"[" * 100_000,
        b'{"temperature": NaN}',
        b'{"seed": ' + b"9" * 5000 + b"}",
        b'{"\\ud800": 1}',
        b'{"messages": [{"role": "user", "content": "\\ud800"}], "max_tokens": 0}',
        b'{"prompt": "\\ud800", "\\udfff": "\\ud800"}',
    ],
)
def test_malformed_bodies_are_bad_requests(engine: Engine, body: bytes) -> None:
    with serving(engine) as running:
        for path in ("/v1/chat/completions", "/v1/completions", "/v1/embeddings"):
            status, answer = ask(running, path, body)
            assert 400 <= status < 500
            assert set(answer["error"]) == {"message", "type", "param", "code"}
            assert len(answer["error"]["message"]) < 1100


def test_a_body_without_the_content_type_of_json_is_refused(engine: Engine) -> None:
    with serving(engine) as running:
        status, answer = ask(running, "/v1/completions", {"prompt": "x"}, Content_Type="text/plain")
    assert (status, "Content-Type" in answer["error"]["message"]) == (415, True)


def test_large_bodies_are_refused_with_and_without_content_length(engine: Engine) -> None:
    with serving(engine, max_body_bytes=1000) as running:
        assert code(ask(running, "/v1/completions", {"prompt": "x" * 1000})) == (413, "body_too_large")
        with running.connection() as connection:
            head = f"POST /v1/completions HTTP/1.1\r\nHost: {running.url[7:]}\r\nTransfer-Encoding: chunked\r\n\r\n"
            connection.sendall(head.encode() + b"3e8\r\n" + b"x" * 1000 + b"\r\n" + b"1\r\nx\r\n")
            assert connection.recv(100).startswith(b"HTTP/1.1 413 ")
        assert ask(running, "/v1/completions", {"prompt": "x", "max_tokens": 1})[0] == 200


def test_requests_beyond_the_limit_of_answers_are_refused(engine: Engine) -> None:
    with serving(engine, max_answers=2) as running:
        with running.connection() as first:
            first.sendall(running.post("/v1/chat/completions", {**ENDLESS, "n": 2}))
            assert first.recv(100).startswith(b"HTTP/1.1 200 ")
            assert code(ask(running, "/v1/chat/completions", SHORT)) == (429, "queue_full")
        running.wait(lambda: ask(running, "/v1/chat/completions", SHORT)[0] == 200)
        assert code(ask(running, "/v1/chat/completions", {**SHORT, "n": 3})) == (400, "too_many_answers")


def test_a_full_engine_refuses_and_frees_its_slots(model: Model) -> None:
    with Engine(model, max_batch=1, max_queue=1) as engine, serving(engine) as running:
        with running.connection() as first:
            first.sendall(running.post("/v1/chat/completions", ENDLESS))
            assert first.recv(100).startswith(b"HTTP/1.1 200 ")
            assert code(ask(running, "/v1/chat/completions", {**SHORT, "n": 5})) == (429, "queue_full")
        running.wait(lambda: engine.stats().running == engine.stats().waiting == 0)
        assert ask(running, "/v1/chat/completions", SHORT)[0] == 200


def test_more_connections_than_allowed_are_refused_while_all_are_answered(engine: Engine) -> None:
    with serving(engine, max_connections=2) as running, contextlib.ExitStack() as stack:
        for _ in range(2):
            connection = stack.enter_context(running.connection())
            connection.sendall(running.post("/v1/chat/completions", ENDLESS))
        running.wait(lambda: engine.stats().running == 2)
        third = stack.enter_context(running.connection())
        assert third.recv(100).startswith(b"HTTP/1.1 503 ")


# --- Clients that leave, and slow clients


@pytest.mark.parametrize("stream", [True, False])
def test_a_disconnected_client_frees_its_slots(engine: Engine, stream: bool) -> None:
    with serving(engine) as running:
        before = engine.stats()
        with running.connection() as connection:
            connection.sendall(running.post("/v1/chat/completions", {**ENDLESS, "n": 3, "stream": stream}))
            running.wait(lambda: engine.stats().running == 3)
        running.wait(lambda: engine.stats().running == engine.stats().waiting == 0)
        assert engine.stats().cancelled - before.cancelled == 3
        assert running.service.working == 0


def test_a_client_that_sends_too_slowly_is_disconnected(engine: Engine) -> None:
    with serving(engine, receive_seconds=0.05) as running:
        for start in (b"", b"POST /v1/completions HT", running.post("/v1/completions", {"prompt": "x"})[:-1]):
            with running.connection() as connection:
                connection.sendall(start)
                with contextlib.suppress(ConnectionResetError):
                    assert connection.recv(100) == b""


def test_a_client_that_reads_nothing_is_disconnected_and_frees_its_slot(engine: Engine) -> None:
    with serving(engine, stall_seconds=0.05) as running, running.connection() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.sendall(running.post("/v1/chat/completions", {**ENDLESS, "logprobs": True, "top_logprobs": 20}))
        running.wait(lambda: engine.stats().running == 1)
        running.wait(lambda: engine.stats().running == 0)


def test_malformed_http_is_refused(engine: Engine) -> None:
    with serving(engine) as running:
        for garbage in (b"\x16\x03\x01\x02\x00\x01", b"GET\r\n\r\n", b"GET / HTTP/1.1\r\n" + b"a" * 100_000):
            with running.connection() as connection:
                connection.sendall(garbage)
                with contextlib.suppress(ConnectionResetError):
                    assert connection.recv(100).startswith(b"HTTP/1.1 400 ")
        assert ask(running, "/health")[0] == 200


# --- Metrics


def test_metrics_count_requests_and_hold_no_prompts(engine: Engine) -> None:
    with serving(engine) as running:
        ask(running, "/v1/completions", {"prompt": "my secret prompt", "max_tokens": 3, "logit_bias": FORBID_END})
        ask(running, "/v1/completions", {"prompt": 7})
        ask(running, "/my/secret/path")
        with running.connection() as connection:
            connection.sendall(running.post("/v1/completions", {"prompt": "my secret prompt"})[:-1])
        text = ""

        def left() -> bool:
            nonlocal text
            with urllib.request.urlopen(running.url + "/metrics") as answer:
                text = answer.read().decode()
            return 'status="499"' in text

        running.wait(left)
    assert 'nybble_http_requests_total{path="/v1/completions",status="200"} 1.0' in text
    assert 'nybble_http_requests_total{path="/v1/completions",status="400"} 1.0' in text
    assert 'nybble_http_requests_total{path="other",status="404"} 1.0' in text
    assert 'nybble_http_requests_total{path="/v1/completions",status="499"} 1.0' in text
    assert "nybble_first_token_seconds_count 1.0" in text
    assert "nybble_running 0.0" in text
    assert "secret" not in text


# --- The command line


class Process:
    """`nybble serve` as a process."""

    def __init__(self, *arguments: object) -> None:
        command = [sys.executable, "-m", "nybble", "serve", *map(str, arguments), "--port", "0", "--name", "tiny"]
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        assert self.process.stderr is not None
        self.output = ""
        while "API" not in self.output:
            line = self.process.stderr.readline()
            assert line, self.output
            self.output += line
        self.running = Running(re.findall(r"http://\S+", self.output)[0], None)  # type: ignore[arg-type]

    def __enter__(self) -> Process:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.communicate()


def test_an_engine_that_failed_answers_503_until_it_computes_again(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    body = {"model": "tiny", "prompt": "abc", "max_tokens": 3, "seed": 1}
    with serving(engine) as running:
        expected = ask(running, "/v1/completions", body)[1]["choices"]
        with monkeypatch.context() as patch:
            patch.setattr(Driver, "step", lambda *_, **__: 1 // 0)
            assert code(ask(running, "/v1/completions", body)) == (503, "engine_failed")
            assert ask(running, "/health") == (503, {"status": "failed"})
        # The health check is an attempt.
        assert ask(running, "/health") == (200, {"status": "ok"})
        assert ask(running, "/v1/completions", body)[1]["choices"] == expected


@pytest.mark.parametrize("kind", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_lets_answers_finish_and_refuses_new_requests(file: Path, kind: signal.Signals) -> None:
    with Process(file, "--threads", 1) as served, served.running.connection() as connection:
        running = served.running
        connection.sendall(running.post("/v1/chat/completions", LONG, "Connection: close\r\n"))
        got = connection.recv(100)
        assert got.startswith(b"HTTP/1.1 200 ")
        served.process.send_signal(kind)
        wait(lambda: ask(running, "/health") == (503, {"status": "draining"}))
        assert code(ask(running, "/v1/chat/completions", SHORT)) == (503, "shutting_down")
        while news := connection.recv(1 << 16):
            got = got[-100:] + news
        assert b"data: [DONE]" in got
        assert served.process.wait(60) == 0


def test_the_end_of_the_drain_sends_an_error_to_open_streams(file: Path) -> None:
    with Process(file, "--threads", 1, "--drain", 0) as served, served.running.connection() as connection:
        connection.sendall(served.running.post("/v1/chat/completions", {**ENDLESS}, "Connection: close\r\n"))
        got = connection.recv(100)
        served.process.send_signal(signal.SIGTERM)
        while news := connection.recv(1 << 16):
            got = got[-1000:] + news
        assert b'"code":"shutting_down"' in got
        assert served.process.wait(60) == 0


def test_an_address_in_use_is_one_line(tiny_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with http_server.bind("127.0.0.1", 0) as taken:
        taken.listen()
        port = taken.getsockname()[1]
        assert main(["serve", str(tiny_file), "--port", str(port)]) == 1
    assert capsys.readouterr().err == f"nybble: cannot listen on 127.0.0.1 port {port}: Address already in use\n"
    assert main(["serve", str(tiny_file), "--host", "nobody.invalid"]) == 1
    assert capsys.readouterr().err.startswith("nybble: cannot listen on nobody.invalid port 8000: ")


def test_an_address_taken_while_the_model_loads_is_one_line(
    tiny_file: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    # Two sockets may bind an address as long as neither listens.
    with http_server.bind("127.0.0.1", 0) as other:
        port = other.getsockname()[1]
        monkeypatch.setattr(http_server, "allowed_hosts", lambda *_: other.listen())
        assert main(["serve", str(tiny_file), "--port", str(port)]) == 1
    assert f"cannot listen on 127.0.0.1 port {port}: Address already in use" in capsys.readouterr().err


def test_without_the_extra_the_error_says_what_to_install(
    tiny_file: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in sys.modules if name.startswith("nybble.server") or name == "nybble.server"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "fastapi", None)
    assert main(["serve", str(tiny_file), "--port", "0"]) == 1
    assert "pip install 'nybble[serve]'" in capsys.readouterr().err


def test_the_default_name_is_that_of_the_repository_or_file() -> None:
    from nybble.server.pool.spec import source_name

    assert source_name("org/model", "whatever-q4.gguf") == "org/model"
    assert source_name("folder/model.gguf", "model.gguf") == "model"
    assert source_name(None, "default.gguf") == "default"
    assert source_name("./model", "model") == "model"


def test_long_prompts_are_limited_by_tokens_not_by_body_size(engine: Engine) -> None:
    with serving(engine) as running, running.connection() as first:
        first.sendall(running.post("/v1/completions", {"prompt": "x" * 900_000, "max_tokens": 1}))
        assert code(ask(running, "/v1/completions", {"prompt": "x" * 1_000_000})) == (413, "body_too_large")
        assert ask(running, "/v1/completions", {"prompt": "x", "max_tokens": 1})[0] == 200


def test_clients_that_are_still_sending_read_why_they_are_refused(engine: Engine) -> None:
    body = {"prompt": "x" * 30_000_000}
    with serving(engine, api_key="s3cret") as running:
        for _ in range(3):
            # urllib closes its connections: left unread, the body would reset this one.
            assert code(ask(running, "/v1/completions", body, Authorization="Bearer wrong")) == (401, "invalid_api_key")
            answer = ask(running, "/v1/completions", body, Authorization="Bearer s3cret")
            assert code(answer) == (413, "body_too_large")
        # Who expects 100 Continue sends nothing after an error.
        with running.connection() as connection:
            head = f"POST /v1/completions HTTP/1.1\r\nHost: {running.url[7:]}\r\nConnection: close\r\n"
            connection.sendall(f"{head}Expect: 100-continue\r\nContent-Length: 30000000\r\n\r\n".encode())
            answer_bytes = b"".join(iter(lambda: connection.recv(65536), b""))
        assert answer_bytes.startswith(b"HTTP/1.1 401 ")
        assert b"100 Continue" not in answer_bytes


def test_an_empty_key_is_refused(tiny_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", str(tiny_file), "--port", "0", "--api-key", ""]) == 2
    error = capsys.readouterr().err
    assert "api_key: found an empty key, expected at least one character; omit it to require no key" in error
    assert "(try: nybble serve --help)" in error


def test_a_key_that_no_header_can_carry_is_refused(tiny_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for key in ("schlüssel", "a\nb", "a\x00"):
        assert main(["serve", str(tiny_file), "--port", "0", "--api-key", key]) == 2
        assert "expected printable ASCII" in capsys.readouterr().err


def test_white_space_around_a_key_is_trimmed(
    tiny_file: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    served: list[Any] = []
    monkeypatch.setattr(http_server, "serve", lambda service, *_: served.append(service.settings.api_key))
    monkeypatch.setenv("NYBBLE_API_KEY", " x y\n")
    assert main(["serve", str(tiny_file), "--port", "0"]) == 0
    assert served == ["x y"]


def test_a_cache_too_small_for_a_page_is_refused_and_a_small_one_noted(
    tiny_file: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(http_server, "serve", lambda *_: None)
    assert main(["serve", str(tiny_file), "--port", "0", "--cache-gb", "0"]) == 1
    assert "cache_gb: found 0, expected at least 1.64e-05" in capsys.readouterr().err
    assert main(["serve", str(tiny_file), "--port", "0", "--cache-gb", "0.00002"]) == 0
    assert "holds requests of up to 78 tokens, less than the context of 128" in capsys.readouterr().err
