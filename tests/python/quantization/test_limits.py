"""Sources at the limits of formats: split files, scales beyond F16, NaN, odd rows, weights in 4 bits already."""

from __future__ import annotations

import json
import logging
import shutil
import struct
from pathlib import Path
from typing import Any, cast

import checkpoints
import numpy as np
import numpy.typing as npt
import pytest
from checkpoints import copy
from goldens import GOLDENS, golden

from nybble import Model, ModelError, QuantizeOptions, _native, quantize

LLAMA = GOLDENS / "llama"
IDS = [int(token) for token in golden("llama", "input_ids")[0]]
WORDS = ["the", "dog", "said", "hello", "to", "a", "cat", "and", "went", "home", "in", "rain", "while", "birds", "sang"]


def logits(source: Path, prose: str | None = None) -> npt.NDArray[np.float32]:
    """The logits of the golden ids, or of a text."""
    with Model.load(source, quantize=None, threads=1, progress=False, cache_type="f32") as model:
        return model.logits(IDS if prose is None else model.tokenize(prose)[:250])


def divergence(reference: npt.NDArray[np.float32], found: npt.NDArray[np.float32]) -> float:
    """The mean Kullback-Leibler divergence of two arrays of logits, in nats."""
    p, q = (x.astype(np.float64) - x.max(-1, keepdims=True) for x in (reference, found))
    p, q = (x - np.log(np.exp(x).sum(-1, keepdims=True)) for x in (p, q))
    return float((np.exp(p) * (p - q)).sum(-1).mean())


def text(seed: int, count: int) -> str:
    random = np.random.default_rng(seed)
    return " ".join(str(random.choice(WORDS)) for _ in range(count))


# Split sources.

_SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}


class GgufReader:
    """Reads the keys of a GGUF file as raw bytes, and its tensors."""

    def __init__(self, path: Path) -> None:
        self._data, self._at = path.read_bytes(), 8
        tensors, count = self._take("Q"), self._take("Q")
        self.pairs: dict[bytes, bytes] = {}
        for _ in range(count):
            start = self._at
            name = self._string()
            self._skip(self._take("I"))
            self.pairs[name] = self._data[start : self._at]
        self.tensors: list[tuple[bytes, list[int], int, bytes]] = []
        infos = [
            (self._string(), [self._take("Q") for _ in range(self._take("I"))], self._take("I"), self._take("Q"))
            for _ in range(tensors)
        ]
        base = -(-self._at // 32) * 32
        ends = [offset for _, _, _, offset in infos[1:]] + [len(self._data) - base]
        for (name, dims, kind, offset), end in zip(infos, ends, strict=True):
            self.tensors.append((name, dims, kind, self._data[base + offset : base + end]))

    def _take(self, form: str) -> int:
        (value,) = struct.unpack_from("<" + form, self._data, self._at)
        self._at += struct.calcsize("<" + form)
        return int(value)

    def _string(self) -> bytes:
        length = self._take("Q")
        self._at += length
        return self._data[self._at - length : self._at]

    def _skip(self, kind: int) -> None:
        if kind == 8:
            self._string()
        elif kind == 9:
            inner, count = self._take("I"), self._take("Q")
            for _ in range(count):
                self._skip(inner)
        else:
            self._at += _SIZES[kind]


def _string(value: bytes) -> bytes:
    return struct.pack("<Q", len(value)) + value


def write_shards(folder: Path, whole: Path, count: int) -> Path:
    """Writes the tensors of a file to several files, with other keys about files. Returns the path of the first."""
    source = GgufReader(whole)
    per_file = -(-len(source.tensors) // count)
    about_files = {
        b"general.alignment": struct.pack("<II", 4, 32),
        b"quantize.imatrix.file": struct.pack("<I", 8) + _string(b"imatrix.gguf"),
        b"quantize.imatrix.entries_count": struct.pack("<Ii", 5, 14),
        b"general.quantized_by": struct.pack("<I", 8) + _string(b"somebody"),
    }
    for number in range(count):
        pairs = list(source.pairs.values()) + [_string(k) + v for k, v in about_files.items()] if number == 0 else []
        pairs += [
            _string(b"split.no") + struct.pack("<IH", 2, number),
            _string(b"split.count") + struct.pack("<IH", 2, count),
            _string(b"split.tensors.count") + struct.pack("<Ii", 5, len(source.tensors)),
        ]
        tensors = source.tensors[number * per_file : (number + 1) * per_file]
        head = struct.pack("<4sIQQ", b"GGUF", 3, len(tensors), len(pairs)) + b"".join(pairs)
        body = b""
        for name, dims, kind, data in tensors:
            head += _string(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, kind, len(body))
            body += data + b"\0" * (-len(data) % 32)
        (folder / f"m-{number + 1:05}-of-{count:05}.gguf").write_bytes(head + b"\0" * (-len(head) % 32) + body)
    return folder / f"m-00001-of-{count:05}.gguf"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The golden llama as one F32 file."""
    path = tmp_path_factory.mktemp("whole") / "whole.gguf"
    _native.convert(LLAMA, path, "f32")
    return path


@pytest.mark.parametrize("count", [2, 5])
@pytest.mark.parametrize("how", ["rtn", "gptq", "convert", "load"])
def test_the_result_of_a_split_source_loads_and_has_no_keys_about_it(
    whole: Path, tmp_path: Path, count: int, how: str
) -> None:
    shards = write_shards(tmp_path, whole, count)
    if how == "load":
        with Model.load(shards, quantize="int4:q4_1", threads=1, progress=False) as model:
            assert np.isfinite(model.logits(IDS)).all()
        return
    # Also under a name like that of a file of several.
    out = tmp_path / "q-00001-of-00003.gguf"
    if how == "convert":
        _native.convert(shards, out, "q8_0")
    else:
        quantize(shards, out, recipe=how, threads=1, calibration_tokens=1024)  # type: ignore[arg-type]
    with Model.load(out, threads=1, progress=False) as model:
        assert np.isfinite(model.logits(IDS)).all()
    found = GgufReader(out).pairs
    about_files = (b"split.", b"quantize.", b"general.quantized_by")
    assert not [key for key in found if key.startswith(about_files)]
    assert set(GgufReader(whole).pairs) <= set(found)


# Scales beyond F16.


def scaled(to: Path, power: int, where: str) -> Path:
    """The golden llama with weights times a power of two, which leaves what it computes as it is."""
    factor = np.float32(2.0**power)

    def scale(tensors: checkpoints.Tensors) -> None:
        for layer in range(2):
            stem = f"model.layers.{layer}."
            if where == "attention":
                for name in "qkv":
                    tensors[f"{stem}self_attn.{name}_proj.weight"] *= factor
                tensors[f"{stem}input_layernorm.weight"] /= factor
            else:
                tensors[f"{stem}mlp.up_proj.weight"] *= factor
                tensors[f"{stem}mlp.down_proj.weight"] /= factor

    return checkpoints.copy("llama", to, tensors=scale)


@pytest.mark.parametrize("power", [27, 18, -16, -20, -40])
@pytest.mark.parametrize("where", ["attention", "feed-forward"])
@pytest.mark.parametrize("recipe", ["rtn", "awq+gptq"])
@pytest.mark.parametrize("form", ["q4_0", "q4_1", "iq4_nl"])
def test_weights_of_any_scale_keep_the_function(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, power: int, where: str, recipe: Any, form: Any
) -> None:
    options: Any = {"recipe": recipe, "format": form, "threads": 1, "calibration_tokens": 1024}
    quantize(LLAMA, tmp_path / "plain.gguf", **options)
    expected = logits(LLAMA)
    usual = divergence(expected, logits(tmp_path / "plain.gguf"))
    with caplog.at_level(logging.WARNING, logger="nybble"):
        report = quantize(scaled(tmp_path / "model", power, where), tmp_path / "out.gguf", **options)
    found = divergence(expected, logits(tmp_path / "out.gguf"))
    assert found < 1.5 * usual + 0.01, (found, usual)
    changed = [tensor for tensor in report.tensors if tensor.note is not None]
    assert all(tensor.type == "BF16" for tensor in changed)
    assert bool(changed) == ("stored in BF16" in caplog.text)


@pytest.mark.parametrize("power", [27, -20])
@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_loading_and_converting_refuse_scales_beyond_f16(tmp_path: Path, power: int, kind: str) -> None:
    folder = scaled(tmp_path / "model", power, "attention")
    with pytest.raises(ModelError, match=r"tensor \"blk\.0\.attn_[qkv]\.weight\": found .* expected values whose"):
        Model.load(folder, quantize=kind, threads=1, progress=False)
    out = tmp_path / "out.gguf"
    with pytest.raises(ModelError, match=r"tensor \"blk\.0\.attn_[qkv]\.weight\""):
        _native.convert(folder, out, {"int8": "q8_0", "int4": "f16"}[kind])
    assert not out.exists()
    _native.convert(folder, out, "bf16")
    assert divergence(logits(LLAMA), logits(out)) < 1e-3


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", ["mlp.up_proj", "input_layernorm"])
@pytest.mark.parametrize("kind", ["f32", "f16", "bf16", "q8_0"])
def test_convert_refuses_numbers_that_are_not_finite(tmp_path: Path, value: float, name: str, kind: str) -> None:
    def damage(tensors: checkpoints.Tensors) -> None:
        tensors[f"model.layers.1.{name}.weight"].flat[7] = value

    folder = checkpoints.copy("llama", tmp_path / "model", tensors=damage)
    with pytest.raises(ModelError, match=r"tensor \"blk\.1\.(ffn_up|attn_norm)\.weight\": found (NaN|-?inf).* row"):
        _native.convert(folder, tmp_path / "out.gguf", kind)
    assert not (tmp_path / "out.gguf").exists()


# Weights that are in 4 bits already.


@pytest.mark.parametrize(
    "options", [{}, {"recipe": "gptq"}, {"recipe": "awq+gptq"}, {"recipe": "rtn", "format": "q4_1"}]
)
def test_weights_in_4_bits_stay_exact_where_the_format_holds_them(whole: Path, tmp_path: Path, options: Any) -> None:
    source = tmp_path / "q4_0.gguf"
    _native.convert(whole, source, "q4_0")
    report = quantize(source, tmp_path / "out.gguf", threads=1, calibration_tokens=2048, **options)
    assert {tensor.recipe for tensor in report.tensors if tensor.name.startswith("blk.")} == {"exact"}
    assert divergence(logits(source), logits(tmp_path / "out.gguf")) < 1e-3


def test_a_format_that_does_not_hold_them_rounds_again(whole: Path, tmp_path: Path) -> None:
    source = tmp_path / "q4_0.gguf"
    _native.convert(whole, source, "q4_0")
    report = quantize(source, tmp_path / "out.gguf", recipe="rtn", format="iq4_nl", threads=1)
    assert {tensor.recipe for tensor in report.tensors if tensor.name.startswith("blk.")} == {"rtn"}


# Formats and bits.


@pytest.mark.parametrize("outlier", [1000, 10000])
def test_auto_chooses_the_format_of_each_layer(tmp_path: Path, outlier: int) -> None:
    def enlarge(tensors: checkpoints.Tensors) -> None:
        for layer in range(2):
            tensors[f"model.layers.{layer}.mlp.up_proj.weight"][7] *= outlier
            tensors[f"model.layers.{layer}.mlp.down_proj.weight"][:, 7] /= np.float32(outlier)

    folder = checkpoints.copy("llama", tmp_path / "model", tensors=enlarge)
    expected, found = logits(folder, text(2, 200)), {}
    for recipe, form in {"auto": None, "gptq": "q4_0"}.items():
        out = tmp_path / f"{recipe}.gguf"
        options: Any = {"recipe": recipe, "format": form, "threads": 1}
        quantize(folder, out, calibration=[text(1, 6000)], calibration_tokens=8192, **options)
        found[recipe] = divergence(expected, logits(out, text(2, 200)))
    assert found["auto"] < 1.5 * found["gptq"], found


def odd_rows(to: Path) -> Path:
    """A llama with rows of 100 and 172 weights."""
    config = {"hidden_size": 100, "intermediate_size": 172, "num_attention_heads": 5, "num_key_value_heads": 5}
    config["head_dim"] = 20
    random = np.random.default_rng(0)

    def matrix(rows: int, columns: int) -> npt.NDArray[np.float32]:
        values: npt.NDArray[np.float32] = random.normal(0, columns**-0.5, (rows, columns)).astype(np.float32)
        return values

    def replace(tensors: checkpoints.Tensors) -> None:
        tensors.clear()
        tensors.update({"model.embed_tokens.weight": matrix(320, 100), "lm_head.weight": matrix(320, 100)})
        tensors["model.norm.weight"] = np.ones(100, np.float32)
        for layer in range(json.loads((LLAMA / "config.json").read_text())["num_hidden_layers"]):
            stem = f"model.layers.{layer}."
            for name in ("input_layernorm", "post_attention_layernorm"):
                tensors[f"{stem}{name}.weight"] = np.ones(100, np.float32)
            for name in "qkvo":
                tensors[f"{stem}self_attn.{name}_proj.weight"] = matrix(100, 100)
            for name, shape in (("gate", (172, 100)), ("up", (172, 100)), ("down", (100, 172))):
                tensors[f"{stem}mlp.{name}_proj.weight"] = matrix(*shape)

    return checkpoints.copy("llama", to, config=config, tensors=replace)


def test_rows_that_do_not_fill_blocks_are_reported(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = odd_rows(tmp_path / "model")
    with caplog.at_level(logging.INFO, logger="nybble"):
        report = quantize(folder, tmp_path / "q.gguf", recipe="rtn", threads=1)
    assert "blk.0.attn_q.weight" in caplog.text or "rows of 100 weights do not fill blocks of 32" in caplog.text
    assert {tensor.note for tensor in report.tensors if tensor.name.startswith("blk.")} == {
        f"stored in F16: rows of {columns} weights do not fill blocks of 32" for columns in (100, 172)
    }
    with pytest.raises(ValueError, match=r"bits_per_weight: found 4.6, expected at least 16.*blk\..* in F16"):
        quantize(folder, tmp_path / "b.gguf", recipe="rtn", bits_per_weight=4.6, threads=1)


@pytest.mark.parametrize("keep", [None, {"blk.0.ffn_down": "f16"}, {"*.attn_*": "q8_0"}])
def test_the_bits_per_weight_are_met_or_refused(tmp_path: Path, keep: dict[str, str] | None) -> None:
    for bits in (2.6, 4.0, 4.6, 5.5, 7.0):
        options: Any = {"recipe": "rtn", "bits_per_weight": bits, "keep": keep, "calibration_tokens": 1024}
        try:
            report = quantize(LLAMA, tmp_path / "q.gguf", threads=1, force=True, **options)
        except ValueError as error:
            refused = str(error)
        else:
            assert report.bits_per_weight <= bits
            continue
        assert keep is not None
        assert refused.startswith("bits_per_weight")


@pytest.mark.parametrize("bits", [None, 5.0, 3.0])
def test_auto_moves_bits_from_the_output_to_linear_layers(tmp_path: Path, bits: float | None) -> None:
    options: Any = {"bits_per_weight": bits, "calibration": [text(1, 6000)], "target": 0.9, "threads": 1}
    found = {
        output_type: quantize(LLAMA, tmp_path / f"{output_type}.gguf", output_type=output_type, **options)
        for output_type in (None, "q8_0")
    }
    chosen, fixed = found[None], found["q8_0"]
    types = {tensor.name: tensor.type for tensor in chosen.tensors if not tensor.name.startswith("blk.")}
    assert set(types) == {"token_embd.weight", "output.weight"}
    assert set(types.values()) <= {"IQ4_NL", "Q5_0", "Q8_0"}
    assert {tensor.type for tensor in fixed.tensors if not tensor.name.startswith("blk.")} == {"Q8_0"}
    # Tensors begin at multiples of 32 bytes.
    assert chosen.size_bytes <= fixed.size_bytes + 32 * len(chosen.tensors)
    assert chosen.bits_per_weight >= fixed.bits_per_weight
    assert (set(types.values()) == {"Q8_0"}) == (chosen.bits_per_weight == fixed.bits_per_weight)


def test_only_auto_without_an_output_type_chooses_one() -> None:
    assert QuantizeOptions().chooses_output
    assert QuantizeOptions(format="iq4_nl", bits_per_weight=5).chooses_output
    for options in (
        {"recipe": "gptq"},
        {"output_type": "q8_0"},
        {"format": "iq4_nl"},
        {"format": "q4_0", "sparsity": 0.5},
    ):
        assert not QuantizeOptions(**cast("Any", options)).chooses_output, options


# Importance matrices.


def test_an_importance_matrix_is_written_and_read(tmp_path: Path) -> None:
    imatrix, out = tmp_path / "imatrix.gguf", tmp_path / "out.gguf"
    options: Any = {"recipe": "rtn", "format": "q4_0", "threads": 1, "calibration": [text(3, 3000)]}
    quantize(LLAMA, tmp_path / "blind.gguf", **options)
    quantize(LLAMA, out, imatrix=imatrix, calibration_tokens=2048, **options)
    written = GgufReader(imatrix)
    names = {name for name, _, _, _ in written.tensors}
    assert {b"general.type", b"imatrix.chunk_count", b"imatrix.chunk_size", b"imatrix.datasets"} <= set(written.pairs)
    assert {b"blk.0.attn_q.weight.in_sum2", b"blk.0.attn_q.weight.counts"} <= names
    assert out.read_bytes() != (tmp_path / "blind.gguf").read_bytes()
    # The file alone gives the same result, without a text.
    before = imatrix.read_bytes()
    quantize(LLAMA, tmp_path / "again.gguf", recipe="rtn", format="q4_0", threads=1, imatrix=imatrix)
    assert (tmp_path / "again.gguf").read_bytes() == out.read_bytes()
    assert imatrix.read_bytes() == before
    expected = logits(LLAMA)
    assert divergence(expected, logits(out)) < 1.2 * divergence(expected, logits(tmp_path / "blind.gguf"))


def test_an_older_importance_file_gives_the_same_result(tmp_path: Path) -> None:
    imatrix, older, out = (tmp_path / name for name in ("imatrix.gguf", "imatrix.dat", "out.gguf"))
    options: Any = {"recipe": "rtn", "format": "q4_0", "threads": 1}
    quantize(LLAMA, out, imatrix=imatrix, calibration=[text(3, 3000)], calibration_tokens=2048, **options)
    tensors = {name: np.frombuffer(data, "<f4") for name, _, _, data in GgufReader(imatrix).tensors}
    names = [name.removesuffix(b".counts") for name in tensors if name.endswith(b".counts")]
    data = struct.pack("<i", len(names))
    for name in names:
        # One chunk, so the values are the means.
        means = tensors[name + b".in_sum2"] / tensors[name + b".counts"][0]
        data += struct.pack("<i", len(name)) + name + struct.pack("<ii", 1, len(means)) + means.astype("<f4").tobytes()
    older.write_bytes(data + struct.pack("<ii", 1, 4) + b"text")
    quantize(LLAMA, tmp_path / "older.gguf", imatrix=older, **options)
    assert (tmp_path / "older.gguf").read_bytes() == out.read_bytes()
    older.write_bytes(data[:-1])
    with pytest.raises(ModelError, match=r"imatrix\.dat"):
        quantize(LLAMA, tmp_path / "damaged.gguf", imatrix=older, **options)


def test_only_an_importance_matrix_of_the_model_is_accepted(whole: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="imatrix"):
        quantize(LLAMA, tmp_path / "out.gguf", recipe="rtn", threads=1, imatrix=whole)
    imatrix = tmp_path / "imatrix.gguf"
    quantize(LLAMA, tmp_path / "a.gguf", recipe="rtn", threads=1, imatrix=imatrix, calibration_tokens=1024)
    with pytest.raises(ValueError, match="imatrix"):
        quantize(odd_rows(tmp_path / "model"), tmp_path / "b.gguf", recipe="rtn", threads=1, imatrix=imatrix)


# Experts.


def test_experts_that_the_text_does_not_reach_are_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    source = copy("mixtral", tmp_path / "mixtral")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(LLAMA / name, source)
    # One word over and over reaches few experts.
    with caplog.at_level(logging.WARNING, logger="nybble"):
        report = quantize(source, tmp_path / "q.gguf", recipe="gptq", threads=1, calibration=["dog " * 700])
    layers = {tensor.name.split(".")[1] for tensor in report.tensors if tensor.name.endswith("ffn_down_exps.weight")}
    config = json.loads((GOLDENS / "mixtral" / "config.json").read_text(encoding="utf-8"))
    assert report.experts == len(layers) * config["num_local_experts"]
    assert 0 < report.experts_unreached <= report.experts_rounded < report.experts
    assert f"{report.experts_rounded} of {report.experts} experts" in caplog.text
    assert quantize(LLAMA, tmp_path / "dense.gguf", recipe="rtn", threads=1).experts == 0
