"""Ends commands on SIGTERM, SIGHUP and Ctrl-Break as on Ctrl-C: cleanup runs, and nothing is left behind."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from typing import Any

_ENDING = ("SIGTERM", "SIGHUP", "SIGBREAK")
"""Not all systems have all of them. Windows sends SIGBREAK for Ctrl-Break, and when a console is closed."""


class Ended(SystemExit):
    """A signal has ended the command. Not a KeyboardInterrupt, which a chat survives."""

    def __init__(self, number: int) -> None:
        super().__init__(128 + number)  # The exit code that a shell reports after a signal.


@contextlib.contextmanager
def ending_signals() -> Iterator[None]:
    """Raises `Ended` in the main thread on SIGTERM, SIGHUP and SIGBREAK, for the duration of the block.

    The kernel ignores a signal to the first process of a container unless that process handles it. A signal that is
    ignored from the start, as `nohup` does for SIGHUP, stays ignored.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    numbers = [getattr(signal, name) for name in _ENDING if hasattr(signal, name)]
    before = {number: signal.getsignal(number) for number in numbers}

    def end(number: int, frame: Any) -> None:
        # A second signal must not interrupt the cleanup.
        for each in numbers:
            signal.signal(each, signal.SIG_IGN)
        raise Ended(number)

    for number, handler in before.items():
        if handler is signal.SIG_DFL:
            signal.signal(number, end)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
