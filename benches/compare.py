#!/usr/bin/env python3
"""Time nybble and llama.cpp on the same file in turn.

    python benches/compare.py model.gguf [--threads 2] [--prompt 512] [--generate 64] [--rounds 5] [--json]

Needs `pip install llama-cpp-python`, which builds llama.cpp for this CPU. Each round loads nothing: both models are in
memory, one computes while the other sleeps. Printed are medians over the rounds, the ratio of each round's speeds
(median, least and greatest), and the machine's own limits measured in the same run: read bandwidth, which bounds
decoding, and the rate of INT8 dot products, which bounds prompts.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path

from nybble import _native
from nybble.sampling import SamplingOptions


class Ours:
    name = "nybble"

    def __init__(self, path: Path, threads: int, context: int) -> None:
        start = time.perf_counter()
        self.model = _native.Model.load(path, threads=threads)
        self.load_seconds = time.perf_counter() - start
        self.info = self.model.info()

    def round(self, prompt: list[int], generate: int) -> tuple[float, float]:
        """Prompt and decoding in tokens a second."""
        sequence = self.model.sequence(prompt, SamplingOptions(temperature=0.0))
        start = time.perf_counter()
        self.model.step([sequence])
        middle = time.perf_counter()
        for _ in range(generate):
            self.model.step([sequence])
        end = time.perf_counter()
        return len(prompt) / (middle - start), generate / (end - middle)


class LlamaCpp:
    name = "llama.cpp"

    def __init__(self, path: Path, threads: int, context: int) -> None:
        from llama_cpp import Llama

        start = time.perf_counter()
        self.model = Llama(
            str(path),
            n_ctx=context,
            n_batch=512,
            n_threads=threads,
            n_threads_batch=threads,
            verbose=False,
        )
        self.load_seconds = time.perf_counter() - start

    def round(self, prompt: list[int], generate: int) -> tuple[float, float]:
        """Prompt and decoding in tokens a second."""
        self.model.reset()
        start = time.perf_counter()
        self.model.eval(prompt)
        token = self.model.sample(temp=0.0)
        middle = time.perf_counter()
        for _ in range(generate):
            self.model.eval([token])
            token = self.model.sample(temp=0.0)
        end = time.perf_counter()
        return len(prompt) / (middle - start), generate / (end - middle)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--threads", type=int, default=_native.default_threads())
    parser.add_argument("--prompt", type=int, default=512, help="tokens of the prompt")
    parser.add_argument("--generate", type=int, default=64, help="tokens that are decoded after it")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()

    context = options.prompt + options.generate + 8
    engines = [kind(options.model, options.threads, context) for kind in (Ours, LlamaCpp)]
    # Tokens below 1,000, which every vocabulary has; speed does not depend on them.
    prompt = [3 + i * 7919 % 997 for i in range(options.prompt)]
    speeds: dict[str, list[tuple[float, float]]] = {engine.name: [] for engine in engines}
    for engine in engines:
        engine.round(prompt, 4)  # Warm up.
    limits = []
    for _ in range(options.rounds):
        limits.append(engines[0].model.machine_limits())
        for engine in engines:
            speeds[engine.name].append(engine.round(prompt, options.generate))

    result: dict[str, object] = {
        "model": options.model.name,
        "threads": options.threads,
        "prompt": options.prompt,
        "generate": options.generate,
        "rounds": options.rounds,
        "kernel": engines[0].info["kernel"],  # type: ignore[union-attr]
        "bandwidth_gb_s": statistics.median(limit[0] for limit in limits),
        "int8_gops": statistics.median(limit[1] for limit in limits),
    }
    for engine in engines:
        result[engine.name] = {
            "load_seconds": engine.load_seconds,
            "prompt_tokens_per_second": statistics.median(p for p, _ in speeds[engine.name]),
            "decode_tokens_per_second": statistics.median(d for _, d in speeds[engine.name]),
        }
    for at, what in enumerate(("prompt_ratio", "decode_ratio")):
        ratios = [ours[at] / theirs[at] for ours, theirs in zip(speeds["nybble"], speeds["llama.cpp"], strict=True)]
        result[what] = {"median": statistics.median(ratios), "least": min(ratios), "greatest": max(ratios)}
    if options.json:
        print(json.dumps(result))
    else:
        for name, value in result.items():
            if isinstance(value, dict):
                value = ", ".join(f"{key} {number:.3g}" for key, number in value.items())
            print(f"{name:>16}  {value}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
