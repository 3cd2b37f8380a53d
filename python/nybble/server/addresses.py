"""The addresses that a server listens on: TCP and Unix sockets."""

from __future__ import annotations

import contextlib
import errno
import ipaddress
import os
import socket
import stat
from collections.abc import Iterator
from pathlib import Path

_LOOPBACK_NAMES = frozenset({"localhost", "127.0.0.1", "::1"})


def bind(host: str, port: int) -> socket.socket:
    """A socket that is bound to an address and does not listen yet.

    Raises:
        OSError: The address is in use or does not belong to this machine.
    """
    with naming_address(f"{host} port {port}"):
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
        try:
            # On Windows, SO_REUSEADDR would let another server take the address over.
            option = getattr(socket, "SO_EXCLUSIVEADDRUSE", socket.SO_REUSEADDR)
            listener.setsockopt(socket.SOL_SOCKET, option, 1)
            listener.bind(address)
        except OSError:
            listener.close()
            raise
    return listener


@contextlib.contextmanager
def bind_unix(path: Path) -> Iterator[socket.socket]:
    """A Unix socket at a path, for the duration of the block. One that a killed server has left is replaced.

    Raises:
        OSError: Another server listens there, or something other than a socket is there.
        ValueError: The system has no Unix sockets.
    """
    if not hasattr(socket, "AF_UNIX"):
        raise ValueError("unix_socket: this system has no Unix sockets")
    with naming_address(str(path)):
        _remove_stale(path)
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            listener.bind(os.fspath(path))
        except OSError:
            listener.close()
            raise
    own = path.stat()
    try:
        yield listener
    finally:
        listener.close()
        with contextlib.suppress(OSError):
            if os.path.samestat(path.stat(), own):
                path.unlink()


def _remove_stale(path: Path) -> None:
    try:
        is_socket = stat.S_ISSOCK(path.lstat().st_mode)
    except FileNotFoundError:
        return
    if not is_socket:
        raise FileExistsError(errno.EEXIST, "something other than a socket is there")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as client:
        try:
            client.connect(os.fspath(path))
        except ConnectionRefusedError:
            path.unlink()
            return
    raise OSError(errno.EADDRINUSE, os.strerror(errno.EADDRINUSE))


@contextlib.contextmanager
def naming_address(address: str) -> Iterator[None]:
    """Adds the address to the message of an OSError, and leaves the error number out."""
    try:
        yield
    except OSError as error:
        raise OSError(f"cannot listen on {address}: {error.strerror or error}") from error


def name(listener: socket.socket) -> str:
    """The address of a socket, for messages."""
    if _is_unix(listener):
        return str(listener.getsockname())
    host, port = listener.getsockname()[:2]
    return f"{host} port {port}"


def url(listener: socket.socket, scheme: str) -> str:
    """The URL of a socket, as `unix:PATH` for a Unix socket."""
    if _is_unix(listener):
        return f"unix:{listener.getsockname()}"
    host, port = listener.getsockname()[:2]
    return f"{scheme}://[{host}]:{port}" if ":" in host else f"{scheme}://{host}:{port}"


def is_loopback(listener: socket.socket) -> bool:
    """Whether only this machine can reach the socket."""
    return _is_unix(listener) or ipaddress.ip_address(listener.getsockname()[0]).is_loopback


def allowed_hosts(listener: socket.socket, more: list[str]) -> frozenset[str] | None:
    """The host names that requests may use; None for any.

    A socket on a loopback address allows the names of this machine and `more`, so that a name that an attacker
    points to this machine is refused.
    """
    return _LOOPBACK_NAMES.union(name.lower() for name in more) if is_loopback(listener) or more else None


def _is_unix(listener: socket.socket) -> bool:
    return hasattr(socket, "AF_UNIX") and listener.family == socket.AF_UNIX
