"""The command `nybble`.

Each command's module imports what it needs when it runs: the first token of `nybble run` should not wait for a table
library.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import Annotated

import typer

from nybble.cli.bench import bench
from nybble.cli.chat import chat
from nybble.cli.convert import convert
from nybble.cli.eval import evaluate
from nybble.cli.inspect import inspect
from nybble.cli.models import models
from nybble.cli.quantize import quantize
from nybble.cli.run import run

app = typer.Typer(
    name="nybble",
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
# Two positions of which the first may be missing are one list to the parser, so the usage line is told what they are.
app.command(options_metavar="[OPTIONS] [MODEL]")(run)
for command in (chat, inspect, convert, quantize, bench, models):
    app.command()(command)
app.command("eval")(evaluate)


@app.callback(invoke_without_command=True)
def nybble(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version and stop.")] = False,
) -> None:
    """Run language models on ordinary CPUs from 4-bit weights."""
    if version:
        from nybble._native import __version__

        typer.echo(f"nybble {__version__}")
    elif context.invoked_subcommand is None:
        typer.echo(context.get_help())


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line. Returns the exit code: 0, 1 (failed) or 2 (misused)."""
    from nybble.cli.terminal import complain

    try:
        code = app(None if arguments is None else list(arguments), prog_name="nybble", standalone_mode=False)
        sys.stdout.flush()
        return code if isinstance(code, int) else 0
    except (KeyboardInterrupt, typer.Abort):
        return 130  # What a shell reports for a program that SIGINT ended.
    except BrokenPipeError:
        # The reader has left, for example `nybble inspect | head`. Python must not try to flush again at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (OSError, ValueError, MemoryError) as error:
        complain(str(error) or type(error).__name__)
        return 1
    except Exception as error:
        # Misuse. The class of the parser's own errors has moved between versions, their two attributes have not.
        if not hasattr(error, "format_message") or not hasattr(error, "exit_code"):
            raise
        complain(f"{error.format_message()} (try: nybble --help)")
        return int(error.exit_code)
