"""`nybble help` and `nybble completion`: the help of a command, and scripts that complete commands in a shell."""

from __future__ import annotations

import os
from typing import Annotated, Literal

import typer

COMPLETE = "_NYBBLE_COMPLETE"
"""The environment variable with which the script of a shell asks for completions."""


def show_help(
    context: typer.Context,
    command: Annotated[
        str | None, typer.Argument(metavar="COMMAND", help="A command; all of them if not given.", show_default=False)
    ] = None,
) -> None:
    """Show the help of a command."""
    root = context.find_root()
    arguments = [] if command is None else [command]
    root.command.main([*arguments, "--help"], prog_name=root.info_name, standalone_mode=False)


def completion(
    shell: Annotated[Literal["bash", "zsh", "fish"], typer.Argument(metavar="SHELL", help="bash, zsh or fish.")],
) -> None:
    """Print the script with which a shell completes commands, options and models.

    bash: add eval "$(nybble completion bash)" to ~/.bashrc.

    zsh: add eval "$(nybble completion zsh)" to ~/.zshrc, after compinit.

    fish: nybble completion fish > ~/.config/fish/completions/nybble.fish
    """
    from typer.completion import get_completion_script  # type: ignore[attr-defined]

    typer.echo(get_completion_script(prog_name="nybble", complete_var=COMPLETE, shell=shell))


def words() -> list[str]:
    """Prepares the parser to answer a shell's request for completions. Returns the words after `nybble` in its line."""
    from typer.completion import completion_init  # type: ignore[attr-defined]

    completion_init()
    line = os.environ.get("COMP_WORDS") or os.environ.get("_TYPER_COMPLETE_ARGS", "")
    # The last word is still being typed, unless a space follows it.
    return line.split()[1 : None if line[-1:].isspace() else -1]


def models(incomplete: str) -> list[str]:
    """Completes the name of a model from those in the caches. Without one, the shell completes the names of files."""
    from nybble.models.cache import cached_models

    try:
        found = {model.source for model in cached_models() if model.source is not None}
    except OSError:
        return []
    return sorted(source for source in found if source.startswith(incomplete))
