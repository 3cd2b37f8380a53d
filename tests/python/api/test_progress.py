"""Progress has one convention in every call: None, True, False or a function."""

from __future__ import annotations

import io
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import nybble
from nybble import Model, Progress, Reference
from nybble import progress as shown

TEXT = "A text of several hundred characters, enough for windows of a hundred. " * 5


@pytest.fixture
def loud(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every bar is drawn at once."""
    monkeypatch.setattr(shown, "BAR_AFTER_SECONDS", -1.0)
    monkeypatch.setenv("TERM", "xterm")


def stderr(monkeypatch: pytest.MonkeyPatch, *, terminal: bool) -> io.StringIO:
    written = io.StringIO()
    written.isatty = lambda: terminal  # type: ignore[method-assign]
    monkeypatch.setattr(sys, "stderr", written)
    return written


class Notebook:
    """The part of IPython that a notebook's kernel has. It records what each output shows."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.outputs: list[list[str]] = []
        ipython: Any = types.ModuleType("IPython")
        ipython.get_ipython = lambda: types.SimpleNamespace(kernel=object())
        display: Any = types.ModuleType("IPython.display")
        display.display = self._display
        monkeypatch.setitem(sys.modules, "IPython", ipython)
        monkeypatch.setitem(sys.modules, "IPython.display", display)

    def _display(self, data: dict[str, str], *, raw: bool, display_id: bool) -> Any:
        assert raw
        assert display_id
        lines = [data["text/plain"]]
        self.outputs.append(lines)
        return types.SimpleNamespace(update=lambda data, raw: lines.append(data["text/plain"]))


def calls(file: Path, model: Model) -> dict[str, Callable[[Any], object]]:
    """Every call that takes `progress`, by the description of its work."""
    return {
        "loading tiny.gguf": lambda progress: Model.load(file, progress=progress).close(),
        "evaluating": lambda progress: nybble.evaluate(model, [TEXT], window=100, progress=progress),
        "evaluating the reference": lambda progress: Reference(model, [TEXT], window=100, progress=progress),
    }


@pytest.mark.parametrize("what", ["loading tiny.gguf", "evaluating", "evaluating the reference"])
@pytest.mark.parametrize(
    ("progress", "terminal", "visible"),
    [(None, True, True), (None, False, False), (True, True, True), (False, True, False), (False, False, False)],
)
def test_a_bar_is_drawn_on_a_terminal_unless_refused(
    tiny_file: Path,
    tiny_model: Model,
    monkeypatch: pytest.MonkeyPatch,
    loud: None,
    what: str,
    progress: Progress,
    terminal: bool,
    visible: bool,
) -> None:
    written = stderr(monkeypatch, terminal=terminal)
    calls(tiny_file, tiny_model)[what](progress)
    assert (what in written.getvalue()) == visible


@pytest.mark.parametrize("what", ["loading tiny.gguf", "evaluating", "evaluating the reference"])
def test_true_writes_lines_where_there_is_no_terminal(
    tiny_file: Path, tiny_model: Model, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    written = stderr(monkeypatch, terminal=False)
    calls(tiny_file, tiny_model)[what](True)
    lines = written.getvalue().splitlines()
    assert lines[-1] == f"{what}: 100%"
    assert len(lines) == len(set(lines)) <= 11
    assert "\x1b" not in written.getvalue()


@pytest.mark.parametrize("progress", [None, True])
def test_a_notebook_shows_one_line_that_is_rewritten(
    tiny_file: Path, monkeypatch: pytest.MonkeyPatch, loud: None, progress: Progress
) -> None:
    written, notebook = stderr(monkeypatch, terminal=False), Notebook(monkeypatch)
    Model.load(tiny_file, progress=progress).close()
    (lines,) = notebook.outputs
    assert lines[-2].startswith("loading tiny.gguf ████")
    assert lines[-2].endswith(" 100%")
    assert lines[-1] == "", "the bar disappears at the end"
    assert written.getvalue() == ""
    Model.load(tiny_file, progress=False).close()
    assert len(notebook.outputs) == 1


def test_a_bar_waits_for_a_second_and_true_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    notebook = Notebook(monkeypatch)
    monkeypatch.setattr(shown, "BAR_AFTER_SECONDS", 1e9)
    for progress, expected in ((None, 0), (True, 1)):
        with shown.counts(progress, "working") as report:
            assert report is not None
            report(1, 2)
        assert len(notebook.outputs) == expected


def test_stages_are_named_in_bars_and_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    written = stderr(monkeypatch, terminal=False)
    with shown.stages(True, "quantizing") as report:
        assert report is not None
        for stage in ("calibrating", "writing"):
            for done in range(101):
                report(stage, done, 100)
        report("empty", 0, 0)
    lines = written.getvalue().splitlines()
    assert lines[:2] == ["quantizing: calibrating: 0%", "quantizing: calibrating: 10%"]
    assert lines[11] == "quantizing: writing: 0%"
    assert lines[22:] == ["quantizing: empty: 0%"]


@pytest.mark.parametrize("progress", [5, "yes", 1])
def test_any_other_progress_is_refused_by_name(tiny_file: Path, tiny_model: Model, progress: Any) -> None:
    for call in calls(tiny_file, tiny_model).values():
        with pytest.raises(TypeError, match=r"progress: found (int|str), expected None, True, False or a function"):
            call(progress)
    with pytest.raises(TypeError, match="progress: found"):
        nybble.quantize(tiny_file, tiny_file.with_name("out.gguf"), recipe="rtn", force=True, progress=progress)
