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


def test_olmo_3_takes_the_base_at_the_top_for_layers_without_a_window(tmp_path: Path) -> None:
    def nested(config: dict[str, Any]) -> None:
        config["rope_parameters"]["sliding_attention"]["rope_theta"] = 500000.0

    def published(config: dict[str, Any]) -> None:
        rope = config.pop("rope_parameters")["full_attention"]
        config.update(rope_theta=rope.pop("rope_theta"), rope_scaling=rope)

    ids = golden("olmo3", "input_ids")[0].tolist()
    found = []
    for change in (nested, published):
        folder = copy("olmo3", tmp_path / change.__name__, config=change)
        with Model.load(folder, quantize=None, threads=1) as model:
            found.append(model.logits(ids))
    assert np.array_equal(found[0], found[1])
    assert np.abs(found[0] - golden("olmo3", "logits")[0]).max() > 0.1, "the base of windows has an effect"
