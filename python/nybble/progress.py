"""A progress bar on standard error, for what takes its time, where somebody sits at a terminal."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator

BAR_AFTER_SECONDS = 1.0


@contextlib.contextmanager
def bar(what: str) -> Iterator[Callable[[int, int], None]]:
    """Gives a callback (done, total) that draws a bar on a terminal once the work turns out to take its time."""
    if sys.stderr is None or not sys.stderr.isatty():
        yield lambda done, total: None
        return
    began = time.monotonic()
    with contextlib.ExitStack() as stack:
        show: Callable[[int, int], None] | None = None

        def advance(done: int, total: int) -> None:
            nonlocal show
            if show is None and time.monotonic() - began > BAR_AFTER_SECONDS:
                show = stack.enter_context(_drawn(what))
            if show is not None:
                show(done, total)

        yield advance


@contextlib.contextmanager
def _drawn(what: str) -> Iterator[Callable[[int, int], None]]:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn

    columns = (TextColumn("{task.description}", markup=False), BarColumn(), TaskProgressColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bars:
        task = bars.add_task(what, total=None)
        yield lambda done, total: bars.update(task, completed=done, total=total)
