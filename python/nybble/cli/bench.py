"""`nybble bench`: how fast a model reads and writes here, and how close that is to what the machine can do."""

from __future__ import annotations

import json
import platform
import statistics
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from nybble.cli import terminal
from nybble.cli.options import LoadOptions, takes_options

if TYPE_CHECKING:
    from nybble.model import Model


@takes_options
def bench(
    load: LoadOptions,
    source: Annotated[
        str | None,
        typer.Argument(metavar="MODEL", help="A GGUF file, a folder or a Hub repository.", show_default=False),
    ] = None,
    prompt: Annotated[int, typer.Option("--prompt", help="Tokens to read.", min=1)] = 512,
    generate: Annotated[int, typer.Option("--generate", help="Tokens to write.", min=1)] = 64,
    rounds: Annotated[int, typer.Option("--rounds", help="Repetitions; the medians are reported.", min=1)] = 3,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Measure the speed of a model, and the limits of this machine in the same run."""
    from nybble import hub

    terminal.show_log()
    file = hub.resolve(source, filename=load.filename, revision=load.revision)  # A download is not part of loading.
    began = time.perf_counter()
    model = load.load(source)
    load_seconds = time.perf_counter() - began
    with model:
        if prompt + generate > model.info.context:
            raise typer.BadParameter(
                f"--prompt {prompt} and --generate {generate} do not fit into {model.info.context} tokens of context"
            )
        measured = _measure(model, prompt, generate, rounds)
    result = {"model": model.info.name or file.name, "file": str(file), "load_seconds": load_seconds, **measured}
    if as_json:
        typer.echo(json.dumps(result))
    else:
        _print(result)


def _measure(model: Model, prompt: int, generate: int, rounds: int) -> dict[str, Any]:
    from nybble import _native
    from nybble.progress import bar
    from nybble.sampling import SamplingOptions

    info, native = model.info, model._native
    greedy = SamplingOptions(temperature=0, seed=0)
    ids = [(7919 * i + 13) % info.vocabulary for i in range(prompt)]  # Any ids do: the work does not depend on them.
    prompt_rates, decode_rates = [], []
    with bar("measuring") as advance:
        for done in range(rounds + 1):  # The first round only warms up.
            advance(done, rounds + 1)
            sequence = native.sequence(ids, greedy)
            began = time.perf_counter()
            native.step([sequence])
            read = time.perf_counter()
            for _ in range(generate):
                native.step([sequence])
            written = time.perf_counter()
            if done:
                prompt_rates.append(prompt / (read - began))
                decode_rates.append(generate / (written - read))
    peak_rss_bytes = _peak_rss_bytes()  # Before the limits are measured, which takes a buffer larger than all caches.
    bandwidth_gb_s, int8_gops = native.machine_limits()
    prompt_rate, decode_rate = statistics.median(prompt_rates), statistics.median(decode_rates)
    # Each of the weights of a token is multiplied and added once, but only the last token of a prompt needs the output
    # layer.
    weights_of_a_prompt_token = (
        info.parameters * info.bytes_per_token / info.weight_bytes - info.vocabulary * info.hidden_size
    )
    return {
        "kernel": info.kernel,
        "threads": info.threads,
        "prompt_tokens": prompt,
        "generated_tokens": generate,
        "rounds": rounds,
        "prompt_tokens_per_second": prompt_rate,
        "decode_tokens_per_second": decode_rate,
        "peak_rss_bytes": peak_rss_bytes,
        "weight_bytes": info.weight_bytes,
        "bandwidth_gb_s": bandwidth_gb_s,
        "int8_gops": int8_gops,
        # Writing a token reads its weights once.
        "decode_share_of_bandwidth": info.bytes_per_token * decode_rate / (bandwidth_gb_s * 1e9),
        "prompt_share_of_int8": 2 * weights_of_a_prompt_token * prompt_rate / (int8_gops * 1e9),
        "cpu": _cpu(),
        "platform": platform.platform(),
        "nybble": _native.__version__,
    }


def _peak_rss_bytes() -> int | None:
    """The most memory that this process has held so far; None where the system does not tell."""
    try:  # On Linux, getrusage may report the peak of the process that started this one.
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    try:
        import resource
    except ImportError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _cpu() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _print(result: dict[str, Any]) -> None:
    from rich.table import Table

    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    peak = result["peak_rss_bytes"]
    rows = {
        "model": result["model"],
        "cpu": f"{result['cpu']}, kernel {result['kernel']}, {result['threads']} threads",
        "loading": f"{result['load_seconds']:.2f} s",
        "memory": f"weights {terminal.human_bytes(result['weight_bytes'])}"
        + (f", process at its peak {terminal.human_bytes(peak)}" if peak is not None else ""),
        f"reading {result['prompt_tokens']}": f"{result['prompt_tokens_per_second']:.1f} tokens a second, "
        f"{result['prompt_share_of_int8']:.0%} of {result['int8_gops']:.0f} GOPS",
        f"writing {result['generated_tokens']}": f"{result['decode_tokens_per_second']:.1f} tokens a second, "
        f"{result['decode_share_of_bandwidth']:.0%} of {result['bandwidth_gb_s']:.1f} GB/s",
    }
    for name, value in rows.items():
        table.add_row(name, terminal.printable(value))
    terminal.console().print(table)
