"""`nybble bench`: the speed of a model, and its share of the limits of this machine."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from nybble.cli import terminal
from nybble.cli.options import ModelArgument, load_model, takes_options
from nybble.load_options import LoadOptions

if TYPE_CHECKING:
    from rich.table import Table

    from nybble.cli.measure import Speed


@takes_options
def bench(
    load: LoadOptions,
    source: ModelArgument = None,
    prompt: Annotated[str, typer.Option("--prompt", metavar="N,...", help="Lengths of prompts in tokens.")] = "128,512",
    batch: Annotated[
        str, typer.Option("--batch", metavar="N,...", help="Numbers of sequences computed together.")
    ] = "1",
    threads: Annotated[
        str | None,
        typer.Option("--threads", metavar="N,...", help="Numbers of threads; by default the number of physical cores."),
    ] = None,
    generate: Annotated[
        int, typer.Option("--generate", help="Tokens to generate per sequence.", min=1, metavar="N")
    ] = 64,
    rounds: Annotated[
        int, typer.Option("--rounds", help="Repetitions, whose medians are reported.", min=1, metavar="N")
    ] = 3,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    tuning: Annotated[
        bool, typer.Option("--tuning", help="Show the kernels that loading chose for this CPU, and their speeds.")
    ] = False,
    compare: Annotated[
        Path | None,
        typer.Option("--compare", metavar="FILE", help="Output of an earlier run with --json, to compare with."),
    ] = None,
) -> None:
    """Measure the speed of a model, and the limits of this machine.

    --prompt, --batch and --threads take lists, such as --batch 1,8. It measures all combinations.
    """
    from nybble.cli import measure
    from nybble.models import hub
    from nybble.progress import bar

    lengths, batches = _numbers("--prompt", prompt), _numbers("--batch", batch)
    counts: list[int | None] = [None] if threads is None else [*_numbers("--threads", threads)]
    before = None if compare is None else _earlier(compare)
    terminal.show_log()
    hub.resolve(source, filename=load.filename, revision=load.revision)  # A download does not count as loading.
    limits, speeds, load_seconds, memory = [], [], [], None
    total, done = len(counts) * len(lengths) * len(batches) * rounds, 0
    for count in counts:
        start = time.perf_counter()
        model = load_model(source, load.replace(threads=count))
        load_seconds.append(time.perf_counter() - start)
        with model, bar("measuring") as advance:
            if max(lengths) + generate > model.info.context:
                raise typer.BadParameter(
                    f"--prompt {max(lengths)} and --generate {generate} do not fit into {model.info.context} tokens of "
                    "context"
                )

            def step(advance: Any = advance) -> None:
                nonlocal done
                done += 1
                advance(done, total)

            limit, found, held = measure.speeds(model, lengths, batches, generate, rounds, step)
            memory = memory or held  # Later peaks include the buffer of the limits.
            limits.append(limit)
            speeds += found
    result = measure.report(model.info, min(load_seconds), limits, speeds, memory or measure.Memory(None, None))
    result |= {"generate": generate, "rounds": rounds}
    if as_json:
        typer.echo(json.dumps(result if before is None else {**result, "before": before}))
        return
    _print_head(result)
    if tuning:
        _print_tuning(result["tuning"])
    if before is None:
        _print_speeds(speeds)
    else:
        _print_comparison(before, speeds)


def _numbers(option: str, text: str) -> list[int]:
    """The numbers of a list such as `1,8`, without repetitions."""
    parts = text.split(",")
    if not all(part.strip().isdecimal() and int(part) > 0 for part in parts):
        raise typer.BadParameter(f"{option}: found {text!r}, expected positive numbers, such as 1,8")
    return list(dict.fromkeys(map(int, parts)))


def _earlier(path: Path) -> dict[str, Any]:
    from nybble.cli import measure

    try:
        run = json.loads(path.read_text(encoding="utf-8"))
        measure.read(run)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    found: dict[str, Any] = run
    return found


def _print_head(result: dict[str, Any]) -> None:
    sizes = [("peak memory", result["peak_rss_bytes"]), ("on huge pages", result["huge_page_bytes"])]
    memory = [f"{name} {terminal.human_bytes(size)}" for name, size in sizes if size is not None]
    lines = [
        result["model"],
        f"{result['cpu']}, kernel {result['kernel']}",
        f"loaded in {result['load_seconds']:.2f} s; weights {terminal.human_bytes(result['weight_bytes'])}, KV cache "
        f"{terminal.human_bytes(result['cache_bytes'])} for {result['context']} tokens",
        *([", ".join(memory)] if memory else []),
        *(
            f"limits with {limit['threads']} {'thread' if limit['threads'] == 1 else 'threads'}: "
            f"{limit['bandwidth_gb_s']:.1f} GB/s, {limit['int8_gops']:.0f} INT8 GOPS"
            for limit in result["limits"]
        ),
        f"medians of {result['rounds']} rounds, {result['generate']} tokens generated per sequence",
        "",
    ]
    console = terminal.console()
    for line in lines:
        console.print(terminal.printable(line))


def _table(*columns: str) -> Table:
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    return table


def _print_tuning(choices: list[dict[str, Any]]) -> None:
    console = terminal.console()
    if not choices:
        console.print("no choice of kernels: one was named, or this CPU runs only one, or NYBBLE_TUNING is off\n")
        return
    table = _table("layout", "rows", "threads", "kernel", "INT8 GOPS of each")
    for choice in choices:
        speeds = ", ".join(f"{kernel} {gops:.0f}" for kernel, gops in choice["gops"].items())
        table.add_row(choice["layout"], str(choice["rows"]), str(choice["threads"]), choice["kernel"], speeds)
    console.print(table)
    console.print()


def _print_speeds(speeds: list[Speed]) -> None:
    table = _table("threads", "length", "batch", "prompt t/s", "of INT8", "decoding t/s", "of reads")
    for speed in speeds:
        table.add_row(
            *map(str, speed.key),
            f"{speed.prompt_tokens_per_second:.1f}",
            f"{speed.prompt_share_of_int8:.0%}",
            f"{speed.decode_tokens_per_second:.1f}",
            f"{speed.decode_share_of_bandwidth:.0%}",
        )
    terminal.console().print(table)


def _print_comparison(before: dict[str, Any], speeds: list[Speed]) -> None:
    from nybble.cli import measure

    console = terminal.console()
    version, kernel = before.get("nybble", "?"), before.get("kernel", "?")
    console.print(terminal.printable(f"before: {before.get('model', '?')}, nybble {version}, kernel {kernel}\n"))
    earlier = {speed.key: speed for speed in measure.read(before)}
    table = _table("threads", "length", "batch", "prompt", "before", "ratio", "decoding", "before", "ratio")
    for speed in speeds:
        old = earlier.get(speed.key)
        cells = []
        for name in ("prompt_tokens_per_second", "decode_tokens_per_second"):
            now, then = getattr(speed, name), getattr(old, name, 0.0)
            ratio = now / then if then else 0.0
            cells += [f"{now:.1f}", f"{then:.1f}" if then else "-"]
            cells.append("-" if not then else f"{ratio:.2f}" if ratio < 100 else f"{ratio:.0f}")
        table.add_row(*map(str, speed.key), *cells)
    console.print(table)
