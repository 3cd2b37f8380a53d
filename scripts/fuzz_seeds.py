"""Writes small valid files as seeds for the fuzzer: `fuzz_seeds.py FOLDER`."""

from __future__ import annotations

import json
import struct
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import mutations

CORPUS = Path(sys.argv[1])


def main() -> None:
    """Writes GGUF files and checkpoints of every family, packed checkpoints, a vocabulary, sessions, and calls."""
    with tempfile.TemporaryDirectory() as folder:
        for original in mutations.files(Path(folder)):
            (data,) = original.files.values()
            for target in ("gguf", "model"):
                (CORPUS / target / original.name).write_bytes(data)
    for original in mutations.folders():
        config = original.files["config.json"].replace(b"\n", b" ")
        (CORPUS / "checkpoint" / original.name).write_bytes(config + b"\n" + original.files["model.safetensors"])
    pieces = [
        "2<unk>",
        "3<s>",
        "1\u2581",
        "1a",
        "1b",
        "1ab",
        "1\u2581a",
        *(f"6<0x{byte:02X}>" for byte in range(256)),
        "4<turn>",
    ]
    text = "\n".join(pieces) + "\n\nab a b\u00e9<turn> <s>"
    (CORPUS / "vocabulary" / "pieces").write_text(text, encoding="utf-8")
    for name, content in packings():
        (CORPUS / "packings" / name).write_bytes(content)
    # Bytes per page of the target's model. The target fills in the model's name and the hashes.
    for cache_type, page in enumerate([5120, 2560, 1792]):
        for seen in (0, 3, 64, 70):
            header = struct.pack("<8sII32xQQ", b"NYBBLEKV", 1, cache_type, seen + 2, seen)
            tokens = struct.pack(f"<{seen + 2}I", *range(seen + 2))
            content = header + tokens + bytes(-(-seen // 64) * page + 32)
            (CORPUS / "session" / f"{cache_type}-{seen}").write_bytes(content)
    # A model, then calls: steps of 40 tokens, a fork, a step of both, the last tokens back, a file, and a damaged one.
    calls = [(0, 39), (0, 39), (3, 0), (2, 20), (4, 9), (5, 0), (12, 23), (0, 1), (6, 5)]
    for model in range(5):
        (CORPUS / "states" / str(model)).write_bytes(bytes([model, *(byte for call in calls for byte in call)]))


HIDDEN, INNER, VOCABULARY, GROUP = 64, 96, 5, 32
LINEAR = {
    "self_attn.q_proj": (HIDDEN, HIDDEN),
    "self_attn.k_proj": (HIDDEN // 2, HIDDEN),
    "self_attn.v_proj": (HIDDEN // 2, HIDDEN),
    "self_attn.o_proj": (HIDDEN, HIDDEN),
    "mlp.gate_proj": (INNER, HIDDEN),
    "mlp.up_proj": (INNER, HIDDEN),
    "mlp.down_proj": (HIDDEN, INNER),
}


def packings() -> Iterator[tuple[str, bytes]]:
    """Yields a one-layer Llama in each packing: name, then config, safetensors header and data as lines."""
    weights = {"num_bits": 4, "symmetric": False, "strategy": "group", "group_size": GROUP}
    group = {"targets": ["Linear"], "input_activations": None, "weights": weights}
    packing_configs: dict[str, dict[str, Any]] = {
        "gptq": {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "desc_act": False, "sym": False},
        "awq": {"quant_method": "awq", "bits": 4, "group_size": GROUP},
        "auto-round": {"quant_method": "auto-round", "bits": 4, "group_size": GROUP},
        "compressed-tensors": {
            "quant_method": "compressed-tensors",
            "format": "pack-quantized",
            "ignore": ["lm_head"],
            "config_groups": {"group_0": group},
        },
    }
    for name, way in packing_configs.items():
        config = {
            "model_type": "llama",
            "hidden_size": HIDDEN,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "num_hidden_layers": 1,
            "intermediate_size": INNER,
            "vocab_size": VOCABULARY,
            "max_position_embeddings": 32,
            "rms_norm_eps": 1e-5,
            "hidden_act": "silu",
            "rope_theta": 5000.0,
            "tie_word_embeddings": False,
            "quantization_config": way,
        }
        header: dict[str, Any] = {}
        data = bytearray()
        for tensor, dtype, values in packed(name):
            begin = len(data)
            data += values.tobytes()
            header[tensor] = {"dtype": dtype, "shape": list(values.shape), "data_offsets": [begin, len(data)]}
        yield name, b"\n".join([json.dumps(config).encode(), json.dumps(header).encode(), bytes(data)])


def packed(way: str) -> Iterator[tuple[str, str, np.ndarray[Any, Any]]]:
    """Yields the tensors of a packed Llama: name, dtype, values."""
    dice = np.random.default_rng(7)
    layer = "model.layers.0."
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        yield name, "F16", dice.normal(0, 0.1, (VOCABULARY, HIDDEN)).astype(np.float16)
    for name in ("model.norm.weight", layer + "input_layernorm.weight", layer + "post_attention_layernorm.weight"):
        yield name, "F16", np.ones(HIDDEN, np.float16)

    def words(*shape: int) -> np.ndarray[Any, Any]:
        return dice.integers(-(2**31), 2**31, shape, np.int32)

    for name, (rows, columns) in LINEAR.items():
        groups = columns // GROUP
        if way == "compressed-tensors":
            yield f"{layer}{name}.weight_packed", "I32", words(rows, columns // 8)
            yield f"{layer}{name}.weight_zero_point", "I32", words(rows // 8, groups)
            yield f"{layer}{name}.weight_scale", "F16", np.full((rows, groups), 0.01, np.float16)
            yield f"{layer}{name}.weight_shape", "I64", np.array([rows, columns], np.int64)
            continue
        shape = (columns, rows // 8) if way == "awq" else (columns // 8, rows)
        yield f"{layer}{name}.qweight", "I32", words(*shape)
        yield f"{layer}{name}.qzeros", "I32", words(groups, rows // 8)
        yield f"{layer}{name}.scales", "F16", np.full((groups, rows), 0.01, np.float16)
        if way != "awq":
            yield f"{layer}{name}.g_idx", "I32", np.arange(columns, dtype=np.int32) // GROUP


if __name__ == "__main__":
    main()
