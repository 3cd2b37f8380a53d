"""What differs between systems: paths, encodings, folders, signals, and what a system says about itself."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import nybble
from nybble import Model, memory
from nybble.models import paths
from nybble.models.names import hub_name
from nybble.server.addresses import bind
from nybble.server.connections import within_open_files

NYBBLE = [sys.executable, "-m", "nybble"]


def _run(encoding: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONIOENCODING": encoding}
    return subprocess.run(
        [*NYBBLE, *map(str, arguments)],
        capture_output=True,
        encoding=encoding,
        env=environment,
        timeout=120,
        check=False,
    )


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252", "utf-8"])
def test_an_answer_is_written_in_any_encoding(encoding: str, tiny_file: Path) -> None:
    options = ["--raw", "--max-tokens", "40", "--regex", "a[é\U0001f600]{8}b", "--seed", "1"]
    full = _run("utf-8", "run", tiny_file, "x", *options).stdout
    assert "\U0001f600" in full
    done = _run(encoding, "run", tiny_file, "x", *options)
    assert done.returncode == 0, done.stderr
    expected = full.encode(encoding, "replace").decode(encoding)
    assert len(done.stdout) >= len(expected.strip())
    assert done.stdout.strip()[0] == "a"
    assert done.stdout.strip()[-1] == "b"


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_a_path_is_written_in_any_encoding(encoding: str, tiny_file: Path, tmp_path: Path) -> None:
    file = shutil.copy(tiny_file, tmp_path / "mü\U0001f600ller.gguf")
    done = _run(encoding, "inspect", file)
    assert done.returncode == 0, done.stderr


def test_no_text_depends_on_the_encoding_of_the_system(tiny_file: Path) -> None:
    """Python warns wherever text would be read or written in the encoding of the system."""
    strict = [sys.executable, "-X", "warn_default_encoding", "-W", "error::EncodingWarning:nybble", "-m", "nybble"]
    for command in (["inspect", tiny_file], ["models"], ["run", "--raw", "--max-tokens", "2", tiny_file, "x"]):
        done = subprocess.run([*strict, *map(str, command)], capture_output=True, timeout=120, check=False)
        assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    "name", ["a b", "m\u00fc\U0001f600ller", "\u6a21\u578b", "x" * 200, "percent %20 #1", "it's & (x)"]
)
def test_a_model_is_found_under_any_name(name: str, tiny_file: Path, tmp_path: Path) -> None:
    folder = tmp_path / name
    folder.mkdir()
    file = Path(shutil.copy(tiny_file, folder / f"{name[:100]}.gguf"))
    for source in (file, str(file), file.as_posix(), folder):
        with Model.load(source, threads=1) as model:
            assert model.info.file.name == file.name
    done = subprocess.run([*NYBBLE, "inspect", str(file)], capture_output=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr


def test_a_path_of_more_than_260_characters_is_read(tiny_file: Path, tmp_path: Path) -> None:
    folder = tmp_path.joinpath(*["folder with a long name " * 3] * 4)
    try:
        folder.mkdir(parents=True)
        file = Path(shutil.copy(tiny_file, folder / "tiny.gguf"))
    except OSError:
        assert sys.platform == "win32"
        pytest.skip("this Windows does not allow long paths")
    assert len(str(file)) > 260
    with Model.load(file, threads=1) as model:
        model.session().save(folder / "session")
        assert (folder / "session").stat().st_size > 0


@pytest.mark.parametrize(
    "path", ["C:\\models\\tiny.gguf", "C:/models/tiny.gguf", "C:tiny.gguf", "models\\tiny", ".\\tiny"]
)
def test_a_path_with_a_drive_or_backslashes_is_not_a_repository(path: str) -> None:
    assert hub_name(path) is None
    with pytest.raises(FileNotFoundError, match="no such file or folder"):
        Model.load(path)


@pytest.mark.parametrize(
    ("system", "variables", "expected"),
    [
        ("win32", {"LOCALAPPDATA": "local"}, "local/nybble/Cache"),
        ("win32", {}, "home/AppData/Local/nybble/Cache"),
        ("darwin", {"XDG_CACHE_HOME": "xdg"}, "home/Library/Caches/nybble"),
        ("linux", {"XDG_CACHE_HOME": "xdg"}, "xdg/nybble"),
        ("linux", {}, "home/.cache/nybble"),
    ],
)
def test_the_cache_is_in_the_usual_folder_of_the_system(
    system: str, variables: dict[str, str], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("NYBBLE_CACHE", "LOCALAPPDATA", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "platform", system)
    monkeypatch.setattr(Path, "home", lambda: Path("home"))
    assert paths.cache_dir() == Path(expected)


def test_the_system_says_how_much_memory_there_is_and_is_used() -> None:
    available, resident, peak = memory.available_bytes(), memory.resident_bytes(), memory.peak_resident_bytes()
    assert available is not None
    assert available > 1 << 20
    assert resident is not None
    assert peak is not None
    assert 1 << 20 < resident <= peak + (1 << 20)
    assert 1 <= nybble._native.default_threads() <= (os.cpu_count() or 1)


def test_a_system_without_the_module_resource_has_no_limit_of_files(monkeypatch: pytest.MonkeyPatch) -> None:
    missing: Any = None
    monkeypatch.setitem(sys.modules, "resource", missing)
    assert within_open_files(100_000).limit == 100_000
    memory.peak_resident_bytes()


def test_two_servers_cannot_have_the_same_address() -> None:
    with bind("127.0.0.1", 0) as first:
        first.listen()
        with pytest.raises(OSError, match="port"), bind("127.0.0.1", first.getsockname()[1]) as second:
            second.listen()


def test_ctrl_break_ends_a_server(tiny_file: Path) -> None:
    if sys.platform != "win32":
        pytest.skip("only Windows has this event")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    process = subprocess.Popen(
        [*NYBBLE, "serve", str(tiny_file), "--port", str(port)],
        stderr=subprocess.PIPE,
        creationflags=subprocess.CREATE_NEW_PROCESS_GROUP,
        text=True,
    )
    assert process.stderr is not None
    for line in process.stderr:
        if "http://" in line:
            break
    process.send_signal(signal.CTRL_BREAK_EVENT)
    _, rest = process.communicate(timeout=60)
    assert process.returncode in (0, 128 + signal.SIGBREAK), rest
