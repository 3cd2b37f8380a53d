"""The documents are true: paths exist, commands exist, and the Python code in them runs."""

from __future__ import annotations

import dataclasses
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import tiny

import nybble
from nybble import SamplingOptions, _native

REPOSITORY = Path(__file__).parents[3]
URL = "https://github.com/nybble-llm/nybble"
RAW = "https://raw.githubusercontent.com/nybble-llm/nybble"
SITE = "https://nybble-llm.github.io/nybble/"
ROOT_DOCUMENTS = ["README.md", "CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md"]
DOCUMENTS = [*ROOT_DOCUMENTS, *sorted(f"docs/{path.name}" for path in (REPOSITORY / "docs").glob("*.md"))]


def text_of(document: str) -> str:
    return (REPOSITORY / document).read_text(encoding="utf-8")


def blocks(document: str, language: str) -> list[str]:
    """The code blocks of a language, those inside tabs included."""
    found = re.findall(rf"^( *)```{language}\n(.*?)^ *```", text_of(document), re.DOTALL | re.MULTILINE)
    return [re.sub(rf"^{indent}", "", block, flags=re.MULTILINE) for indent, block in found]


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as the documentation site makes them."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", heading).strip().lower()) for heading in headings}


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_path_in_a_document_exists(document: str) -> None:
    text = text_of(document)
    named = set(re.findall(r"`((?:src|python|tests|benches|examples|scripts)/[\w./-]*)`", text))
    named |= set(re.findall(r"python ((?:benches|scripts|examples)/[\w./-]+)", text))
    missing = sorted(path for path in named if not (REPOSITORY / path).exists() and path != "examples/NAME.py")
    assert not missing


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_link_in_a_document_leads_somewhere(document: str) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", re.sub(r"```.*?```", "", text_of(document), flags=re.DOTALL)):
        link, _, anchor = link.partition("#")
        if link.startswith(f"{SITE}rustdoc/"):
            continue  # The workflow docs.yml adds it to the site.
        if link.startswith(SITE):
            page = REPOSITORY / "docs" / f"{link.removeprefix(SITE).rstrip('/') or 'index'}.md"
        elif match := re.match(rf"(?:{URL}/(?:blob|tree)|{RAW})/main/(.*)", link):
            page = REPOSITORY / match[1]
        elif "://" in link:
            continue
        elif link:
            assert document.startswith("docs/"), f"{document}: {link} is relative, which a package index cannot follow"
            page = REPOSITORY / "docs" / link
        else:
            page = REPOSITORY / document
        assert page.exists(), link
        assert not anchor or page.suffix != ".md" or anchor in anchors(page), f"{link}#{anchor}"


def test_every_make_target_in_a_document_exists() -> None:
    rules = re.findall(r"^([a-z -]+):", text_of("Makefile"), re.MULTILINE)
    targets = {target for rule in rules for target in rule.split()}
    for document in DOCUMENTS:
        named = set(re.findall(r"`make ([a-z-]+)", text_of(document)))
        named |= set(re.findall(r"^make ([a-z-]+)", "\n".join(blocks(document, "sh")), re.MULTILINE))
        assert named <= targets, document
        assert document not in ("README.md", "CONTRIBUTING.md") or "test" in named


def test_the_readme_is_short_and_begins_with_the_two_commands() -> None:
    lines = text_of("README.md").splitlines()
    assert len(lines) <= 140
    assert any(line.startswith("make demo") for line in lines[:25])
    assert any(line.startswith("make test") for line in lines[:25])


def test_a_family_takes_as_few_lines_as_the_document_says() -> None:
    table = re.findall(r"^\| ([\w ]+) \| (\d+) \| (\d+) \|$", text_of("CONTRIBUTING.md"), re.MULTILINE)
    assert len(table) == 5
    model = REPOSITORY / "src/model"
    architectures = "".join(path.read_text(encoding="utf-8") for path in model.glob("arch/*.rs"))
    checkpoints = "".join(path.read_text(encoding="utf-8") for path in model.glob("hf/families/*.rs"))
    for family, *lines in table:
        name = family.lower().replace(" ", "")
        (entry,) = re.findall(rf"^    family\(\s*\"{name}\".*?\),$", architectures, re.MULTILINE | re.DOTALL)
        (checkpoint,) = re.findall(
            rf"^pub\(super\) const {name.upper()}: .*?^}};", checkpoints, re.MULTILINE | re.DOTALL
        )
        assert lines == [str(len(entry.splitlines())), str(len(checkpoint.splitlines()))], family


def test_every_test_that_checks_a_promise_exists() -> None:
    text = text_of("docs/security.md")
    named = set(re.findall(r"`((?:tests|scripts|src)/[\w./]+)(?:::(\w+))?`", text))
    assert any(test for _, test in named)
    for path, test in sorted(named):
        assert (REPOSITORY / path).exists(), path
        assert not test or f"{test}(" in text_of(path), test


def test_every_nybble_command_in_the_documents_exists() -> None:
    options: dict[str, set[str]] = {}
    for document in DOCUMENTS:
        text = "\n".join(blocks(document, "sh"))
        for command, rest in re.findall(r"^nybble ([a-z]+)((?:[^#\n]|\\\n)*)", text, re.MULTILINE):
            options.setdefault(command, set()).update(re.findall(r"(--[a-z-]+)", rest))
    assert {"run", "chat", "serve", "inspect", "convert", "quantize", "eval", "bench"} <= options.keys()
    table = re.findall(r"^\| `nybble ([a-z]+)", text_of("docs/command-line.md"), re.MULTILINE)
    assert set(options) <= set(table)
    for command in sorted(set(table)):
        call = [sys.executable, "-c", "from nybble.cli import main; main()", command, "--help"]
        done = subprocess.run(call, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert options.get(command, set()) <= set(re.findall(r"--[a-z-]+", done.stdout)), command


def test_the_table_of_sampling_options_is_complete() -> None:
    rows = re.findall(r"^\| `(\w+)` \| ([^|]+) \| ", text_of("docs/reference/sampling.md"), re.MULTILINE)
    expected = [
        (field.name, str(getattr(SamplingOptions(), field.name))) for field in dataclasses.fields(SamplingOptions)
    ]
    assert rows == expected


def test_the_reference_has_every_public_name() -> None:
    pages = "".join(path.read_text(encoding="utf-8") for path in (REPOSITORY / "docs/reference").glob("*.md"))
    documented = set(re.findall(r"^::: nybble\.(\w+)$", pages, re.MULTILINE))
    assert set(nybble.__all__) - documented == {"__version__"}


@pytest.fixture
def folder(tmp_path: Path, default_file: Path, tiny_file: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with the files that the documents name, and an empty cache for what they make."""
    (tmp_path / "model.gguf").symlink_to(default_file)
    tiny.write_model(tmp_path / "tiny.gguf", llama__context_length=512)
    _native.convert(tmp_path / "tiny.gguf", tmp_path / "model-f16.gguf", "f16")
    (tmp_path / "prose.txt").write_text(
        "The fox jumps over the lazy dog, and the dog does not mind. " * 80, encoding="utf-8"
    )
    monkeypatch.chdir(tmp_path)
    (tmp_path / "cache/models").mkdir(parents=True)
    (tmp_path / "cache/models" / default_file.name).symlink_to(default_file)
    monkeypatch.setenv("NYBBLE_CACHE", str(tmp_path / "cache"))
    return tmp_path


def run_blocks(document: str, code: list[str]) -> None:
    assert code
    exec(compile("\n".join(code), document, "exec"), {"__name__": "__main__"})


def test_the_python_code_of_the_readme_runs(capsys: pytest.CaptureFixture[str], folder: Path) -> None:
    run_blocks("README.md", blocks("README.md", "python"))
    printed = capsys.readouterr().out
    assert "Paris" in printed
    assert "finish_reason" in printed or "length" in printed or "stop" in printed


@pytest.mark.parametrize("document", ["index", "getting-started", "python", "quantization"])
def test_the_python_code_of_a_guide_runs(document: str, capsys: pytest.CaptureFixture[str], folder: Path) -> None:
    run_blocks(document, blocks(f"docs/{document}.md", "python"))
    assert capsys.readouterr().out


def test_the_python_code_of_the_server_guide_runs(capsys: pytest.CaptureFixture[str], folder: Path) -> None:
    pytest.importorskip("openai")
    from serving import serving

    from nybble import Engine, Model

    code = blocks("docs/serving.md", "python")
    on_ray = [block for block in code if "ray" in block]
    assert compile("\n".join(on_ray), "serving.md", "exec")
    code = [block for block in code if block not in on_ray]
    by_clients = [block for block in code if "client." in block]
    assert "openai" in by_clients[0]
    runnable = [block for block in by_clients if "anthropic" not in block or find_spec("anthropic")]
    with Model.load("model.gguf") as model, Engine(model) as engine, serving(engine) as running:
        adapted = [block.replace("http://127.0.0.1:8000", running.url) for block in runnable]
        run_blocks("serving.md", [block.replace('="model"', '="tiny"') for block in adapted])
    assert capsys.readouterr().out.strip()
    run_blocks("serving.md", [block for block in code if block not in by_clients])
