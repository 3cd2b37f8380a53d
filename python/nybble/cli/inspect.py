"""`nybble inspect`: shows the metadata and tensors of a GGUF file."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from nybble.cli import terminal

if TYPE_CHECKING:
    from nybble import _native

_SHOWN_ITEMS = 4
_LAYER = re.compile(r"(?<=\.)\d+(?=\.)")


def inspect(
    file: Annotated[str, typer.Argument(metavar="FILE", help="A GGUF file, a folder or a Hub repository.")],
    filename: Annotated[
        str | None, typer.Option("--filename", help="Which GGUF file of a folder or repository.", metavar="PATTERN")
    ] = None,
    every: Annotated[bool, typer.Option("--all", help="List every tensor, not one line for all layers.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print metadata and tensors as one JSON object.")] = False,
) -> None:
    """Show the metadata and tensors of a model file."""
    from nybble import _native
    from nybble.models import hub

    terminal.show_log()
    path = hub.resolve(file, filename=filename)
    gguf = _native.GgufFile(path)
    if as_json:
        typer.echo(json.dumps(_as_json(path, gguf)))
        return
    _print(path, gguf, every)


def _as_json(path: Path, gguf: _native.GgufFile) -> dict[str, Any]:
    tensors = [
        {"name": t.name, "type": t.type, "shape": list(t.shape), "offset": t.offset, "bytes": t.nbytes}
        for t in gguf.tensors
    ]
    return {"file": str(path), "metadata": _plain(gguf.metadata), "tensors": tensors}


def _plain(value: Any) -> Any:
    """`value` for JSON, which has neither infinities nor lone surrogates."""
    if isinstance(value, dict):
        return {_plain(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, str):
        return value.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
    return value


def _print(path: Path, gguf: _native.GgufFile, every: bool) -> None:
    from rich.table import Table

    tensors = gguf.tensors
    nbytes = sum(t.nbytes for t in tensors)
    weights = sum(math.prod(t.shape) for t in tensors)
    types = Counter[str]()
    for tensor in tensors:
        types[tensor.type] += tensor.nbytes
    console = terminal.console()
    bits = f", {8 * nbytes / weights:.2f} bits per weight" if weights else ""
    console.print(
        terminal.printable(
            f"{path}\n{weights:,} weights in {len(tensors)} tensors, {terminal.human_bytes(nbytes)}{bits}\n"
            + ", ".join(f"{name} {terminal.human_bytes(size)}" for name, size in types.most_common())
        ),
        soft_wrap=True,
    )

    table = Table(box=None, pad_edge=False, header_style="bold", expand=True)
    # Values may be cut, keys may not: they get the width that they need, at most half of 80 columns.
    table.add_column("key", overflow="fold", width=min(40, max(map(len, gguf.metadata), default=0)))
    table.add_column("value", overflow="ellipsis", no_wrap=True, ratio=1)
    for key, value in gguf.metadata.items():
        table.add_row(terminal.printable(key), _short(value))
    console.print()
    console.print(table)

    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("tensor", overflow="fold")
    table.add_column("type", no_wrap=True)
    table.add_column("shape", justify="right", no_wrap=True)
    table.add_column("size", justify="right", no_wrap=True)
    for name, kind, shape, size in _lines(tensors, every):
        table.add_row(terminal.printable(name), kind, " x ".join(map(str, shape)), terminal.human_bytes(size))
    console.print()
    console.print(table)


def _lines(tensors: list[_native.TensorInfo], every: bool) -> list[tuple[str, str, tuple[int, ...], int]]:
    """Name, type, shape and bytes per line. Tensors that differ only in the number of their layer share a line."""
    if every:
        return [(t.name, t.type, t.shape, t.nbytes) for t in tensors]
    groups: dict[tuple[str, str, tuple[int, ...]], list[_native.TensorInfo]] = {}
    for tensor in tensors:
        groups.setdefault((_LAYER.sub("*", tensor.name), tensor.type, tensor.shape), []).append(tensor)
    lines = []
    for (pattern, kind, shape), members in groups.items():
        name = members[0].name if len(members) == 1 else f"{pattern} ({len(members)} times)"
        lines.append((name, kind, shape, sum(t.nbytes for t in members)))
    return lines


def _short(value: Any) -> str:
    """A value on one line, shortened if it is long."""
    if isinstance(value, list):
        items = ", ".join(_short(item) for item in value[:_SHOWN_ITEMS])
        return f"[{items}, ...] ({len(value):,} items)" if len(value) > _SHOWN_ITEMS else f"[{items}]"
    if isinstance(value, str):
        return terminal.printable(value[:400].replace("\n", "\\n").replace("\t", "\\t"))
    if isinstance(value, float):
        return f"{value:.7g}"
    return str(value)
