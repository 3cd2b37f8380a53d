"""Progress bars on standard error, if it is a terminal."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator

BAR_AFTER_SECONDS = 1.0


@contextlib.contextmanager
def bar(what: str) -> Iterator[Callable[[int, int], None]]:
    """Yields a callback (done, total) that draws a bar on a terminal if the work takes more than a second."""
    if sys.stderr is None or not sys.stderr.isatty():
        yield lambda done, total: None
        return
    began = time.monotonic()
    with contextlib.ExitStack() as stack:
        show: Callable[..., None] | None = None

        def advance(done: int, total: int) -> None:
            nonlocal show
            if show is None and time.monotonic() - began > BAR_AFTER_SECONDS:
                show = stack.enter_context(_drawn(what))
            if show is not None:
                show(done, total)

        yield advance


@contextlib.contextmanager
def stages(what: str) -> Iterator[Callable[[str, int, int], None]]:
    """Yields a callback (stage, done, total) for work of several stages, which draws a bar at once."""
    if sys.stderr is None or not sys.stderr.isatty():
        yield lambda stage, done, total: None
        return
    with _drawn(what) as show:
        before = 0

        def advance(stage: str, done: int, total: int) -> None:
            nonlocal before
            # A new stage has its own speed, from which the remaining time is estimated.
            show(done, total, f"{what}: {stage}", done < before)
            before = done

        yield advance


@contextlib.contextmanager
def _drawn(what: str) -> Iterator[Callable[..., None]]:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}", markup=False), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bars:
        task = bars.add_task(what, total=None)

        def show(done: int, total: int, text: str = what, is_new: bool = False) -> None:
            if is_new:
                bars.reset(task)
            bars.update(task, completed=done, total=total, description=text)

        yield show
