"""The documents say what is true of the repository: paths, commands and examples are read off them and tried."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[3]
DOCUMENTS = ["README.md", "CONTRIBUTING.md"]


def text_of(document: str) -> str:
    return (REPOSITORY / document).read_text(encoding="utf-8")


def blocks(document: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text_of(document), re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_path_that_a_document_names_exists(document: str) -> None:
    text = text_of(document)
    named = set(re.findall(r"`((?:src|python|tests|benches|examples|scripts)/[\w./-]*)`", text))
    named |= set(re.findall(r"python ((?:benches|scripts)/[\w./-]+)", text))
    named |= {link for link in re.findall(r"\]\(([^)#]+)\)", text) if "://" not in link}
    assert named, "the document names some paths"
    missing = sorted(path for path in named if not (REPOSITORY / path).exists())
    assert not missing


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_make_command_that_a_document_names_can_be_made(document: str) -> None:
    named = set(re.findall(r"(?:^|`)make ([a-z-]+)", text_of(document), re.MULTILINE))
    targets = set(re.findall(r"^([a-z-]+):", text_of("Makefile"), re.MULTILINE))
    assert "test" in named
    assert named <= targets


def test_a_family_takes_as_few_lines_as_the_document_says() -> None:
    table = re.findall(r"^\| ([\w ]+) \| (\d+) \| (\d+) \|$", text_of("CONTRIBUTING.md"), re.MULTILINE)
    names = [name.upper().replace(" ", "") for name, _, _ in table]
    model = REPOSITORY / "src/model"
    source = "".join(path.read_text(encoding="utf-8") for path in (model / "hf/families").glob("*.rs"))
    choices = "".join(path.read_text(encoding="utf-8") for path in (model / "arch").glob("*.rs"))
    assert len(names) == 5
    for name, (_, in_choices, in_families) in zip(names, table, strict=True):
        (line,) = re.findall(rf"^    family\(\"{name.lower()}\", .*\),$", choices, re.MULTILINE)
        (entry,) = re.findall(rf"^pub\(super\) const {name}: .*?^}};", source, re.MULTILINE | re.DOTALL)
        assert (in_choices, in_families) == (str(len(line.splitlines())), str(len(entry.splitlines())))


def test_every_test_that_checks_a_promise_is_there() -> None:
    text = text_of("docs/security.md")
    named = set(re.findall(r"`((?:tests|scripts)/[\w./]+)(?:::(\w+))?`", text))
    assert any(test for _, test in named)
    for path, test in sorted(named):
        assert (REPOSITORY / path).exists(), path
        assert not test or f"{test}(" in text_of(path), test


def test_every_nybble_command_of_the_readme_is_one() -> None:
    named = set(re.findall(r"^nybble ([a-z]+)", "".join(blocks("README.md", "sh")), re.MULTILINE))
    assert "run" in named
    for command in sorted(named):
        call = [sys.executable, "-c", "from nybble.cli import main; main()", command, "--help"]
        done = subprocess.run(call, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr


def test_the_python_examples_of_the_readme_run_as_they_stand(capsys: pytest.CaptureFixture[str]) -> None:
    examples = blocks("README.md", "python")
    assert len(examples) > 1
    exec(compile("".join(examples), "README.md", "exec"), {"__name__": "__main__"})
    printed = capsys.readouterr().out
    assert "Paris" in printed
    assert "EngineStats" in printed
