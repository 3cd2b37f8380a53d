"""`nybble quantize`: quantizes a checkpoint to a 4-bit GGUF file and reports the result."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from nybble.cli import terminal
from nybble.cli.ending import Ended
from nybble.cli.options import takes_options
from nybble.quantization.options import QuantizeOptions

if TYPE_CHECKING:
    from nybble.quantization.report import Report


@takes_options
def quantize(
    options: QuantizeOptions,
    source: Annotated[
        str, typer.Argument(metavar="SOURCE", help="A folder with safetensors, a GGUF file or a Hub repository.")
    ],
    out: Annotated[Path, typer.Argument(metavar="OUT.gguf", help="The file to write.", dir_okay=False)],
    no_search: Annotated[
        bool, typer.Option("--no-search", help="Fit scales to the largest weight of a group, without a search.")
    ] = False,
    asymmetric: Annotated[
        bool, typer.Option("--asymmetric", help="Give each group its own minimum: the format q4_1.")
    ] = False,
    keep: Annotated[
        list[str] | None,
        typer.Option("--keep", help='The type of single tensors, such as "blk.0.*=q8_0".', metavar="PATTERN=TYPE"),
    ] = None,
    calibration: Annotated[
        str,
        typer.Option(
            "--calibration",
            help="The calibration text: prose, or JSON Lines or Parquet with prose or conversations; 'sample' for the "
            "short text in the package, 'self' for text that the model generates.",
            metavar="FILE",
        ),
    ] = "sample",
    imatrix: Annotated[
        Path | None,
        typer.Option(
            "--imatrix",
            help="An imatrix.gguf or imatrix.dat file of llama.cpp with the importance of columns; measured on the "
            "calibration text and written if it does not exist.",
            metavar="FILE",
        ),
    ] = None,
    evaluation: Annotated[
        Path | None,
        typer.Option(
            "--evaluation",
            help="The text to measure on; a held-out part of the calibration text if not given.",
            metavar="FILE",
        ),
    ] = None,
    target: Annotated[
        str | None,
        typer.Option(
            "--target",
            help="auto ends when the perplexity is within this share of the source's; 0.01 if not given.",
            metavar="SHARE",
        ),
    ] = None,
    report: Annotated[
        Path | None,
        typer.Option(
            "--report", help="Measure, and write an HTML page with plots and a JSON file.", metavar="FILE.html"
        ),
    ] = None,
    tasks: Annotated[
        str | None,
        typer.Option(
            "--tasks",
            help="Compare the file with the source in these tasks of lm-evaluation-harness, with commas between.",
            metavar="NAMES",
        ),
    ] = None,
    task_folder: Annotated[
        Path | None,
        typer.Option("--task-folder", help="A folder with tasks of your own: YAML files.", metavar="FOLDER"),
    ] = None,
    task_limit: Annotated[
        int | None,
        typer.Option("--task-limit", help="Use only the first documents of each task.", min=1, metavar="N"),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as one JSON object.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Overwrite OUT.gguf and the report if they exist.")] = False,
) -> None:
    """Quantize a model to 4 bits and write it as a GGUF file for nybble and llama.cpp.

    After an interruption, the same command continues the run.
    """
    from nybble.integrations.tasks import Tasks
    from nybble.quantization import api

    terminal.show_log()
    pages = [] if report is None else list(dict.fromkeys([report, report.with_suffix(".json")]))
    for page in pages:
        if page.exists() and not force:
            raise FileExistsError(f"{page}: already exists; use force to overwrite it")
        if not page.absolute().parent.is_dir():
            raise FileNotFoundError(f"{page}: its folder does not exist")
    chosen = options.replace(
        search=not no_search,
        symmetric=False if asymmetric else None,
        keep=dict(map(_rule, keep or [])),
        calibration=calibration,
        imatrix=imatrix,
        evaluation=evaluation,
        measure=True if report is not None else None,
        target=None if target is None else _share(target),
        force=force,
    )
    if tasks is None and (task_folder or task_limit):
        raise typer.BadParameter("--task-folder and --task-limit: found without --tasks, expected with it only")
    with _hint():
        finish = None if tasks is None else Tasks(tasks, task_folder, task_limit, chosen.threads).compare
        done = api.quantize_and_report(source, out, chosen, pages, finish=finish)
    for page in pages:
        done.save(page)
    if as_json:
        typer.echo(json.dumps(json.loads(done.to_json())))
    else:
        _print(done, pages)


@contextlib.contextmanager
def _hint() -> Iterator[None]:
    """Prints after Ctrl-C, or a signal that ends the command, how to continue."""
    try:
        yield
    except (KeyboardInterrupt, Ended):
        terminal.note("interrupted: the same command continues from here")
        raise


def _share(text: str) -> float:
    """Parses a share such as 0.01 or 1%."""
    try:
        return float(text.rstrip("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        raise typer.BadParameter(f"--target: found {text!r}, expected a share such as 0.01 or 1%") from None


def _rule(text: str) -> tuple[str, str]:
    """Parses PATTERN=TYPE."""
    pattern, equals, kind = text.rpartition("=")
    if not equals or not pattern:
        raise typer.BadParameter(f'--keep: found {text!r}, expected PATTERN=TYPE, such as "blk.0.*=q8_0"')
    return pattern, kind


def _print(done: Report, pages: list[Path]) -> None:
    from rich.table import Table

    from nybble.quantization import report_page
    from nybble.quantization.html_table import report_rows

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
                report_page.number(one.perplexity, 4),
                report_page.number(one.kl_mean),
                report_page.percent(one.top_agreement),
                report_page.duration(one.seconds),
            )
            table.add_row(*map(terminal.printable, cells), style="bold" if one.chosen else None)
        console.print(table)
        console.print()
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    rows = {**report_rows(done), "file": f"{done.out}, {terminal.human_bytes(done.size_bytes)}"}
    if pages:
        rows["report"] = ", ".join(map(str, pages))
    for name, value in rows.items():
        table.add_row(name, terminal.printable(value))
    console.print(table)
