"""Small vocabularies of both kinds, as the metadata of GGUF files."""

from __future__ import annotations

import json
from collections import Counter
from functools import cache
from typing import Any

import tokenizers
from tokenizers import models, pre_tokenizers, trainers

TEXT = (
    "Once upon a time there was a small model that lived in a file. It read numbers like 1234567 and 3.14, it's true, "
    "and we're sure it'll do so again. The small model wrote: for (int i = 0; i < 10; ++i) { sum += i; }\n\n"
    "Es läuft überall, aussi près d'ici, и здесь тоже, 这里也是, 👍🏽 und so weiter.\n\tTabs   and    spaces too.\r\n"
) * 3
SPACE = "\u2581"


@cache
def _trained() -> dict[str, Any]:
    """A byte-level model of 600 tokens, trained on `TEXT`."""
    package = tokenizers.Tokenizer(models.BPE())
    package.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    package.train_from_iterator([TEXT], trainers.BpeTrainer(vocab_size=600, initial_alphabet=alphabet))
    model: dict[str, Any] = json.loads(package.to_str())["model"]
    return model


def byte_level(**changes: Any) -> dict[str, Any]:
    """Merges over bytes, then <|start|>, <|end|> and a run of spaces. Changes name keys without `tokenizer.ggml`."""
    model = _trained()
    tokens = sorted(model["vocab"], key=model["vocab"].__getitem__)
    values = {
        "model": "gpt2",
        "pre": "gpt-2",
        "tokens": [*tokens, "<|start|>", "<|end|>", "    "],
        "token_type": [1] * len(tokens) + [3, 3, 4],
        "merges": [" ".join(merge) for merge in model["merges"]],
        "bos_token_id": len(tokens),
        "eos_token_id": len(tokens) + 1,
        "add_bos_token": False,
    }
    return _keys(values, changes)


def pieces(**changes: Any) -> dict[str, Any]:
    """Pieces with scores: <unk>, <s>, </s>, 256 bytes, then what is frequent in `TEXT`, four at a time equal."""
    words = TEXT.replace("\n", "").replace(" ", SPACE)
    counts = Counter(words[i : i + n] for n in (2, 3, 4, 5) for i in range(len(words) // 3 - n))
    singles = sorted(set(words) - set("这里也是"))
    longer = [piece for piece, _ in counts.most_common(300)]
    texts = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *longer, *singles, "<turn>", "\n\n"]
    kinds = [2, 3, 3] + [6] * 256 + [1] * (len(longer) + len(singles)) + [3, 4]
    scores = [0.0] * 259 + [-float(i // 4) for i in range(len(longer) + len(singles))] + [-1000.0, -1000.0]
    values = {
        "model": "llama",
        "pre": "default",
        "tokens": texts,
        "scores": scores,
        "token_type": kinds,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "unknown_token_id": 0,
    }
    return _keys(values, changes)


def _keys(values: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    merged = {"general.architecture": "llama"} | {f"tokenizer.ggml.{key}": value for key, value in values.items()}
    for key, value in changes.items():
        merged[key.replace("__", ".") if "__" in key else f"tokenizer.ggml.{key}"] = value
    return {key: value for key, value in merged.items() if value is not None}
