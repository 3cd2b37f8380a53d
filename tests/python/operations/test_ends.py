"""Commands that a signal ends leave nothing behind, and the next run makes the same file."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny

from nybble import cli, quantize
from nybble.cli import ending

if sys.platform == "win32":
    pytest.skip("Windows has no signals of this kind", allow_module_level=True)

SIGNALS = [signal.SIGTERM, signal.SIGHUP, signal.SIGINT, signal.SIGKILL]
MOMENTS = 20
STEP = 1 if os.environ.get("NYBBLE_ALL_MOMENTS") else 5
"""NYBBLE_ALL_MOMENTS=1 tries each signal at each moment, which takes a quarter of an hour."""

SCRIPT = """
import os, signal, sys
import rich.table, tokenizers
import nybble.cli.convert, nybble.cli.quantize, nybble.quantization.report_page, nybble.tokenizer.encoders
from nybble import _native
from nybble.cli import main

for line in sys.stdin:
    number, moment = map(int, line.split())
    child = os.fork()
    if child == 0:
        break
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
else:
    sys.exit()

os.dup2(2, 1)
signal.alarm(120)
calls = [0]

def counting(real):
    def call(*arguments, progress=None, **options):
        def report(*state):
            calls[0] += 1
            if calls[0] == moment:
                os.kill(os.getpid(), number)
            return None if progress is None else progress(*state)
        return real(*arguments, progress=report, **options)
    return call

native_convert = _native.convert
_native.convert = lambda source, out, kind, progress=None, adapter=None: counting(
    lambda progress: native_convert(source, out, kind, progress, adapter))(progress=progress)
_native.quantize = counting(_native.quantize)
sys.exit(main(sys.argv[1:]))
"""
"""Runs a command once for each line of its input, and prints the exit code. The command sends itself a signal at one of
its reports of progress. Each run is a fork, because imports take several times as long as the command."""

COMMANDS = {
    "convert": ["convert", "{source}", "{out}", "--type", "f32", "--force"],
    "quantize": ["quantize", "{source}", "{out}", "--recipe", "gptq", "--calibration", "{text}", "--force"],
    "bits": [
        *("quantize", "{source}", "{out}", "--recipe", "rtn", "--calibration", "{text}", "--force"),
        *("--bits-per-weight", "6", "--imatrix", "{folder}/imatrix.gguf", "--report", "{folder}/report.json"),
    ],
    "search": ["quantize", "{source}", "{out}", "--calibration", "{text}", "--force"],
}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_model(tmp_path_factory.mktemp("source") / "tiny.gguf", layers=1, feed_forward=32)


def _runs(process: subprocess.Popen[str]) -> Callable[..., int]:
    """Returns a function that runs the command of `process` and returns its exit code."""
    assert process.stdin is not None
    assert process.stdout is not None
    questions, answers = process.stdin, process.stdout

    def run(number: int = 0, moment: int = 0) -> int:
        print(int(number), moment, file=questions, flush=True)
        return int(answers.readline())

    return run


@pytest.mark.parametrize("number", SIGNALS, ids=lambda number: number.name)
@pytest.mark.parametrize("name", list(COMMANDS))
def test_a_command_that_is_ended_leaves_nothing(
    name: str, number: signal.Signals, source: Path, tmp_path: Path
) -> None:
    text = tmp_path / "prose.txt"
    text.write_text("Some prose to calibrate on, again and again. " * 60)
    folder = tmp_path / "out"
    folder.mkdir()
    out = folder / "model.gguf"
    command = [part.format(source=source, out=out, text=text, folder=folder) for part in COMMANDS[name]]
    start = [sys.executable, "-c", SCRIPT, *command]
    pipe, devnull = subprocess.PIPE, subprocess.DEVNULL
    with subprocess.Popen(start, stdin=pipe, stdout=pipe, stderr=devnull, text=True) as process:
        run = _runs(process)
        assert run() == 0
        whole = _contents(folder)
        codes = []
        # A conversion of a small model reports twice, the others at all moments.
        first = 1 + SIGNALS.index(number) % (min(STEP, 2) if name == "convert" else STEP)
        for moment in range(first, MOMENTS + 1, STEP):
            for path in folder.iterdir():
                path.unlink()
            code = run(number, moment)
            codes.append(code)
            assert code in (0, 128 + number, -number), f"{number.name} at report {moment}: exit code {code}"
            left = set(_contents(folder)) - set(whole)
            if number != signal.SIGKILL:
                # Only what the next run continues from.
                assert all(".resume" in one for one in left), f"{number.name} at report {moment} has left {left}"
            if code:
                assert run() == 0
            assert _contents(folder) == whole, f"{number.name} at report {moment}"
        assert any(codes), f"no {number.name} has ended the command"


def _contents(folder: Path) -> dict[str, bytes]:
    """The files of a folder. Reports differ in their times."""
    return {path.name: b"" if path.suffix == ".json" else path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("is_renamed", [True, False])
def test_what_a_finished_run_has_left_goes_with_the_next(is_renamed: bool, source: Path, tmp_path: Path) -> None:
    out = tmp_path / "model.gguf"
    quantize(source, out, recipe="rtn")
    state = out.stat()
    left = [tmp_path / name for name in ("model.gguf.resume", "model.gguf.resume-state", ".model.gguf.gptq.gguf")]
    for path in left:
        path.write_bytes(b"work")
    mark = tmp_path / "model.gguf.resume-done"
    mark.write_text(f"{state.st_size} {state.st_mtime_ns if is_renamed else 1}")
    for _ in range(2):
        with pytest.raises(FileExistsError):
            quantize(source, out, recipe="rtn")
        assert [path.exists() for path in [*left, mark]] == [not is_renamed] * 4
    assert out.stat().st_mtime_ns == state.st_mtime_ns


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_chat_ends_by_a_signal_too(number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli, "_run", lambda arguments: _raise_and_catch(number))
    before = signal.getsignal(number)
    assert cli.main([]) == 128 + number
    assert signal.getsignal(number) is before


def _raise_and_catch(number: int) -> int:
    try:
        signal.raise_signal(number)
    except KeyboardInterrupt:
        return 0  # As a chat does, which would continue.
    except SystemExit as ended:
        return int(ended.code or 0)
    return 0


def test_a_signal_that_was_ignored_stays_ignored() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with ending.ending_signals():
            signal.raise_signal(signal.SIGHUP)
    finally:
        signal.signal(signal.SIGHUP, before)
