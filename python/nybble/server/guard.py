"""The door: who may ask, how much may be sent, and how long that may take. Nothing is parsed before."""

from __future__ import annotations

import hmac
import time
from collections.abc import Iterable
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from nybble.server.errors import ApiError
from nybble.server.service import Service

_OPEN = frozenset({"/", "/health"})
"""What needs no key: the page holds no secret and asks for the key itself."""


class Guard:
    """Stands around the application.

    Args:
        app: the application.
        service: whose settings count.
        paths: those that metrics tell apart.
    """

    def __init__(self, app: ASGIApp, service: Service, paths: Iterable[str]) -> None:
        self._app = app
        self._service = service
        self._paths = frozenset(paths)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Lets a request through, or answers it."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        path, status, began = scope["path"], 499, time.perf_counter()  # 499: the client left before it had an answer.

        async def watched(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(scope=message)
                headers.setdefault("X-Content-Type-Options", "nosniff")
                headers.setdefault("Cache-Control", "no-store")
            await send(message)

        try:
            await self._let_in(scope, receive, watched)
        except Exception:
            status = 500
            raise
        finally:
            known = path if path in self._paths else "other"
            metrics = self._service.metrics
            metrics.requests.labels(known, str(status)).inc()
            metrics.seconds.labels(known).observe(time.perf_counter() - began)

    async def _let_in(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            headers = Headers(scope=scope)
            self._check_host(headers)
            self._check_key(scope["path"], headers)
            body = await self._body(headers, receive)
        except ApiError as error:
            await error.response()(scope, receive, send)
            return
        if body is not None:
            scope.setdefault("state", {})["body_bytes"] = len(body)
            await self._app(scope, _again(body, receive), send)

    def _check_host(self, headers: Headers) -> None:
        """Keeps web pages from asking a server that only this machine should reach, by a name that leads here."""
        allowed = self._service.settings.allowed_hosts
        host = headers.get("host", "")
        if allowed is not None and _name_of(f"//{host}") not in allowed:
            message = f"this server is not {host!r}; --allow-host lets it be"
            raise ApiError(403, message, code="unknown_host")
        origin = headers.get("origin")
        if origin is not None and _place_of(origin) != host.lower():
            raise ApiError(403, "requests of other sites' pages are not answered", code="foreign_origin")

    def _check_key(self, path: str, headers: Headers) -> None:
        key = self._service.settings.api_key
        if key is None or path in _OPEN:
            return
        scheme, _, given = headers.get("authorization", "").partition(" ")
        right = hmac.compare_digest(given.strip().encode(), key.encode())
        if scheme.lower() != "bearer" or not right:
            said = "the API key is wrong" if given else "an API key is needed: Authorization: Bearer KEY"
            raise ApiError(401, said, code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})

    async def _body(self, headers: Headers, receive: Receive) -> bytes | None:
        """The whole body; None if the client left. Connections see to it that this does not take forever."""
        most = self._service.settings.max_body_bytes
        too_large = ApiError(413, f"the body has more than {most} bytes", code="body_too_large")
        length = headers.get("content-length", "")
        if length.isascii() and length.isdigit() and int(length[:20]) > most:
            raise too_large
        chunks: list[bytes] = []
        size = 0
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                return None
            chunks.append(message.get("body", b""))
            size += len(chunks[-1])
            if size > most:
                raise too_large
            if not message.get("more_body", False):
                return b"".join(chunks)


def _again(body: bytes, receive: Receive) -> Receive:
    """A `receive` that gives the body first."""
    given = False

    async def replayed() -> Message:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replayed


def _name_of(url: str) -> str | None:
    try:
        return urlsplit(url).hostname
    except ValueError:
        return None


def _place_of(url: str) -> str | None:
    try:
        return urlsplit(url).netloc.lower() or None
    except ValueError:
        return None
