"""`nybble run`: one prompt, one text."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from nybble.cli import terminal
from nybble.cli.options import LoadOptions, takes_options
from nybble.sampling import SamplingOptions


@takes_options
def run(
    arguments: Annotated[
        list[str],
        typer.Argument(
            metavar="PROMPT",
            help="The text to continue, or - for standard input. A MODEL may stand before it: a GGUF file, a folder or "
            "a Hub repository.",
            show_default=False,
        ),
    ],
    load: LoadOptions,
    sampling: SamplingOptions,
    chat: Annotated[
        bool, typer.Option("--chat", help="Send the prompt as a message instead of continuing it.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object when done.")] = False,
) -> None:
    """Continue a text, or answer it with --chat.

    Without MODEL, the default model is used and fetched if needed.
    """
    if len(arguments) > 2:
        raise typer.BadParameter("more than [MODEL] PROMPT was given; a prompt of several words needs quotes")
    source, prompt = (None, arguments[0]) if len(arguments) == 1 else arguments
    if source is None and prompt.lower().endswith(".gguf") and Path(prompt).is_file():
        raise typer.BadParameter("PROMPT is missing: only a model was given")
    if prompt == "-":
        prompt = sys.stdin.read()

    with load.load(source) as model:
        stream = (
            model.chat([{"role": "user", "content": prompt}], sampling, stream=True)
            if chat
            else model.stream(prompt, sampling)
        )
        for piece in stream:
            if not as_json:
                terminal.write(piece)
        done = stream.completion
    if as_json:
        typer.echo(json.dumps(dataclasses.asdict(done)))
        return
    terminal.write("\n")
    if sys.stderr.isatty():
        timings = done.timings
        terminal.note(
            f"{done.usage.prompt_tokens} tokens read at {timings.prompt_tokens_per_second:.0f} a second, "
            f"{done.usage.completion_tokens} written at {timings.decode_tokens_per_second:.1f} a second "
            f"({done.finish_reason})"
        )
