"""`nybble quantize`: from a full-precision checkpoint to a 4-bit file, and what that cost."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from nybble.cli import terminal

if TYPE_CHECKING:
    from nybble.quantization.report import Report


class Recipe(str, Enum):
    """How codes are found."""

    AUTO = "auto"
    RTN = "rtn"
    GPTQ = "gptq"
    GPTQ_TUNE = "gptq+tune"
    AWQ = "awq"
    AWQ_GPTQ = "awq+gptq"
    SIGNROUND = "signround"


class Format(str, Enum):
    """The blocks of linear layers."""

    Q4_0 = "q4_0"
    Q4_1 = "q4_1"
    IQ4_NL = "iq4_nl"


def quantize(
    source: Annotated[
        str, typer.Argument(metavar="SOURCE", help="A folder with safetensors, a GGUF file or a Hub repository.")
    ],
    out: Annotated[Path, typer.Argument(metavar="OUT.gguf", help="The file to write.", dir_okay=False)],
    recipe: Annotated[
        Recipe,
        typer.Option(
            "--recipe",
            help="How codes are found: rtn, gptq, gptq+tune, awq, awq+gptq or signround; auto tries them from cheap "
            "to dear.",
            metavar="RECIPE",
        ),
    ] = Recipe.AUTO,
    no_search: Annotated[
        bool, typer.Option("--no-search", help="Round with the scale of the largest weight, unsearched.")
    ] = False,
    group: Annotated[
        int | None,
        typer.Option("--group", help="Weights that share a scale: 32, 64, 128, or 0 for whole rows.", metavar="SIZE"),
    ] = None,
    asymmetric: Annotated[
        bool, typer.Option("--asymmetric", help="Give each group a minimum of its own: the format q4_1.")
    ] = False,
    block_format: Annotated[
        Format | None,
        typer.Option("--format", help="The blocks of linear layers: q4_0, q4_1 or iq4_nl.", metavar="FORMAT"),
    ] = None,
    bits_per_weight: Annotated[
        float | None,
        typer.Option(
            "--bits-per-weight", help="Give the most sensitive layers 5 or 8 bits, up to this average.", metavar="BITS"
        ),
    ] = None,
    output_type: Annotated[
        str, typer.Option("--output-type", help="What embedding and output are stored as.", metavar="TYPE")
    ] = "q8_0",
    keep: Annotated[
        list[str] | None,
        typer.Option("--keep", help='The type of single tensors, such as "blk.0.*=q8_0".', metavar="PATTERN=TYPE"),
    ] = None,
    calibration: Annotated[
        str,
        typer.Option(
            "--calibration",
            help="The text that recipes look at: prose, or JSONL with a document a line; 'sample' for the small one "
            "that comes with nybble, 'self' for what the model writes.",
            metavar="FILE",
        ),
    ] = "sample",
    calibration_tokens: Annotated[
        int, typer.Option("--calibration-tokens", help="Look at only so many of its tokens.", min=512, metavar="N")
    ] = 65_536,
    evaluation: Annotated[
        Path | None,
        typer.Option(
            "--evaluation",
            help="The text to measure with; a part of the other that is held out if not given.",
            metavar="FILE",
        ),
    ] = None,
    target: Annotated[
        str | None,
        typer.Option("--target", help="End when the perplexity is within this share of the source's.", metavar="SHARE"),
    ] = None,
    budget: Annotated[
        float | None, typer.Option("--budget", help="End after so many minutes.", metavar="MINUTES")
    ] = None,
    report: Annotated[
        Path | None,
        typer.Option(
            "--report",
            help="Measure, and write a page with plots, and beside it the same as JSON.",
            metavar="FILE.html",
        ),
    ] = None,
    seed: Annotated[int, typer.Option("--seed", help="The same seed gives the same file.", min=0, metavar="N")] = 0,
    threads: Annotated[
        int | None,
        typer.Option("--threads", help="Threads to compute with; the physical cores if not given.", min=1, metavar="N"),
    ] = None,
    revision: Annotated[
        str | None, typer.Option("--revision", help="Branch, tag or commit of a repository.", metavar="NAME")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as one JSON object.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Overwrite OUT.gguf and the report if they exist.")] = False,
) -> None:
    """Quantize a model to 4 bits and write it as a GGUF file that llama.cpp runs, too.

    Started again after an interruption, the same command goes on where it stopped.
    """
    from nybble.quantization import api as quantization

    terminal.show_log()
    pages = [] if report is None else list(dict.fromkeys([report, report.with_suffix(".json")]))
    for path in [out, *pages]:
        if path.exists() and not force:
            raise FileExistsError(f"{path}: exists already (--force overwrites it)")
        if not path.absolute().parent.is_dir():
            raise FileNotFoundError(f"{path}: its folder does not exist")
    with _hint():
        done = quantization.quantize(
            source,
            out,
            recipe=recipe.value,
            group=group,
            symmetric=False if asymmetric else None,
            format=None if block_format is None else block_format.value,
            search=not no_search,
            calibration=calibration,
            calibration_tokens=calibration_tokens,
            evaluation=evaluation,
            measure=True if report is not None else None,
            target=None if target is None else _share(target),
            budget=budget,
            bits_per_weight=bits_per_weight,
            output_type=output_type,
            keep=dict(map(_rule, keep or [])),
            seed=seed,
            threads=threads,
            force=force,
            revision=revision,
            progress=True,
        )
    for path in pages:
        done.save(path)
    if as_json:
        typer.echo(json.dumps(json.loads(done.to_json())))
    else:
        _print(done, pages)


@contextlib.contextmanager
def _hint() -> Iterator[None]:
    """Tells whoever stops the command that nothing is lost."""
    try:
        yield
    except KeyboardInterrupt:
        terminal.note("interrupted: the same command goes on from here")
        raise


def _share(text: str) -> float:
    """0.01, or 1%."""
    try:
        return float(text.rstrip("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        raise typer.BadParameter(f"--target: found {text!r}, expected a share such as 0.01 or 1%") from None


def _rule(text: str) -> tuple[str, str]:
    pattern, equals, kind = text.rpartition("=")
    if not equals or not pattern:
        raise typer.BadParameter(f'--keep: found {text!r}, expected PATTERN=TYPE, such as "blk.0.*=q8_0"')
    return pattern, kind


def _print(done: Report, pages: list[Path]) -> None:
    from rich.table import Table

    from nybble.quantization import report_page as write

    console = terminal.console()
    if len(done.candidates) > 1:
        table = Table(box=None, pad_edge=False, header_style="bold")
        for column in ("recipe", "format", "group", "size", "perplexity", "mean KL", "same top", "time"):
            table.add_column(column, justify="left" if column in ("recipe", "format") else "right", no_wrap=True)
        for one in done.candidates:
            cells = (
                one.recipe,
                one.format,
                str(one.group or "row"),
                terminal.human_bytes(one.size_bytes),
                write.number(one.perplexity, 4),
                write.number(one.kl_mean),
                write.percent(one.top_agreement),
                write.duration(one.seconds),
            )
            table.add_row(*map(terminal.printable, cells), style="bold" if one.chosen else None)
        console.print(table)
        console.print()
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    rows = {
        "file": f"{done.out}, {terminal.human_bytes(done.size_bytes)}",
        "recipe": done.recipe,
        "linear layers": f"{done.bits_per_weight:.2f} bits a weight, scales included",
        "matrices": ", ".join(write.matrices(done)),
    }
    if (chosen := done.chosen) is not None:
        rows["perplexity"] = write.number(chosen.perplexity, 4) + (
            f", {write.number(done.reference_perplexity, 4)} of the source" if done.reference_perplexity else ""
        )
        rows["divergence"] = f"mean KL {write.number(chosen.kl_mean)}, median {write.number(chosen.kl_median)}"
        rows["same top token"] = write.percent(chosen.top_agreement)
    if done.chosen_because:
        rows["chosen because"] = done.chosen_because
    rows["time"] = write.duration(done.seconds)
    if pages:
        rows["report"] = ", ".join(map(str, pages))
    for name, value in rows.items():
        table.add_row(name, terminal.printable(value))
    console.print(table)
