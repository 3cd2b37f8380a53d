"""The native module: files, kernels and sequences."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny

from nybble import LoadOptions, ModelError, SamplingOptions, _native


def read(path: Path, values: dict[str, Any]) -> dict[str, Any]:
    tiny.write_gguf(path / "a.gguf", values)
    return _native.GgufFile(path / "a.gguf").metadata


@pytest.mark.parametrize(
    "value",
    [0, 2**32 - 1, -1, True, False, 0.5, -math.inf, "", "Grüße 🌍", [1, 2], ["a", "", "世"], [True, False], [0.5], []],
)
def test_metadata_values_have_python_types(tmp_path: Path, value: Any) -> None:
    found = read(tmp_path, {"the.key": value})["the.key"]
    assert found == value
    assert type(found) is type(value)


def test_metadata_keeps_the_order_of_the_file(tmp_path: Path) -> None:
    assert list(read(tmp_path, {"b": 1, "a": 2, "c": 3})) == ["b", "a", "c"]


def test_invalid_utf_8_round_trips_through_surrogates(tmp_path: Path) -> None:
    broken = b"caf\xe9 \xf0\x9f"
    found = read(tmp_path, {"one": broken, "many": [broken, b"whole"]})
    assert found["one"].encode("utf-8", "surrogateescape") == broken
    assert [text.encode("utf-8", "surrogateescape") for text in found["many"]] == [broken, b"whole"]


def test_tensors_are_listed_in_the_order_of_the_file(tiny_file: Path) -> None:
    tensors = _native.GgufFile(tiny_file).tensors
    assert len(tensors) == 20
    first = tensors[0]
    assert (first.name, first.type, first.shape, first.nbytes) == ("token_embd.weight", "Q8_0", (64, 259), 17_612)
    weights = np.random.default_rng(7).normal(0, 0.2, (tiny.VOCABULARY, 64))
    assert tiny_file.read_bytes()[first.offset :][: first.nbytes] == tiny.q8_0(weights)


def test_system_errors_become_the_matching_os_errors(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError) as caught:
        _native.GgufFile(tmp_path / "nowhere.gguf")
    assert caught.value.filename == str(tmp_path / "nowhere.gguf")
    with pytest.raises(OSError, match="directory"):
        _native.GgufFile(tmp_path)


def test_a_damaged_file_is_a_model_error(tmp_path: Path, tiny_file: Path) -> None:
    for length in (0, 3, 4, 24, 100, 5000):
        (tmp_path / "cut.gguf").write_bytes(tiny_file.read_bytes()[:length])
        with pytest.raises(ModelError, match=r"cut\.gguf: .*found .*, expected "):
            _native.GgufFile(tmp_path / "cut.gguf")


def test_kernels_are_listed_best_first_and_scalar_is_always_there() -> None:
    assert _native.kernels()[-1] == "scalar"
    assert _native.default_threads() >= 1


def test_a_sequence_can_be_in_a_step_only_once(tiny_file: Path) -> None:
    model = _native.Model.load(tiny_file, LoadOptions(threads=1))
    sequence = model.sequence([1, 2, 3], SamplingOptions(seed=1))
    with pytest.raises(ValueError, match="sequence"):
        model.step([sequence, sequence])
    assert len(model.step([sequence])) == 1, "the sequence is still usable"


def test_a_sequence_of_another_model_is_refused(tiny_file: Path, tmp_path: Path) -> None:
    other = _native.Model.load(tiny.write_model(tmp_path / "other.gguf", layers=1), LoadOptions(threads=1))
    sequence = _native.Model.load(tiny_file, LoadOptions(threads=1)).sequence([1, 2, 3], SamplingOptions(seed=1))
    with pytest.raises(ValueError, match="another model"):
        other.step([sequence])
