"""Experts in MXFP4, as gpt-oss is published."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from checkpoints import Tensors, copy
from goldens import golden

import nybble
from nybble import _native

# The values of the 16 codes (Open Compute Project 2023, Microscaling Formats, E2M1).
VALUES = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)
HIDDEN, WIDTH, EXPERTS = 32, 64, 4
CONFIG = {
    "intermediate_size": WIDTH,
    "quantization_config": {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]},
}
IDS: list[int] = golden("gpt_oss", "input_ids")[0].tolist()


def _experts(packed: bool) -> Callable[[Tensors], object]:
    """Replaces the experts by random ones in MXFP4, or by their values in F32 as transformers lays them out."""

    def edit(tensors: Tensors) -> None:
        generator = np.random.default_rng(7)
        for name in [name for name in tensors if re.search(r"experts\.(gate_up|down)_proj$", name)]:
            rows, columns = (2 * WIDTH, HIDDEN) if "gate_up" in name else (HIDDEN, WIDTH)
            blocks = generator.integers(0, 256, (EXPERTS, rows, columns // 32, 16), np.uint8)
            scales = generator.integers(120, 126, (EXPERTS, rows, columns // 32), np.uint8)
            del tensors[name]
            if packed:
                tensors[f"{name}_blocks"], tensors[f"{name}_scales"] = blocks, scales
            else:
                tensors[name] = _decoded(blocks, scales)
            bias = generator.normal(size=(EXPERTS, rows)).astype(np.float32)
            tensors[f"{name}_bias"] = bias

    return edit


def _decoded(blocks: npt.NDArray[np.uint8], scales: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
    """The values `(experts, columns, rows)`: the low four bits of a byte come first."""
    pairs = np.stack([VALUES[blocks & 15], VALUES[blocks >> 4]], axis=-1)
    experts, rows, groups, _ = blocks.shape
    values = pairs.reshape(experts, rows, groups, 32) * np.exp2(scales.astype(np.float32) - 127)[..., None]
    return np.ascontiguousarray(values.reshape(experts, rows, 32 * groups).transpose(0, 2, 1))


def logits(source: Path) -> npt.NDArray[np.float32]:
    """The logits of a model as its file stores it."""
    with nybble.Model.load(source, quantize=None) as model:
        return model.logits(IDS)


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    """The checkpoint in MXFP4, and the same values in F32."""
    packed = copy("gpt_oss", tmp_path / "packed", config=CONFIG, tensors=_experts(packed=True))
    plain = copy("gpt_oss", tmp_path / "plain", config={"intermediate_size": WIDTH}, tensors=_experts(packed=False))
    return packed, plain


def test_a_folder_in_mxfp4_has_the_logits_of_its_values(folders: tuple[Path, Path], tmp_path: Path) -> None:
    packed, plain = folders
    expected = logits(plain)
    _native.convert(packed, tmp_path / "all-f32.gguf", "f32")
    np.testing.assert_allclose(logits(tmp_path / "all-f32.gguf"), expected, atol=1e-5 * np.abs(expected).max())


def test_a_folder_in_mxfp4_loads_as_it_is(folders: tuple[Path, Path]) -> None:
    packed, plain = folders
    # Activations are rounded to 8 bits for the experts, which may send tokens to others.
    assert np.median(np.abs(logits(packed) - logits(plain))) < 0.05 * np.abs(logits(plain)).mean()


def test_a_folder_in_mxfp4_can_be_quantized(folders: tuple[Path, Path], tmp_path: Path) -> None:
    expected = logits(folders[0])
    nybble.quantize(folders[0], tmp_path / "out.gguf", recipe="rtn")
    assert np.abs(logits(tmp_path / "out.gguf") - expected).mean() < np.abs(expected).mean()


def test_damaged_blocks_are_refused_by_name(tmp_path: Path) -> None:
    def cut(tensors: Tensors) -> None:
        _experts(packed=True)(tensors)
        name = next(name for name in tensors if name.endswith("_scales"))
        tensors[name] = tensors[name][:, :-1].copy()

    folder = copy("gpt_oss", tmp_path / "model", config=CONFIG, tensors=cut)
    with pytest.raises(nybble.ModelError, match="_scales"):
        logits(folder)
