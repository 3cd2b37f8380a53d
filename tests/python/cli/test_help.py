"""Help, completion in shells, and colors of the command line."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from nybble.cli import _COMMANDS, guide, main, terminal

needs_pty = pytest.mark.skipif(sys.platform == "win32", reason="Windows has no pseudo-terminals of this kind")


def output(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """Runs the command in this process and returns what it printed."""
    assert main(list(arguments)) == 0
    out, err = capsys.readouterr()
    assert err == ""
    return out


def nybble(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "nybble", *arguments]
    return subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True, check=False)


def completions(line: str, **environment: str) -> list[str]:
    """Returns what the script of bash shows for a line that ends at the cursor."""
    words = line.split(" ")
    request = {guide.COMPLETE: "complete_bash", "COMP_WORDS": line, "COMP_CWORD": str(len(words) - 1)}
    done = nybble(**request, **environment)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout.split()


@pytest.fixture
def help_of(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[[str, int], str]:
    """The help of a command in a terminal with this number of columns."""

    def shown(command: str, columns: int) -> str:
        monkeypatch.setenv("COLUMNS", str(columns))
        return output(capsys, command, "--help")

    return shown


# --- Help


@pytest.mark.parametrize("command", _COMMANDS)
def test_help_of_a_command_equals_its_option(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert output(capsys, "help", command) == output(capsys, command, "--help")


def test_help_without_a_command_lists_all(capsys: pytest.CaptureFixture[str]) -> None:
    shown = output(capsys, "help")
    assert shown == output(capsys, "--help")
    assert all(f" {command} " in shown for command in _COMMANDS)
    assert "nybble help COMMAND" in shown


def test_help_of_an_unknown_command_is_wrong_usage(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["help", "frobnicate"]) == 2
    assert "No such command 'frobnicate'" in capsys.readouterr().err


@pytest.mark.parametrize("command", _COMMANDS)
def test_help_speaks_of_the_command_line_not_of_python(command: str, help_of: Callable[[str, int], str]) -> None:
    shown = help_of(command, 200)
    for word in ("None", "True", "False", "dict", "pydantic", "<str>  A constraint", "math.inf", "Mapping", "()"):
        assert word not in shown, word
    options = [line for line in shown.splitlines() if line.startswith("│ --")]
    assert options
    assert not [line for line in options if "<str>" in line or "<int" in line or "<float>" in line]


@pytest.mark.parametrize("command", _COMMANDS)
def test_lines_of_a_description_are_full(command: str, help_of: Callable[[str, int], str]) -> None:
    description = help_of(command, 80).partition("╭")[0].strip().splitlines()[1:]
    for line, following in itertools.pairwise(line.strip() for line in description):
        if line and following:
            assert len(f" {line} {following.split()[0]} ") > 80, line


@pytest.mark.parametrize("command", _COMMANDS)
def test_help_fits_into_80_columns(command: str, help_of: Callable[[str, int], str]) -> None:
    shown = help_of(command, 80)
    assert max(map(len, shown.splitlines())) <= 80
    assert "…" not in shown, "a word is longer than its column"


# --- Completion


def test_commands_options_and_choices_complete() -> None:
    assert completions("nybble ") == list(_COMMANDS)
    assert completions("nybble qu") == ["quantize"]
    assert completions("nybble run --max") == ["--max-tokens"]
    assert completions("nybble run --cache-type ") == ["f16", "int8", "f32"]
    assert completions("nybble serve --spec") == ["--speculation"]
    assert completions("nybble completion ") == ["bash", "zsh", "fish"]
    assert completions("nybble unknown --max") == []


def test_models_in_the_caches_complete(tmp_path: Path) -> None:
    file = tmp_path / "models--org--name" / "snapshots" / "1" / "model.gguf"
    file.parent.mkdir(parents=True)
    file.write_bytes(b"")
    assert completions("nybble chat ", HF_HUB_CACHE=str(tmp_path)) == ["org/name"]
    assert completions("nybble chat or", HF_HUB_CACHE=str(tmp_path)) == ["org/name"]
    assert completions("nybble chat x", HF_HUB_CACHE=str(tmp_path)) == [], "the shell completes files"


@pytest.mark.parametrize(
    ("shell", "part"), [("bash", "complete -o default -F"), ("zsh", "compdef"), ("fish", "complete")]
)
def test_a_script_for_each_shell_is_printed(shell: str, part: str, capsys: pytest.CaptureFixture[str]) -> None:
    script = output(capsys, "completion", shell)
    assert part in script
    assert f"{guide.COMPLETE}=complete_{shell}" in script


@pytest.mark.skipif(sys.platform == "win32", reason="needs bash")
def test_bash_completes_a_line_with_the_script(tmp_path: Path) -> None:
    command = tmp_path / "nybble"
    command.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m nybble "$@"\n')
    command.chmod(0o755)
    script = (
        'eval "$(nybble completion bash)"; COMP_WORDS=(nybble run --typ); COMP_CWORD=2\n'
        '_nybble_completion nybble; printf "%s\\n" "${COMPREPLY[@]}"'
    )
    environment = {**os.environ, "PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}"}
    done = subprocess.run(["bash", "-c", script], env=environment, capture_output=True, text=True, check=False)
    assert (done.stdout, done.stderr) == ("--typical-p\n", "")


def test_an_unknown_shell_is_wrong_usage(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["completion", "tcsh"]) == 2
    assert "tcsh" in capsys.readouterr().err


# --- Colors


def seen_on_a_terminal(*arguments: str, **environment: str) -> str:
    """Returns what a command writes to a pseudo-terminal."""
    import pty

    pid, fd = pty.fork()
    if pid == 0:
        os.environ.update({"TERM": "xterm-256color", **environment})
        os.execv(sys.executable, [sys.executable, "-m", "nybble", *arguments])
    seen = b""
    try:
        while piece := os.read(fd, 4096):
            seen += piece
    except OSError:  # Linux raises this at the end of the output.
        pass
    os.waitpid(pid, 0)
    os.close(fd)
    return seen.decode()


def colors(text: str) -> bool:
    """Whether a text sets a color of the foreground."""
    return any(f"\x1b[{style}3{color}m" in text for style in ("", "1;") for color in range(8))


@needs_pty
def test_no_color_turns_colors_off_unless_it_is_empty(tiny_file: Path) -> None:
    assert colors(seen_on_a_terminal("help", "run"))
    assert colors(seen_on_a_terminal("help", "run", NO_COLOR=""))
    assert not colors(seen_on_a_terminal("help", "run", NO_COLOR="1"))
    run = ("run", str(tiny_file), "abc", "--max-tokens", "2")
    assert "\x1b[2m" in seen_on_a_terminal(*run)
    assert "\x1b" not in seen_on_a_terminal(*run, NO_COLOR="1").partition("prompt:")[2]
    assert "\x1b" not in seen_on_a_terminal(*run, TERM="dumb").partition("prompt:")[2]


# --- Errors of files


def test_an_error_of_a_file_is_printed_without_its_number() -> None:
    error = FileNotFoundError(2, "No such file or directory", "model.gguf")
    assert terminal.explain(error) == "model.gguf: No such file or directory"
    assert terminal.explain(OSError("no address")) == "no address"
    assert terminal.explain(MemoryError()) == "MemoryError"
