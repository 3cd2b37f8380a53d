"""`nybble convert`: any checkpoint to one GGUF file."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from nybble.cli import terminal


class BlockType(str, Enum):
    """What matrices can be stored as."""

    F32 = "f32"
    F16 = "f16"
    BF16 = "bf16"
    Q8_0 = "q8_0"
    Q4_0 = "q4_0"
    Q4_1 = "q4_1"


def convert(
    source: Annotated[
        str, typer.Argument(metavar="SOURCE", help="A folder with safetensors, a GGUF file or a Hub repository.")
    ],
    out: Annotated[Path, typer.Argument(metavar="OUT.gguf", help="The file to write.", dir_okay=False)],
    block_type: Annotated[
        BlockType,
        typer.Option(
            "--type",
            help="What matrices are stored as. With q4_0 and q4_1 embedding and output become q8_0; norms and other "
            "vectors stay f32.",
        ),
    ] = BlockType.F16,
    force: Annotated[bool, typer.Option("--force", help="Overwrite OUT.gguf if it exists.")] = False,
) -> None:
    """Write a model as a GGUF file, with tokenizer, chat template and all keys."""
    from nybble import _native
    from nybble.models import hub
    from nybble.progress import bar

    terminal.show_log()
    if out.exists() and not force:
        raise FileExistsError(f"{out}: exists already (--force overwrites it)")
    path = hub.resolve(source)
    with bar(f"writing {out.name}") as progress:
        _native.convert(path, out, block_type.value, progress)
    typer.echo(f"{out}: {terminal.human_bytes(out.stat().st_size)}")
