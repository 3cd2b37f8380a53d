"""`nybble convert`: writes a checkpoint as one GGUF file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from nybble.cli import terminal


def convert(
    source: Annotated[
        str, typer.Argument(metavar="SOURCE", help="A folder with safetensors, a GGUF file or a Hub repository.")
    ],
    out: Annotated[Path, typer.Argument(metavar="OUT.gguf", help="The file to write.", dir_okay=False)],
    block_type: Annotated[
        Literal["f32", "f16", "bf16", "q8_0", "q4_0", "q4_1"],
        typer.Option(
            "--type",
            help="Type of the matrices: f32, f16, bf16, q8_0, q4_0 or q4_1. With q4_0 and q4_1, embedding and output "
            "become q8_0. Norms and other vectors stay f32.",
            metavar="TYPE",
        ),
    ] = "f16",
    adapter: Annotated[
        Path | None,
        typer.Option(
            "--adapter",
            help="LoRA adapter to merge before the matrices are stored: a folder that PEFT has saved, or a GGUF file.",
            metavar="PATH",
        ),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Overwrite OUT.gguf if it exists.")] = False,
) -> None:
    """Convert a model to a GGUF file, with tokenizer and chat template."""
    from nybble import _native
    from nybble.models import hub
    from nybble.progress import bar

    terminal.show_log()
    if out.exists() and not force:
        raise FileExistsError(f"{out}: already exists; --force overwrites it")
    path = hub.resolve(source)
    _native.check_output(out, [path] if adapter is None else [path, adapter])
    with bar(f"writing {out.name}") as progress:
        notes = _native.convert(path, out, block_type, progress, adapter)
    for note in notes:
        terminal.note(f"nybble: {adapter}: {note}")
    typer.echo(f"{out}: {terminal.human_bytes(out.stat().st_size)}")
