"""Terminal output of the commands: streamed text, notes and tables. Pipes receive it without formatting."""

from __future__ import annotations

import datetime
import io
import logging
import os
import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from collections.abc import Iterable

    from rich.console import Console

    from nybble.chat.reasoning_splitter import OutputPart

_UNPRINTABLE: dict[int, str | None] = {code: None for code in (*range(32), *range(127, 160)) if code not in (9, 10)}
# Bytes that are not UTF-8 come as lone surrogates, which a terminal cannot print.
_UNPRINTABLE.update(dict.fromkeys(range(0xD800, 0xE000), "\ufffd"))


def printable(text: str) -> str:
    """`text` without control characters, so that a file or a model cannot control the terminal."""
    return text.translate(_UNPRINTABLE)


def write(text: str) -> None:
    """Writes a piece of a model's text: unchanged to a pipe, without control characters to a terminal."""
    sys.stdout.write(printable(text) if sys.stdout.isatty() else text)
    sys.stdout.flush()


def write_parts(parts: Iterable[OutputPart]) -> None:
    """Writes the parts of an answer: reasoning dim, or not at all to a pipe, and an empty line before the content."""
    is_after_reasoning = False
    for kind, text, _ in parts:
        if kind == "content":
            write(f"\n\n{text}" if is_after_reasoning and sys.stdout.isatty() else text)
        elif sys.stdout.isatty():
            sys.stdout.write(f"\x1b[2m{printable(text)}\x1b[0m" if _has_colors() else printable(text))
            sys.stdout.flush()
        is_after_reasoning = kind == "reasoning"


def _has_colors() -> bool:
    # NO_COLOR counts unless it is empty: https://no-color.org
    return not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def open_standard_streams() -> None:
    """Opens the null device in place of standard streams that the caller has closed.

    Without it, messages would fail, and files that are opened later would take the places of the streams.
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, Path(os.devnull).open(mode, encoding="utf-8"))  # noqa: SIM115


def replace_unencodable() -> None:
    """Makes standard output replace characters that its encoding lacks, such as emoji in Latin-1."""
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors == "strict":
        sys.stdout.reconfigure(errors="replace")


def note(text: str) -> None:
    """Writes a line to standard error, dim on a terminal."""
    dim = sys.stderr.isatty() and _has_colors()
    text = printable(text)
    sys.stderr.write(f"\x1b[2m{text}\x1b[0m\n" if dim else f"{text}\n")
    sys.stderr.flush()


def complain(text: str) -> None:
    """Writes the one line that says why a command failed."""
    sys.stderr.write(f"nybble: {printable(' '.join(text.split()))}\n")
    sys.stderr.flush()


def explain(error: BaseException) -> str:
    """The message of an error. That of a file begins with the file, as all messages do, and has no error number."""
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        return f"{os.fsdecode(error.filename)}: {error.strerror}"
    return str(error) or type(error).__name__


class _Notes(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        note(f"nybble: {self.format(record)}")


def show_log() -> None:
    """Writes log messages of the package to standard error, such as the source of a download."""
    logger = logging.getLogger("nybble")
    if not any(isinstance(handler, _Notes) for handler in logger.handlers):
        logger.addHandler(_Notes())
        logger.setLevel(logging.INFO)


def log_with_times(name: str, level: str) -> None:
    """Writes the log of a long-running command to standard error, each line with its time and level."""
    handler = logging.StreamHandler()
    handler.setFormatter(_Line("%(asctime)s %(levelname)-7s %(message)s"))
    for each in (name, "uvicorn", "asyncio"):
        logger = logging.getLogger(each)
        logger.handlers = [handler]
        logger.propagate = False
    logging.getLogger(name).setLevel(level.upper())


class _Line(logging.Formatter):
    """Times in the format of RFC 3339, with the offset from UTC."""

    def formatTime(self, record: logging.LogRecord, datefmt: str | None = None) -> str:  # noqa: N802
        return datetime.datetime.fromtimestamp(record.created).astimezone().isoformat(timespec="milliseconds")


def show_warnings() -> None:
    """Writes each warning as one line, without its source code."""
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
    """A console on standard output for tables, 80 columns wide without a terminal. It interprets no markup."""
    from rich.console import Console

    return Console(highlight=False, markup=False, emoji=False)


def human_bytes(count: int) -> str:
    """A size with a unit: 98362432 becomes "98.4 MB"."""
    size = float(count)
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.1f} {unit}" if unit != "B" else f"{count} B"
        size /= 1000
    return f"{size:.1f} TB"
