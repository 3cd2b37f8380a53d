#!/usr/bin/env python3
"""Runs one runtime for `compare.py`, which starts it with the interpreter of the runtime's environment.

    python benches/peers.py NAME MODEL THREADS CONTEXT [PROGRAM]

Needs only the runtime itself. Prints `{"load_seconds": ...}` when the model is loaded. For each input line
`{"prompt": [ids], "generate": n}` it prints `{"prompt_seconds": ..., "decode_seconds": ...}`: the time to the first
token and the time for the `n` tokens after it. Output of the runtime goes to standard error.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

Round = Callable[[list[int], int], tuple[float, float]]
"""Takes a prompt and the number of tokens to decode after the first; returns seconds for each."""


def nybble(path: str, threads: int, context: int) -> tuple[Round, dict[str, Any]]:
    from nybble import LoadOptions, _native
    from nybble.sampling import SamplingOptions

    model = _native.Model.load(path, LoadOptions(threads=threads, context=context))
    greedy = SamplingOptions(temperature=0.0, seed=0)

    def run(prompt: list[int], generate: int) -> tuple[float, float]:
        sequence = model.sequence(prompt, greedy)
        start = time.perf_counter()
        model.step([sequence])
        middle = time.perf_counter()
        for _ in range(generate):
            model.step([sequence])
        return middle - start, time.perf_counter() - middle

    info = model.info()
    return run, {
        "version": _native.__version__,
        "kernel": info["kernel"],
        "bytes_per_token": info["bytes_per_token"],
        "state_bytes": info["state_bytes"],
        "limits": model.machine_limits,
    }


def llama_cpp(path: str, threads: int, context: int) -> tuple[Round, dict[str, Any]]:
    import llama_cpp as package

    model = package.Llama(path, n_ctx=context, n_batch=512, n_threads=threads, n_threads_batch=threads, verbose=False)

    def run(prompt: list[int], generate: int) -> tuple[float, float]:
        model.reset()
        start = time.perf_counter()
        model.eval(prompt)
        token = model.sample(temp=0.0)
        middle = time.perf_counter()
        for _ in range(generate):
            model.eval([token])
            token = model.sample(temp=0.0)
        return middle - start, time.perf_counter() - middle

    return run, {"version": package.__version__}


def openvino(path: str, threads: int, context: int) -> tuple[Round, dict[str, Any]]:
    import numpy as np
    import openvino
    import openvino_genai as package

    pipeline = package.LLMPipeline(path, "CPU", INFERENCE_NUM_THREADS=threads)

    def run(prompt: list[int], generate: int) -> tuple[float, float]:
        config = package.GenerationConfig(max_new_tokens=generate + 1, ignore_eos=True, do_sample=False)
        ids = openvino.Tensor(np.array([prompt], dtype=np.int64))
        start = time.perf_counter()
        metrics = pipeline.generate(ids, config).perf_metrics
        total = time.perf_counter() - start
        first = metrics.get_ttft().mean / 1000
        return first, total - first

    return run, {"version": package.__version__}


def mistral_rs(path: str, threads: int, context: int) -> tuple[Round, dict[str, Any]]:
    os.environ["RAYON_NUM_THREADS"] = str(threads)
    import mistralrs as package

    file = Path(path).resolve()
    runner = package.Runner(
        which=package.Which.GGUF(quantized_model_id=str(file.parent), quantized_filename=file.name),
        no_kv_cache=False,
        prefix_cache_n=0,
    )

    def run(prompt: list[int], generate: int) -> tuple[float, float]:
        # It takes text only: the prompt is a number of short words, and times are scaled by its own token counts.
        request = package.CompletionRequest(
            model="default", prompt=" a" * len(prompt), max_tokens=generate + 1, temperature=0.0, ignore_eos=True
        )
        usage = runner.send_completion_request(request).usage
        read = usage.total_prompt_time_sec * len(prompt) / max(usage.prompt_tokens, 1)
        return read, usage.total_completion_time_sec * generate / max(usage.completion_tokens, 1)

    return run, {"version": getattr(package, "__version__", "?")}


def neural_speed(path: str, threads: int, context: int) -> tuple[Round, dict[str, Any]]:
    """`path` is a file that its `Model.quant_model` wrote: it cannot read GGUF into its fast layout."""
    import importlib.metadata
    import importlib.util

    # Importing the package itself would import torch, which running a model does not need.
    found = importlib.util.find_spec("neural_speed")
    assert found is not None
    assert found.submodule_search_locations
    sys.path.append(next(iter(found.submodule_search_locations)))
    package = importlib.import_module("llama_cpp")

    model = package.Model()
    model.init_model(path, threads=threads, ctx_size=context, n_batch=2048, max_new_tokens=context)

    def step(prompt: list[list[int]]) -> None:
        # On an error it prints a message to standard error and returns an empty list.
        if not model.generate(prompt):
            raise SystemExit("neural-speed returned no tokens")

    def run(prompt: list[int], generate: int) -> tuple[float, float]:
        model.reinit()
        start = time.perf_counter()
        step([[1, *prompt[1:]]])  # Prompts must start with this token.
        middle = time.perf_counter()
        for _ in range(generate):
            step([])  # Continues from its last token.
        return middle - start, time.perf_counter() - middle

    return run, {"version": importlib.metadata.version("neural-speed")}


def bench(path: str, threads: int, *options: str) -> tuple[Round, dict[str, Any]]:
    """The program `llama-bench`, the first of `options`, which loads the model for every round and times itself."""
    common = ["-m", path, "-t", str(threads), "-fa", "1", "-r", "1", "-o", "json", *options[1:]]

    def speed(*what: str) -> tuple[float, str]:
        found = subprocess.run([options[0], *common, *what], stdout=subprocess.PIPE, check=True)
        # Some versions print a line before the list.
        last = json.loads(found.stdout[found.stdout.index(b"[") :])[-1]
        return last["avg_ts"], last["build_commit"]

    def run(prompt: list[int], generate: int) -> tuple[float, float]:
        read, _ = speed("-p", str(len(prompt)), "-n", "0")
        behind = ("-gp", f"{len(prompt)},{generate}") if is_ik else ("-n", str(generate), "-d", str(len(prompt)))
        written, _ = speed("-p", "0", *(("-n", "0") if is_ik else ()), *behind)
        return len(prompt) / read, generate / written

    is_ik = b"-rtr" in subprocess.run([options[0], "--help"], stdout=subprocess.PIPE, check=False).stdout
    return run, {"version": speed("-p", "1", "-n", "0")[1]}


def llama_bench(path: str, threads: int, context: int, program: str) -> tuple[Round, dict[str, Any]]:
    return bench(path, threads, program)


def ik_repacked(path: str, threads: int, context: int, program: str) -> tuple[Round, dict[str, Any]]:
    return bench(path, threads, program, "-rtr", "1")


RUNTIMES: dict[str, Callable[..., tuple[Round, dict[str, Any]]]] = {
    "nybble": nybble,
    "llama.cpp": llama_cpp,
    "openvino": openvino,
    "mistral.rs": mistral_rs,
    "neural-speed": neural_speed,
    "llama-bench": llama_bench,
    "ik": llama_bench,
    "ik-rtr": ik_repacked,
}


def main() -> int:
    name, path, threads, context, *program = sys.argv[1:]
    # Answers go to standard output; what runtimes print there is redirected to standard error.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def answer(value: dict[str, Any]) -> None:
        answers.write(json.dumps(value) + "\n")
        answers.flush()

    start = time.perf_counter()
    run, facts = RUNTIMES[name](path, int(threads), int(context), *program)
    limits = facts.pop("limits", None)
    answer({"load_seconds": time.perf_counter() - start, **facts})
    for line in sys.stdin:
        request = json.loads(line)
        if request == "limits":
            bandwidth, int8 = limits() if limits else (0.0, 0.0)
            answer({"bandwidth_gb_s": bandwidth, "int8_gops": int8})
        else:
            reading, writing = run(request["prompt"], request["generate"])
            answer({"prompt_seconds": reading, "decode_seconds": writing})
    return 0


if __name__ == "__main__":
    sys.exit(main())
