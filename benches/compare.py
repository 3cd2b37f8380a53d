#!/usr/bin/env python3
"""Measure nybble and other runtimes in turn on the same file.

    python benches/compare.py model.gguf [--threads 2] [--prompt 512] [--generate 64] [--rounds 5]
        [--peer NAME[=PROGRAM[:MODEL]] ...] [--json] [--png FILE] [--with EARLIER.json ...]

Peers are llama.cpp (`pip install llama-cpp-python`, which builds it for this CPU), openvino (`openvino-genai`),
mistral.rs (`mistralrs`) and neural-speed. PROGRAM is the interpreter of an environment with the peer, so that peers
with conflicting requirements can be compared. MODEL is another file for a runtime that cannot read this one. Without
--peer, llama.cpp in this environment is compared.

Other peers are programs called `llama-bench`: `llama-bench=PROGRAM` is llama.cpp's, `ik=PROGRAM` that of ik_llama.cpp,
and `ik-rtr=PROGRAM` the same with `-rtr 1`, which rearranges the weights when it loads them.

Each runtime has its own process and keeps the model loaded. While one computes, the others are stopped, so that their
spinning threads cost it nothing. Prints medians over the rounds, the ratios of each round's speeds (median, minimum and
maximum), and the machine's limits measured in the same run: read bandwidth, which bounds decoding, and the rate of INT8
dot products, which bounds prefill. A peer that cannot read a file is named and left out of its table.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import signal
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, cast

HERE = Path(__file__).resolve().parent


PROGRAMS = ("llama-bench", "ik", "ik-rtr")
"""Peers that are programs and not packages."""


class RuntimeEndedError(Exception):
    """The process of a runtime has ended. Says which, and its last message."""


class Runtime:
    """A runtime in its own process, stopped except while it answers a request."""

    def __init__(self, name: str, program: str, model: str, threads: int, context: int) -> None:
        self.name = name
        command = [program, str(HERE / "peers.py"), name, model, str(threads), str(context)]
        if name in PROGRAMS:
            command = [sys.executable, *command[1:], program]
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
        # A file, because a full pipe would block the process.
        self.stderr = tempfile.TemporaryFile("w+")  # noqa: SIM115
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.stderr, text=True, env=environment
        )
        self.facts = self._answer()

    def ask(self, request: object) -> dict[str, Any]:
        """Resumes the process for one request and returns its answer."""
        assert self.process.stdin is not None
        self.process.send_signal(signal.SIGCONT)
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        return self._answer()

    def close(self) -> None:
        """Kills the process."""
        self.process.kill()
        self.process.communicate()

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            self.process.wait()
            self.stderr.seek(0)
            lines = self.stderr.read().strip().splitlines()
            last = lines[-1] if lines else "no message"
            raise RuntimeEndedError(f"{self.name} ended with {self.process.returncode}: {last}")
        self.process.send_signal(signal.SIGSTOP)
        return cast("dict[str, Any]", json.loads(line))


def measure(model: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Measures all runtimes on one file."""
    context = options.prompt + options.generate + 8
    wanted = [("nybble", sys.executable, str(model))]
    for peer in options.peer or ["llama.cpp"]:
        name, _, rest = peer.partition("=")
        program, _, other = rest.partition(":")
        if name in PROGRAMS and not program:
            raise SystemExit(f"--peer {name}: expected {name}=PROGRAM, the path of llama-bench")
        wanted.append((name, program or sys.executable, other or str(model)))
    runtimes: list[Runtime] = []
    try:
        for name, program, path in wanted:
            try:
                runtimes.append(Runtime(name, program, path, options.threads, context))
            except RuntimeEndedError as error:
                if not runtimes:
                    raise SystemExit(str(error)) from None
                print(f"{model.name}: left out, {error}", file=sys.stderr)
        return rounds(model, runtimes, options)
    except RuntimeEndedError as error:
        raise SystemExit(str(error)) from None
    finally:
        for runtime in runtimes:
            runtime.close()


def rounds(model: Path, runtimes: list[Runtime], options: argparse.Namespace) -> dict[str, Any]:
    """Runs alternating rounds and summarizes them."""

    def prompt(number: int) -> list[int]:
        # Every vocabulary has tokens below 1,000, and speed does not depend on them. Each round starts with a different
        # token, because some runtimes cache prompts.
        return [3 + (i + number) * 7919 % 997 for i in range(options.prompt)]

    for runtime in runtimes:
        runtime.ask({"prompt": prompt(0), "generate": min(4, options.generate)})  # Warm up.
    seconds: dict[str, list[tuple[float, float]]] = {runtime.name: [] for runtime in runtimes}
    limits = []
    for number in range(1, options.rounds + 1):
        limits.append(runtimes[0].ask("limits"))
        for runtime in runtimes:
            found = runtime.ask({"prompt": prompt(number), "generate": options.generate})
            seconds[runtime.name].append((found["prompt_seconds"], found["decode_seconds"]))
    result: dict[str, Any] = {
        "model": model.name,
        "cpu": cpu(),
        "threads": options.threads,
        "prompt": options.prompt,
        "generate": options.generate,
        "rounds": options.rounds,
        "bandwidth_gb_s": statistics.median(limit["bandwidth_gb_s"] for limit in limits),
        "int8_gops": statistics.median(limit["int8_gops"] for limit in limits),
        "runtimes": {},
    }
    ours = seconds["nybble"]
    for runtime in runtimes:
        own = seconds[runtime.name]
        entry = {
            **runtime.facts,
            "prompt_tokens_per_second": statistics.median(options.prompt / p for p, _ in own),
            "decode_tokens_per_second": statistics.median(options.generate / d for _, d in own),
        }
        for at, what in enumerate(("prompt_ratio", "decode_ratio")):
            ratios = [theirs[at] / mine[at] for mine, theirs in zip(ours, own, strict=True)]
            entry[what] = {"median": statistics.median(ratios), "least": min(ratios), "greatest": max(ratios)}
        result["runtimes"][runtime.name] = entry
    return result


def cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def show(result: dict[str, Any]) -> None:
    """Prints the table of one file, with the speed of nybble relative to each peer."""
    print(f"{result['model']}: {result['threads']} threads, {result['rounds']} rounds, {result['cpu']}")
    own = result["runtimes"]["nybble"]
    # Recurrent states are read and written.
    moved = own["bytes_per_token"] + 2 * own.get("state_bytes", 0)
    share = moved * own["decode_tokens_per_second"] / (result["bandwidth_gb_s"] * 1e9)
    print(
        f"limits: {result['bandwidth_gb_s']:.1f} GB/s read (nybble decodes at {share:.0%}), "
        f"{result['int8_gops']:.0f} GOPS of INT8"
    )
    print(f"{'':14}{'prompt ' + str(result['prompt']):>12} {'ratio':<20}{'decoding':>10} {'ratio':<20}")
    for name, entry in result["runtimes"].items():
        cells = [f"{name:14}"]
        for what, width in (("prompt", 12), ("decode", 10)):
            ratio = entry[f"{what}_ratio"]
            spread = f"{ratio['median']:.2f} ({ratio['least']:.2f} to {ratio['greatest']:.2f})"
            cells.append(f"{entry[f'{what}_tokens_per_second']:>{width}.1f} {'' if name == 'nybble' else spread:<20}")
        print("".join(cells).rstrip())
    print(flush=True)


def draw(results: list[dict[str, Any]], path: Path) -> None:
    """Draws a bar per file and runtime, relative to the fastest of the file: prefill above, decode below."""
    from matplotlib.figure import Figure

    names = list(dict.fromkeys(name for result in results for name in result["runtimes"]))
    most = max(len(result["runtimes"]) for result in results)
    figure = Figure(figsize=(8, 2.2 * 2), layout="constrained")
    axes = figure.subplots(2, 1)
    for axis, what, title in zip(axes, ("prompt", "decode"), ("Prompt", "Decoding"), strict=True):
        labelled = set()
        for at, result in enumerate(results):
            speeds = {name: entry[f"{what}_tokens_per_second"] for name, entry in result["runtimes"].items()}
            for n, (name, speed) in enumerate(speeds.items()):
                bar = axis.bar(
                    at + (n - (len(speeds) - 1) / 2) * 0.8 / most,
                    speed / max(speeds.values()),
                    0.75 / most,
                    color=f"C{names.index(name)}",
                    label=None if name in labelled else name,
                )
                labelled.add(name)
                axis.bar_label(bar, [f"{speed:,.0f}" if speed >= 100 else f"{speed:.1f}"], fontsize=7)
        axis.set_title(f"{title}: tokens per second", fontsize=9)
        labels = [
            f"{result['model'].removesuffix('.gguf')}\n{result['threads']} threads, {result['prompt']} in"
            for result in results
        ]
        axis.set_xticks(range(len(results)), labels, fontsize=7)
        axis.set_yticks([])
        axis.set_ylim(0, 1.18)
        axis.spines[["left", "top", "right"]].set_visible(False)
    axes[0].legend(fontsize=7, frameon=False, ncols=len(names), loc="upper right", bbox_to_anchor=(1, 1.3))
    figure.savefig(path, dpi=150)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", type=Path, metavar="model.gguf")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--prompt", type=int, default=512, help="prompt tokens")
    parser.add_argument("--generate", type=int, default=64, help="tokens to decode after the prompt")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--peer", action="append", metavar="NAME[=PROGRAM[:MODEL]]", help="a runtime to compare with")
    parser.add_argument("--json", action="store_true", help="print a list of results instead of tables")
    parser.add_argument("--png", type=Path, metavar="FILE", help="draw a chart (`pip install --group chart`)")
    parser.add_argument(
        "--with",
        action="append",
        type=Path,
        default=[],
        metavar="FILE",
        dest="earlier",
        help="earlier output of --json, shown and drawn before this run's results",
    )
    options = parser.parse_args()
    if not options.models and not options.earlier:
        parser.error("expected a model to measure or --with FILE")
    results = [result for path in options.earlier for result in json.loads(path.read_text())]
    if not options.json:
        for result in results:
            show(result)
    for model in options.models:
        results.append(measure(model, options))
        if not options.json:
            show(results[-1])
    if options.json:
        print(json.dumps(results, indent=1))
    if options.png:
        draw(results, options.png)
    return 0


if __name__ == "__main__":
    sys.exit(main())
