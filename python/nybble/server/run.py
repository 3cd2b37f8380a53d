"""The process: a socket, connections that do not wait forever, and an end that lets answers be finished."""

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
from nybble.server.service import Service, Settings

_LOOPBACK_NAMES = frozenset({"localhost", "127.0.0.1", "::1"})
_BACKLOG = 256
_READ_BYTES = 1 << 16
"""What is read at a time of what a client sends."""


def bind(host: str, port: int) -> socket.socket:
    """A socket at an address, on which nothing is answered yet.

    Raises:
        OSError: the address is in use, or not of this machine.
    """
    with _explained(host, port):
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
def _explained(host: str, port: int) -> Iterator[None]:
    """Says of what goes wrong at which address it did, and leaves the number of the error out."""
    try:
        yield
    except OSError as error:
        raise OSError(f"cannot listen on {host} port {port}: {error.strerror}") from error


def is_loopback(listener: socket.socket) -> bool:
    """Whether only this machine can reach a socket."""
    return ipaddress.ip_address(listener.getsockname()[0]).is_loopback


def allowed_hosts(listener: socket.socket, more: list[str]) -> frozenset[str] | None:
    """The names that requests may be addressed to: on a loopback address, only this machine's own and `more`."""
    return _LOOPBACK_NAMES.union(name.lower() for name in more) if is_loopback(listener) or more else None


def serve(service: Service, listener: socket.socket, ready: Callable[[str], object] = lambda _: None) -> None:
    """Answers requests until SIGTERM or Ctrl-C, then finishes what is running; a second signal ends that, too.

    Args:
        service: what is served.
        listener: where, as `bind` makes it.
        ready: called with the address once requests are answered.

    Raises:
        OSError: the address is in use.
    """
    # An address that another one has bound, too, and listens on by now, is found in use only here.
    with _explained(*listener.getsockname()[:2]):
        listener.listen(_BACKLOG)
    make_server(service, ready).run(sockets=[listener])


def make_server(service: Service, ready: Callable[[str], object]) -> Server:
    """The server, which has not begun yet."""
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
    logging.getLogger("uvicorn").setLevel(logging.ERROR)  # Who sends what is no HTTP is told so, and not the log.
    return Server(config, service, ready)


class Server(uvicorn.Server):
    """uvicorn's server, which after a signal goes on listening until all is answered, to refuse what comes politely."""

    def __init__(self, config: uvicorn.Config, service: Service, ready: Callable[[str], object]) -> None:
        super().__init__(config)
        self._service = service
        self._ready = ready
        self._deadline = 0.0

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Begins to listen."""
        await super().startup(sockets)
        host, port = (sockets or [])[0].getsockname()[:2]
        self._ready(f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}")

    def handle_exit(self, sig: int, frame: Any) -> None:
        """The first signal begins the drain, the second ends it."""
        if self._service.draining:
            self._deadline = 0.0
        else:
            self._deadline = time.monotonic() + self._service.settings.drain_seconds
            self._service.draining = True

    async def on_tick(self, counter: int) -> bool:
        """Ends the server when all is answered, or the time for that is over."""
        if self._service.draining and (self._service.working == 0 or time.monotonic() >= self._deadline):
            self._service.stop()
            self.should_exit = True
        return await super().on_tick(counter)


def _protocol(settings: Settings) -> type[H11Protocol]:
    """HTTP connections that end when the other side sends or reads too slowly, and of which there are not too many."""

    # What asyncio gives a plain protocol was read into 256 kB and cut down, which tears memory to pieces. A buffer is
    # filled and emptied without a wait in between, so all connections can have the same one.
    buffer = memoryview(bytearray(_READ_BYTES))

    class Protocol(H11Protocol, asyncio.BufferedProtocol):  # To asyncio one that is both is the latter.
        def get_buffer(self, sizehint: int) -> memoryview:
            return buffer

        def buffer_updated(self, nbytes: int) -> None:
            self.data_received(bytes(buffer[:nbytes]))

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            super().connection_made(transport)
            self._receiving = _Clock(settings.receive_seconds, transport.abort)
            self._stalled = _Clock(settings.stall_seconds, transport.abort)
            self._receiving.start()
            if len(self.connections) > settings.max_connections:
                transport.write(b"HTTP/1.1 503 Service Unavailable\r\nRetry-After: 1\r\nConnection: close\r\n\r\n")
                transport.close()

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            cycle = self.cycle
            if cycle is not None and not cycle.response_complete and not cycle.more_body:
                self._receiving.stop()  # The request is there whole.
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


class _Clock:
    """Calls something after a while, unless it is stopped."""

    def __init__(self, seconds: float, callback: Callable[[], object]) -> None:
        self._seconds = seconds
        self._callback = callback
        self._timer: asyncio.TimerHandle | None = None

    def start(self) -> None:
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(self._seconds, self._callback)

    def stop(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
