"""Checkpoint folders of Hugging Face: loading, quantization and conversion."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from nybble import Model, ModelError, _native
from nybble.cli import main

LLAMA = Path(__file__).parents[2] / "data" / "goldens" / "llama"


def golden(name: str) -> npt.NDArray[Any]:
    """An array of the reference values, from a safetensors file."""
    raw = (LLAMA / "golden.bin").read_bytes()
    length = int.from_bytes(raw[:8], "little")
    entry = json.loads(raw[8 : 8 + length])[name]
    start, end = entry["data_offsets"]
    kind = {"F32": np.float32, "I32": np.int32}[entry["dtype"]]
    array: npt.NDArray[Any] = np.frombuffer(raw[8 + length :][start:end], kind).reshape(entry["shape"])
    return array


def test_a_folder_as_stored_gives_the_logits_of_transformers() -> None:
    with Model.load(LLAMA, quantize=None) as model:
        logits = model.logits(golden("input_ids")[0].tolist())
    assert np.abs(logits - golden("logits")[0]).max() <= 2e-4


@pytest.mark.parametrize("quantize", ["auto", "int4", "int8"])
def test_a_folder_is_quantized_while_it_loads(quantize: str) -> None:
    with Model.load(LLAMA, quantize=None) as exact, Model.load(LLAMA, quantize=quantize) as model:
        assert model.info.weight_bytes < exact.info.weight_bytes / 3
        assert np.isfinite(model.logits([1, 2, 3])).all()


def test_a_folder_has_its_tokenizer_and_chat_template() -> None:
    with Model.load(LLAMA) as model:
        done = model.chat([{"role": "user", "content": "Hello"}], max_tokens=4, temperature=0)
        assert done.usage.completion_tokens <= 4
        assert model.detokenize(model.tokenize("Hello there")) == "Hello there"


def test_an_unknown_quantization_is_refused() -> None:
    with pytest.raises(ValueError, match="int3"):
        Model.load(LLAMA, quantize="int3")


def test_weights_in_a_pickle_are_refused_with_the_reason(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes((LLAMA / "config.json").read_bytes())
    (tmp_path / "pytorch_model.bin").write_bytes(b"PK")
    with pytest.raises(ModelError, match="pickle"):
        Model.load(tmp_path)


def test_a_converted_folder_runs_on_its_own(tmp_path: Path) -> None:
    out = tmp_path / "llama.gguf"
    assert main(["convert", str(LLAMA), str(out), "--type", "f32"]) == 0
    with Model.load(LLAMA, quantize=None) as folder, Model.load(out) as file:
        assert np.abs(file.logits([5, 6, 7]) - folder.logits([5, 6, 7])).max() <= 1e-5
        assert file.tokenize("Hello there") == folder.tokenize("Hello there")
        text = file.tokenizer.apply_chat_template([{"role": "user", "content": "Hello"}])
        assert text == folder.tokenizer.apply_chat_template([{"role": "user", "content": "Hello"}])


def test_an_existing_file_is_overwritten_only_with_force(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "llama.gguf"
    out.write_bytes(b"precious")
    assert main(["convert", str(LLAMA), str(out)]) == 1
    assert "llama.gguf: already exists" in capsys.readouterr().err
    assert out.read_bytes() == b"precious"
    assert main(["convert", str(LLAMA), str(out), "--type", "q8_0", "--force"]) == 0
    assert out.read_bytes()[:4] == b"GGUF"


def test_ctrl_c_leaves_no_file(tmp_path: Path) -> None:
    def interrupt(done: int, total: int) -> None:
        assert list(tmp_path.iterdir()), "the file has been begun"
        signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        _native.convert(LLAMA, tmp_path / "out.gguf", "f32", interrupt)
    assert not list(tmp_path.iterdir())


def test_a_source_that_cannot_be_converted_leaves_no_file(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "perceptron"}')
    (tmp_path / "model.safetensors").write_bytes((LLAMA / "model.safetensors").read_bytes())
    out = tmp_path / "out.gguf"
    assert main(["convert", str(tmp_path), str(out)]) == 1
    assert not list(tmp_path.glob("out*"))
