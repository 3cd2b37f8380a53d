"""Memory of a model, measured in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tiny

from nybble import Model

ALLOWED = 150_000_000
KEPT = 14_000_000
"""Bytes that may remain of closed models: small blocks of each thread."""
AGAIN_AND_AGAIN = """
import sys
from concurrent.futures import ThreadPoolExecutor
from nybble import Model
from nybble.memory import resident_bytes

def use(number):
    with Model.load(sys.argv[1], threads=2, context=1024) as model:
        model.generate("a" * (100 + 100 * number), max_tokens=4, temperature=0)
        model.embed("b" * 600)

with ThreadPoolExecutor(6) as pool:
    use(6)
    before = resident_bytes()
    for _ in range(4):
        list(pool.map(use, range(6)))
print(resident_bytes() - before)
"""
CHILD = """
import json, sys
from nybble import Model
with Model.load(sys.argv[1], threads=2) as model:
    loaded = model.info.peak_resident_bytes
    model.generate("a" * 600, max_tokens=8, temperature=0)
    info = model.info
    resident = info.resident_bytes
    print(json.dumps([loaded, resident, info.peak_resident_bytes, info.weight_bytes, info.cache_bytes]))
"""
HUGE_PAGES = """
import sys
from nybble import Model
from nybble.memory import huge_page_bytes
before = huge_page_bytes()
with Model.load(sys.argv[1], threads=2) as model:
    tokens = model.generate("a" * 600, max_tokens=8, temperature=0).tokens
    print(model.info.huge_page_bytes - before, model.info.weight_bytes, *tokens)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux reports the peak of one process")
def test_the_peak_is_at_most_packed_weights_cache_and_150_mb(tmp_path: Path) -> None:
    path = wide_model(tmp_path / "wide.gguf")
    done = subprocess.run([sys.executable, "-c", CHILD, path], stdout=subprocess.PIPE, text=True, check=True)
    loaded, resident, peak, weights, cache = json.loads(done.stdout)
    assert path.stat().st_size > 2 * ALLOWED, "a smaller file would pass even if it were in memory twice"
    assert weights <= loaded <= weights + ALLOWED
    assert weights <= resident <= peak <= weights + cache + ALLOWED


@pytest.mark.skipif(
    sys.platform != "linux" or not Path("/sys/kernel/mm/transparent_hugepage/enabled").exists(),
    reason="the system has no huge pages",
)
def test_huge_pages_can_be_switched_off_and_change_no_result(tmp_path: Path) -> None:
    path = wide_model(tmp_path / "wide.gguf", hidden=1024, feed_forward=4096, vocabulary=8192)

    def run(switch: str) -> tuple[int, int, list[str]]:
        environment = {**os.environ, "NYBBLE_HUGE_PAGES": switch}
        command = [sys.executable, "-c", HUGE_PAGES, str(path)]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=environment)
        huge, weights, *ids = done.stdout.split()
        return int(huge), int(weights), ids

    huge, weights, ids = run("")
    ordinary, _, same_ids = run("off")
    assert ids == same_ids
    if "[always]" not in Path("/sys/kernel/mm/transparent_hugepage/enabled").read_text():
        assert ordinary == 0
    # At most the last page is not full; a system may have no huge pages left, or grant none.
    assert 0 <= huge <= weights + ALLOWED


@pytest.mark.skipif(sys.platform != "linux", reason="other systems use their own allocator")
def test_closing_models_returns_their_memory_to_the_system(tmp_path: Path) -> None:
    path = wide_model(tmp_path / "wide.gguf", hidden=1024, feed_forward=4096, vocabulary=8192)
    done = subprocess.run([sys.executable, "-c", AGAIN_AND_AGAIN, path], stdout=subprocess.PIPE, text=True, check=True)
    assert int(done.stdout) < KEPT


def test_the_cache_grows_with_the_context(tiny_file: Path) -> None:
    with Model.load(tiny_file, context=64) as short, Model.load(tiny_file, context=128) as long:
        # 2 layers of 2 heads of 16 numbers, keys and values, in F16.
        assert short.info.cache_bytes == 64 * 2 * 2 * 16 * 2 * 2
        assert long.info.cache_bytes == 2 * short.info.cache_bytes


def wide_model(path: Path, hidden: int = 4096, feed_forward: int = 8192, vocabulary: int = 60_000) -> Path:
    """A llama of two wide layers, 340 MB, mostly embedding. Loading must not hold it both packed and unpacked."""
    kv = 512
    dice = np.random.default_rng(7)
    tensors: dict[str, tuple[int, tuple[int, ...], bytes]] = {
        "token_embd.weight": (tiny.Q8_0, (hidden, vocabulary), blocks(dice, hidden * vocabulary, 32)),
        "output_norm.weight": tiny.norm(hidden),
    }
    for layer in range(2):
        tensors[f"blk.{layer}.attn_norm.weight"] = tiny.norm(hidden)
        tensors[f"blk.{layer}.ffn_norm.weight"] = tiny.norm(hidden)
        for name, (columns, rows) in tiny.layer_shapes(hidden, kv, feed_forward).items():
            tensors[f"blk.{layer}.{name}.weight"] = (tiny.Q4_0, (columns, rows), blocks(dice, columns * rows, 16))
    sizes = {
        "llama__embedding_length": hidden,
        "llama__feed_forward_length": feed_forward,
        "llama__attention__head_count": hidden // 128,
        "llama__attention__head_count_kv": 4,
        "llama__rope__dimension_count": 128,
        "llama__context_length": 1024,
        "llama__vocab_size": vocabulary,
        "tokenizer__ggml__tokens": [*tiny.byte_pieces(), "<|endoftext|>", "<|im_start|>", "<|im_end|>"]
        + [f"w{i}" for i in range(vocabulary - tiny.VOCABULARY)],
        "tokenizer__ggml__token_type": [1] * 256 + [3] * 3 + [1] * (vocabulary - tiny.VOCABULARY),
    }
    tiny.write_gguf(path, tiny.metadata(**sizes), tensors)
    return path


def blocks(dice: np.random.Generator, count: int, code_bytes: int) -> bytes:
    """Blocks of 32 weights, an F16 scale and codes each: 1,024 random blocks, repeated."""
    some = b"".join(np.float16(0.002).tobytes() + dice.bytes(code_bytes) for _ in range(1024))
    return some * (count // tiny.BLOCK // 1024)
