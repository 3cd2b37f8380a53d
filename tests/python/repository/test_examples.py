"""The examples and the notebooks run, on a tiny model or on the default one."""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny
from serving import TOOL_TEMPLATE

from nybble import _native

REPOSITORY = Path(__file__).parents[3]
EXAMPLES = REPOSITORY / "examples"
TEXT = "The quick brown fox jumps over the lazy dog, and the dog, being lazy, does not mind at all.\n" * 60


@pytest.fixture(scope="module")
def model_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with a long context, whose chat template supports tools."""
    path = tmp_path_factory.mktemp("examples") / "model.gguf"
    return tiny.write_model(path, llama__context_length=4096, tokenizer__chat_template=TOOL_TEMPLATE)


@pytest.fixture(scope="module")
def full_precision_file(model_file: Path) -> Path:
    """The same model in F32."""
    path = model_file.with_name("model-f32.gguf")
    _native.convert(model_file, path, "f32")
    return path


@pytest.fixture(scope="module")
def text_file(model_file: Path) -> Path:
    path = model_file.with_name("prose.txt")
    path.write_text(TEXT, encoding="utf-8")
    return path


def run(name: str, *arguments: str | Path, **environment: str) -> str:
    """The standard output of an example in a process of its own."""
    command = [sys.executable, str(EXAMPLES / f"{name}.py"), *map(str, arguments)]
    environment = {**os.environ, "PYTHONUTF8": "1", **environment}
    done = subprocess.run(command, capture_output=True, text=True, encoding="utf-8", env=environment, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_every_example_is_tested_and_shown() -> None:
    source = Path(__file__).read_text(encoding="utf-8")
    shown = (REPOSITORY / "docs/examples.md").read_text(encoding="utf-8")
    for path in sorted(EXAMPLES.glob("*.py")):
        assert f'"{path.stem}"' in source
        assert f"examples/{path.name}" in shown
    for path in sorted(EXAMPLES.glob("notebooks/*.ipynb")):
        assert f'"{path.name}"' in source
        assert f"examples/notebooks/{path.name}" in shown


def test_chat_answers_both_questions(model_file: Path) -> None:
    printed = run("chat", model_file)
    assert printed.count("> ") >= 2
    reused = re.findall(r"\((\d+) of \d+ prompt tokens reused\)", printed)
    assert int(reused[0]) == 0 < int(reused[1])


def test_streaming_reports_the_finish_reason_and_speed(model_file: Path) -> None:
    assert re.search(r"(stop|length): \d+ tokens per second", run("streaming", model_file))


def test_batch_gives_the_same_stories_both_ways(model_file: Path) -> None:
    printed = run("batch", model_file)
    assert printed.count("bit-identical in both: True") == 4
    assert "EngineStats" in printed


def test_json_schema_fills_the_pydantic_model(model_file: Path) -> None:
    assert len(re.findall(r"(positive|neutral|negative), [1-5] stars: ", run("json_schema", model_file))) == 2


def test_sessions_reuse_the_saved_prompt(model_file: Path) -> None:
    assert re.search(r"\([1-9]\d+ tokens reused\)", run("sessions", model_file))


def test_embeddings_search_ranks_every_document(model_file: Path) -> None:
    scores = [float(line.split()[0]) for line in run("embeddings_search", model_file).splitlines()]
    assert len(scores) == 4
    assert scores == sorted(scores, reverse=True)


def test_quantize_compare_measures_every_recipe(full_precision_file: Path, text_file: Path) -> None:
    lines = run("quantize_compare", full_precision_file, text_file).splitlines()
    assert len([line for line in lines if "perplexity" in line and "mean KL" in line]) == 3


def test_serve_openai_starts_a_server_and_streams(model_file: Path) -> None:
    pytest.importorskip("openai")
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    assert "64 numbers in an embedding" in run("serve_openai", model_file, PORT=str(port))


def test_tool_calling_calls_the_function(model_file: Path) -> None:
    pytest.importorskip("openai")
    from serving import serving

    from nybble import Engine, Model

    with Model.load(model_file) as model, Engine(model) as engine, serving(engine) as running:
        printed = run("tool_calling", OPENAI_BASE_URL=f"{running.url}/v1", OPENAI_API_KEY="none")
    assert re.search(r"population\(\{'city': '(Paris|Rome)'\}\) = \d+", printed)


def test_fastapi_app_streams_a_story_and_mounts_the_api(model_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("fastapi")
    from fastapi.testclient import TestClient

    monkeypatch.setenv("NYBBLE_MODEL", str(model_file))
    monkeypatch.syspath_prepend(str(EXAMPLES))
    app = importlib.import_module("fastapi_app").app
    with TestClient(app) as client:
        answer = client.get("/story", params={"topic": "rain", "max_tokens": 8})
        assert answer.status_code == 200
        assert answer.text
        assert client.get("/openai/v1/models").json()["data"][0]["id"] == "model"


def run_notebook(name: str) -> list[tuple[str, str]]:
    """Runs the code cells in one namespace. Returns for each what the file shows and what it prints now."""
    notebook: dict[str, Any] = json.loads((EXAMPLES / "notebooks" / name).read_text(encoding="utf-8"))
    namespace: dict[str, Any] = {"__name__": "__main__"}
    outputs = []
    for number, cell in enumerate(notebook["cells"]):
        if cell["cell_type"] == "code":
            printed = io.StringIO()
            with contextlib.redirect_stdout(printed):
                exec(compile("".join(cell["source"]), f"{name}, cell {number}", "exec"), namespace)
            shown = "".join("".join(output["text"]) for output in cell["outputs"])
            outputs.append((shown, printed.getvalue()))
    assert outputs
    return outputs


def test_the_first_steps_notebook_prints_what_it_shows(default_file: Path) -> None:
    """Results are bit-identical on every machine, so are the outputs of the notebook."""
    for shown, printed in run_notebook("first_steps.ipynb"):
        assert printed == shown


def test_the_quantization_notebook_runs(
    full_precision_file: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NYBBLE_SOURCE", str(full_precision_file))
    monkeypatch.setenv("NYBBLE_TEXT", str(text_file))
    monkeypatch.setenv("NYBBLE_OUT", str(tmp_path))
    printed = "".join(printed for _, printed in run_notebook("quantize_and_judge.ipynb"))
    assert printed.count("mean KL") == 2
    assert printed.count("relative error") == 5
