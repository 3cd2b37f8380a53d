"""`nybble chat`: a conversation at the terminal, or one message a line from a pipe."""

from __future__ import annotations

import contextlib
import sys
from typing import TYPE_CHECKING, Annotated

import typer

from nybble.cli import terminal
from nybble.cli.options import LoadOptions, takes_options
from nybble.sampling import SamplingOptions

if TYPE_CHECKING:
    from nybble.model import Message, Model

_HELP = "/clear forgets the conversation, /exit or Ctrl-D leaves, Ctrl-C stops an answer"


@takes_options
def chat(
    load: LoadOptions,
    sampling: SamplingOptions,
    source: Annotated[
        str | None,
        typer.Argument(metavar="MODEL", help="A GGUF file, a folder or a Hub repository.", show_default=False),
    ] = None,
    system: Annotated[
        str | None, typer.Option("--system", help="What the model is told before the conversation.")
    ] = None,
) -> None:
    """Talk with a model.

    Without MODEL, the default model is used and fetched if needed.
    """
    opening: list[Message] = [{"role": "system", "content": system}] if system else []
    messages = list(opening)
    at_terminal = sys.stdin.isatty()
    with load.load(source) as model:
        if at_terminal:
            with contextlib.suppress(ImportError):
                import readline  # noqa: F401  # Gives input() its line editing and history.
            terminal.note(f"{model.info.name or model.info.file.name}\n{_HELP}")
        while True:
            try:
                text = (input("> ") if at_terminal else input()).strip()
            except EOFError:
                if at_terminal:
                    terminal.write("\n")
                return
            except KeyboardInterrupt:
                if not at_terminal:
                    raise
                terminal.write("\n")
                terminal.note(_HELP)
                continue
            if text in ("/exit", "/quit"):
                return
            if text == "/clear":
                messages = list(opening)
            elif text in ("/help", "/?"):
                terminal.note(_HELP)
            elif text:
                messages = _turn(model, messages, text, sampling)


def _turn(model: Model, messages: list[Message], text: str, sampling: SamplingOptions) -> list[Message]:
    """Asks, streams the answer, and returns the conversation with both; without them where nothing was answered."""
    from nybble.errors import ContextFullError

    asked: list[Message] = [*messages, {"role": "user", "content": text}]
    try:
        stream = model.chat(asked, sampling, stream=True)
    except ContextFullError as error:
        terminal.complain(f"{error}; /clear starts a new conversation")
        return messages
    try:
        for piece in stream:
            terminal.write(piece)
        stopped = ""
    except KeyboardInterrupt:
        stopped = " [stopped]"
    done = stream.completion
    terminal.write(f"{stopped}\n")
    if sys.stderr.isatty() and done.usage.completion_tokens > 1:
        terminal.note(f"{done.usage.completion_tokens} tokens, {done.timings.decode_tokens_per_second:.1f} a second")
    if not done.text:
        return messages
    return [*asked, {"role": "assistant", "content": done.text}]
