#!/usr/bin/env python3
"""Measure the time from process start to the first token, for nybble and llama.cpp in turn.

    python benches/startup.py model.gguf [--threads 2] [--rounds 7] [--peer PYTHON] [--json]

Each round starts two processes with the same prompt of 32 tokens: `nybble run`, and a script for llama-cpp-python
with the interpreter PYTHON (default: this one). The time includes the interpreter, imports, loading and prefill, with
the file in the page cache. Prints medians and the ratios of the rounds (median, minimum and maximum).
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

from nybble import Tokenizer

PROMPT_TOKENS = 32
TEXT = "Once upon a time there was a small machine that could read and write. " * 8

PEER = """
import sys
from llama_cpp import Llama
path, prompt, threads = sys.argv[1], sys.argv[2], int(sys.argv[3])
model = Llama(path, n_threads=threads, n_threads_batch=threads, verbose=False)
for piece in model.create_completion(prompt, max_tokens=4, temperature=0, stream=True):
    print(piece["choices"][0]["text"], end="", flush=True)
"""


def first_output(command: list[str]) -> float:
    """Returns the seconds until a process writes its first byte."""
    began = time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        assert process.stdout is not None
        found = process.stdout.read(1)
        seconds = time.perf_counter() - began
        process.stdout.read()
    if not found or process.returncode:
        raise SystemExit(f"{command[0]} failed with {process.returncode}; run it by hand: {command}")
    return seconds


def prompt(path: Path) -> str:
    """Returns a prompt of about 32 tokens in the vocabulary of the model."""
    tokenizer = Tokenizer.load(path)
    return tokenizer.decode(tokenizer.encode(TEXT)[:PROMPT_TOKENS])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument(
        "--peer", default=sys.executable, metavar="PYTHON", help="interpreter that has llama-cpp-python"
    )
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()

    path, text, threads = str(options.model), prompt(options.model), str(options.threads)
    ours = [sys.executable, "-m", "nybble", "run", path, text]
    ours += ["--raw", "--max-tokens", "4", "--temperature", "0", "--threads", threads]
    theirs = [options.peer, "-c", PEER, path, text, threads]
    seconds: list[tuple[float, float]] = []
    for done in range(options.rounds + 1):
        pair = first_output(ours), first_output(theirs)
        if done:  # The first round fills the page cache.
            seconds.append(pair)
    ratios = [mine / peer for mine, peer in seconds]
    result = {
        "model": options.model.name,
        "threads": options.threads,
        "rounds": options.rounds,
        "nybble_seconds": statistics.median(mine for mine, _ in seconds),
        "llama_cpp_seconds": statistics.median(peer for _, peer in seconds),
        "ratio": {"median": statistics.median(ratios), "least": min(ratios), "greatest": max(ratios)},
    }
    print(json.dumps(result, indent=None if options.json else 2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
