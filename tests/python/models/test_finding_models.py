"""Finding the file of a model among others, and by the names that it has elsewhere."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from gguf_files import File, Kind, text
from goldens import GOLDENS

from nybble import Model, ModelError, _native
from nybble.cli import main
from nybble.models import hub
from nybble.models.names import HubName, hub_name


@pytest.fixture
def others(tmp_path: Path) -> dict[str, Path]:
    """Other files than models: a projector, an importance matrix, an adapter, and what macOS writes next to files."""
    kinds = {
        "projector": {"general.architecture": text("clip"), "general.type": text("mmproj")},
        "imatrix": {"general.type": text("imatrix"), "imatrix.datasets": (Kind.ARRAY, (Kind.STRING, [b"a.txt"]))},
        "adapter": {"general.architecture": text("llama"), "general.type": text("adapter")},
    }
    files = {kind: File(keys).write(tmp_path / f"{kind}.other") for kind, keys in kinds.items()}
    files["resource fork"] = tmp_path / "fork.other"
    files["resource fork"].write_bytes(b"\0\5\x16\7")
    return files


def folder(to: Path, **files: Path) -> Path:
    """Copies files into a folder under new names. Two underscores become a slash."""
    for name, source in files.items():
        path = to / f"{name.replace('__', '/')}.gguf"
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(source, path)
    return to


def cached(cache: Path, repository: str, **files: Path) -> Path:
    """Creates a repository in the layout of the Hub's cache."""
    storage = cache / f"models--{repository.replace('/', '--')}"
    (storage / "refs").mkdir(parents=True)
    (storage / "refs" / "main").write_text("a" * 40)
    return folder(storage / "snapshots" / ("a" * 40), **files)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of the Hub, which cannot be reached."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    (tmp_path / "hub").mkdir()
    return tmp_path / "hub"


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("projector", "mmproj-model-f16"),
        ("projector", "it-mmproj"),
        ("projector", "vision encoder"),
        ("imatrix", "imatrix"),
        ("imatrix", "imatrix_unsloth"),
        ("imatrix", "importance"),
        ("adapter", "style"),
        ("resource fork", "._it-Q4_0"),
    ],
)
def test_other_files_next_to_the_model_do_not_count(
    kind: str, name: str, tiny_file: Path, others: dict[str, Path], tmp_path: Path
) -> None:
    source = folder(tmp_path / "model", **{"it-Q4_0": tiny_file, name: others[kind]})
    assert hub.resolve(source).name == "it-Q4_0.gguf"
    assert hub.resolve(source, filename="*.gguf").name == "it-Q4_0.gguf"


def test_a_projector_in_a_repository_does_not_count(tiny_file: Path, others: dict[str, Path], cache: Path) -> None:
    cached(cache, "org/eyes", **{"it-Q4_0": tiny_file, "mmproj-f16": others["projector"]})
    with Model.load("org/eyes", threads=1) as model:
        assert model.info.file.name == "it-Q4_0.gguf"


@pytest.mark.parametrize("source", ["folder", "first", "second"])
def test_a_model_in_shards_loads_by_any_of_them(source: str, tmp_path: Path) -> None:
    file = tmp_path / "whole.gguf"
    _native.convert(GOLDENS / "llama", file, "f32")
    whole = File.read(file)
    names = list(whole.tensors)
    (tmp_path / "split").mkdir()
    shards = []
    for number in range(3):
        keys = {
            "split.no": (Kind.U16, number),
            "split.count": (Kind.U16, 3),
            "split.tensors.count": (Kind.I32, len(names)),
        }
        members = names[number - 1 :: 2] if number else []
        shard = File({**({} if number else whole.metadata), **keys}, {name: whole.tensors[name] for name in members})
        shards.append(shard.write(tmp_path / "split" / f"my model-{number + 1:05}-of-00003.gguf"))
    path = {"folder": tmp_path / "split", "first": shards[0], "second": shards[1]}[source]
    with Model.load(path, threads=1) as model, Model.load(file, threads=1) as expected:
        np.testing.assert_array_equal(model.logits([5, 6, 7]), expected.logits([5, 6, 7]))


def test_a_folder_without_a_model_says_what_it_holds(others: dict[str, Path], tmp_path: Path) -> None:
    source = folder(tmp_path / "model", mmproj=others["projector"], imatrix=others["imatrix"])
    with pytest.raises(FileNotFoundError, match=r"no model among .*mmproj\.gguf"):
        hub.resolve(source)


def test_quantizations_of_imatrix_are_models(tiny_file: Path, tmp_path: Path) -> None:
    source = folder(tmp_path / "model", **{"it-imatrix-Q4_0": tiny_file, "it-imatrix-Q8_0": tiny_file})
    with pytest.raises(ModelError, match=r"it-imatrix-Q4_0\.gguf.*it-imatrix-Q8_0\.gguf.*filename"):
        hub.resolve(source)


def test_a_quantization_in_a_subfolder_is_found(tiny_file: Path, tmp_path: Path) -> None:
    one = folder(tmp_path / "one", Q4_K_M__it=tiny_file)
    (one / "config.json").write_text("{}")
    assert hub.resolve(one) == one / "Q4_K_M" / "it.gguf"
    several = folder(tmp_path / "several", Q4_K_M__it=tiny_file, Q8_0__it=tiny_file)
    assert hub.resolve(several, filename="*Q8_0*") == several / "Q8_0" / "it.gguf"
    with pytest.raises(ModelError, match=r"Q4_K_M/it\.gguf.*Q8_0/it\.gguf"):
        hub.resolve(several)
    # A model in the folder itself comes first.
    top = folder(tmp_path / "top", it=tiny_file, more__it=tiny_file)
    assert hub.resolve(top) == top / "it.gguf"


def test_a_link_that_leads_nowhere_is_skipped(tiny_file: Path, cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cached(cache, "org/here", **{"m-Q4_0": tiny_file})
    gone = cached(cache, "org/gone")
    gone.mkdir(parents=True)
    (gone / "m.gguf").symlink_to("../../blobs/missing")
    assert [model.source for model in hub.cached_models() if model.source] == ["org/here"]
    assert main(["models"]) == 0
    assert "org/here" in capsys.readouterr().out
    with pytest.raises(ConnectionError, match="org/gone"):
        hub.resolve("org/gone")


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("org/Model-GGUF", HubName("org/Model-GGUF")),
        ("org/Model-GGUF:Q4_K_M", HubName("org/Model-GGUF", "*[-._/]Q4_K_M[-./]*")),
        ("org/Model-GGUF:latest", HubName("org/Model-GGUF")),
        ("hf.co/org/Model-GGUF", HubName("org/Model-GGUF")),
        ("hf.co/org/Model-GGUF:Q8_0", HubName("org/Model-GGUF", "*[-._/]Q8_0[-./]*")),
        ("https://huggingface.co/org/Model-GGUF/", HubName("org/Model-GGUF")),
        ("https://huggingface.co/org/m/tree/v2", HubName("org/m", None, "v2")),
        ("https://hf.co/org/m/resolve/main/a/b.gguf?download=true", HubName("org/m", "a/b.gguf", "main")),
        ("huggingface.co/org/m/blob/main/b%20c.gguf", HubName("org/m", "b c.gguf", "main")),
        ("models/a/b.gguf", None),
        ("llama3.2:1b", None),
    ],
)
def test_names_of_repositories_in_other_programs_are_read(name: str, expected: HubName | None) -> None:
    assert hub_name(name) == expected


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("https://example.org/m.gguf", "found the URL 'https://example.org/m.gguf', expected a path"),
        ("https://huggingface.co/datasets", "https://huggingface.co/organization/name"),
    ],
)
def test_a_url_of_something_else_is_refused(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        hub.resolve(name)


def test_a_name_with_a_quantization_loads_that_file(tiny_file: Path, cache: Path) -> None:
    cached(cache, "org/m", **{"m-F16": tiny_file, "m-BF16": tiny_file, "m-Q8_0-00001-of-00001": tiny_file})
    assert hub.resolve("org/m:F16").name == "m-F16.gguf"
    assert hub.resolve("hf.co/org/m:q8_0").name == "m-Q8_0-00001-of-00001.gguf"
    with Model.load("https://huggingface.co/org/m/blob/main/m-BF16.gguf") as model:
        assert model.info.file.name == "m-BF16.gguf"
    with pytest.raises(ModelError, match=r"Q2_K.*m-F16\.gguf"):
        hub.resolve("org/m:Q2_K")
    with pytest.raises(ValueError, match="filename"):
        hub.resolve("org/m:F16", filename="m-BF16.gguf")


def test_a_single_name_says_what_names_look_like(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match="organization/name"):
        hub.resolve("llama3.2:1b")
