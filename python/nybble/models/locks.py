"""Locks between processes and threads that write the same file of nybble's cache."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from nybble.models.hub_client import log
from nybble.models.paths import cache_dir


@contextlib.contextmanager
def lock(name: str) -> Iterator[bool]:
    """Holds the lock of the file with that name in nybble's cache. Others wait; the system releases it after a kill.

    File systems without locks let all pass, with False.
    """
    import filelock

    folder = cache_dir() / "locks"
    folder.mkdir(parents=True, exist_ok=True)
    held = filelock.FileLock(folder / f"{name}.lock")
    try:
        held.acquire(timeout=0)
    except filelock.Timeout:
        log.info("waiting for another process or thread that writes %s", name)
        held.acquire()
    except (OSError, NotImplementedError):
        log.debug("%s: the file system has no locks", folder)
    try:
        yield held.is_locked
    finally:
        held.release()
