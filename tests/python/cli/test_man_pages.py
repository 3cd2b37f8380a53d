"""The man pages that scripts/man_pages.py writes."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import man_pages
import pytest

from nybble.cli import _COMMANDS, main

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The pages as the script writes them."""
    to = tmp_path_factory.mktemp("man")
    subprocess.run([sys.executable, ROOT / "scripts" / "man_pages.py", to], check=True)
    return to / "man1"


def test_every_command_has_a_page(folder: Path) -> None:
    names = {"nybble.1", *(f"nybble-{command}.1" for command in _COMMANDS)}
    assert {path.name for path in folder.iterdir()} == names == set(man_pages.pages())
    text = (folder / "nybble.1").read_text(encoding="utf-8")
    assert all(f"\\fBnybble {command}\\fR" in text for command in _COMMANDS)


@pytest.mark.parametrize("command", _COMMANDS)
def test_a_page_has_every_option_that_the_help_lists(
    command: str, folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    assert main([command, "--help"]) == 0
    listed = {name for line in capsys.readouterr().out.splitlines() for name in re.findall(r"^│\W+?(--[a-z-]+)", line)}
    assert listed
    page = (folder / f"nybble-{command}.1").read_text(encoding="utf-8").replace("\\-", "-")
    terms = re.findall(r"^\.TP\n\\fB(.*)\\fR$", page, re.MULTILINE)
    assert listed <= {name for term in terms for name in re.findall(r"--[a-z-]+", term)}


def test_special_characters_are_escaped() -> None:
    assert man_pages._text(".x\n'y' a-b \\n") == "\\&.x 'y' a\\-b \\en"


def test_groff_has_no_warnings(folder: Path) -> None:
    groff = shutil.which("groff")
    if groff is None:
        pytest.skip("needs groff")
    for path in folder.iterdir():
        done = subprocess.run([groff, "-man", "-Tutf8", "-ww", path], capture_output=True, text=True, check=True)
        assert (done.stderr, "OPTIONS" in done.stdout) == ("", True), path.name
