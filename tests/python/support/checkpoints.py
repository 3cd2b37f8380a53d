"""Changed copies of the golden checkpoint folders."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from goldens import GOLDENS, golden

from nybble import Model

Tensors = dict[str, npt.NDArray[Any]]

IDS: list[int] = golden("llama", "input_ids")[0].tolist()
"""Token ids that every golden model has."""


Change = Mapping[str, Any] | Callable[[dict[str, Any]], object] | None
"""New values of a JSON object, or a function that edits it in place."""


def copy(
    family: str,
    to: Path,
    *,
    config: Change = None,
    without: Iterable[str] = (),
    tensors: Callable[[Tensors], object] | None = None,
    tokenizer: Change = None,
    tokenizer_config: Change = None,
    weights: str = "model.safetensors",
    files: Mapping[str, object] | None = None,
) -> Path:
    """Copies a golden folder with changes. Those without a tokenizer get that of the llama.

    Args:
        family: The name of the golden folder.
        to: The folder to create.
        config: The change of `config.json`.
        without: Keys to remove from `config.json`.
        tensors: Edits the tensors in place.
        tokenizer: The change of `tokenizer.json`.
        tokenizer_config: The change of `tokenizer_config.json`.
        weights: The name of the safetensors file.
        files: More files by name: text, or a value to write as JSON.
    """
    shutil.copytree(GOLDENS / family, to, dirs_exist_ok=True)
    (to / "golden.bin").unlink()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        if not (to / name).exists():
            shutil.copy(GOLDENS / "llama" / name, to)
    _edit(to / "config.json", config, without)
    _edit(to / "tokenizer.json", tokenizer)
    _edit(to / "tokenizer_config.json", tokenizer_config)
    for name, content in (files or {}).items():
        (to / name).write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    if tensors is not None:
        found = read_safetensors(to / "model.safetensors")
        tensors(found)
        write_safetensors(to / "model.safetensors", found)
    (to / "model.safetensors").rename(to / weights)
    return to


def _edit(path: Path, change: Change, without: Iterable[str] = ()) -> None:
    values = json.loads(path.read_text(encoding="utf-8"))
    if callable(change):
        change(values)
    else:
        values.update(change or {})
    for key in without:
        values.pop(key)
    path.write_text(json.dumps(values), encoding="utf-8")


def logits(source: Path, **options: Any) -> npt.NDArray[np.float32]:
    """The logits of a model for the ids of the goldens, without quantizing it."""
    with Model.load(source, **{"quantize": None, "threads": 1, **options}) as model:
        return model.logits(IDS)


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
    """Writes F32, F16 and U8 tensors."""
    header: dict[str, Any] = {}
    parts: list[bytes] = []
    position = 0
    for name, tensor in tensors.items():
        part = np.ascontiguousarray(tensor).tobytes()
        kind = {np.dtype(np.float32): "F32", np.dtype(np.float16): "F16", np.dtype(np.uint8): "U8"}[tensor.dtype]
        header[name] = {"dtype": kind, "shape": list(tensor.shape), "data_offsets": [position, position + len(part)]}
        parts.append(part)
        position += len(part)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(len(text).to_bytes(8, "little") + text + b"".join(parts))
