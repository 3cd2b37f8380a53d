"""GGUF files and folders of safetensors in unusual layouts, with more or fewer tensors than the model has."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoints import Tensors, copy, logits, read_safetensors, write_safetensors
from gguf_files import File, Tensor, u32
from goldens import GOLDENS, golden

import nybble
from nybble import Model, ModelError, _native

POINTER = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 4683073184\n"


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> File:
    """The golden llama in F32."""
    out = tmp_path_factory.mktemp("gguf") / "llama.gguf"
    _native.convert(GOLDENS / "llama", out, "f32")
    return File.read(out)


@pytest.fixture
def changed(file: File) -> File:
    return file.copy()


def vector(length: int) -> Tensor:
    return Tensor.of(np.linspace(0.5, 1.5, length))


TEXT: dict[str, Any] = {
    "calibration": ["A line of prose, and another one after it. " * 40],
    "calibration_tokens": 256,
}

WRITERS: dict[str, Callable[[Path, Path], object]] = {
    "convert": lambda source, out: _native.convert(source, out, "q8_0"),
    "rtn": lambda source, out: nybble.quantize(source, out, recipe="rtn"),
    "gptq": lambda source, out: nybble.quantize(source, out, recipe="gptq", **TEXT),
    "auto": lambda source, out: nybble.quantize(source, out, recipe="auto", **TEXT),
    "bits": lambda source, out: nybble.quantize(source, out, bits_per_weight=6, **TEXT),
    "loading": lambda source, out: Model.load(source, quantize="int4:rtn", threads=1),
}


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of quantized models, which is empty."""
    monkeypatch.setenv("NYBBLE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


# Tensors of GGUF


@pytest.mark.parametrize(
    "name",
    [
        "blk.0.attn_sinks.weight",
        "blk.1.attn_norm.bias",
        "blk.0.attn_q_sub.weight",
        "output_norm.bias",
        "blk.0.attn_q.weight.lora_a",
        "blk.0.ffn_gate.scale",
        "blk.2.attn_q.weight",
        "cls.weight",
    ],
)
def test_a_tensor_that_nothing_reads_is_refused_by_name(name: str, changed: File, tmp_path: Path) -> None:
    changed.tensors[name] = vector(64)
    with pytest.raises(ModelError, match=f'tensor "{name}"'):
        logits(changed.write(tmp_path / "model.gguf"))


@pytest.mark.parametrize("writer", WRITERS.values(), ids=WRITERS)
@pytest.mark.parametrize("is_folder", [False, True], ids=["file", "folder"])
def test_a_tensor_that_nothing_reads_is_refused_before_a_file_is_written(
    writer: Callable[[Path, Path], object], is_folder: bool, changed: File, cache: Path, tmp_path: Path
) -> None:
    if is_folder:
        more = with_more(model__layers__1__self_attn__sinks=(4,))
        source, name = copy("llama", tmp_path / "model", tensors=more), "model.layers.1.self_attn.sinks"
    else:
        changed.tensors["blk.1.ffn_up.lora_b"] = vector(64)
        source, name = changed.write(tmp_path / "model.gguf"), "blk.1.ffn_up.lora_b"
    before = sorted(tmp_path.iterdir())
    with pytest.raises(ModelError, match=f'tensor "{name}"'):
        writer(source, tmp_path / "out.gguf")
    assert sorted({*tmp_path.iterdir()} - {cache}) == before
    assert not [*cache.rglob("*.gguf")]


@pytest.mark.parametrize(
    "name",
    [
        "v.patch_embd.weight",
        "mm.0.weight",
        "blk.0.attn_rot_embd.weight",
        "rope_factors_long.weight",
        "mtp.layers.0.weight",
        "blk.2.nextn.eh_proj.weight",
    ],
)
def test_tensors_without_influence_change_no_logits(name: str, changed: File, tmp_path: Path) -> None:
    expected = logits(changed.write(tmp_path / "plain.gguf"))
    changed.tensors[name] = vector(8)
    more = changed.write(tmp_path / "more.gguf")
    np.testing.assert_array_equal(logits(more), expected)
    _native.convert(more, tmp_path / "converted.gguf", "f32")
    np.testing.assert_array_equal(logits(tmp_path / "converted.gguf"), expected)
    nybble.quantize(more, tmp_path / "quantized.gguf", recipe="rtn")


def test_empty_tensors_and_dimensions_of_one_at_the_end_change_no_logits(changed: File, tmp_path: Path) -> None:
    expected = logits(changed.write(tmp_path / "plain.gguf"))
    for name, tensor in changed.tensors.items():
        more = [1, 1] if "norm" in name else [1]
        changed.tensors[name] = Tensor([*tensor.shape, *more], tensor.kind, tensor.data)
    changed.tensors["empty.weight"] = Tensor([64, 0], 0, b"")
    path = changed.write(tmp_path / "odd.gguf")
    np.testing.assert_array_equal(logits(path), expected)
    # Norms keep their type.
    assert logits(path, quantize="int4").shape == expected.shape
    np.testing.assert_array_equal(logits(path, quantize="int4"), logits(tmp_path / "plain.gguf", quantize="int4"))


@pytest.mark.parametrize(
    ("kind", "name", "advice"),
    [(4, "Q4_2", "Q4_0"), (31, "Q4_0_4_4", "Q4_0"), (33, "Q4_0_8_8", "Q4_0"), (37, "IQ4_NL_4_8", "IQ4_NL")],
)
def test_withdrawn_types_are_named_with_advice(
    kind: int, name: str, advice: str, changed: File, tmp_path: Path
) -> None:
    old = changed.tensors["blk.0.ffn_up.weight"]
    changed.tensors["blk.0.ffn_up.weight"] = Tensor(old.shape, kind, old.data)
    with pytest.raises(ModelError, match=rf"blk.0.ffn_up.weight.*{name},.*a.* file.* in {advice}"):
        logits(changed.write(tmp_path / "old.gguf"))


@pytest.mark.parametrize("layout", [{"gap": 3}, {"version": 2}, {"alignment": 4096}], ids=str)
def test_valid_layouts_are_read(layout: dict[str, Any], changed: File, tmp_path: Path) -> None:
    expected = logits(changed.write(tmp_path / "plain.gguf"))
    if "alignment" in layout:
        changed.metadata["general.alignment"] = u32(layout["alignment"])
    np.testing.assert_array_equal(logits(changed.write(tmp_path / "odd.gguf", **layout)), expected)


def test_factors_of_the_rotation_apply_in_every_family(tmp_path: Path) -> None:
    for family in ("llama", "qwen2"):
        _native.convert(copy(family, tmp_path / family), tmp_path / f"{family}.gguf", "f32")
        file = File.read(tmp_path / f"{family}.gguf")
        expected = logits(tmp_path / f"{family}.gguf")
        file.tensors["rope_freqs.weight"] = Tensor.of(np.ones(8))
        np.testing.assert_array_equal(logits(file.write(tmp_path / "ones.gguf")), expected)
        file.tensors["rope_freqs.weight"] = Tensor.of(np.linspace(1, 3, 8))
        assert (logits(file.write(tmp_path / "others.gguf")) != expected).any()


# Folders


def is_golden(folder: Path) -> bool:
    return float(np.abs(logits(folder) - golden("llama", "logits")[0]).max()) <= 2e-3


@pytest.mark.parametrize("name", ["gptq_model-4bit-128g.safetensors", "pytorch_model.safetensors"])
def test_the_only_safetensors_file_may_have_any_name(name: str, tmp_path: Path) -> None:
    folder = copy("llama", tmp_path / "model", weights=name)
    write_safetensors(folder / "adapter_model.safetensors", {"lora.weight": np.zeros((2, 2), np.float32)})
    (folder / f"._{name}").write_bytes(b"macOS")
    assert is_golden(folder)
    write_safetensors(folder / "another.safetensors", {"other.weight": np.zeros((2, 2), np.float32)})
    with pytest.raises(ModelError, match="several"):
        logits(folder)


@pytest.mark.parametrize("index", ["model.safetensors.index.json", "gptq_model-4bit.safetensors.index.json"])
def test_an_index_and_its_shards_may_have_any_names(index: str, tmp_path: Path) -> None:
    folder = copy("llama", tmp_path / "model")
    tensors = read_safetensors(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    shards = {"one part é.safetensors": names[::2], "zz.safetensors": names[1::2]}
    for shard, members in shards.items():
        write_safetensors(folder / shard, {name: tensors[name] for name in members})
    weight_map = {name: shard for shard, members in shards.items() for name in members}
    (folder / index).write_text(json.dumps({"weight_map": weight_map}), encoding="utf-8")
    assert is_golden(folder)


def with_more(**more: tuple[int, ...]) -> Callable[[Tensors], None]:
    def change(tensors: Tensors) -> None:
        tensors.update({name.replace("__", "."): np.zeros(shape, np.float32) for name, shape in more.items()})

    return change


def with_dimensions_of_one(tensors: Tensors) -> None:
    for name, tensor in tensors.items():
        tensors[name] = tensor.reshape(1, *tensor.shape, 1)


@pytest.mark.parametrize(
    "change", [with_more(empty__weight=(0, 4)), with_more(mtp__fc__weight=(4, 4)), with_dimensions_of_one]
)
def test_tensors_of_a_folder_without_influence_are_ignored(change: Callable[[Tensors], None], tmp_path: Path) -> None:
    assert is_golden(copy("llama", tmp_path / "model", tensors=change))


def test_a_tensor_of_a_folder_that_nothing_reads_is_refused(tmp_path: Path) -> None:
    folder = copy("llama", tmp_path / "model", tensors=with_more(model__layers__0__self_attn__sinks=(4,)))
    with pytest.raises(ModelError, match=r"model\.layers\.0\.self_attn\.sinks"):
        logits(folder)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "model.safetensors.index.json", "m.gguf"])
def test_pointers_of_git_lfs_are_named(name: str, tmp_path: Path) -> None:
    folder = copy("llama", tmp_path / "model")
    if name.endswith("index.json"):
        (folder / "model.safetensors").unlink()
    (folder / name).write_text(POINTER)
    with pytest.raises(ModelError, match=rf"{name}.*Git LFS pointer.*git lfs pull"):
        logits(folder / name if name == "m.gguf" else folder)


@pytest.mark.parametrize("content", [b"<!DOCTYPE html><html>", b"lmgg" + bytes(100), b""], ids=str)
def test_files_of_other_formats_are_refused_by_name(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "m.gguf").write_bytes(content)
    with pytest.raises(ModelError, match=r"m\.gguf"):
        logits(tmp_path / "m.gguf")


@pytest.mark.parametrize("family", ["gemma4", "gemma4-moe", "gemma4-k_eq_v", "granite_swa"])
def test_converted_files_list_windows_where_llama_cpp_reads_a_list(family: str, tmp_path: Path) -> None:
    _native.convert(GOLDENS / family, tmp_path / "model.gguf", "f32")
    metadata = _native.GgufFile(tmp_path / "model.gguf").metadata
    architecture = metadata["general.architecture"]
    config = json.loads((GOLDENS / family / "config.json").read_text(encoding="utf-8"))
    kinds = config.get("text_config", config)["layer_types"]
    listed = metadata[f"{architecture}.attention.sliding_window_pattern"]
    assert listed == [kind == "sliding_attention" for kind in kinds]


def test_a_period_of_windows_in_that_place_is_read_as_before(tmp_path: Path) -> None:
    out = tmp_path / "model.gguf"
    _native.convert(GOLDENS / "gemma4-moe", out, "f32")
    older = File.read(out)
    older.metadata["gemma4.attention.sliding_window_pattern"] = u32(3)
    ids = golden("gemma4-moe", "input_ids")[0].tolist()
    found = []
    for path in (out, older.write(tmp_path / "older.gguf")):
        with Model.load(path, quantize=None, threads=1) as model:
            found.append(model.logits(ids))
    assert np.array_equal(found[0], found[1])


def test_biases_of_hy_3s_router_have_llama_cpps_names(tmp_path: Path) -> None:
    _native.convert(GOLDENS / "hy_v3", tmp_path / "model.gguf", "f32")
    tensors = _native.GgufFile(tmp_path / "model.gguf").tensors
    names = [tensor.name for tensor in tensors if "exp_probs" in tensor.name]
    assert names
    assert all(name.endswith(".exp_probs_b") for name in names)
