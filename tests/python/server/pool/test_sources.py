"""The models of a server: those of the command line, of a folder, and of a configuration file."""

from __future__ import annotations

import logging
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import adapters
import pytest
import tiny
from fake_hub import FakeHub
from goldens import GOLDENS
from serving import serving_several, spec

from nybble import LoadOptions
from nybble.cli import main
from nybble.server import ServeOptions, http_server
from nybble.server.pool.config import configured_models, read_config, with_config
from nybble.server.pool.names import check_names
from nybble.server.pool.pool import Pool
from nybble.server.pool.sources import models_in, named_models, new_pool
from nybble.server.protocols.models import model_cards

FILE = """
port = 8123
max_memory = "4GB"
threads = 2
adapter_folder = "loras"
allow_host = ["example.org"]
timeout = 30

[[models]]
name = "chat"
source = "small.gguf"
aliases = ["gpt-4o", "default"]
context = 64
cache_gb = 0.5
cache_type = "int8"
threads = 1
max_batch = 2
prefix_cache = false
chat_template = "chat.jinja"
adapters = { pirate = "loras/one" }

[[models]]
source = "organization/name:Q4_K_M"
filename = "*Q4_K_M.gguf"
draft = "small.gguf"
speculation = "on"
"""


@pytest.fixture(autouse=True)
def _log_of_the_command() -> Iterator[None]:
    """Takes the handlers away again that the command adds to the log."""
    loggers = [logging.getLogger(name) for name in ("nybble", "nybble.server", "uvicorn", "asyncio")]
    before = [(logger, [*logger.handlers], logger.level, logger.propagate) for logger in loggers]
    yield
    for logger, handlers, level, propagate in before:
        logger.handlers, logger.propagate = handlers, propagate
        logger.setLevel(level)


@pytest.fixture
def folder(tmp_path: Path, tiny_file: Path) -> Path:
    folder = tmp_path / "models"
    folder.mkdir()
    shutil.copy(tiny_file, folder / "small.gguf")
    adapters.write_peft(folder / "loras" / "one", 1)
    (folder / "chat.jinja").write_text("{{ messages[0].content }}", encoding="utf-8")
    (folder / "broken.jinja").write_text("{% if %}", encoding="utf-8")
    (folder / "server.toml").write_text(FILE, encoding="utf-8")
    return folder


def configured(file: Path, text: str) -> Any:
    """The models of a file with this content."""
    file.write_text(text, encoding="utf-8")
    config = read_config(file)
    options, load = with_config(config, ServeOptions(), LoadOptions(), ())
    return configured_models(config, options, load)


def test_a_file_has_models_and_options_of_the_server(folder: Path) -> None:
    config = read_config(folder / "server.toml")
    options, load = with_config(config, ServeOptions(port=9000, timeout=5), LoadOptions(), ["port"])
    assert (options.port, options.timeout, options.max_memory_bytes) == (9000, 30, 4 * 10**9)
    assert (options.allow_host, options.adapter_folder) == (["example.org"], str(folder / "loras"))
    first, second = configured_models(config, options, load)
    assert (first.name, first.aliases, first.source) == ("chat", ("gpt-4o", "default"), str(folder / "small.gguf"))
    assert first.load == LoadOptions(threads=1, context=64, cache_type="int8")
    assert (first.options.cache_bytes, first.options.max_batch) == (5 * 10**8, 2)
    assert (first.options.prefix_cache, first.options.timeout) == (False, 30)
    assert first.adapters == {"pirate": folder / "loras" / "one"}
    assert first.chat_template == "{{ messages[0].content }}"
    # A model without own options has those of the file.
    assert (second.name, second.load.threads, second.load.filename) == ("organization/name:Q4_K_M", 2, "*Q4_K_M.gguf")
    assert (second.options.draft, second.options.max_batch) == (str(folder / "small.gguf"), 16)
    assert not second.is_local


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("models = 3", "models: found 3, expected tables: [[models]]"),
        ("prot = 1", "found the unknown key 'prot'; did you mean 'port'?"),
        ("zzzzzzz = 1", "found the unknown key 'zzzzzzz'; expected one of adapter_folder, allow_host, "),
        ("name = 'a'", "found the unknown key 'name'"),
        ("port = '8000'", "port: found '8000', expected a whole number"),
        ("port = true", "port: found True, expected a whole number"),
        ("port = 70000", "port: found 70000, expected 0 to 65535"),
        ("timeout = 'x'", "timeout: found 'x', expected a number"),
        ("allow_host = 'x'", "allow_host: found 'x', expected a list of strings"),
        ("log_level = 'loud'", "log_level: found 'loud', expected 'debug' or 'info' or 'warning' or 'error'"),
        ("max_memory = '4'", "max_memory: found '4', expected a size with its unit, such as 16GB or 500MB"),
        ("max_memory = 4", "max_memory: found 4, expected a string"),
        ("port = ", "expected TOML"),
        ("[[models]]\nname = 'a'", "models[1] (a): found no source, expected a file, a folder or a repository"),
        (
            "[[models]]\nsource = 'small.gguf'\n[[models]]\nsource = 'small.gguf'\ncontxt = 8",
            "models[2] (small.gguf): found the unknown key 'contxt'; did you mean 'context'?",
        ),
        ("[[models]]\nsource = 'small.gguf'\nport = 8", "models[1] (small.gguf): found the unknown key 'port'"),
        ("[[models]]\nsource = 'small.gguf'\ncontext = '8k'", "context: found '8k', expected a whole number"),
        ("[[models]]\nsource = 'small.gguf'\ncache_type = 'f64'", "cache_type: found 'f64', expected 'f16' or 'int8'"),
        ("[[models]]\nsource = 'small.gguf'\nmax_batch = 0", "models[1] (small.gguf): max_batch: found 0, expected 1"),
        ("[[models]]\nsource = 'small.gguf'\nadapters = ['a']", "adapters: found ['a'], expected a table of names"),
        ("[[models]]\nsource = 'small.gguf'\nadapters = {latest = 'a'}", "models[1] (small.gguf): adapter: found the"),
        ("[[models]]\nsource = 'small.gguf'\nchat_template = 'no.jinja'", "models[1] (small.gguf): chat_template: "),
        ("[[models]]\nsource = 'small.gguf'\nchat_template = 'broken.jinja'", "broken.jinja: line 1: "),
        ("[[models]]\nsource = 'ftp://a/b'", "models[1] (ftp://a/b): source: found the URL"),
        ("cache_dir_bytes = 9", "found the unknown key 'cache_dir_bytes'; did you mean 'cache_dir"),
        (
            "[[models]]\nsource = 'small.gguf'\ncache_dir_gb = 2",
            "models[1] (small.gguf): cache_dir_gb: found a limit, but no cache_dir",
        ),
        ("[[models]]\nsource = 4", "models[1]: source: found 4, expected a string"),
        ("[[models]]\nsource = 'small.gguf'\naliases = [1]", "aliases: found [1], expected a list of strings"),
    ],
)
def test_a_wrong_file_is_refused_with_its_place(folder: Path, text: str, message: str) -> None:
    file = folder / "wrong.toml"
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        configured(file, text)
    assert str(error.value).startswith(str(file))


@pytest.mark.parametrize(
    ("text", "own", "expected"),
    [
        ("cache_dir = 'p'\ncache_dir_gb = 1.5", "", ("p", 1_500_000_000)),
        ("cache_dir = 'p'\ncache_dir_gb = 1.5", "cache_dir_gb = 2", ("p", 2_000_000_000)),
        ("cache_dir = 'p'", "cache_dir = 'q'\ncache_dir_gb = 0", ("q", 0)),
        ("cache_dir_gb = 1", "cache_dir = 'q'", ("q", 1_000_000_000)),
        ("cache_dir = 'p'", "", ("p", None)),
    ],
)
def test_each_model_may_have_its_prefix_cache_on_disk(
    folder: Path, text: str, own: str, expected: tuple[str, int | None]
) -> None:
    (model,) = configured(folder / "disk.toml", f"{text}\n[[models]]\nsource = 'small.gguf'\n{own}")
    engine = model.options.engine()
    assert (engine.cache_dir, engine.cache_dir_bytes) == (str(folder / expected[0]), expected[1])


def test_the_file_and_the_command_line_have_the_disk_cache_together(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pools: list[Pool] = []
    monkeypatch.setattr(http_server, "serve", lambda served, *_: pools.append(served))
    file = folder / "disk.toml"
    start = ["serve", "--config", str(file), "--port", "0", "--cache-dir-gb", "5"]
    for text, status in (("cache_dir = 'p'", 0), ("", 2)):
        file.write_text(f"{text}\n[[models]]\nsource = 'small.gguf'", encoding="utf-8")
        assert main(start) == status
    assert "cache_dir_gb: found a limit, but no cache_dir" in capsys.readouterr().err
    ((spec, _),) = [entry.plan for entry in pools[0].entries]
    assert (spec.options.cache_dir, spec.options.cache_dir_bytes) == (str(folder / "p"), 5 * 10**9)


def test_what_cannot_be_read_in_a_folder_is_left_out_with_a_warning(
    folder: Path, tiny_file: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("lost+found", "other"):
        (folder / name / "deep").mkdir(parents=True)
        shutil.copy(tiny_file, folder / name / "deep" / "model.gguf")
    (folder / "unreachable.gguf").symlink_to(folder / "lost+found" / "secret.gguf")
    (folder / "nothing.gguf").symlink_to(folder / "missing.gguf")

    # Permissions do not restrict root, which may run the tests.
    def refusing(call: Callable[..., Any], refused: Path) -> Callable[..., Any]:
        def wrapper(path: Path, **options: Any) -> Any:
            if path == refused:
                raise PermissionError(13, "Permission denied", str(path))
            return call(path, **options)

        return wrapper

    monkeypatch.setattr(Path, "iterdir", refusing(Path.iterdir, folder / "lost+found"))
    monkeypatch.setattr(Path, "stat", refusing(Path.stat, folder / "unreachable.gguf"))
    names = [model.name for model in models_in(folder, ServeOptions(), LoadOptions())]
    assert names == ["small", "other/deep/model"]
    first, second = [record.getMessage() for record in caplog.records]
    assert "a file is left out" in first
    assert str(folder / "unreachable.gguf") in first
    assert "a folder is left out" in second
    assert str(folder / "lost+found") in second
    with pytest.raises(PermissionError, match=r"lost\+found"):
        models_in(folder / "lost+found", ServeOptions(), LoadOptions())


def test_a_folder_holds_models_by_their_names(folder: Path, tiny_file: Path, tmp_path: Path) -> None:
    deep = folder / "author" / "repository"
    shutil.copytree(GOLDENS / "llama", folder / "checkpoint", ignore=shutil.ignore_patterns("golden.*"))
    for name in ("b.gguf", "mmproj-b.gguf", "imatrix.gguf", ".hidden.gguf", "split-00001-of-00002.gguf"):
        deep.mkdir(parents=True, exist_ok=True)
        shutil.copy(tiny_file, deep / name)
    shutil.copy(tiny_file, deep / "split-00002-of-00002.gguf")
    adapters.write_gguf(folder / "lora.gguf", 1)
    (folder / "damaged.gguf").write_bytes(b"GGUF")
    (folder / "readme.md").write_text("text", encoding="utf-8")
    options, load = ServeOptions(max_batch=3), LoadOptions(threads=1, filename="*Q4*")
    found = models_in(folder, options, load)
    assert [model.name for model in found] == [
        "damaged",
        "small",
        "author/repository/b",
        "author/repository/split",
        "checkpoint",
    ]
    assert {model.load.filename for model in found} == {None}
    assert {model.options.max_batch for model in found} == {3}
    pool = new_pool([model for model in found if "split" not in model.name], options, None)
    known = {entry.name: entry.context for entry in pool.entries}
    assert known == {"damaged": None, "small": 128, "author/repository/b": 128, "checkpoint": 256}
    empty = tmp_path / "empty"
    empty.mkdir()
    for path, message in ((empty, "found no model in"), (empty / "no", "expected a folder")):
        with pytest.raises(ValueError, match=message):
            models_in(path, options, load)


def test_names_stand_for_one_model(tiny_file: Path, tmp_path: Path) -> None:
    one = spec("a", tiny_file, aliases=("b",), adapters={"x": tmp_path})
    for other in ("a", "b", "a:x", "b:x"):
        with pytest.raises(ValueError, match=f"name: found '{other}' for both"):
            check_names([one, spec(other, tmp_path / "other.gguf")])
    with pytest.raises(ValueError, match="name: found 'b' for both"):
        check_names([one, spec("c", tmp_path, aliases=("b",))])
    with pytest.raises(ValueError, match="name: found 'a' twice for the model"):
        check_names([spec("a", tiny_file, aliases=("a",))])
    with pytest.raises(ValueError, match="expected at least one character"):
        check_names([spec(" ", tiny_file)])
    check_names([one, spec("c", tmp_path), spec("a:y", tmp_path)])


def test_options_of_one_model_are_refused_for_several(tiny_file: Path) -> None:
    for options in (ServeOptions(name="x"), ServeOptions(adapter=["a=b"])):
        with pytest.raises(ValueError, match=r"(name|adapter): found 2 models, expected one"):
            named_models([str(tiny_file), "organization/name"], options, LoadOptions())


def test_what_can_never_be_served_ends_the_command(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small, config = str(folder / "small.gguf"), str(folder / "server.toml")
    other = str(shutil.copy(small, folder / "other.gguf"))
    cases: list[tuple[list[str], str]] = [
        ([small, small], "name: found 'small' for both"),
        ([small, str(folder / "missing.gguf")], "missing.gguf"),
        ([small, other, "--max-memory", "10kB"], "max_memory: the model 'small' needs "),
        ([small, other, "--context", "4096"], "the model 'small': context: found 4096, expected 1 to 128"),
        ([small, other, "--name", "x"], "name: found 2 models, expected one"),
        (["--models-dir", str(folder), "--name", "x"], "name: found 0 models, expected one"),
        (["--config", config, "--adapter", "z=/nowhere"], "adapter: found 0 models, expected one"),
        ([small, other, "--max-memory", "9" * 400 + "GB", "--ssl-cert", config], "ssl_key: found ssl_cert alone"),
        ([small, "--cache-dir", str(folder / "cache"), "--cache-dir-gb", "inf"], "cache_dir_gb: found inf"),
        ([small, "--cache-gb", "1e12"], "cache_gb: found 1000000000000.0, expected less than 1e+09"),
        ([small, "--config", config, "--max-loaded", "0"], "max_loaded: found 0, expected 1 or more"),
        (["--models-dir", str(folder / "no")], "models_dir: found"),
        (["--config", str(folder / "no.toml")], "no.toml"),
    ]
    for arguments, message in cases:
        assert main(["serve", *arguments, "--port", "0"]) in (1, 2)
        assert message in capsys.readouterr().err


def test_the_command_collects_models_from_all_places(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], fake_hub: FakeHub
) -> None:
    pools: list[Pool] = []

    def serve(served: Pool, listener: Any, ready: Any, certificate: Any) -> None:
        pools.append(served)
        ready("http://here")

    monkeypatch.setattr(http_server, "serve", serve)
    more = folder / "more"
    more.mkdir()
    tiny.write_model(more / "third.gguf", layers=1)
    other = shutil.copy(folder / "small.gguf", folder / "first.gguf")
    arguments = [str(other), "--config", str(folder / "server.toml"), "--models-dir", str(more)]
    assert main(["serve", *arguments, "--port", "0", "--timeout", "7", "--unload-after", "9"]) == 0
    (pool,) = pools
    assert [entry.name for entry in pool.entries] == ["first", "chat", "organization/name:Q4_K_M", "third"]
    # The command line comes before the file, and options of a model before those of the server.
    assert (pool.settings.request_seconds, pool.limits.max_bytes) == (7, 4 * 10**9)
    assert [entry.spec.load.threads for entry in pool.entries if entry.spec is not None] == [2, 1, 2, 2]
    assert [entry.settings.max_answers for entry in pool.entries] == [144, 130, 144, 144]
    assert {entry.unload_after for entry in pool.entries} == {9}
    assert [entry.needs is None for entry in pool.entries] == [False, False, True, False]
    assert "first\nchat\norganization/name:Q4_K_M\nthird\n  page  http://here\n" in capsys.readouterr().err
    assert not fake_hub.requests


def test_one_model_is_loaded_at_the_start_unless_an_option_concerns_loading(
    tiny_file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seen: list[tuple[bool, list[str], list[Any]]] = []

    def serve(served: Any, listener: Any, ready: Any, certificate: Any) -> None:
        pool = Pool.of(served)
        cards = [card.model_dump(exclude_unset=True) for card in model_cards(pool)]
        seen.append((pool.fixed is not None, [entry.state for entry in pool.entries], cards))

    monkeypatch.setattr(http_server, "serve", serve)
    for options in ([], ["--unload-after", "0"], ["--max-loaded", "1"], ["--max-memory", "1GB"]):
        assert main(["serve", str(tiny_file), "--port", "0", "--name", "own", *options]) == 0
    (eager, *lazy) = seen
    assert eager[:2] == (True, ["loaded"])
    assert eager[2][0].keys().isdisjoint({"loaded", "aliases"})
    assert {(is_fixed, *states) for is_fixed, states, _ in lazy} == {(False, "unloaded")}
    assert {cards[0]["id"] for _, _, cards in seen} == {"own"}
    assert "own" not in capsys.readouterr().out


def test_a_repository_is_downloaded_by_its_first_request(fake_hub: FakeHub, tiny_file: Path) -> None:
    fake_hub.repositories["org/model"] = {"model-Q4_0.gguf": tiny_file.read_bytes()}
    specs = [spec("local", tiny_file), spec("org/model", "org/model")]
    with serving_several(specs) as server:
        cards = {card["id"]: card for card in server.request("GET", "/v1/models").json["data"]}
        assert (cards["org/model"]["context_length"], cards["local"]["context_length"]) == (None, 128)
        # A model whose files have not been read may take a long request.
        large = {"model": "none", "prompt": "x" * 9_000_000}
        assert server.request("POST", "/v1/completions", large).status == 404
        assert server.chat(model="org/model").status == 200
        assert server.request("POST", "/v1/completions", large).status == 413
        assert server.request("GET", "/v1/models/org/model").json["context_length"] == 128
        fake_hub.reset()
        assert server.chat(model="local").status == 200
