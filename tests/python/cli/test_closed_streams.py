"""Commands whose standard streams the caller has closed, as managers of services do."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest


def run(redirections: str, file: Path) -> subprocess.CompletedProcess[str]:
    options = ["--max-tokens", "2", "--temperature", "0", "--raw"]
    command = [sys.executable, "-m", "nybble", "run", str(file), "he", *options]
    script = f'"$@" {redirections}'
    return subprocess.run(["sh", "-c", script, "sh", *command], stdout=subprocess.PIPE, text=True, check=False)


@pytest.mark.skipif(sys.platform == "win32", reason="needs a POSIX shell")
def test_closed_streams_change_neither_the_output_nor_the_exit_code(tiny_file: Path) -> None:
    expected = run("2>/dev/null", tiny_file)
    assert expected.returncode == 0
    for redirections in ("2>&-", "<&- 2>/dev/null", "<&- 2>&-"):
        done = run(redirections, tiny_file)
        assert (done.returncode, done.stdout) == (0, expected.stdout), redirections
    # An error has an exit code, even where nobody can read its message.
    assert run("2>&-", tiny_file.with_name("missing.gguf")).returncode == 1
