"""The command `llm` with a model that the server runs, as its documentation of OpenAI-compatible models says."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import clients
import pytest
from clients import needed
from serving import Running, served

from nybble import Model

pytestmark = clients.IGNORED

OPTIONS = ("-o", "temperature", "0", "-o", "max_tokens", "12")


@pytest.fixture(scope="module")
def server(tool_model: Model) -> Iterator[Running]:
    with served(tool_model) as running:
        yield running


def llm(folder: Path, *arguments: str) -> str:
    """The output of the command with the settings in a folder."""
    needed("llm")
    environment = {**os.environ, "LLM_USER_PATH": str(folder), "PYTHONIOENCODING": "utf-8"}
    done = subprocess.run(
        [sys.executable, "-m", "llm", *arguments], env=environment, capture_output=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr.decode()
    return done.stdout.decode().rstrip("\n")


@pytest.fixture
def folder(server: Running, tmp_path: Path) -> Path:
    models = f'- model_id: served\n  model_name: tiny\n  api_base: "{server.url}/v1"\n  api_key_name: none\n'
    (tmp_path / "extra-openai-models.yaml").write_text(models, encoding="utf-8")
    return tmp_path


def test_prompts_streams_and_conversations_work(server: Running, folder: Path) -> None:
    said = server.chat([{"role": "user", "content": "Hi"}], temperature=0, max_tokens=12).choice["message"]["content"]
    assert llm(folder, "prompt", "-m", "served", "Hi", "--no-stream", *OPTIONS) == said.rstrip("\n")
    assert llm(folder, "prompt", "-m", "served", "Hi", *OPTIONS) == said.rstrip("\n")
    turns = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": said},
        {"role": "user", "content": "And?"},
    ]
    more = server.chat(turns, temperature=0, max_tokens=12).choice["message"]["content"]
    assert llm(folder, "prompt", "-c", "And?", *OPTIONS) == more.rstrip("\n")
