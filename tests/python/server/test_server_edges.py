"""The server at its edges: many connections, proxies, half-closed connections, Unix sockets, TLS, its log."""

from __future__ import annotations

import contextlib
import logging
import socket
import ssl
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from serving import Running, serving, wait

from nybble import Model
from nybble.engine import Engine
from nybble.server import addresses
from nybble.server.certificate import Certificate
from nybble.server.connections import Connections, Listener

BODY = {"prompt": "x", "max_tokens": 1}


@pytest.fixture
def server(tiny_model: Model) -> Iterator[Running]:
    with Engine(tiny_model) as engine, serving(engine, allowed_origins=frozenset({"llm.example.com"})) as running:
        yield running


def _answer(connection: socket.socket, request: bytes) -> bytes:
    connection.sendall(request)
    return b"".join(iter(lambda: connection.recv(65536), b""))


def _status(server: Running, headers: str) -> int:
    with server.connection() as connection:
        request = server.post("/v1/completions", BODY, f"Connection: close\r\n{headers}")
        return int(_answer(connection, request).split()[1])


def test_a_page_of_an_allowed_name_may_ask_whatever_the_host(server: Running) -> None:
    assert _status(server, "Origin: https://llm.example.com\r\n") == 200
    assert _status(server, "Origin: https://other.example.com\r\n") == 403
    assert _status(server, "Origin: http://localhost:3000\r\n") == 403


def test_a_request_in_absolute_form_is_answered(server: Running) -> None:
    with server.connection() as connection:
        request = f"GET {server.url}/v1/models?x=1 HTTP/1.1\r\nHost: other.example.com\r\nConnection: close\r\n\r\n"
        assert b"200 OK" in _answer(connection, request.encode())
    with server.connection() as connection:
        request = "GET http://other.example.com/v1/models HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
        assert b"403 Forbidden" in _answer(connection, request.encode())


@pytest.mark.parametrize("version", ["1.0", "1.1"])
def test_a_client_that_half_closes_gets_its_answer(version: str, server: Running) -> None:
    with server.connection() as connection:
        connection.sendall(server.post("/v1/completions", BODY).replace(b"HTTP/1.1", f"HTTP/{version}".encode()))
        connection.shutdown(socket.SHUT_WR)
        answer = b"".join(iter(lambda: connection.recv(65536), b""))
    assert b"200 OK" in answer
    assert b'"usage"' in answer


def test_a_request_is_one_line_of_the_log(server: Running, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "nybble.server")
    with server.connection() as connection:
        _answer(connection, b"GET /v1/models/\x41%0a HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
    wait(lambda: bool(caplog.records))
    assert [record.getMessage().split(" ")[:4] for record in caplog.records] == [
        ["127.0.0.1", "GET", "/v1/models/A%0a", "404"]
    ]


def test_idle_connections_make_way_for_working_ones(tiny_model: Model) -> None:
    with Engine(tiny_model) as engine, serving(engine, max_connections=8) as server, contextlib.ExitStack() as stack:
        for _ in range(40):
            stack.enter_context(server.connection())
        for _ in range(20):
            assert _status(server, "") == 200


def test_a_connection_that_is_answered_is_never_replaced() -> None:
    with socket.socket() as bound, contextlib.ExitStack() as stack:
        bound.bind(("127.0.0.1", 0))
        bound.listen()
        address = bound.getsockname()
        connections = Connections(2)
        listener = stack.enter_context(Listener(bound, connections))
        accepted = []
        for _ in range(2):
            stack.enter_context(socket.create_connection(address))
            accepted.append(stack.enter_context(listener.accept()[0]))
        connections.working(accepted[0].fileno())
        stack.enter_context(socket.create_connection(address))
        accepted.append(stack.enter_context(listener.accept()[0]))
        assert accepted[1].recv(1) == b"", "the idle one was replaced"
        connections.working(accepted[2].fileno())
        refused = stack.enter_context(socket.create_connection(address))
        with pytest.raises(BlockingIOError, match="too many connections"):
            listener.accept()
        assert refused.recv(100).startswith(b"HTTP/1.1 503")


def test_a_unix_socket_goes_with_its_server_and_a_stale_one_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "nybble.sock"
    with socket.socket(socket.AF_UNIX) as killed:
        killed.bind(str(path))
    with addresses.bind_unix(path) as listener:
        listener.listen()
        assert addresses.is_loopback(listener)
        assert addresses.url(listener, "http") == f"unix:{path}"
        with pytest.raises(OSError, match="cannot listen on"), addresses.bind_unix(path):
            pass
    assert not path.exists()
    path.write_text("a file")
    with pytest.raises(OSError, match="something other than a socket"), addresses.bind_unix(path):
        pass
    assert path.read_text() == "a file"


def _certificate(folder: Path) -> Certificate:
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=localhost"]
    files = ["-keyout", str(folder / "key.pem"), "-out", str(folder / "cert.pem")]
    try:
        subprocess.run([*command, *files], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("no openssl here")
    return Certificate(folder / "cert.pem", folder / "key.pem")


def test_a_certificate_and_its_key_must_match(tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    _certificate(tmp_path)
    _certificate(tmp_path / "other")
    with pytest.raises(ValueError, match=r"cert\.pem"):
        Certificate(tmp_path / "cert.pem", tmp_path / "other" / "key.pem")
    with pytest.raises(FileNotFoundError, match=r"no\.pem"):
        Certificate(tmp_path / "no.pem", tmp_path / "key.pem")


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no Unix sockets in Python")
@pytest.mark.parametrize("kind", ["unix", "https"])
def test_the_command_serves_a_unix_socket_and_https(kind: str, tiny_file: Path, tmp_path: Path) -> None:
    path = tmp_path / "s.sock"
    options = ["--port", "0"]
    if kind == "https":
        _certificate(tmp_path)
        options += ["--ssl-cert", str(tmp_path / "cert.pem"), "--ssl-key", str(tmp_path / "key.pem")]
    else:
        options = ["--unix-socket", str(path)]
    command = [sys.executable, "-m", "nybble", "serve", str(tiny_file), "--threads", "1", *options]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        url = next(line.split()[1] for line in process.stderr if line.split()[:1] == ["page"])
        request = b"GET /health HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
        if kind == "unix":
            with socket.socket(socket.AF_UNIX) as connection:
                connection.connect(str(path))
                assert b"200 OK" in _answer(connection, request)
        else:
            port = int(url.rpartition(":")[2])
            context = ssl.create_default_context(cafile=str(tmp_path / "cert.pem"))
            with (
                socket.create_connection(("127.0.0.1", port)) as raw,
                context.wrap_socket(raw, server_hostname="localhost") as connection,
            ):
                assert b"200 OK" in _answer(connection, request)
        process.terminate()
        log = process.stderr.read()
        assert process.wait(60) == 0
    assert "INFO" in log
    assert "GET /health 200" in log
    assert not path.exists()


def test_a_prompt_that_cannot_fit_is_refused_before_it_is_tokenized(
    server: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    def encode(*arguments: object, **options: object) -> list[int]:
        raise AssertionError("the prompt was tokenized")

    tokenizer = server.service.engine.model.tokenizer
    for name in ("encode", "encode_prompt"):
        monkeypatch.setattr(type(tokenizer), name, encode)
    text = "x" * 500_000
    bodies: dict[str, dict[str, Any]] = {
        "/v1/completions": {"prompt": text},
        "/v1/chat/completions": {"messages": [{"role": "user", "content": text}]},
        "/v1/embeddings": {"input": text},
    }
    for path, body in bodies.items():
        with server.connection() as connection:
            answer = _answer(connection, server.post(path, body, "Connection: close\r\n"))
        assert b"400 Bad Request" in answer
        assert b"context_length_exceeded" in answer
