"""The spellings of `config.json` before `rope_parameters`: a model computes the same."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoints import copy
from goldens import GOLDENS, golden

from nybble import Model


def _has_rotation(folder: Path) -> bool:
    """Whether the configuration has one rotation for all layers."""
    rope = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("rope_parameters")
    return isinstance(rope, dict) and "rope_theta" in rope


def _older(config: dict[str, Any]) -> None:
    rope = config.pop("rope_parameters")
    for key in ("rope_theta", "partial_rotary_factor"):
        if key in rope:
            config[key] = rope.pop(key)
    kind = rope.pop("rope_type", "default")
    config["rope_scaling"] = None if kind == "default" else {"type": kind, **rope}
    config["torch_dtype"] = config.pop("dtype")


@pytest.mark.parametrize("family", sorted(path.name for path in GOLDENS.iterdir() if _has_rotation(path)))
def test_the_older_spelling_of_rotations_computes_the_same(family: str, tmp_path: Path) -> None:
    folder = copy(family, tmp_path / "model", config=_older)
    ids = golden(family, "input_ids")[0].tolist()
    with Model.load(folder, quantize=None, threads=1) as model:
        assert np.abs(model.logits(ids) - golden(family, "logits")[0]).max() <= 2e-3
