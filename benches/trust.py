#!/usr/bin/env python3
"""Runs robustness tests on several runtimes, each in its own process, and prints a table for docs/security.md.

    python benches/trust.py                                        nybble only
    python benches/trust.py --peer llama-cpp-python=PYTHON --peer mistral.rs=PYTHON --peer neural-speed=PYTHON

PYTHON is the interpreter of an environment with that runtime. The model is a llama of 32 layers with random Q4_0
weights and a vocabulary of bytes, which all runtimes can read. Damaged files are copies of a small one. Needs
nybble's test dependencies, and permission to create a cgroup for the memory limit.
"""

from __future__ import annotations

import argparse
import json
import os
import select
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parent / "tests" / "python" / "support"), str(HERE.parent / "tests")]

import cgroups  # noqa: E402
import mutations  # noqa: E402
import tiny  # noqa: E402

LAYERS = 32
TIMEOUT = 90.0
"""Seconds without output after which a process counts as hung."""
TITLES = {
    "damaged": "damaged copies of a file",
    "nan": "a NaN in a weight",
    "cut": "the file is cut after loading",
    "no-memory": "memory for half of the file (`ulimit -v`)",
    "cgroup": "a cgroup with less memory than the model",
    "unknown-token": "a token id beyond the vocabulary",
    "too-long": "100 tokens more than the context",
    "two-calls": "two threads use one model, eight times each",
    "other-threads": "other Python threads, while a prompt is read",
    "interrupt": "Ctrl-C, while a prompt is read",
    "same-bits": "logits of 61 tokens, read at once and",
}


def llama(path: Path, hidden: int, feed_forward: int) -> Path:
    """Writes the model, including the tensors that only other runtimes require."""
    kinds = np.array([1] * 256 + [3] * 3, np.int32)
    dice = np.random.default_rng(11)

    def matrix(rows: int, columns: int) -> tuple[int, tuple[int, ...], bytes]:
        some = tiny.random_q4_0(dice, 1 << 15)
        return tiny.Q4_0, (columns, rows), (some * (rows * columns // (1 << 15) + 1))[: rows * columns // 32 * 18]

    def norm() -> tuple[int, tuple[int, ...], bytes]:
        return tiny.F32, (hidden,), np.ones(hidden, np.float32).tobytes()

    tensors = {"token_embd.weight": matrix(tiny.VOCABULARY, hidden), "output.weight": matrix(tiny.VOCABULARY, hidden)}
    tensors["output_norm.weight"] = norm()
    for layer in range(LAYERS):
        tensors |= {f"blk.{layer}.{name}_norm.weight": norm() for name in ("attn", "ffn")}
        for name in ("attn_q", "attn_k", "attn_v", "attn_output"):
            tensors[f"blk.{layer}.{name}.weight"] = matrix(hidden, hidden)
        for name in ("ffn_gate", "ffn_up"):
            tensors[f"blk.{layer}.{name}.weight"] = matrix(feed_forward, hidden)
        tensors[f"blk.{layer}.ffn_down.weight"] = matrix(hidden, feed_forward)
    sizes = {
        "general__file_type": 2,
        "llama__block_count": LAYERS,
        "llama__context_length": 2048,
        "llama__embedding_length": hidden,
        "llama__feed_forward_length": feed_forward,
        "llama__attention__head_count": hidden // 64,
        "llama__attention__head_count_kv": hidden // 64,
        "llama__rope__dimension_count": 64,
        "tokenizer__ggml__token_type": kinds,
        "tokenizer__chat_template": None,
    }
    tiny.write_gguf(path, tiny.metadata(**sizes), tensors)
    return path


def outcome(last: Any, process: subprocess.Popen[bytes], hangs: bool) -> str:
    """Describes the outcome of a test: the last message of the process, or how it ended without one."""
    if last is not None:
        return str(last["ended"]) if "ended" in last else f"`{last['raised']}`"
    if hangs:
        return f"nothing for {TIMEOUT:.0f} s"
    code = process.returncode
    return f"ends the process by {signal.Signals(-code).name}" if code < 0 else f"ends the process with status {code}"


def ask(
    python: str, name: str, test: str, paths: list[Path], group: Path | None = None, log: Path = Path(os.devnull)
) -> list[str]:
    """Runs a test on each model and returns the outcomes. A process that ends is replaced."""
    found: list[str] = []
    while len(found) < len(paths):
        command = [python, str(HERE / "trust_peers.py"), name, test, *map(str, paths[len(found) :])]
        if group is not None:
            command = [
                sys.executable,
                "-c",
                cgroups.JOIN + "import os; os.execv(sys.argv[2], sys.argv[2:])",
                str(group),
                *command,
            ]
        with log.open("ab") as errors:
            process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, start_new_session=True)
        assert process.stdout is not None
        before = ""
        while True:
            ready, _, _ = select.select([process.stdout], [], [], TIMEOUT)
            line = process.stdout.readline() if ready else b""
            if not line:
                break
            match word := json.loads(line):
                case dict():
                    found.append(before + outcome(word, process, False))
                case "long prompt":
                    time.sleep(0.7)
                    sent = time.monotonic()
                    process.send_signal(signal.SIGINT)
                case float():
                    before = f"after {word - sent:.2f} s "
        hangs = not ready
        process.kill() if hangs else None
        process.wait()
        if len(found) < len(paths):
            found.append(before + outcome(None, process, hangs))
        elif process.returncode < 0:
            found[-1] += f", then ends the process by {signal.Signals(-process.returncode).name}"
    return found


def summarize(found: list[str]) -> str:
    counts = Counter("raises" if word.startswith("`") and "Panic" not in word else word for word in found)
    return ", ".join(f"{count} {word}" for word, count in counts.most_common())


def main() -> int:
    """Runs all tests on all runtimes and prints one line per test."""
    parser = argparse.ArgumentParser(description="Robustness tests for several runtimes.")
    parser.add_argument("--peer", action="append", default=[], metavar="NAME=PYTHON")
    parser.add_argument("--files", type=int, default=500, help="number of damaged files")
    parser.add_argument("--model", type=Path, help="a real model for the logits test, instead of the random one")
    parser.add_argument("--only", action="append", choices=list(TITLES))
    parser.add_argument("--log", type=Path, default=Path(os.devnull), help="file for the output of the runtimes")
    arguments = parser.parse_args()
    runtimes = {"nybble": sys.executable} | dict(peer.split("=", 1) for peer in arguments.peer)
    with tempfile.TemporaryDirectory(prefix="nybble-trust-") as place:
        folder = Path(place)
        model = llama(folder / "model.gguf", 1024, 2816)
        small = llama(folder / "small.gguf", 64, 128)
        (nan := folder / "nan.gguf").write_bytes(with_nan(small.read_bytes()))
        damaged = []
        for case in range(arguments.files):
            data, dice = bytearray(small.read_bytes()), np.random.default_rng([0, case])
            ways = [*mutations.GENERAL, *[mutations.field] * 4]
            ways[dice.integers(len(ways))](dice, data)
            damaged.append(folder / f"{case}.gguf")
            damaged[-1].write_bytes(data)
        print("| | " + " | ".join(runtimes) + " |\n|" + " --- |" * (len(runtimes) + 1), flush=True)
        for test in arguments.only or TITLES:
            cells = []
            for name, python in runtimes.items():
                if test == "damaged":
                    found = ask(python, name, "loads", damaged, log=arguments.log)
                elif test == "nan":
                    found = ask(python, name, "loads", [nan], log=arguments.log)
                elif test == "cgroup":
                    limits = ({"memory.limit_in_bytes": 200 << 20}, {"memory.max": 200 << 20, "memory.swap.max": 0})
                    with cgroups.group("memory", first=limits[0], second=limits[1]) as group:
                        found = ask(python, name, "loads", [model], group, log=arguments.log)
                else:
                    source = arguments.model if test == "same-bits" and arguments.model else model
                    shutil.copy(source, copy := folder / "copy.gguf")
                    found = ask(python, name, test, [copy], log=arguments.log)
                cells.append(summarize(found) if len(found) > 1 else found[0])
            print(f"| {TITLES[test]} | " + " | ".join(cells) + " |", flush=True)
    return 0


def with_nan(data: bytes) -> bytes:
    """Returns the file with a NaN as the scale of its last block."""
    return data[:-18] + struct.pack("<e", float("nan")) + data[-16:]


if __name__ == "__main__":
    raise SystemExit(main())
