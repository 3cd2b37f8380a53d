"""The native half of quantization: arrays, exceptions and signals."""

from __future__ import annotations

import dataclasses
import json
import resource
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from nybble import QuantizeOptions, _native

CHECKPOINT = Path(__file__).parents[2] / "data" / "goldens" / "llama"
GPTQ = QuantizeOptions(recipe="gptq")
WINDOWS = np.random.default_rng(1).integers(0, 320, (20, 64)).astype(np.int32)


def test_a_folder_becomes_a_file_and_a_report(tmp_path: Path) -> None:
    out = tmp_path / "out.gguf"
    seen: list[tuple[str, int, int]] = []
    text = _native.quantize(CHECKPOINT, out, GPTQ, windows=WINDOWS, progress=lambda *now: seen.append(now))
    report = json.loads(text)
    assert report["size_bytes"] == out.stat().st_size
    assert report["recipe"] == "gptq"
    assert report["bits_per_weight"] == 4.5
    linear = [tensor for tensor in report["tensors"] if tensor["recipe"] == "gptq"]
    assert len(linear) == 14
    assert all(0 < tensor["relative_error"] < 0.02 for tensor in linear)
    assert seen
    assert all(0 <= done < total for _, done, total in seen)
    assert list(tmp_path.iterdir()) == [out]


def test_a_full_disk_is_an_error_and_finished_work_is_kept(tmp_path: Path) -> None:
    whole, out = tmp_path / "whole.gguf", tmp_path / "out.gguf"
    _native.quantize(CHECKPOINT, whole, GPTQ, windows=WINDOWS)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    # A limit on file sizes has the effect of a full disk. Python ignores the signal that comes with it.
    resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, before[1]))
    try:
        with pytest.raises(OSError, match=r"out\.gguf"):
            _native.quantize(CHECKPOINT, out, GPTQ, windows=WINDOWS)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not out.exists()
    _native.quantize(CHECKPOINT, out, GPTQ, windows=WINDOWS)
    assert out.read_bytes() == whole.read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.gguf", "whole.gguf"]


def test_a_run_after_a_kill_continues_to_the_same_bytes(tmp_path: Path) -> None:
    whole, out = tmp_path / "whole.gguf", tmp_path / "out.gguf"
    _native.quantize(CHECKPOINT, whole, GPTQ, windows=WINDOWS)
    # The process kills itself in the middle of the second layer.
    script = (
        "import os, signal, sys, numpy as np\n"
        "from nybble import QuantizeOptions, _native\n"
        "windows = np.load(sys.argv[3])\n"
        "def progress(stage, done, total):\n"
        "    if done > total * 0.7: os.kill(os.getpid(), signal.SIGKILL)\n"
        "options = QuantizeOptions(recipe='gptq')\n"
        "_native.quantize(sys.argv[1], sys.argv[2], options, windows=windows, progress=progress)\n"
    )
    saved = tmp_path / "windows.npy"
    np.save(saved, WINDOWS)
    killed = subprocess.run([sys.executable, "-c", script, str(CHECKPOINT), str(out), str(saved)], check=False)
    assert killed.returncode == -signal.SIGKILL
    assert not out.exists()
    firsts: list[int] = []
    _native.quantize(
        CHECKPOINT, out, GPTQ, windows=WINDOWS, progress=lambda _, done, total: firsts.append(done * 2 // total)
    )
    assert firsts[0] == 1, "the first layer is not computed again"
    assert out.read_bytes() == whole.read_bytes()


def test_an_exception_of_the_progress_ends_the_run(tmp_path: Path) -> None:
    def progress(stage: str, done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        _native.quantize(CHECKPOINT, tmp_path / "out.gguf", GPTQ, windows=WINDOWS, progress=progress)
    assert not (tmp_path / "out.gguf").exists()


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"recipe": "magic"}, 'recipe: found "magic"'),
        ({"recipe": "auto+tune"}, 'recipe: found "auto"'),
        ({"block_format": "q4_k"}, "format: found"),
        ({"block_format": "nothing"}, "format: found"),
        ({"group_size": 48}, "group: found 48"),
        ({"keep": {"*": "q1_9"}}, "keep: found"),
        ({"output_type": "iq1_s"}, "output_type: found IQ1_S"),
        ({"budget": -1.0}, "budget: found -1"),
    ],
)
def test_options_out_of_range_are_refused(tmp_path: Path, changed: dict[str, object], message: str) -> None:
    names = [field.name for field in dataclasses.fields(GPTQ)] + ["block_format", "group_size"]
    options: Any = SimpleNamespace(**{name: getattr(GPTQ, name) for name in names} | changed)
    with pytest.raises(ValueError, match=message):
        _native.quantize(CHECKPOINT, tmp_path / "out.gguf", options, windows=WINDOWS)
    assert not (tmp_path / "out.gguf").exists()


@pytest.mark.parametrize(
    ("windows", "message"),
    [(np.full((9, 99), -1, np.int32), "token: found -1"), (None, "calibration: found 0 tokens")],
)
def test_windows_out_of_range_are_refused(tmp_path: Path, windows: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        _native.quantize(CHECKPOINT, tmp_path / "out.gguf", GPTQ, windows=windows)
    assert not (tmp_path / "out.gguf").exists()
