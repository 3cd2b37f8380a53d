"""Runs the application on a socket: connection limits, timeouts, and a shutdown that lets answers finish."""

from __future__ import annotations

import asyncio
import logging
import signal
import socket
import threading
import time
from collections.abc import Callable
from typing import Any

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from nybble.server import addresses
from nybble.server.addresses import allowed_hosts, bind, bind_unix, is_loopback
from nybble.server.app import create_app
from nybble.server.certificate import Certificate
from nybble.server.connections import Connections, Listener, within_open_files
from nybble.server.middleware import client_name
from nybble.server.options import Settings
from nybble.server.pool.pool import Pool
from nybble.server.service import Service

__all__ = ["allowed_hosts", "bind", "bind_unix", "is_loopback", "make_server", "serve"]

_BACKLOG = 256
_READ_BYTES = 1 << 16
"""Size of the buffer that connections read into."""
_PROBE_SECONDS = 0.2
"""How often a connection that the client has closed for writing is checked."""

_log = logging.getLogger("nybble.server")


def serve(
    served: Service | Pool,
    listener: socket.socket,
    ready: Callable[[str], object] = lambda _: None,
    certificate: Certificate | None = None,
) -> None:
    """Answers requests until SIGTERM, SIGHUP or Ctrl-C, then lets running answers finish. A second signal cancels them.

    Args:
        served: The model or the models to serve.
        listener: A bound socket, as `bind` returns it.
        ready: Called with the URL once the server accepts requests.
        certificate: With which the server speaks HTTPS; None for plain HTTP.

    Raises:
        OSError: The address is in use.
    """
    # Two processes may bind an address. The second one to listen fails here.
    with addresses.naming_address(addresses.name(listener)):
        listener.listen(_BACKLOG)
    make_server(served, ready, certificate).run(sockets=[listener])


def make_server(
    served: Service | Pool, ready: Callable[[str], object], certificate: Certificate | None = None
) -> uvicorn.Server:
    """A server that does not run yet."""
    pool = Pool.of(served)
    connections = within_open_files(pool.settings.max_connections)
    config = uvicorn.Config(
        create_app(pool),
        ssl_certfile=None if certificate is None else certificate.file,
        ssl_keyfile=None if certificate is None else certificate.key,
        http=_protocol(pool.settings, connections),
        loop="asyncio",  # Its event loop accepts connections through the listener.
        ws="none",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        timeout_graceful_shutdown=5,
        backlog=_BACKLOG,
    )
    logging.getLogger("uvicorn").setLevel(logging.ERROR)  # Malformed requests get an answer, not a log line.
    return _Server(config, pool, ready, connections)


class _Server(uvicorn.Server):
    """uvicorn's server. After a signal it refuses new requests with an error until the running ones are answered."""

    def __init__(
        self, config: uvicorn.Config, pool: Pool, ready: Callable[[str], object], connections: Connections
    ) -> None:
        super().__init__(config)
        self._connections = connections
        self._pool = pool
        self._ready = ready
        self._deadline = 0.0

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Starts to accept requests."""
        asyncio.get_running_loop().set_exception_handler(_log_loop_error)
        is_main = threading.current_thread() is threading.main_thread()
        if is_main and hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
            signal.signal(signal.SIGHUP, self.handle_exit)
        listeners: list[socket.socket] = [Listener(bound, self._connections) for bound in sockets or []]
        await super().startup(listeners)
        self._ready(addresses.url(listeners[0], "https" if self.config.is_ssl else "http"))

    def handle_exit(self, sig: int, frame: Any) -> None:
        """The first signal starts the drain, the second ends it."""
        shared = self._pool.shared
        if shared.draining:
            self._deadline = 0.0
        else:
            self._deadline = time.monotonic() + self._pool.settings.drain_seconds
            shared.draining = True

    async def on_tick(self, counter: int) -> bool:
        """Ends the server when all requests are answered or the drain time is over."""
        shared = self._pool.shared
        if shared.draining:
            self._pool.refuse_waiting()
        if shared.draining and (shared.working == 0 or time.monotonic() >= self._deadline):
            self._pool.stop()
            self.should_exit = True
        return await super().on_tick(counter)


def _log_loop_error(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    """Logs an error of the event loop in one line, and a traceback only for what is not the network's."""
    error = context.get("exception")
    if isinstance(error, OSError):
        _log.warning("%s: %s", context.get("message", "connection"), error)
    else:
        _log.error("%s", context.get("message", "error in the event loop"), exc_info=error)


def _protocol(settings: Settings, connections: Connections) -> type[H11Protocol]:
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
            self._number = transport.get_extra_info("socket").fileno()
            self._is_half_closed = False
            self._receiving = _Timer(settings.receive_seconds, transport.abort)
            self._stalled = _Timer(settings.stall_seconds, transport.abort)
            self._probing = _Timer(_PROBE_SECONDS, self._probe)
            self._receiving.start()
            # On Windows, connections do not come through the listener.
            if not connections.includes(self._number) and len(self.connections) > settings.max_connections:
                transport.write(b"HTTP/1.1 503 Service Unavailable\r\nRetry-After: 1\r\nConnection: close\r\n\r\n")
                transport.close()

        def data_received(self, data: bytes) -> None:
            connections.active(self._number)
            super().data_received(data)
            if self._is_answering():
                self._receiving.stop()  # The request is complete.
                connections.working(self._number)
            elif not self.transport.is_closing():
                self._receiving.start()

        def eof_received(self) -> bool | None:  # type: ignore[override]
            """Keeps the connection of a client that only closes it for writing, until its request is answered."""
            if self.scheme == "https" or not self._is_answering():
                return None
            self._is_half_closed = True
            if self.scope["http_version"] == "1.1" and not self.cycle.response_started:
                # Without this, nobody notices that a client has left: its system answers by a reset.
                self.transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")
            self._probing.start()
            return True

        def on_response_complete(self) -> None:
            super().on_response_complete()
            connections.answered(self._number)
            if self._is_half_closed:
                self.transport.close()

        def send_400_response(self, msg: str) -> None:
            _log.info("%s 400 %s", client_name(self.client), msg)
            if self.conn.our_state is h11.SEND_RESPONSE or self.conn.our_state is h11.IDLE:
                super().send_400_response(msg)
            else:  # Part of a response has been sent.
                self.transport.close()

        def connection_lost(self, exc: Exception | None) -> None:
            self._receiving.stop()
            self._stalled.stop()
            self._probing.stop()
            super().connection_lost(exc)

        def pause_writing(self) -> None:
            super().pause_writing()
            self._stalled.start()

        def resume_writing(self) -> None:
            super().resume_writing()
            self._stalled.stop()

        def _is_answering(self) -> bool:
            cycle = self.cycle
            return cycle is not None and not cycle.response_complete and not cycle.more_body

        def _probe(self) -> None:
            """Closes the connection if the client has closed it for reading, too."""
            if self.transport.is_closing():
                return
            if self.transport.get_extra_info("socket").getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
                self.transport.abort()
                return
            self._probing.stop()
            self._probing.start()

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
