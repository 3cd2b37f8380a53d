"""Runs the application on a socket: connection limits, timeouts, and a shutdown that lets answers finish."""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import logging
import socket
import time
from collections.abc import Callable, Iterator
from typing import Any

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from nybble.server.app import create_app
from nybble.server.options import Settings
from nybble.server.service import Service

_LOOPBACK_NAMES = frozenset({"localhost", "127.0.0.1", "::1"})
_BACKLOG = 256
_READ_BYTES = 1 << 16
"""Size of the buffer that connections read into."""


def bind(host: str, port: int) -> socket.socket:
    """A socket that is bound to an address and does not listen yet.

    Raises:
        OSError: The address is in use or does not belong to this machine.
    """
    with _naming_address(host, port):
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
        except OSError:
            listener.close()
            raise
    return listener


@contextlib.contextmanager
def _naming_address(host: str, port: int) -> Iterator[None]:
    """Adds the address to the message of an OSError, and leaves the error number out."""
    try:
        yield
    except OSError as error:
        raise OSError(f"cannot listen on {host} port {port}: {error.strerror}") from error


def is_loopback(listener: socket.socket) -> bool:
    """Whether only this machine can reach the socket."""
    return ipaddress.ip_address(listener.getsockname()[0]).is_loopback


def allowed_hosts(listener: socket.socket, more: list[str]) -> frozenset[str] | None:
    """The host names that requests may use; None for any.

    A socket on a loopback address allows the names of this machine and `more`, so that a name that an attacker
    points to this machine is refused.
    """
    return _LOOPBACK_NAMES.union(name.lower() for name in more) if is_loopback(listener) or more else None


def serve(service: Service, listener: socket.socket, ready: Callable[[str], object] = lambda _: None) -> None:
    """Answers requests until SIGTERM or Ctrl-C, then lets running answers finish. A second signal cancels them.

    Args:
        service: The service to run.
        listener: A bound socket, as `bind` returns it.
        ready: Called with the URL once the server accepts requests.

    Raises:
        OSError: The address is in use.
    """
    # Two processes may bind an address. The second one to listen fails here.
    with _naming_address(*listener.getsockname()[:2]):
        listener.listen(_BACKLOG)
    make_server(service, ready).run(sockets=[listener])


def make_server(service: Service, ready: Callable[[str], object]) -> Server:
    """A server that does not run yet."""
    config = uvicorn.Config(
        create_app(service),
        http=_protocol(service.settings),
        ws="none",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        timeout_graceful_shutdown=5,
        backlog=_BACKLOG,
    )
    logging.getLogger("uvicorn").setLevel(logging.ERROR)  # Malformed requests get an answer, not a log line.
    return Server(config, service, ready)


class Server(uvicorn.Server):
    """uvicorn's server. After a signal it refuses new requests with an error until the running ones are answered."""

    def __init__(self, config: uvicorn.Config, service: Service, ready: Callable[[str], object]) -> None:
        super().__init__(config)
        self._service = service
        self._ready = ready
        self._deadline = 0.0

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Starts to accept requests."""
        await super().startup(sockets)
        host, port = (sockets or [])[0].getsockname()[:2]
        self._ready(f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}")

    def handle_exit(self, sig: int, frame: Any) -> None:
        """The first signal starts the drain, the second ends it."""
        if self._service.draining:
            self._deadline = 0.0
        else:
            self._deadline = time.monotonic() + self._service.settings.drain_seconds
            self._service.draining = True

    async def on_tick(self, counter: int) -> bool:
        """Ends the server when all requests are answered or the drain time is over."""
        if self._service.draining and (self._service.working == 0 or time.monotonic() >= self._deadline):
            self._service.stop()
            self.should_exit = True
        return await super().on_tick(counter)


def _protocol(settings: Settings) -> type[H11Protocol]:
    """The class of HTTP connections, which limits their number and closes those of slow clients."""

    # For a plain protocol, asyncio allocates 256 kB per read and shrinks it, which fragments memory. A buffer is filled
    # and emptied without a wait in between, so all connections share one.
    buffer = memoryview(bytearray(_READ_BYTES))

    class Protocol(H11Protocol, asyncio.BufferedProtocol):  # asyncio treats it as the latter.
        def get_buffer(self, sizehint: int) -> memoryview:
            return buffer

        def buffer_updated(self, nbytes: int) -> None:
            self.data_received(bytes(buffer[:nbytes]))

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            super().connection_made(transport)
            self._receiving = _Timer(settings.receive_seconds, transport.abort)
            self._stalled = _Timer(settings.stall_seconds, transport.abort)
            self._receiving.start()
            if len(self.connections) > settings.max_connections:
                transport.write(b"HTTP/1.1 503 Service Unavailable\r\nRetry-After: 1\r\nConnection: close\r\n\r\n")
                transport.close()

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            cycle = self.cycle
            if cycle is not None and not cycle.response_complete and not cycle.more_body:
                self._receiving.stop()  # The request is complete.
            elif not self.transport.is_closing():
                self._receiving.start()

        def connection_lost(self, exc: Exception | None) -> None:
            self._receiving.stop()
            self._stalled.stop()
            super().connection_lost(exc)

        def pause_writing(self) -> None:
            super().pause_writing()
            self._stalled.start()

        def resume_writing(self) -> None:
            super().resume_writing()
            self._stalled.stop()

    return Protocol


class _Timer:
    """Calls `callback` after a number of seconds, unless it is stopped."""

    def __init__(self, seconds: float, callback: Callable[[], object]) -> None:
        self._seconds = seconds
        self._callback = callback
        self._handle: asyncio.TimerHandle | None = None

    def start(self) -> None:
        if self._handle is None:
            self._handle = asyncio.get_running_loop().call_later(self._seconds, self._callback)

    def stop(self) -> None:
        if self._handle is not None:
            self._handle.cancel()
            self._handle = None
