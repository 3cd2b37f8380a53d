"""`nybble run`: answers or continues one prompt."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from nybble.cli import terminal
from nybble.cli.options import AdapterOption, EffortOption, ThinkOption, load_model, takes_options
from nybble.load_options import LoadOptions
from nybble.sampling import SamplingOptions


@takes_options
def run(
    arguments: Annotated[
        list[str],
        typer.Argument(
            metavar="PROMPT",
            help="The prompt, or - for standard input. An optional MODEL precedes it: a GGUF file, a folder or a Hub "
            "repository.",
            show_default=False,
        ),
    ],
    load: LoadOptions,
    sampling: SamplingOptions,
    raw: Annotated[bool, typer.Option("--raw", help="Continue the prompt without the chat template.")] = False,
    adapter: AdapterOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the completion as one JSON object.")] = False,
    think: ThinkOption = None,
    reasoning_effort: EffortOption = None,
) -> None:
    """Answer a prompt.

    With --raw, or if the model has no chat template, continue it. What the model thinks before its answer is dim on a
    terminal; a pipe receives the answer alone.

    Without MODEL, it uses the default model, which is downloaded on first use.
    """
    if len(arguments) > 2:
        raise typer.BadParameter("found more arguments than [MODEL] PROMPT; a prompt of several words needs quotes")
    source, prompt = (None, arguments[0]) if len(arguments) == 1 else arguments
    if source is None and prompt.lower().endswith(".gguf") and Path(prompt).is_file():
        raise typer.BadParameter("PROMPT is missing; found only a model")
    if prompt == "-":
        prompt = sys.stdin.read()

    with load_model(source, load, adapter) as model:
        stream = (
            model.stream(prompt, sampling)
            if raw or not model.tokenizer.has_chat_template
            else model.chat(
                [{"role": "user", "content": prompt}],
                sampling,
                stream=True,
                enable_thinking=think,
                reasoning_effort=reasoning_effort,
            )
        )
        if as_json:
            for _ in stream:
                pass
        else:
            terminal.write_parts(stream.parts())
        done = stream.completion
    if as_json:
        typer.echo(json.dumps(dataclasses.asdict(done)))
        return
    terminal.write("\n")
    if sys.stderr.isatty():
        timings = done.timings
        terminal.note(
            f"prompt: {done.usage.prompt_tokens} tokens, {timings.prompt_tokens_per_second:.0f} tokens/s; "
            f"completion: {done.usage.completion_tokens} tokens, {timings.decode_tokens_per_second:.1f} tokens/s "
            f"({done.finish_reason})"
        )
