"""Fixtures shared by all tests. No test uses the network, except to download the default model once."""

from __future__ import annotations

import contextlib
import gc
import logging
import os
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import hypothesis
import pytest
import tiny
from fake_hub import FakeHub

# A background job ignores SIGINT, and so would every process that the tests start.
signal.signal(signal.SIGINT, signal.default_int_handler)

# Every run tries the same examples, without a deadline for busy machines.
hypothesis.settings.register_profile("nybble", deadline=None, derandomize=True)
hypothesis.settings.load_profile("nybble")

# The Hub client reads its settings at import, so they are set before anything imports it. Each pytest-xdist worker has
# its own hub, port and cache.
HUB = FakeHub()
os.environ["HF_ENDPOINT"] = HUB.url
os.environ["HF_HOME"] = tempfile.mkdtemp(prefix="nybble-tests-")
os.environ["HF_HUB_DISABLE_XET"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["NYBBLE_TUNING"] = "off"  # Measures nothing, and writes nothing to the cache folder of the user.
for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_TOKEN", "HF_HUB_CACHE", "NYBBLE_KERNEL"):
    os.environ.pop(name, None)

from serving import REASONING_TEMPLATE, TOOL_TEMPLATE, Running, scripted, served, serving  # noqa: E402

from nybble import Model  # noqa: E402
from nybble.engine import Engine  # noqa: E402
from nybble.models import hub  # noqa: E402

if TYPE_CHECKING:
    from browser import Chat, Page


def pytest_collection_finish() -> None:
    """Keeps the garbage collector from visiting all imported modules and thousands of tests again and again.

    It also runs less often than by default: it took a fifth of the time of random requests.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000)


@pytest.fixture(autouse=True)
def restored_loggers() -> Iterator[None]:
    """Removes the handlers of commands that ran in this process: their standard error ends with the test."""
    loggers = [logging.getLogger(name) for name in ("nybble", "nybble.server", "uvicorn", "asyncio")]
    before = [(logger.handlers[:], logger.propagate, logger.level) for logger in loggers]
    yield
    for logger, (handlers, propagate, level) in zip(loggers, before, strict=True):
        logger.handlers[:] = handlers
        logger.propagate = propagate
        logger.setLevel(level)


@pytest.fixture
def fake_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    """An empty Hub with an empty cache."""
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
    """The loaded tiny llama."""
    with Model.load(tiny_file, threads=2) as model:
        yield model


@pytest.fixture(scope="session")
def tool_model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Model]:
    """The tiny llama with a context of 2,048 tokens and a chat template that supports tools."""
    changes: dict[str, Any] = {"llama__context_length": 2048, "tokenizer__chat_template": TOOL_TEMPLATE}
    with Model.load(tiny.write_model(tmp_path_factory.mktemp("tool") / "tiny.gguf", **changes), threads=2) as model:
        yield model


@pytest.fixture(scope="session")
def reasoning_model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Model]:
    """The tiny llama with a chat template that opens reasoning, which the model never closes by itself."""
    changes: dict[str, Any] = {"llama__context_length": 2048, "tokenizer__chat_template": REASONING_TEMPLATE}
    with Model.load(tiny.write_model(tmp_path_factory.mktemp("thinks") / "tiny.gguf", **changes), threads=1) as model:
        yield model


@pytest.fixture(scope="session")
def uniform_model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Model]:
    """A tiny model that predicts all tokens with the same probability."""
    file = tiny.write_model(
        tmp_path_factory.mktemp("uniform") / "uniform.gguf", layers=1, uniform=True, llama__context_length=4096
    )
    with Model.load(file, threads=1) as model:
        yield model


@pytest.fixture(scope="session")
def chat_model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Model]:
    """A uniform model with a long context, whose chat template has tools."""
    file = tiny.write_model(
        tmp_path_factory.mktemp("chat") / "chat.gguf",
        layers=1,
        uniform=True,
        llama__context_length=8192,
        tokenizer__chat_template=TOOL_TEMPLATE,
    )
    with Model.load(file, threads=1) as model:
        yield model


@pytest.fixture(scope="session")
def default_file() -> Path:
    """The default model's file, downloaded once per user and kept."""
    try:
        return hub.resolve()
    except FileNotFoundError as error:
        pytest.skip(f"the default model cannot be downloaded: {error}")


@pytest.fixture(scope="session")
def default_model(default_file: Path) -> Iterator[Model]:
    """The loaded default model."""
    with Model.load(default_file) as model:
        yield model


@pytest.fixture(scope="module")
def server(model: Model) -> Iterator[Running]:
    """A server of the `model` of the module."""
    with served(model) as running:
        yield running


# The chat page. The browser is imported only where a test uses it.


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    """A browser."""
    from browser import launched

    with launched() as driver:
        yield driver


@pytest.fixture(scope="module")
def default_server(default_model: Model) -> Iterator[Running]:
    """A server of the default model."""
    with Engine(default_model) as engine, serving(engine) as running:
        yield running


@pytest.fixture
def page(chromium: Any, default_server: Running) -> Iterator[Page]:
    """The page of the default model. The browser must not complain."""
    from browser import Page

    made = Page(chromium, default_server.url).ready()
    yield made
    assert made.complaints() == []
    made.forget()


@pytest.fixture
def chat(chromium: Any, chat_model: Model) -> Iterator[Chat]:
    """Opens the page of a server with scripted answers. The browser must not complain."""
    from browser import Page

    opened: list[Page] = []
    with contextlib.ExitStack() as stack:

        def opening(*answers: str, model: Model = chat_model) -> Page:
            engine, script = scripted(model, *answers)
            made = Page(chromium, stack.enter_context(serving(engine)).url).ready()
            made.script = script
            opened.append(made)
            return made

        yield opening
        complaints = [message for made in opened for message in made.complaints()]
        for made in opened:
            made.forget()
    assert complaints == []
