"""Runs a sample of the damaged files of `tests/mutations.py`."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

PROGRAM = Path(__file__).parents[2] / "mutations.py"


def test_damaged_models_load_or_raise_documented_errors() -> None:
    # Times depend on the load of the machine, so only a hang fails here.
    limits = ["--files", "2000", "--folders", "500", "--seed", "1", "--seconds", "inf"]
    command = [sys.executable, str(PROGRAM), *limits]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2,000 files" in done.stdout
    assert "500 folders" in done.stdout
