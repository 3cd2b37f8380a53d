"""Checks host, origin, API key and size of every request before it is parsed, and counts requests."""

from __future__ import annotations

import hmac
import time
from collections.abc import Iterable
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from nybble.server.errors import ApiError
from nybble.server.service import Service

_PUBLIC_PATHS = frozenset({"/", "/health", "/v1/health", "/ping"})
"""Paths that need no key. The page holds no secret and asks for the key itself."""


class Middleware:
    """ASGI middleware around the application.

    Args:
        app: The application.
        service: Its settings and metrics are used.
        paths: The paths that metrics distinguish.
    """

    def __init__(self, app: ASGIApp, service: Service, paths: Iterable[str]) -> None:
        self._app = app
        self._service = service
        self._paths = frozenset(paths)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Passes a request on, or answers it with an error."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        path, status, start = scope["path"], 499, time.perf_counter()  # 499: the client left before the answer.

        async def send_with_headers(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(scope=message)
                headers.setdefault("X-Content-Type-Options", "nosniff")
                headers.setdefault("Cache-Control", "no-store")
            await send(message)

        try:
            await self._check_and_pass_on(scope, receive, send_with_headers)
        except Exception:
            status = 500
            raise
        finally:
            known = path if path in self._paths else "other"
            metrics = self._service.metrics
            metrics.requests.labels(known, str(status)).inc()
            metrics.seconds.labels(known).observe(time.perf_counter() - start)

    async def _check_and_pass_on(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            headers = Headers(scope=scope)
            self._check_host(headers, scope.get("http_version", ""))
            self._check_key(scope["path"], headers)
            body = await self._read_body(headers, receive)
        except ApiError as error:
            await error.response(scope["path"])(scope, receive, send)
            return
        if body is not None:
            scope.setdefault("state", {})["body_bytes"] = len(body)
            await self._app(scope, _replay(body, receive), send)

    def _check_host(self, headers: Headers, http_version: str) -> None:
        """Keeps web pages from reaching a local server, by DNS rebinding or from another origin."""
        allowed = self._service.settings.allowed_hosts
        host = headers.get("host", "")
        if not host and http_version == "1.0":
            allowed = None  # Health checks of load balancers name no host. Browsers always do.
        if allowed is not None and _hostname(f"//{host}") not in allowed:
            message = f"the host {host!r} is not allowed; add it with --allow-host"
            raise ApiError(403, message, code="unknown_host")
        origin = headers.get("origin")
        origins = self._service.settings.allowed_origins
        if origin is not None and _netloc(origin) != host.lower() and not origins & {origin.lower(), "*"}:
            message = f"requests from web pages of the origin {origin!r:.200} are refused; allow it with --allow-origin"
            raise ApiError(403, message, code="foreign_origin")

    def _check_key(self, path: str, headers: Headers) -> None:
        key = self._service.settings.api_key
        if key is None or path in _PUBLIC_PATHS:
            return
        scheme, _, given = headers.get("authorization", "").partition(" ")
        is_correct = hmac.compare_digest(given.strip().encode(), key.encode())
        if scheme.lower() != "bearer" or not is_correct:
            message = "the API key is wrong" if given else "the API key is missing: send Authorization: Bearer KEY"
            raise ApiError(401, message, code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})

    async def _read_body(self, headers: Headers, receive: Receive) -> bytes | None:
        """The whole body, or None if the client disconnected. The connection limits the time."""
        limit = self._service.settings.max_body_bytes
        too_large = ApiError(413, f"the request body is larger than {limit} bytes", code="body_too_large")
        length = headers.get("content-length", "")
        if length.isascii() and length.isdigit() and int(length[:20]) > limit:
            raise too_large
        chunks: list[bytes] = []
        size = 0
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                return None
            chunks.append(message.get("body", b""))
            size += len(chunks[-1])
            if size > limit:
                raise too_large
            if not message.get("more_body", False):
                return b"".join(chunks)


def _replay(body: bytes, receive: Receive) -> Receive:
    """A `receive` that returns the body first."""
    is_replayed = False

    async def receive_body_first() -> Message:
        nonlocal is_replayed
        if is_replayed:
            return await receive()
        is_replayed = True
        return {"type": "http.request", "body": body, "more_body": False}

    return receive_body_first


def _hostname(url: str) -> str | None:
    try:
        return urlsplit(url).hostname
    except ValueError:
        return None


def _netloc(url: str) -> str | None:
    try:
        return urlsplit(url).netloc.lower() or None
    except ValueError:
        return None
