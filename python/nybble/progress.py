"""Reports progress: a bar on a terminal or in a notebook, lines in a log, or calls of a function."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

BAR_AFTER_SECONDS = 1.0

Progress = Callable[[int, int], object] | bool | None
"""How a call reports its progress.

- `None`: a bar on a terminal or in a notebook if the work takes more than a second, otherwise nothing.
- `True`: a bar from the start; without a terminal or notebook, a line on standard error for each tenth of the work.
- `False`: nothing.
- A function: called from time to time with the work done and the total. An exception that it raises stops the work.
"""

StageProgress = Callable[[str, int, int], object] | bool | None
"""As `Progress`, for work of several stages: a function is called with the stage, the work done and the total."""

_Show = Callable[[str, int, int], None]
"""Called with a description, the work done and the total."""


@contextlib.contextmanager
def counts(progress: Progress, what: str) -> Iterator[Callable[[int, int], object] | None]:
    """Yields the function to call with the work done and the total. None if nothing is reported.

    Args:
        progress: The argument of the public call.
        what: The work, such as "loading model.gguf".

    Raises:
        TypeError: `progress` is not a `Progress`.
    """
    if callable(progress):
        yield progress
        return
    with _shown(progress) as show:
        yield None if show is None else lambda done, total: show(what, done, total)


@contextlib.contextmanager
def stages(progress: StageProgress, what: str) -> Iterator[Callable[[str, int, int], object] | None]:
    """As `counts`, for work of several stages."""
    if callable(progress):
        yield progress
        return
    with _shown(progress) as show:
        yield None if show is None else lambda stage, done, total: show(f"{what}: {stage}", done, total)


@contextlib.contextmanager
def bar(what: str) -> Iterator[Callable[[int, int], object]]:
    """Yields a callback (done, total) that draws a bar on a terminal if the work takes more than a second."""
    with counts(None, what) as report:
        yield report or (lambda done, total: None)


def is_visible(progress: Progress | StageProgress) -> bool:
    """Whether `progress` stands for a bar or lines here."""
    return not callable(progress) and _form(progress) is not None


@contextlib.contextmanager
def _shown(progress: bool | None) -> Iterator[_Show | None]:
    if progress is not None and not isinstance(progress, bool):
        raise TypeError(f"progress: found {type(progress).__name__}, expected None, True, False or a function")
    form = _form(progress)
    if form is None:
        yield None
        return
    began = time.monotonic()
    with contextlib.ExitStack() as stack:
        show: _Show | None = None

        def advance(text: str, done: int, total: int) -> None:
            nonlocal show
            if show is None and (progress is True or time.monotonic() - began > BAR_AFTER_SECONDS):
                show = stack.enter_context(form())
            if show is not None:
                show(text, done, total)

        yield advance


def _form(progress: object) -> Callable[[], contextlib.AbstractContextManager[_Show]] | None:
    if progress is False:
        return None
    if _in_notebook():
        return _displayed
    if sys.stderr is not None and sys.stderr.isatty():
        return _drawn
    return _logged if progress is True else None


def _in_notebook() -> bool:
    """Whether this process is the kernel of a notebook. A process that has not imported IPython is not."""
    ipython: Any = sys.modules.get("IPython")
    shell = None if ipython is None else ipython.get_ipython()
    return hasattr(shell, "kernel")


@contextlib.contextmanager
def _drawn() -> Iterator[_Show]:
    """A bar on a terminal, which disappears at the end."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}", markup=False), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bars:
        task = bars.add_task("", total=None)
        before = 0

        def show(text: str, done: int, total: int) -> None:
            nonlocal before
            if done < before:  # A new stage has its own speed, from which the remaining time is estimated.
                bars.reset(task)
            bars.update(task, completed=done, total=total, description=text)
            before = done

        yield show


@contextlib.contextmanager
def _displayed() -> Iterator[_Show]:
    """A line of text in the output of a notebook's cell, which is rewritten and disappears at the end."""
    from IPython.display import display

    handle: Any = None
    before = ""

    def show(text: str, done: int, total: int) -> None:
        nonlocal handle, before
        percent = _percent(done, total)
        filled = percent * 40 // 100
        line = f"{text} {'█' * filled}{'░' * (40 - filled)} {percent:3}%"
        if line == before:
            return
        before = line
        if handle is None:
            handle = display({"text/plain": line}, raw=True, display_id=True)
        else:
            handle.update({"text/plain": line}, raw=True)

    try:
        yield show
    finally:
        if handle is not None:
            handle.update({"text/plain": ""}, raw=True)


@contextlib.contextmanager
def _logged() -> Iterator[_Show]:
    """A line on standard error for each tenth of the work."""
    before = ("", -1)

    def show(text: str, done: int, total: int) -> None:
        nonlocal before
        now = (text, _percent(done, total) // 10)
        if now != before and sys.stderr is not None:
            sys.stderr.write(f"{text}: {10 * now[1]}%\n")
            sys.stderr.flush()
        before = now

    yield show


def _percent(done: int, total: int) -> int:
    return min(100, 100 * done // total) if total > 0 else 0
