"""Writes the man pages of the command line, from the parser that also prints its help: one page for each command.

python scripts/man_pages.py FOLDER   # writes FOLDER/man1/nybble.1, FOLDER/man1/nybble-run.1, ...

`man --manpath FOLDER nybble-run` shows a page. Packagers install the folder as share/man.
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import Any

import typer
from typer.main import get_command

from nybble import __version__, cli


def pages() -> dict[str, str]:
    """Returns the source of each page by its file name."""
    cli._add_commands([])
    program: Any = get_command(cli.app)
    with program.make_context("nybble", [], resilient_parsing=True) as context:
        found = {"nybble": _page(program, context, {name: command.help for name, command in program.commands.items()})}
        for name, command in program.commands.items():
            with command.make_context(name, [], parent=context, resilient_parsing=True) as own:
                found[f"nybble-{name}"] = _page(command, own, {})
    return {f"{name}.1": text for name, text in found.items()}


def _page(command: Any, context: typer.Context, commands: dict[str, str]) -> str:
    name = context.command_path.replace(" ", "-")
    first, *paragraphs = re.split(r"\n\s*\n", command.help.strip())
    usage = " ".join(command.collect_usage_pieces(context))
    lines = [
        f'.TH "{name.upper()}" "1" "" "nybble {__version__}" "nybble"',
        ".SH NAME",
        f"{_text(name)} \\- {_text(first.rstrip('.'))}",
        ".SH SYNOPSIS",
        f"\\fB{_text(context.command_path)}\\fR {_text(usage)}",
    ]
    if paragraphs:
        lines.append(".SH DESCRIPTION")
        lines.append("\n.PP\n".join(map(_text, paragraphs)))
    arguments = [part for part in command.params if part.param_type_name == "argument"]
    options = [part for part in command.get_params(context) if part.param_type_name == "option"]
    for title, parameters in (("ARGUMENTS", arguments), ("OPTIONS", options)):
        records = [record for part in parameters if (record := part.get_help_record(context))]
        lines += _table(title, dict(records))
    lines += _table("COMMANDS", {f"nybble {name}": text.split("\n")[0] for name, text in commands.items()})
    return "\n".join(lines) + "\n"


def _table(title: str, rows: dict[str, str]) -> list[str]:
    lines = [f".SH {title}"] if rows else []
    for term, text in rows.items():
        lines += [".TP", f"\\fB{_text(term)}\\fR", _text(text)]
    return lines


def _text(text: str) -> str:
    """Escapes text for troff: backslashes, hyphens that would become dashes, and lines that look like requests."""
    joined = " ".join(text.split())
    return re.sub(r"^([.'])", r"\\&\1", joined.replace("\\", "\\e").replace("-", "\\-"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="the folder in which the folder man1 is made")
    folder = parser.parse_args().folder / "man1"
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in pages().items():
        (folder / name).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
