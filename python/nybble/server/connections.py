"""Keeps the number of connections below the limit of open files, so that idle ones never keep working ones out."""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import sys
from pathlib import Path
from typing import Any

_RESERVED_FILES = 64
"""Open files for everything but connections, in addition to those that are open at the start."""
_CLOSING = 128
"""Connections that may be on their way out beyond the limit: the event loop needs a moment to close them."""
_SHARE = 8
"""Both are at most this part of the open files that are allowed."""
_REFUSAL = b"HTTP/1.1 503 Service Unavailable\r\nRetry-After: 1\r\nConnection: close\r\nContent-Length: 0\r\n\r\n"


class Connections:
    """The open connections of a server.

    Beyond the limit, a new connection replaces the one that has been idle for longest. One whose request is being
    answered is never replaced. If all are, the new connection is refused.

    Args:
        limit: The largest number of connections.
        closing: How many more may be on their way out.
    """

    def __init__(self, limit: int, closing: int = _CLOSING) -> None:
        self.limit = limit
        self._closing = closing
        self._open: dict[int, _Accepted] = {}
        self._idle: dict[int, None] = {}
        """Numbers of the files of idle connections, those without activity for longest first."""
        self._evicted: set[int] = set()

    def accepted(self, connection: _Accepted) -> bool:
        """Registers a new connection. False if it must be refused."""
        number = connection.fileno()
        if len(self._open) - len(self._evicted) >= self.limit and not self._evict():
            return False
        self._open[number] = connection
        self._idle[number] = None
        return True

    def includes(self, number: int) -> bool:
        """Whether the connection came through the listener."""
        return number in self._open

    def is_waiting(self) -> bool:
        """Whether too many connections are on their way out to accept more at the moment."""
        return len(self._evicted) >= self._closing

    def active(self, number: int) -> None:
        """Notes that something was received on an idle connection."""
        if number in self._idle:
            del self._idle[number]
            self._idle[number] = None

    def working(self, number: int) -> None:
        """Notes that a request is complete, and is being answered."""
        self._idle.pop(number, None)

    def answered(self, number: int) -> None:
        """Notes that the connection is idle again."""
        if number in self._open and number not in self._evicted:
            self._idle[number] = None

    def closed(self, number: int) -> None:
        """Forgets a connection."""
        self._open.pop(number, None)
        self._idle.pop(number, None)
        self._evicted.discard(number)

    def _evict(self) -> bool:
        """Closes the connection that has been idle for longest. The event loop reads its end and closes the file."""
        number = next(iter(self._idle), None)
        if number is None:
            return False
        del self._idle[number]
        self._evicted.add(number)
        with contextlib.suppress(OSError):
            self._open[number].shutdown(socket.SHUT_RDWR)
        return True


class _Accepted(socket.socket):
    """A connection that says when its file is closed."""

    owner: Connections | None = None

    def close(self) -> None:
        """Closes the file."""
        if self.owner is not None and (number := self.fileno()) >= 0:
            self.owner.closed(number)
        super().close()


class Listener(socket.socket):
    """A listening socket whose connections are limited."""

    def __init__(self, bound: socket.socket, connections: Connections) -> None:
        """Takes over a bound socket."""
        super().__init__(bound.family, bound.type, bound.proto, fileno=bound.detach())
        self._connections = connections
        self._spare = os.open(os.devnull, os.O_RDONLY)

    def accept(self) -> tuple[socket.socket, Any]:
        """Accepts a connection.

        Raises:
            BlockingIOError: None is waiting, or it was refused.
        """
        if self._connections.is_waiting():
            raise BlockingIOError(errno.EAGAIN, "connections are being closed")
        try:
            accepted, address = super().accept()
        except OSError as error:
            if error.errno in (errno.EMFILE, errno.ENFILE):
                self._refuse_without_file()
                raise BlockingIOError(errno.EAGAIN, "too many open files") from None
            raise
        kept = _Accepted(accepted.family, accepted.type, accepted.proto, fileno=accepted.detach())
        if not self._connections.accepted(kept):
            kept.setblocking(False)
            with contextlib.suppress(OSError):
                kept.send(_REFUSAL)
            kept.close()
            raise BlockingIOError(errno.EAGAIN, "too many connections")
        kept.owner = self._connections
        return kept, address

    def close(self) -> None:
        """Closes the socket."""
        if self._spare >= 0:
            os.close(self._spare)
            self._spare = -1
        super().close()

    def _refuse_without_file(self) -> None:
        """Closes the waiting connection with the spare file, or the event loop would report it again and again."""
        if self._spare < 0:
            return
        os.close(self._spare)
        self._spare = -1
        with contextlib.suppress(OSError):
            super().accept()[0].close()
        with contextlib.suppress(OSError):
            self._spare = os.open(os.devnull, os.O_RDONLY)


def within_open_files(wanted: int) -> Connections:
    """At most `wanted` connections, fewer if the limit of open files demands it.

    Raises the soft limit of this process as far as needed and allowed.
    """
    try:
        import resource
    except ImportError:  # Windows has no such limit.
        return Connections(wanted)
    used = _open_files()
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = wanted + used + _RESERVED_FILES + _CLOSING
    if soft != resource.RLIM_INFINITY and soft < needed:
        more = needed if hard == resource.RLIM_INFINITY else min(hard, needed)
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (more, hard))
            soft = more
    if soft == resource.RLIM_INFINITY:
        return Connections(wanted)
    closing, reserved = min(_CLOSING, soft // _SHARE), min(_RESERVED_FILES, soft // _SHARE)
    return Connections(max(1, min(wanted, soft - used - closing - reserved)), closing)


def _open_files() -> int:
    folder = "/proc/self/fd" if sys.platform == "linux" else "/dev/fd"
    try:
        return sum(1 for _ in Path(folder).iterdir())
    except OSError:
        return 32
