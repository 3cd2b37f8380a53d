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
            help="The text to answer, or - for standard input. A MODEL may stand before it: a GGUF file, a folder or "
            "a Hub repository.",
            show_default=False,
        ),
    ],
    load: LoadOptions,
    sampling: SamplingOptions,
    raw: Annotated[
        bool, typer.Option("--raw", help="Continue the prompt as it is, even where the model can chat.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object when done.")] = False,
) -> None:
    """Answer a prompt; or continue it, with --raw and where the model has no chat template.

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
            model.stream(prompt, sampling)
            if raw or not model.tokenizer.has_chat_template
            else model.chat([{"role": "user", "content": prompt}], sampling, stream=True)
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
