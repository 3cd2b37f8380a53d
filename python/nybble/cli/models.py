"""`nybble models`: lists the models that load without a download."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from nybble.cli import terminal


def models(
    as_json: Annotated[bool, typer.Option("--json", help="Print a JSON list.")] = False,
    verify: Annotated[
        bool, typer.Option("--verify", help="Compare every file with its size and hash. Exit code 1 if one differs.")
    ] = False,
) -> None:
    """List the models in the caches of nybble and the Hub."""
    if verify:
        _verify(as_json)
        return
    from nybble.models.cache import cached_models
    from nybble.models.default_model import DEFAULT_MODEL

    found = cached_models()
    if as_json:
        rows = [
            {
                "source": m.source,
                "filename": m.filename,
                "path": str(m.path),
                "bytes": m.nbytes,
                "default": m.source is None,
            }
            for m in found
        ]
        typer.echo(json.dumps(rows, indent=2))
        return
    if not found:
        typer.echo(
            "no models in the cache: nybble run PROMPT downloads the default model, nybble run ORG/NAME PROMPT another"
        )
        return
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("model", overflow="fold")
    table.add_column("file", overflow="fold")
    table.add_column("size", justify="right", no_wrap=True)
    for model in found:
        name = f"{DEFAULT_MODEL.name} (default)" if model.source is None else model.source
        table.add_row(
            terminal.printable(name),
            terminal.printable(model.filename or model.path.name),
            terminal.human_bytes(model.nbytes),
        )
    terminal.console().print(table)


def _verify(as_json: bool) -> None:
    from nybble.models.verify import verify

    found = []
    for file in verify():
        found.append(file)
        if not as_json:
            where = terminal.printable(f"{file.source or 'default model'}: {file.filename}")
            typer.echo(f"{where}: {terminal.printable(file.problem or 'ok')}")
    if as_json:
        rows = [{"source": f.source, "filename": f.filename, "path": str(f.path), "problem": f.problem} for f in found]
        typer.echo(json.dumps(rows, indent=2))
    if any(file.problem for file in found):
        raise typer.Exit(1)
