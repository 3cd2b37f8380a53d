#!/usr/bin/env python3
"""Measure concurrent requests: nybble's engine against one request at a time and llama.cpp's batched decoding.

    python benches/throughput.py model.gguf [--threads 2] [--requests 16] [--prompt 128] [--generate 64]
        [--peer PYTHON] [--json]

PYTHON is the interpreter of an environment with llama-cpp-python. The runtimes run one after the other, each in its
own process, with the same file, prompts (random tokens), threads and greedy sampling. Rates are generated tokens per
second, prefill included; nybble's are measured through `nybble.Engine`, with decoded text. "decoding" counts steps
with one row per request, after all prompts.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from typing import Any

Prompt = list[int]


def prompts(count: int, length: int, seed: int = 7) -> list[Prompt]:
    """Returns prompts of random tokens, the same in every process."""
    dice = random.Random(seed)
    return [[dice.randrange(300, 30_000) for _ in range(length)] for _ in range(count)]


def rates(begun: float, times: Sequence[Sequence[float]]) -> dict[str, float]:
    """Tokens per second of requests whose tokens arrived at `times`: in total, and after the last first token."""
    ended, last_first = max(each[-1] for each in times), max(each[0] for each in times)
    after = sum(at > last_first for each in times for at in each)
    return {
        "seconds": ended - begun,
        "rate": sum(map(len, times)) / (ended - begun),
        "decoding_rate": after / max(ended - last_first, 1e-9),
    }


# nybble


class Consumer(threading.Thread):
    """Records the arrival time of each token of a request."""

    def __init__(self, engine: Any, prompt: Prompt, options: Any) -> None:
        super().__init__()
        self.times: list[float] = []
        self.request = engine.submit(prompt, options)
        self.start()

    def run(self) -> None:
        for piece in self.request:
            self.times.extend([time.perf_counter()] * len(piece.tokens))


def measure_nybble(arguments: argparse.Namespace) -> dict[str, Any]:
    """Measures nybble."""
    from nybble import Engine, Model, SamplingOptions

    model = Model.load(arguments.model, threads=arguments.threads)
    forbidden = dict.fromkeys(model.tokenizer.eos_ids, float("-inf"))

    def options(tokens: int) -> SamplingOptions:
        return SamplingOptions(temperature=0, max_tokens=tokens, logit_bias=forbidden)

    def together(engine: Engine, some: list[Prompt]) -> dict[str, float]:
        begun = time.perf_counter()
        consumers = [Consumer(engine, prompt, options(arguments.generate)) for prompt in some]
        for consumer in consumers:
            consumer.join()
        return rates(begun, [consumer.times for consumer in consumers])

    found: dict[str, Any] = {"kernel": model.info.kernel, "threads": model.info.threads}
    different = prompts(arguments.requests, arguments.prompt)
    with Engine(model, max_batch=arguments.requests, prefix_cache=False) as engine:
        together(engine, prompts(1, 16, seed=1))
        lone = [together(engine, [prompt]) for prompt in different[: arguments.lone]]
        found["alone"] = {name: statistics.median(each[name] for each in lone) for name in lone[0]}
        found["together"] = together(engine, different)
    with Engine(model, max_batch=arguments.requests) as engine:
        found["equal prompts"] = together(engine, [different[0]] * arguments.requests)
    found["step"] = steps(model, different)
    found["arrival"] = arrival(model, options)
    found["prefix"] = prefix(model, options)
    return found


def steps(model: Any, some: list[Prompt]) -> dict[str, float]:
    """Measures steps of one row, and of one row per prompt, in milliseconds."""
    from nybble import SamplingOptions

    native, greedy = model._native, SamplingOptions(temperature=0, seed=0)
    sequences = [native.sequence(prompt, greedy) for prompt in some]
    native.step(sequences)

    def median(batch: Sequence[Any]) -> float:
        times = []
        for _ in range(9):
            begun = time.perf_counter()
            native.step(batch)
            times.append(time.perf_counter() - begun)
        return statistics.median(times) * 1000

    one, all_of_them = median(sequences[:1]), median(sequences)
    return {"one_ms": one, "all_ms": all_of_them, "ratio": all_of_them / one}


def arrival(model: Any, options: Any, running: int = 4, length: int = 2000) -> dict[str, float]:
    """Measures the inter-token latency of running requests, before and while a long prompt is prefilled."""
    from nybble import Engine

    length = min(length, model.info.context - 2)
    with Engine(model) as engine:
        consumers = [Consumer(engine, prompt, options(None)) for prompt in prompts(running, 16, seed=2)]
        while not all(len(consumer.times) >= 40 for consumer in consumers):
            time.sleep(0.01)
        came = time.perf_counter()
        newcomer = Consumer(engine, prompts(1, length, seed=3)[0], options(1))
        newcomer.join()
        for consumer in consumers:
            consumer.request.cancel()
            consumer.join()
    usual, longest = [], 0.0
    for consumer in consumers:
        gaps = [(b - a, b) for a, b in zip(consumer.times[10:], consumer.times[11:], strict=False)]
        usual += [gap for gap, at in gaps if at < came]
        longest = max([longest, *(gap for gap, at in gaps if came <= at <= newcomer.times[0])])
    return {
        "usual_ms": statistics.median(usual) * 1000,
        "longest_ms": longest * 1000,
        "ratio": longest / statistics.median(usual),
        "first_token_seconds": newcomer.times[0] - came,
    }


def prefix(model: Any, options: Any, shared: int = 1000, own: int = 16) -> dict[str, float]:
    """Measures the seconds to the first token of two requests with a common prefix."""
    from nybble import Engine

    system = prompts(1, shared, seed=4)[0]
    with Engine(model) as engine:
        seconds = []
        for question in prompts(2, own, seed=5):
            begun = time.perf_counter()
            consumer = Consumer(engine, system + question, options(8))
            consumer.join()
            seconds.append(consumer.times[0] - begun)
    return {"first_seconds": seconds[0], "second_seconds": seconds[1], "ratio": seconds[0] / seconds[1]}


# llama.cpp


def measure_llama(arguments: argparse.Namespace) -> dict[str, Any]:
    """Measures llama.cpp with a sequence per request: all prompts first, then a token of each per step."""
    import llama_cpp as package  # type: ignore[import-not-found, unused-ignore]
    import numpy as np

    package.llama_backend_init()
    model = package.llama_model_load_from_file(str(arguments.model).encode(), package.llama_model_default_params())
    vocabulary = package.llama_vocab_n_tokens(package.llama_model_get_vocab(model))
    parameters = package.llama_context_default_params()
    each = arguments.prompt + arguments.generate
    parameters.n_ctx = (each + 32) * arguments.requests
    parameters.n_batch, parameters.n_ubatch = 2048, 512
    parameters.n_seq_max = arguments.requests
    parameters.n_threads = parameters.n_threads_batch = arguments.threads
    parameters.kv_unified = arguments.unified
    context = package.llama_init_from_model(model, parameters)
    batch = package.llama_batch_init(2048, 0, 1)

    def decode(rows: list[tuple[int, int, int, bool]]) -> list[int]:
        """Decodes rows (token, position, sequence, logits wanted) and returns the top tokens of rows with logits."""
        chosen = []
        for at in range(0, len(rows), 2048):
            part = rows[at : at + 2048]
            batch.n_tokens = len(part)
            for i, (token, position, sequence, wanted) in enumerate(part):
                batch.token[i], batch.pos[i], batch.n_seq_id[i] = token, position, 1
                batch.seq_id[i][0], batch.logits[i] = sequence, wanted
            assert package.llama_decode(context, batch) == 0
            for i, (*_, wanted) in enumerate(part):
                if wanted:
                    logits = np.ctypeslib.as_array(package.llama_get_logits_ith(context, i), shape=(vocabulary,))
                    chosen.append(int(logits.argmax()))
        return chosen

    def together(some: list[Prompt]) -> dict[str, float]:
        package.llama_memory_clear(package.llama_get_memory(context), True)
        begun = time.perf_counter()
        rows = [
            (token, position, sequence, position == len(prompt) - 1)
            for sequence, prompt in enumerate(some)
            for position, token in enumerate(prompt)
        ]
        tokens = decode(rows)
        times = [time.perf_counter()]
        for n in range(arguments.generate - 1):
            tokens = decode([(token, len(some[s]) + n, s, True) for s, token in enumerate(tokens)])
            times.append(time.perf_counter())
        return rates(begun, [times] * len(some))

    different = prompts(arguments.requests, arguments.prompt)
    together(prompts(1, 16, seed=1))
    lone = [together([prompt]) for prompt in different[: arguments.lone]]
    alone = {name: statistics.median(each[name] for each in lone) for name in lone[0]}
    return {"version": package.__version__, "alone": alone, "together": together(different)}


# Both


def ask(python: str, what: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Measures a runtime in its own process."""
    names = ("threads", "requests", "prompt", "generate", "lone")
    numbers = [f"--{name}={getattr(arguments, name)}" for name in names]
    command = [python, __file__, arguments.model, f"--measure={what}", *numbers]
    environment = {**os.environ, "OMP_NUM_THREADS": str(arguments.threads)}
    flags = ["--unified"] if arguments.unified else []
    done = subprocess.run([*command, *flags], capture_output=True, text=True, env=environment, check=False)
    if done.returncode != 0:
        sys.exit(f"{what} failed:\n{done.stderr[-2000:]}")
    answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return answer


def show(found: dict[str, Any]) -> None:
    """Prints the results."""
    ours = found["nybble"]
    print(f"{found['machine']}, {ours['threads']} threads, {ours['kernel']}")
    print(f"{found['requests']} requests of {found['prompt']} tokens in, {found['generate']} out; tokens/s\n")
    step, arrived, shared = ours["step"], ours["arrival"], ours["prefix"]
    one, all_of_them = step["one_ms"], step["all_ms"]
    lines = [("nybble", name, ours[name]["rate"]) for name in ("alone", "together", "equal prompts")]
    lines += [("nybble", "alone, decoding", 1000 / one), ("nybble", "decoding", 1000 * found["requests"] / all_of_them)]
    if theirs := found.get("llama.cpp"):
        for name, key in (("", "rate"), ("decoding", "decoding_rate")):
            for which in ("alone", "together"):
                lines.append(("llama.cpp", f"{which} {name}".strip(), theirs[which][key]))
        whole = ours["together"]["rate"] / theirs["together"]["rate"]
        decoding = 1000 * found["requests"] / all_of_them / theirs["together"]["decoding_rate"]
        lines += [("nybble / llama.cpp", "together", whole), ("nybble / llama.cpp", "decoding", decoding)]
    for runtime, name, figure in lines:
        print(f"{runtime:20} {name:20} {figure:7.1f}")
    print(f"\na step of 1 row {one:.1f} ms, of {found['requests']} {all_of_them:.1f} ms: {step['ratio']:.2f}")
    print(
        f"a prompt of 2,000 tokens arrives: running requests wait at most {arrived['longest_ms']:.0f} ms, "
        f"{arrived['ratio']:.1f} times the usual {arrived['usual_ms']:.0f} ms; "
        f"its first token comes after {arrived['first_token_seconds']:.1f} s"
    )
    print(
        f"1,000 tokens shared: first token after {shared['first_seconds']:.2f} s, "
        f"of the second request after {shared['second_seconds']:.2f} s: {shared['ratio']:.0f} times faster"
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--requests", type=int, default=16)
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--generate", type=int, default=64)
    parser.add_argument("--lone", type=int, default=3, help="number of requests to measure alone")
    parser.add_argument("--peer", help="interpreter of an environment with llama-cpp-python")
    parser.add_argument("--unified", action="store_true", help="llama.cpp: one cache for all sequences")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--measure", choices=["nybble", "llama.cpp"], help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        measure = {"nybble": measure_nybble, "llama.cpp": measure_llama}[arguments.measure]
        print(json.dumps(measure(arguments)))
        return 0
    found: dict[str, Any] = {"machine": platform.processor() or platform.machine()}
    found |= {name: getattr(arguments, name) for name in ("requests", "prompt", "generate")}
    found["nybble"] = ask(sys.executable, "nybble", arguments)
    if arguments.peer:
        found["llama.cpp"] = ask(arguments.peer, "llama.cpp", arguments)
    if arguments.json:
        print(json.dumps(found, indent=1))
    else:
        show(found)
    return 0


if __name__ == "__main__":
    sys.exit(main())
