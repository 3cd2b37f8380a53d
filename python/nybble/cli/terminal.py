"""What the commands show besides their result: one-line notes and tables. All of it plain when piped."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from rich.console import Console

_UNPRINTABLE: dict[int, str | None] = {code: None for code in (*range(32), *range(127, 160)) if code not in (9, 10)}
# Bytes of a file that are no UTF-8 come as lone surrogates, which no terminal takes.
_UNPRINTABLE.update(dict.fromkeys(range(0xD800, 0xE000), "\ufffd"))


def printable(text: str) -> str:
    """`text` without control characters: what a file or a model says must not steer the terminal."""
    return text.translate(_UNPRINTABLE)


def write(text: str) -> None:
    """Streams a piece of a model's text: as it is into a pipe, without control characters on a terminal."""
    sys.stdout.write(printable(text) if sys.stdout.isatty() else text)
    sys.stdout.flush()


def note(text: str) -> None:
    """A line on standard error, dim on a terminal."""
    dim = sys.stderr.isatty() and "NO_COLOR" not in os.environ
    text = printable(text)
    sys.stderr.write(f"\x1b[2m{text}\x1b[0m\n" if dim else f"{text}\n")
    sys.stderr.flush()


def complain(text: str) -> None:
    """The one line that says why a command failed."""
    sys.stderr.write(f"nybble: {printable(' '.join(text.split()))}\n")
    sys.stderr.flush()


class _Notes(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        note(f"nybble: {self.format(record)}")


def show_log() -> None:
    """Shows what the package logs, such as where a model is fetched from."""
    logger = logging.getLogger("nybble")
    if not any(isinstance(handler, _Notes) for handler in logger.handlers):
        logger.addHandler(_Notes())
        logger.setLevel(logging.INFO)


def show_warnings() -> None:
    """Shows warnings as a line each, without the line of code that they come from."""
    warnings.showwarning = _note_warning


def _note_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    note(f"nybble: {message}")


def console() -> Console:
    """Standard output for tables: 80 columns where there is no terminal to ask. Texts are shown as they are."""
    from rich.console import Console

    return Console(highlight=False, markup=False, emoji=False)


def human_bytes(count: int) -> str:
    """98362432 -> "98.4 MB"."""
    size = float(count)
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.1f} {unit}" if unit != "B" else f"{count} B"
        size /= 1000
    return f"{size:.1f} TB"
