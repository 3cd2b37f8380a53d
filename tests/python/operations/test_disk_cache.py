"""The prefix cache on disk: across restarts and processes, killed ones too, and when the disk refuses."""

from __future__ import annotations

import functools
import json
import re
import shutil
import signal
import subprocess
import sys
import threading
import urllib.request
from pathlib import Path
from typing import Any

import pytest
import tiny
from serving import wait

from nybble import Engine, EngineError, EngineOptions, Model, _native
from nybble.cli import main
from nybble.engine import Request
from nybble.generation.driver import Driver
from nybble.server import http_server
from nybble.server.options import ServeOptions

if sys.platform == "win32":
    pytest.skip("Windows has no signals of this kind", allow_module_level=True)

PAGE = 64
SYSTEM = "".join(f"Rule {number}: answer politely. " for number in range(200))[:4000]
"""A system prompt of 4,000 tokens: a token of the tiny model is a byte."""


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_model(tmp_path_factory.mktemp("cached") / "tiny.gguf", llama__context_length=8192)


@pytest.fixture(scope="module")
def model(file: Path) -> Model:
    return Model.load(file, threads=2)


def pages(folder: Path) -> list[Path]:
    """The pages in the folder of a cache."""
    return sorted(folder.glob("nybble-*/*.page"))


# --- The server


def ask(url: str, question: str) -> tuple[str, int]:
    """The answer to a question after the system prompt, and the number of tokens that were not computed."""
    body = {"prompt": f"{SYSTEM} {question}", "max_tokens": 8, "temperature": 0, "model": "tiny"}
    request = urllib.request.Request(f"{url}/v1/completions", json.dumps(body).encode())
    request.add_header("Content-Type", "application/json")
    with urllib.request.urlopen(request, timeout=60) as answer:
        found = json.loads(answer.read())
    return found["choices"][0]["text"], found["usage"]["prompt_tokens_details"]["cached_tokens"]


def metric(url: str, name: str) -> float:
    with urllib.request.urlopen(f"{url}/metrics", timeout=60) as answer:
        lines = answer.read().decode().splitlines()
    return next(float(line.split()[1]) for line in lines if re.match(rf"nybble_{name}(_total)? ", line))


class Server:
    """A process of `nybble serve`."""

    def __init__(self, file: Path, *options: str) -> None:
        command = [sys.executable, "-m", "nybble", "serve", str(file), "--port", "0", *options]
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        assert self.process.stderr is not None
        self.url = ""
        for line in self.process.stderr:
            if found := re.search(r"page +(http://\S+)", line):
                self.url = found[1].rstrip("/")
                break

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.communicate()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL], ids=["terminated", "killed"])
def test_a_restarted_server_computes_at_most_the_last_page(file: Path, tmp_path: Path, number: signal.Signals) -> None:
    folder = tmp_path / "prefixes"
    options = ("--cache-dir", str(folder), "--cache-dir-gb", "0.5")
    with Server(file, *options) as server:
        assert ask(server.url, "Who are you?")[1] == 0
        expected = ask(server.url, "What is a page?")[0]
        # A long prompt is written while the server runs.
        wait(lambda: len(pages(folder)) >= 4000 // PAGE)
        assert metric(server.url, "restored_tokens") == 0
        server.process.send_signal(number)
        assert server.process.wait(60) == (0 if number == signal.SIGTERM else -number)
    with Server(file, *options) as server:
        text, cached = ask(server.url, "What is a page?")
        assert (text, cached) == (expected, 4000 // PAGE * PAGE)
        assert metric(server.url, "restored_tokens") == cached
        assert (metric(server.url, "disk_cache_hits"), metric(server.url, "disk_cache_errors")) == (1, 0)
        assert metric(server.url, "disk_cache_bytes") == sum(page.stat().st_size for page in pages(folder))


def test_options_of_the_folder_are_checked(
    file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(http_server, "serve", lambda *_: None)
    start = ["serve", str(file), "--port", "0"]
    for options, status, error in [
        (["--cache-dir-gb", "1"], 2, "cache_dir_gb: found a limit, but no cache_dir"),
        (["--cache-dir", str(tmp_path), "--cache-dir-gb", "-1"], 2, "cache_dir_gb: found -1"),
        (["--cache-dir", str(tmp_path), "--no-prefix-cache"], 2, "cache_dir: found a folder, but prefix_cache=False"),
        (["--cache-dir", ""], 2, "cache_dir: found an empty path"),
        (["--cache-dir", str(file)], 1, f"cache_dir: found {file}, expected a folder"),
    ]:
        assert main([*start, *options]) == status
        assert error in capsys.readouterr().err
    for negative in (-1, -(10**12)):
        with pytest.raises(ValueError, match="cache_dir_bytes: found -"):
            EngineOptions(cache_dir=tmp_path, cache_dir_bytes=negative)
    with pytest.raises(TypeError, match="cache_dir: found 5"):
        EngineOptions(cache_dir=5)  # type: ignore[arg-type]
    assert ServeOptions(cache_dir="x", cache_dir_gb=0.25).engine().cache_dir_bytes == 250_000_000


def test_the_end_of_an_engine_writes_what_one_request_used(model: Model, tmp_path: Path) -> None:
    prompt = SYSTEM[: 3 * PAGE + 5]
    with Engine(model) as engine:
        expected = engine.submit(prompt, max_tokens=4, temperature=0).result()
    for _ in range(2):
        with Engine(model, cache_dir=tmp_path) as engine:
            assert engine.submit(prompt, max_tokens=4, temperature=0).result().text == expected.text
        stats = engine.stats()
    assert (stats.restored_tokens, stats.disk_cache_hits, len(pages(tmp_path))) == (3 * PAGE, 1, 3)


def test_the_folder_may_be_in_the_home_folder(model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    with Engine(model, cache_dir="~/cache") as engine:
        engine.submit("a" * 200, max_tokens=1).result()
    assert pages(tmp_path / "cache")


def test_the_end_waits_for_the_disk_as_long_as_it_is_told(model: Model, tmp_path: Path) -> None:
    for seconds in (-1, float("nan")):
        engine = Engine(model, cache_dir=tmp_path)
        with pytest.raises(ValueError, match="saving_seconds: found"):
            engine.close(saving_seconds=seconds)
        engine.close()
    for seconds, count in ((0, 0), (float("inf"), 3)):
        engine = Engine(model, cache_dir=tmp_path)
        engine.submit(SYSTEM[: 3 * PAGE + 5], max_tokens=1, temperature=0).result()
        engine.close(drain=True, saving_seconds=seconds)
        assert len(pages(tmp_path)) == count


def test_a_closed_scheduler_says_so(model: Model, tmp_path: Path) -> None:
    scheduler = _native.Scheduler(model._native, EngineOptions(cache_dir=tmp_path))
    scheduler.close()
    scheduler.close()
    scheduler.interrupt()
    for call in (scheduler.stats, scheduler.take_reports, lambda: scheduler.step(False), lambda: scheduler.cancel(1)):
        with pytest.raises(ValueError, match="a scheduler that was closed"):
            call()


def test_opening_and_closing_the_folder_leaves_other_threads_alone(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = Engine(model)
    seen: list[str] = []

    def ask(name: str) -> None:
        # Another thread gets the engine's lock meanwhile.
        def get() -> None:
            engine.stats()
            seen.append(name)

        thread = threading.Thread(target=get)
        thread.start()
        thread.join(30)

    def opening() -> Driver[Request]:
        ask("open")
        return new()

    def closing(self: Driver[Any]) -> None:
        ask("close")
        close(self)

    new, close, step = engine._loop._new_driver, Driver.close, Driver.step

    def failing(self: Driver[Any], **_: Any) -> Any:
        monkeypatch.setattr(Driver, "step", step)
        raise RuntimeError("broken")

    monkeypatch.setattr(Driver, "close", closing)
    monkeypatch.setattr(Driver, "step", failing)
    engine._loop._new_driver = opening
    with pytest.raises(EngineError, match="broken"):
        engine.submit("a", max_tokens=1).result()
    assert engine.submit("a", max_tokens=1).result().tokens
    engine.close()
    assert seen == ["close", "open", "close"]


def test_a_folder_whose_disk_cannot_be_asked_is_reported(
    model: Model, tmp_path: Path, caplog: Any, monkeypatch: Any
) -> None:
    def refuse(_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(shutil, "disk_usage", refuse)
    (tmp_path / "file").write_text("")
    with Engine(model, cache_dir=tmp_path / "file" / "inside") as engine:
        assert engine.submit("a", max_tokens=1).result().tokens
    assert "the prefix cache is not kept on disk" in caplog.text


# --- Processes


WRITER = """
import sys
from nybble import Engine, Model

folder, first, count = sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
with Model.load(sys.argv[1], threads=1) as model, Engine(model, cache_dir=folder) as engine:
    for number in range(first, first + count):
        # Each prompt has more than sixteen pages, which are written at once.
        prompt = f"{number}. " + "word " * 230
        print(number, engine.submit(prompt, max_tokens=2, temperature=0).result().tokens, flush=True)
    print("errors", engine.stats().disk_cache_errors, flush=True)
"""
"""Answers prompts of its own, and prints the answers."""


def writer(file: Path, folder: Path, first: int, count: int, **options: Any) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", WRITER, str(file), str(folder), str(first), str(count)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options)


def answers(file: Path, folder: Path, count: int, **options: Any) -> tuple[list[str], str]:
    """The answers of a process that ends by itself, and its log."""
    with writer(file, folder, 0, count, **options) as process:
        out, log = process.communicate(timeout=120)
    assert process.returncode == 0, log
    return out.splitlines(), log


def test_a_process_that_is_killed_while_it_writes_leaves_only_whole_pages(file: Path, tmp_path: Path) -> None:
    expected, _ = answers(file, tmp_path / "whole", 6)
    folder = tmp_path / "killed"

    def has_files(count: int) -> bool:
        return len(list(folder.glob("nybble-*/*"))) >= count

    for count in (1, 7, 20, 45, 70):
        with writer(file, folder, 0, 10_000) as process:
            # Written one after the other, so the next one is being written.
            wait(functools.partial(has_files, count))
            process.kill()
            process.communicate()
        found, log = answers(file, folder, 6)
        assert (found, log) == (expected, "")
        assert not list(folder.glob("nybble-*/.*"))


def test_processes_that_write_at_the_same_time_share_the_folder(file: Path, tmp_path: Path) -> None:
    expected, _ = answers(file, tmp_path / "alone", 5)
    folder = tmp_path / "shared"
    for _ in range(2):
        processes = [writer(file, folder, 0, 5) for _ in range(3)]
        for process in processes:
            out, log = process.communicate(timeout=120)
            assert (out.splitlines(), log) == (expected, "")
    assert [page.name for page in pages(folder)] == [page.name for page in pages(tmp_path / "alone")]


def test_a_disk_without_space_is_reported_once_and_changes_nothing(file: Path, tmp_path: Path) -> None:
    resource = pytest.importorskip("resource")
    (*expected, _), _ = answers(file, tmp_path / "whole", 3)

    def without_space() -> None:
        # No file may be larger than this: the first write that exceeds it fails, as on a full disk.
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))

    (*found, errors), log = answers(file, tmp_path / "full", 3, preexec_fn=without_space)
    assert (found, errors) == (expected, "errors 1")
    assert log.count("cache_dir: ") == 1
    assert "pages are not written for a minute" in log
    assert not list((tmp_path / "full").glob("nybble-*/*"))
    assert not list((tmp_path / "full").glob("nybble-*/.*"))


@pytest.mark.skipif(sys.platform != "linux", reason="needs a folder in which nobody may create files")
def test_a_folder_that_cannot_be_written_to_is_reported_once(file: Path, tmp_path: Path) -> None:
    expected, _ = answers(file, tmp_path / "whole", 2)
    found, log = answers(file, Path("/proc/nybble-prefixes"), 2)
    assert found == expected
    assert log.count("cache_dir: /proc/nybble-prefixes") == 1
    assert "the prefix cache is not kept on disk" in log
