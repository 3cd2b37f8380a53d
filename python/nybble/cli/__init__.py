"""The command line `nybble`.

The module of each command imports its dependencies when the command runs, so that the first token of `nybble run` does
not wait for a table library.
"""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Sequence
from importlib import import_module
from inspect import cleandoc
from typing import Annotated

import typer

from nybble.cli import guide
from nybble.cli.ending import Ended, ending_signals

_COMMANDS = {
    "run": "run",
    "chat": "chat",
    "serve": "serve",
    "inspect": "inspect",
    "convert": "convert",
    "quantize": "quantize",
    "eval": "evaluate",
    "bench": "bench",
    "models": "models",
    "completion": "guide:completion",
    "help": "guide:show_help",
}
"""The commands in the order of the help, with their functions. Their module has their name if no other is given."""

app: typer.Typer = typer.Typer(
    name="nybble",
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="nybble help COMMAND lists the arguments and options of a command.",
)


def _add_commands(arguments: Sequence[str]) -> None:
    """Adds the command that `arguments` begin with, or else all. Generating the options of all takes a while."""
    app.registered_commands.clear()
    # The version needs none, but the parser wants one.
    first = "help" if list(arguments) == ["--version"] else arguments[0] if arguments else ""
    for name in [first] if first in _COMMANDS else _COMMANDS:
        module, _, function_name = _COMMANDS[name].rpartition(":")
        function = getattr(import_module(f"nybble.cli.{module or name}"), function_name)
        # The parser sees [MODEL] PROMPT as one list, so the usage line has to name both.
        metavar = "[OPTIONS] [MODEL]" if name == "run" else "[OPTIONS]"
        app.command(name, help=_unwrapped(function.__doc__ or ""), options_metavar=metavar)(function)


def _unwrapped(docstring: str) -> str:
    """The paragraphs of a docstring, each on one line: the parser keeps the line breaks of all but the first."""
    return "\n\n".join(" ".join(paragraph.split()) for paragraph in cleandoc(docstring).split("\n\n"))


@app.callback(invoke_without_command=True)
def nybble(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Show the version and exit.")] = False,
) -> None:
    """Run language models on ordinary CPUs from 4-bit weights."""
    if version:
        from nybble._native import __version__

        typer.echo(f"nybble {__version__}")
    elif context.invoked_subcommand is None:
        typer.echo(context.get_help())


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line.

    Args:
        arguments: The arguments; those of the process if None.

    Returns:
        The exit code: 0, 1 (failure), 2 (wrong usage), 130 (interrupted), or 128 plus the number of the signal that
        ended the command.
    """
    from nybble.cli.terminal import open_standard_streams

    open_standard_streams()
    with ending_signals():
        return _run(sys.argv[1:] if arguments is None else list(arguments))


def _run(arguments: list[str]) -> int:
    from nybble.cli.terminal import complain, explain, replace_unencodable, show_warnings

    try:
        replace_unencodable()
        if guide.COMPLETE in os.environ:
            _add_commands(guide.words())
        else:
            # `nybble help` shows any of them.
            _add_commands([] if arguments[:1] == ["help"] else arguments)
        with warnings.catch_warnings():
            show_warnings()
            code = app(arguments, prog_name="nybble", standalone_mode=False)
        sys.stdout.flush()
        return code if isinstance(code, int) else 0
    except Ended as ended:
        return int(ended.code or 0)
    except (KeyboardInterrupt, typer.Abort):
        return 130  # The exit code that a shell reports after SIGINT.
    except BrokenPipeError:
        # The reader of the pipe has ended, as in `nybble inspect | head`. Python must not flush again at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (OSError, ValueError, MemoryError) as error:
        complain(explain(error))
        return 1
    except RuntimeError as error:
        if "start new thread" not in str(error):
            raise
        complain("the system refuses to start another thread: the limit of processes (ulimit -u, pids.max) is reached")
        return 1
    except Exception as error:
        # Wrong usage. The class of the parser's errors has moved between versions, these two attributes have not.
        if not hasattr(error, "format_message") or not hasattr(error, "exit_code"):
            raise
        context = getattr(error, "ctx", None)
        complain(f"{error.format_message()} (try: {context.command_path if context else 'nybble'} --help)")
        return int(error.exit_code)
