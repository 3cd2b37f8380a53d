"""Details of HTTP that clients, proxies, health checks and web pages rely on."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from serving import Running, served

from nybble import Model

CHAT: dict[str, Any] = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 2, "temperature": 0}
PATH = "/v1/chat/completions"
ORIGIN = "http://localhost:3000"
PREFLIGHT = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "content-type,authorization"}


@pytest.fixture(scope="module")
def server(tiny_model: Model) -> Iterator[Running]:
    with served(tiny_model) as running:
        yield running


@pytest.mark.parametrize("path", ["/health", "/", "/v1/models", "/nowhere"])
def test_head_returns_the_headers_of_get(path: str, server: Running) -> None:
    head, get = server.request("HEAD", path), server.request("GET", path)
    assert (head.status, head.headers["content-type"]) == (get.status, get.headers["content-type"])
    assert head.text == ""


@pytest.mark.parametrize(("request_line", "status"), [("GET /health", b"200"), ("GET /v1/models", b"200")])
def test_http_1_0_needs_no_host(request_line: str, status: bytes, server: Running) -> None:
    with server.connection() as connection:
        connection.sendall(f"{request_line} HTTP/1.0\r\n\r\n".encode())
        assert connection.recv(1 << 16).split(b" ")[1] == status


def test_a_missing_content_type_is_explained(server: Running) -> None:
    for headers, found in (({}, "no Content-Type"), ({"Content-Type": "text/plain"}, "Content-Type: text/plain")):
        reply = server.request("POST", PATH, b'{"messages": []}', headers)
        assert reply.status == 415
        assert f"found {found}, expected JSON, with the header Content-Type: application/json" in reply.error
    assert server.request("POST", PATH, headers={"Content-Length": "0"}).error.startswith("the request body is missing")


@pytest.mark.parametrize("headers", [{}, {"Content-Type": "application/x-www-form-urlencoded"}], ids=str)
def test_ollama_routes_read_json_whatever_its_type(headers: dict[str, str], server: Running) -> None:
    body = b'{"prompt": "x", "stream": false, "options": {"num_predict": 2}}'
    assert server.request("POST", "/api/generate", body, headers).json["eval_count"] == 2
    assert "not valid JSON" in server.request("POST", "/api/generate", b"{", headers).json["error"]


def test_answers_carry_a_request_id(server: Running) -> None:
    assert server.request("GET", "/health", headers={"X-Request-Id": "abc-1"}).headers["x-request-id"] == "abc-1"
    ids = {server.request("POST", PATH, CHAT).headers["x-request-id"] for _ in range(2)}
    assert len(ids) == 2
    assert server.request("GET", "/nowhere", headers={"X-Request-Id": "a b"}).headers["x-request-id"] != "a b"


def test_routes_work_without_v1(server: Running) -> None:
    for path, body in (
        ("/chat/completions", CHAT),
        ("/chat/completions", {**CHAT, "input": "Hi"}),
        ("/api/chat", {**CHAT, "input": "Hi"}),
        ("/completions", {"prompt": "a", "max_tokens": 1}),
        ("/embeddings", {"input": "a"}),
    ):
        assert server.request("POST", path, body).status == 200
    assert server.request("GET", "/models").json["data"][0]["max_model_len"] == 128
    assert server.request("GET", "/models/tiny").json["id"] == "tiny"
    for path in ("/ping", "/v1/health", "/health"):
        assert server.request("GET", path).json == {"status": "ok"}
    assert server.request("GET", "/version").json["version"]
    assert server.request("GET", "/props").json["default_generation_settings"] == {"n_ctx": 128}


@pytest.mark.parametrize(
    ("method", "path", "advice"),
    [
        ("POST", "/v1/assistants", "; use /v1/chat/completions."),
        ("POST", "/completion", "; use /v1/completions."),
        ("GET", "/v1/model", "; use /v1/models."),
        ("GET", "/xyz", " on this server. Its routes: POST /v1/chat/completions, "),
    ],
)
def test_an_unknown_route_is_named_with_what_there_is(method: str, path: str, advice: str, server: Running) -> None:
    reply = server.request(method, path)
    assert reply.status == 404
    assert f"there is no route {method} {path}" in reply.error
    assert advice in reply.error


def test_a_wrong_method_is_answered_with_the_right_one(server: Running) -> None:
    reply = server.request("GET", PATH)
    assert (reply.status, reply.headers["allow"]) == (405, "POST")
    assert reply.error == f"GET {PATH}: this route takes POST"


def test_pages_of_allowed_origins_may_send_requests(tiny_model: Model) -> None:
    with served(tiny_model, allowed_origins=frozenset({ORIGIN}), api_key="key") as running:
        preflight = running.request("OPTIONS", PATH, headers={**PREFLIGHT, "Origin": ORIGIN})
        assert preflight.status == 200
        assert preflight.headers["access-control-allow-origin"] == ORIGIN
        assert "authorization" in preflight.headers["access-control-allow-headers"].lower()
        asked = running.request("POST", PATH, CHAT, {"Origin": ORIGIN, "Authorization": "Bearer key"})
        assert (asked.status, asked.headers["access-control-allow-origin"]) == (200, ORIGIN)
        assert running.request("POST", PATH, CHAT, {"Origin": ORIGIN}).status == 401


def test_pages_of_other_origins_are_refused(tiny_model: Model, server: Running) -> None:
    with served(tiny_model, allowed_origins=frozenset({ORIGIN})) as allowing:
        for running in (allowing, server):
            reply = running.request("POST", PATH, CHAT, {"Origin": "http://other.example"})
            assert reply.status == 403
            assert "allow it with --allow-origin" in reply.error
            assert "access-control-allow-origin" not in reply.headers
