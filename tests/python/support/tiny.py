"""Writes GGUF files for tests, such as a tiny model with random weights and a byte vocabulary."""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

F32, Q4_0, Q8_0 = 0, 2, 8
BLOCK = 32

END_OF_TEXT, IM_START, IM_END = 256, 257, 258
VOCABULARY = 259
CONTEXT = 128

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def byte_pieces() -> list[str]:
    """Returns the 256 characters that represent bytes in GPT-2 vocabularies, in byte order."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = iter(range(256, 512))
    return [chr(byte) if byte in printable else chr(next(others)) for byte in range(256)]


def metadata(**changes: Any) -> dict[str, Any]:
    """Returns the tiny model's metadata. `changes` replace keys (`__` for a dot); None removes a key."""
    values: dict[str, Any] = {
        "general.architecture": "llama",
        "general.name": "tiny",
        "llama.block_count": 2,
        "llama.context_length": CONTEXT,
        "llama.embedding_length": 64,
        "llama.feed_forward_length": 96,
        "llama.attention.head_count": 4,
        "llama.attention.head_count_kv": 2,
        "llama.attention.layer_norm_rms_epsilon": 1e-5,
        "llama.rope.dimension_count": 16,
        "llama.rope.freq_base": 10000.0,
        "llama.vocab_size": VOCABULARY,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": [*byte_pieces(), "<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        "tokenizer.ggml.token_type": [1] * 256 + [3] * 3,
        "tokenizer.ggml.merges": [],
        "tokenizer.ggml.bos_token_id": IM_START,
        "tokenizer.ggml.eos_token_id": IM_END,
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.chat_template": CHATML,
    }
    values.update({key.replace("__", "."): value for key, value in changes.items()})
    return {key: value for key, value in values.items() if value is not None}


def with_special_tokens(texts: Sequence[str]) -> dict[str, Any]:
    """Changes of the metadata that add special tokens."""
    known = metadata()
    return {
        "llama__vocab_size": VOCABULARY + len(texts),
        "tokenizer__ggml__tokens": [*known["tokenizer.ggml.tokens"], *texts],
        "tokenizer__ggml__token_type": [*known["tokenizer.ggml.token_type"], *(3 for _ in texts)],
    }


def write_model(path: Path, layers: int = 2, feed_forward: int = 96, *, uniform: bool = False, **changes: Any) -> Path:
    """Writes the tiny llama: layers of width 64 in Q4_0, tied Q8_0 embedding. Always the same weights.

    A uniform model predicts all tokens with the same probability, so that sampling reaches everything that is allowed.
    """
    dice = np.random.default_rng(7)
    sizes = {"llama__block_count": layers, "llama__feed_forward_length": feed_forward}
    values = metadata(**{**sizes, **changes})
    hidden, kv, vocabulary = 64, 32, len(values["tokenizer.ggml.tokens"])
    tensors: dict[str, tuple[int, tuple[int, ...], bytes]] = {
        "token_embd.weight": (Q8_0, (hidden, vocabulary), q8_0(dice.normal(0, 0.2, (vocabulary, hidden)))),
        "output_norm.weight": norm(hidden, 0 if uniform else 1),
    }
    for layer in range(layers):
        tensors[f"blk.{layer}.attn_norm.weight"] = norm(hidden)
        tensors[f"blk.{layer}.ffn_norm.weight"] = norm(hidden)
        for name, (columns, rows) in layer_shapes(hidden, kv, feed_forward).items():
            tensors[f"blk.{layer}.{name}.weight"] = (Q4_0, (columns, rows), random_q4_0(dice, columns * rows))
    write_gguf(path, values, tensors)
    return path


def write_large(path: Path, layers: int, hidden: int, feed_forward: int) -> Path:
    """Writes a llama with the tiny vocabulary. All of its wide layers have the same random weights in Q8_0."""
    dice = np.random.default_rng(7)
    sizes: dict[str, Any] = {"llama__block_count": layers, "llama__feed_forward_length": feed_forward}
    heads = {
        "llama__embedding_length": hidden,
        "llama__attention__head_count": 16,
        "llama__attention__head_count_kv": 8,
    }
    values = metadata(**sizes, **heads, llama__rope__dimension_count=hidden // 16)
    vocabulary = len(values["tokenizer.ggml.tokens"])
    tensors: dict[str, tuple[int, tuple[int, ...], bytes]] = {
        "token_embd.weight": (Q8_0, (hidden, vocabulary), random_q8_0(dice, vocabulary * hidden)),
        "output_norm.weight": norm(hidden),
    }
    shapes = layer_shapes(hidden, hidden // 2, feed_forward)
    weights = {name: random_q8_0(dice, columns * rows) for name, (columns, rows) in shapes.items()}
    for layer in range(layers):
        tensors[f"blk.{layer}.attn_norm.weight"] = norm(hidden)
        tensors[f"blk.{layer}.ffn_norm.weight"] = norm(hidden)
        for name, shape in shapes.items():
            tensors[f"blk.{layer}.{name}.weight"] = (Q8_0, shape, weights[name])
    write_gguf(path, values, tensors)
    return path


def write_experts(path: Path, layers: int, hidden: int, feed_forward: int, experts: int, used: int = 2) -> Path:
    """Writes a llama of experts, as Mixtral is one, with the tiny vocabulary and random weights in Q8_0."""
    dice = np.random.default_rng(7)
    sizes: dict[str, Any] = {"llama__block_count": layers, "llama__feed_forward_length": feed_forward}
    heads = {
        "llama__embedding_length": hidden,
        "llama__attention__head_count": 4,
        "llama__attention__head_count_kv": 2,
        "llama__expert_count": experts,
        "llama__expert_used_count": used,
    }
    values = metadata(**sizes, **heads, llama__rope__dimension_count=hidden // 4)
    vocabulary = len(values["tokenizer.ggml.tokens"])
    tensors: dict[str, tuple[int, tuple[int, ...], bytes]] = {
        "token_embd.weight": (Q8_0, (hidden, vocabulary), q8_0(dice.normal(0, 0.2, (vocabulary, hidden)))),
        "output_norm.weight": norm(hidden),
    }
    for layer in range(layers):
        tensors[f"blk.{layer}.attn_norm.weight"] = norm(hidden)
        tensors[f"blk.{layer}.ffn_norm.weight"] = norm(hidden)
        router = dice.normal(0, 2 / hidden**0.5, (experts, hidden)).astype(np.float32)
        tensors[f"blk.{layer}.ffn_gate_inp.weight"] = (F32, (hidden, experts), router.tobytes())
        for name, shape in layer_shapes(hidden, hidden // 2, feed_forward).items():
            stack = (experts,) if name.startswith("ffn_") else ()
            name = f"blk.{layer}.{name}{'_exps' if stack else ''}.weight"
            # Weights of a size with which experts change the results.
            size = 0.02 / shape[0] ** 0.5
            tensors[name] = (Q8_0, (*shape, *stack), random_q8_0(dice, int(np.prod((*shape, *stack))), size))
    write_gguf(path, values, tensors)
    return path


def layer_shapes(hidden: int, kv: int, feed_forward: int) -> dict[str, tuple[int, int]]:
    """Returns the columns and rows of the matrices of a layer, by name."""
    return {
        "attn_q": (hidden, hidden),
        "attn_k": (hidden, kv),
        "attn_v": (hidden, kv),
        "attn_output": (hidden, hidden),
        "ffn_gate": (hidden, feed_forward),
        "ffn_up": (hidden, feed_forward),
        "ffn_down": (feed_forward, hidden),
    }


def norm(length: int, value: float = 1) -> tuple[int, tuple[int, ...], bytes]:
    """Returns the type, shape and bytes of a norm whose weights all have one value."""
    return F32, (length,), np.full(length, value, np.float32).tobytes()


def q8_0(values: np.ndarray[Any, Any]) -> bytes:
    """Encodes Q8_0: blocks of 32 with an F16 scale and 32 signed bytes."""
    blocks = values.reshape(-1, BLOCK).astype(np.float32)
    scales = (np.abs(blocks).max(axis=1) / 127).astype(np.float16)
    codes = np.rint(blocks / scales.astype(np.float32)[:, None]).clip(-127, 127).astype(np.int8)
    return b"".join(scale.tobytes() + row.tobytes() for scale, row in zip(scales, codes, strict=True))


def random_q8_0(dice: np.random.Generator, count: int, size: float = 0.0002) -> bytes:
    """Makes random Q8_0 data: blocks of 32 with the same F16 scale and 32 signed bytes."""
    scale = np.frombuffer(np.float16(size).tobytes(), np.uint8)
    codes = np.frombuffer(dice.bytes(count), np.uint8).reshape(-1, BLOCK)
    return np.hstack([np.broadcast_to(scale, (len(codes), 2)), codes]).tobytes()


def random_q4_0(dice: np.random.Generator, count: int) -> bytes:
    """Makes random Q4_0 data: blocks of 32 with an F16 scale and 32 nibbles."""
    scale = np.frombuffer(np.float16(0.03).tobytes(), np.uint8)
    codes = np.frombuffer(dice.bytes(count // 2), np.uint8).reshape(-1, BLOCK // 2)
    return np.hstack([np.broadcast_to(scale, (len(codes), 2)), codes]).tobytes()


def write_gguf(
    path: Path, values: Mapping[str, Any], tensors: Mapping[str, tuple[int, tuple[int, ...], bytes]] | None = None
) -> None:
    """Writes GGUF version 3. `tensors` maps names to type, shape (contiguous dimension first) and bytes."""
    tensors = tensors or {}
    out = bytearray(struct.pack("<4sIQQ", b"GGUF", 3, len(tensors), len(values)))
    for key, value in values.items():
        out += _text(key.encode()) + _value(value)
    offset = 0
    for name, (kind, shape, data) in tensors.items():
        out += _text(name.encode()) + struct.pack("<I", len(shape)) + struct.pack(f"<{len(shape)}Q", *shape)
        out += struct.pack("<IQ", kind, offset)
        offset += len(data) + -len(data) % 32
    with path.open("wb") as file:  # Tensor by tensor: some of these files are large.
        file.write(out)
        for _, _, data in tensors.values():
            file.write(bytes(-file.tell() % 32))
            file.write(data)
        file.write(bytes(-file.tell() % 32))


def _text(text: bytes) -> bytes:
    return struct.pack("<Q", len(text)) + text


def _value(value: Any) -> bytes:
    kind, data = _typed(value)
    return struct.pack("<I", kind) + data


def _typed(value: Any) -> tuple[int, bytes]:
    match value:
        case bool():
            return 7, struct.pack("<?", value)
        case int():
            return (4, struct.pack("<I", value)) if 0 <= value < 2**32 else (11, struct.pack("<q", value))
        case float():
            return 6, struct.pack("<f", value)
        case str():
            return 8, _text(value.encode())
        case bytes():
            return 8, _text(value)
        case np.ndarray() if value.dtype == np.int32:
            return 9, struct.pack("<IQ", 5, len(value)) + value.tobytes()
        case list():
            items = [_typed(item) for item in value]
            kind = items[0][0] if items else 8
            return 9, struct.pack("<IQ", kind, len(items)) + b"".join(data for _, data in items)
    raise TypeError(f"no GGUF type for {value!r}")
