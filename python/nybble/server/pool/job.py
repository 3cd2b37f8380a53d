"""Runs work in a thread, and calls back in the event loop when it ends."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable
from typing import Generic, TypeVar

T = TypeVar("T")


class StoppedError(Exception):
    """The server ends while the work is under way."""


class Job(Generic[T]):
    """Work in a thread.

    Args:
        work: Computes the result. It receives the job, and passes `report` on as the progress of long calls.
        done: Called in the event loop with the job when the work has ended.
    """

    def __init__(self, work: Callable[[Job[T]], T], done: Callable[[Job[T]], object]) -> None:
        self.result: T | None = None
        self.error: BaseException | None = None
        self.is_delivered: bool = False
        """Whether `done` has been called."""
        self._work = work
        self._done = done
        self._stops = threading.Event()
        self._loop = asyncio.get_running_loop()
        # A daemon, so that a call that reports nothing, such as one that waits for the network, keeps no process alive.
        self._thread = threading.Thread(target=self._run, name="nybble-loading", daemon=True)
        self._thread.start()

    def report(self, done: int, total: int) -> None:
        """Continues the work unless it was asked to stop.

        Raises:
            StoppedError: `stop` was called.
        """
        if self._stops.is_set():
            raise StoppedError

    def stop(self, seconds: float) -> None:
        """Asks the work to stop, and waits for it, but no longer than some seconds."""
        self._stops.set()
        self._thread.join(seconds)

    def _run(self) -> None:
        try:
            self.report(0, 0)
            self.result = self._work(self)
        except BaseException as error:
            self.error = error
        with contextlib.suppress(RuntimeError):  # The loop is closed: the pool looks at the result when it closes.
            self._loop.call_soon_threadsafe(self._deliver)

    def _deliver(self) -> None:
        self.is_delivered = True
        self._done(self)
