"""The page of models lists every family, with what the tests read."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[3]


def test_the_table_of_families_is_up_to_date() -> None:
    check = subprocess.run(
        [sys.executable, ROOT / "scripts/models_page.py", "--check"], capture_output=True, text=True, check=False
    )
    assert check.returncode == 0, check.stderr
