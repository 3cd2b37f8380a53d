"""Changed copies of the golden checkpoint folders."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from goldens import GOLDENS

Tensors = dict[str, npt.NDArray[Any]]


def copy(
    family: str,
    to: Path,
    *,
    config: Mapping[str, Any] | None = None,
    tensors: Callable[[Tensors], object] | None = None,
) -> Path:
    """Copies a golden folder, with new values in `config.json` and with tensors that a function edits in place."""
    shutil.copytree(GOLDENS / family, to, dirs_exist_ok=True)
    settings = json.loads((to / "config.json").read_text(encoding="utf-8"))
    (to / "config.json").write_text(json.dumps({**settings, **(config or {})}), encoding="utf-8")
    if tensors is not None:
        found = read_safetensors(to / "model.safetensors")
        tensors(found)
        write_safetensors(to / "model.safetensors", found)
    return to


def padded(family: str, to: Path, rows: int) -> Path:
    """Copies a golden folder and appends rows to its embedding and output matrices, but no tokens to its tokenizer."""

    def pad(tensors: Tensors) -> None:
        for name in ("model.embed_tokens.weight", "lm_head.weight"):
            if name in tensors:
                more = np.resize(tensors[name], (rows, tensors[name].shape[1]))
                tensors[name] = np.concatenate([tensors[name], more])

    settings = json.loads((GOLDENS / family / "config.json").read_text(encoding="utf-8"))
    return copy(family, to, config={"vocab_size": settings["vocab_size"] + rows}, tensors=pad)


def read_safetensors(path: Path) -> Tensors:
    """Reads a file of F32 and F16 tensors."""
    raw = path.read_bytes()
    start = 8 + int.from_bytes(raw[:8], "little")
    kinds = {"F32": np.float32, "F16": np.float16}
    tensors: Tensors = {}
    for name, entry in json.loads(raw[8:start]).items():
        if name != "__metadata__":
            begin, end = (start + offset for offset in entry["data_offsets"])
            tensors[name] = np.frombuffer(raw[begin:end], kinds[entry["dtype"]]).reshape(entry["shape"]).copy()
    return tensors


def write_safetensors(path: Path, tensors: Tensors) -> None:
    """Writes F32 and F16 tensors."""
    header: dict[str, Any] = {}
    parts: list[bytes] = []
    position = 0
    for name, tensor in tensors.items():
        part = np.ascontiguousarray(tensor).tobytes()
        kind = {np.dtype(np.float32): "F32", np.dtype(np.float16): "F16"}[tensor.dtype]
        header[name] = {"dtype": kind, "shape": list(tensor.shape), "data_offsets": [position, position + len(part)]}
        parts.append(part)
        position += len(part)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(len(text).to_bytes(8, "little") + text + b"".join(parts))
