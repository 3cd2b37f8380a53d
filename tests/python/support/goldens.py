"""The golden values of `tests/data/goldens`, which transformers computed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

GOLDENS = Path(__file__).parents[2] / "data" / "goldens"


MTP = GOLDENS.parent / "mtp"
"""Checkpoints with heads for multi-token prediction."""


def golden(family: str, name: str, folder: Path = GOLDENS) -> npt.NDArray[Any]:
    """An array of a family, from its safetensors file."""
    raw = (folder / family / "golden.bin").read_bytes()
    length = int.from_bytes(raw[:8], "little")
    entry = json.loads(raw[8 : 8 + length])[name]
    start, end = entry["data_offsets"]
    kind = {"F32": np.float32, "I32": np.int32}[entry["dtype"]]
    array: npt.NDArray[Any] = np.frombuffer(raw[8 + length :][start:end], kind).reshape(entry["shape"])
    return array
