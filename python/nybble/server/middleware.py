"""Checks host, origin, API key and size of every request before it is parsed, and counts requests."""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import logging
import time
from collections.abc import Iterable
from urllib.parse import unquote, urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from nybble.server.errors import ApiError
from nybble.server.page.routes import PREFIX
from nybble.server.pool.pool import Pool

_PUBLIC_PATHS = frozenset({"/", "/health", "/v1/health", "/ping"})
"""Paths that need no key. The page and its files hold no secret, and the page asks for the key itself."""
_DISCARD_SECONDS = 5
"""How long the rest of a body is read whose request is refused."""
_LOGGED_CHARACTERS = 200
"""Characters of a path in the log."""

_log = logging.getLogger("nybble.server")


class Middleware:
    """ASGI middleware around the application.

    Args:
        app: The application.
        pool: Its settings and metrics are used.
        paths: The paths that metrics distinguish.
    """

    def __init__(self, app: ASGIApp, pool: Pool, paths: Iterable[str]) -> None:
        self._app = app
        self._pool = pool
        self._paths = frozenset(paths)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Passes a request on, or answers it with an error."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        _use_origin_form(scope)
        path, status, start = _own_path(scope), 499, time.perf_counter()  # 499: the client left before the answer.

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
            metrics = self._pool.shared.metrics
            metrics.requests.labels(known, str(status)).inc()
            seconds = time.perf_counter() - start
            metrics.seconds.labels(known).observe(seconds)
            _log.info("%s", _request_line(scope, status, seconds))

    async def _check_and_pass_on(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            headers = Headers(scope=scope)
            self._check_host(headers, scope.get("http_version", ""))
            self._check_key(_own_path(scope), headers)
            body = await self._read_body(headers, receive)
        except ApiError as error:
            await _refuse(error.response(_own_path(scope)), scope, receive, send)
            return
        if body is not None:
            state = scope.setdefault("state", {})
            state["body_bytes"] = len(body)
            # Waiting for a model and the answer itself have one time limit together.
            state["deadline"] = time.monotonic() + self._pool.settings.request_seconds
            # A model that the request uses stays loaded until the answer has been sent.
            with contextlib.ExitStack() as state["leases"]:
                await self._app(scope, _replay(body, receive), send)

    def _check_host(self, headers: Headers, http_version: str) -> None:
        """Keeps web pages from reaching a local server, by DNS rebinding or from another origin."""
        allowed = self._pool.settings.allowed_hosts
        host = headers.get("host", "")
        if not host and http_version == "1.0":
            allowed = None  # Health checks of load balancers name no host. Browsers always do.
        if allowed is not None and _hostname(f"//{host}") not in allowed:
            message = f"the host {host!r} is not allowed; add it with --allow-host"
            raise ApiError(403, message, code="unknown_host")
        origin = headers.get("origin")
        # A reverse proxy may pass on its own name for this server as the host, and the origin as the browser sends it.
        is_own = origin is None or _netloc(origin) == host.lower()
        allowed_origins = self._pool.settings.allowed_origins
        if not is_own and not allowed_origins & {(origin or "").lower(), _hostname(origin or ""), "*"}:
            message = f"requests from web pages of the origin {origin!r:.200} are refused; allow it with --allow-origin"
            raise ApiError(403, message, code="foreign_origin")

    def _check_key(self, path: str, headers: Headers) -> None:
        key = self._pool.settings.api_key
        if key is None or path in _PUBLIC_PATHS or path.startswith(PREFIX):
            return
        scheme, _, given = headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer":
            given = headers.get("x-api-key", "")  # As Anthropic's clients send it.
        if not hmac.compare_digest(given.strip().encode(), key.encode()):
            message = "the API key is wrong" if given else "the API key is missing: send Authorization: Bearer KEY"
            raise ApiError(401, message, code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})

    async def _read_body(self, headers: Headers, receive: Receive) -> bytes | None:
        """The whole body, or None if the client disconnected. The connection limits the time."""
        limit = self._pool.max_body_bytes
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


async def _refuse(response: Response, scope: Scope, receive: Receive, send: Send) -> None:
    """Answers a request whose body has not been read, then reads the rest of it.

    A connection that is closed with unread data is reset, and a client that is still sending loses the answer
    (RFC 9112, section 9.6).
    """

    async def send_without_end(message: Message) -> None:
        await send({**message, "more_body": True} if message["type"] == "http.response.body" else message)

    await response(scope, receive, send_without_end)
    # A client that expects 100 Continue sends no body without it.
    if "expect" not in Headers(scope=scope):
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(_discard(receive), _DISCARD_SECONDS)
    await send({"type": "http.response.body"})


async def _discard(receive: Receive) -> None:
    while (await receive()).get("more_body", False):
        pass


def _own_path(scope: Scope) -> str:
    """The path of a request within the application, which may be mounted below another path."""
    path, root = str(scope["path"]), str(scope.get("root_path", "")).rstrip("/")
    return path.removeprefix(root) if path.startswith(f"{root}/") else path


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


def _use_origin_form(scope: Scope) -> None:
    """Turns a request target in absolute form into a path. Its host replaces that of the header (RFC 9112)."""
    target = scope.get("raw_path", b"").decode("latin-1")
    scheme, colon, rest = target.partition("://")
    if not colon or scheme.lower() not in ("http", "https"):
        return
    netloc, _, path = rest.partition("/")
    scope["raw_path"] = f"/{path}".encode("latin-1")
    scope["path"] = unquote(f"/{path}")
    others = [(name, value) for name, value in scope["headers"] if name != b"host"]
    scope["headers"] = [(b"host", netloc.rpartition("@")[2].encode("latin-1")), *others]


def client_name(client: tuple[str, int] | None) -> str:
    """The address of a client in the log."""
    return client[0] if client else "unix"


def _request_line(scope: Scope, status: int, seconds: float) -> str:
    """The line of a request in the log. The target is as sent: printable ASCII, with everything else escaped."""
    target = scope.get("raw_path", b"").decode("ascii", "backslashreplace")
    target = target if len(target) <= _LOGGED_CHARACTERS else f"{target[:_LOGGED_CHARACTERS]}..."
    method = scope["method"][:20]
    return f"{client_name(scope.get('client'))} {method} {target} {status} {seconds:.3f} s"


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
