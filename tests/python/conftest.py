"""What the tests share. No test here reaches further than this machine, save for fetching the default model once."""

from __future__ import annotations

import os
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest
import tiny
from fake_hub import FakeHub

# A job that was started in the background ignores Ctrl-C, and so would every process that the tests start.
signal.signal(signal.SIGINT, signal.default_int_handler)

# Properties are tried on the same examples in every run, however long a busy machine takes for one.
hypothesis.settings.register_profile("nybble", deadline=None, derandomize=True)
hypothesis.settings.load_profile("nybble")

# The Hub's client reads its settings when it is imported, so they are made before anything imports it.
HUB = FakeHub()
os.environ["HF_ENDPOINT"] = HUB.url
os.environ["HF_HOME"] = tempfile.mkdtemp(prefix="nybble-tests-")
os.environ["HF_HUB_DISABLE_XET"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_TOKEN", "HF_HUB_CACHE", "NYBBLE_KERNEL"):
    os.environ.pop(name, None)

from nybble import Model  # noqa: E402
from nybble.models import hub  # noqa: E402


@pytest.fixture
def fake_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    """An empty Hub, and an empty cache of it."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub-cache"))
    HUB.reset()
    yield HUB
    HUB.reset()


@pytest.fixture(scope="session")
def tiny_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A GGUF file of a tiny llama with random weights, whose tokens are bytes."""
    return tiny.write_model(tmp_path_factory.mktemp("tiny") / "tiny.gguf")


@pytest.fixture(scope="session")
def tiny_model(tiny_file: Path) -> Iterator[Model]:
    """The tiny llama, loaded."""
    with Model.load(tiny_file, threads=2) as model:
        yield model


@pytest.fixture(scope="session")
def default_file() -> Path:
    """The file of the default model, fetched once for this user and kept."""
    try:
        return hub.resolve()
    except FileNotFoundError as error:
        pytest.skip(f"the default model cannot be fetched here: {error}")


@pytest.fixture(scope="session")
def default_model(default_file: Path) -> Iterator[Model]:
    """The default model, loaded."""
    with Model.load(default_file) as model:
        yield model
