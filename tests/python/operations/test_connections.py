"""Runs a smaller version of `tests/connections.py`."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = Path(__file__).parents[2] / "connections.py"


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no limit of open files")
def test_idle_connections_beyond_the_open_files_keep_no_request_out() -> None:
    limits = ["--files", "128", "--connections", "300", "--working", "20"]
    command = [sys.executable, str(PROGRAM), *limits]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.startswith("20 of 20 requests answered, /health 200")
