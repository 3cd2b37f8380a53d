"""LoRA adapters with random weights for the tiny model of `tiny.write_model`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import tiny
from checkpoints import write_safetensors

ADAPTERS = Path(__file__).parents[2] / "data" / "adapters"
"""Adapters by PEFT, with its results."""

MODULES = {
    "q_proj": ("self_attn", "attn_q"),
    "k_proj": ("self_attn", "attn_k"),
    "v_proj": ("self_attn", "attn_v"),
    "o_proj": ("self_attn", "attn_output"),
    "gate_proj": ("mlp", "ffn_gate"),
    "up_proj": ("mlp", "ffn_up"),
    "down_proj": ("mlp", "ffn_down"),
}
"""The part of a layer and GGUF's name of each linear layer."""


def write_peft(
    folder: Path, seed: int, *, rank: int = 4, targets: tuple[str, ...] = tuple(MODULES), **settings: Any
) -> Path:
    """Writes an adapter as PEFT saves it. `settings` are keys of its configuration."""
    folder.mkdir(parents=True, exist_ok=True)
    dice = np.random.default_rng(seed)
    shapes = tiny.layer_shapes(64, 32, 96)
    tensors = {}
    for layer in range(2):
        for target in targets:
            part, name = MODULES[target]
            columns, rows = shapes[name]
            module = f"base_model.model.model.layers.{layer}.{part}.{target}"
            tensors[f"{module}.lora_A.weight"] = dice.normal(0, 0.3, (rank, columns)).astype(np.float32)
            tensors[f"{module}.lora_B.weight"] = dice.normal(0, 0.3, (rows, rank)).astype(np.float32)
    write_safetensors(folder / "adapter_model.safetensors", tensors)
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": 2 * rank, "target_modules": list(targets), "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps({**config, **settings}), encoding="utf-8")
    return folder


def write_gguf(path: Path, seed: int, *, rank: int = 4, **changes: Any) -> Path:
    """Writes an adapter of all value and output matrices as llama.cpp's converter does. `changes` replace keys."""
    dice = np.random.default_rng(seed)
    tensors: dict[str, tuple[int, tuple[int, ...], bytes]] = {}
    for layer in range(2):
        for name, (columns, rows) in tiny.layer_shapes(64, 32, 96).items():
            if name not in ("attn_v", "attn_output"):
                continue
            for end, shape in (("lora_a", (columns, rank)), ("lora_b", (rank, rows))):
                values = dice.normal(0, 0.3, shape).astype(np.float32)
                tensors[f"blk.{layer}.{name}.weight.{end}"] = (tiny.F32, shape, values.tobytes())
    keys: dict[str, Any] = {
        "general.type": "adapter",
        "general.architecture": "llama",
        "adapter.type": "lora",
        "adapter.lora.alpha": 8.0,
    }
    keys.update({key.replace("__", "."): value for key, value in changes.items()})
    tiny.write_gguf(path, {key: value for key, value in keys.items() if value is not None}, tensors)
    return path
