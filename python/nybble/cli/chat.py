"""`nybble chat`: a conversation on the terminal, or one message per line from a pipe."""

from __future__ import annotations

import contextlib
import sys
from typing import TYPE_CHECKING, Annotated

import typer

from nybble.cli import terminal
from nybble.cli.options import (
    AdapterOption,
    EffortOption,
    ModelArgument,
    ThinkOption,
    load_model,
    takes_options,
)
from nybble.load_options import LoadOptions
from nybble.sampling import SamplingOptions

if TYPE_CHECKING:
    from nybble.model import Message, Model

_HELP = "/clear starts a new conversation, /exit or Ctrl-D leaves, Ctrl-C stops an answer"


@takes_options
def chat(
    load: LoadOptions,
    sampling: SamplingOptions,
    source: ModelArgument = None,
    adapter: AdapterOption = None,
    system: Annotated[str | None, typer.Option("--system", help="System prompt.", metavar="TEXT")] = None,
    think: ThinkOption = None,
    reasoning_effort: EffortOption = None,
) -> None:
    """Chat with a model.

    Without MODEL, it uses the default model, which is downloaded on first use. What the model thinks before its answer
    is dim on a terminal; a pipe receives the answer alone.
    """
    choice = think, reasoning_effort
    opening: list[Message] = [{"role": "system", "content": system}] if system else []
    messages = list(opening)
    is_terminal = sys.stdin.isatty()
    with load_model(source, load, adapter) as model:
        if is_terminal:
            with contextlib.suppress(ImportError):
                import readline  # noqa: F401  # Gives input() line editing and history.
            terminal.note(f"{model.info.name or model.info.file.name}\n{_HELP}")
        while True:
            try:
                text = (input("> ") if is_terminal else input()).strip()
            except EOFError:
                if is_terminal:
                    terminal.write("\n")
                return
            except KeyboardInterrupt:
                if not is_terminal:
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
                messages = _turn(model, messages, text, sampling, choice)


def _turn(
    model: Model,
    messages: list[Message],
    text: str,
    sampling: SamplingOptions,
    choice: tuple[bool | None, str | None],
) -> list[Message]:
    """Streams the answer to a message. Returns the conversation with both, or unchanged if there was no answer."""
    from nybble.errors import ContextFullError

    extended: list[Message] = [*messages, {"role": "user", "content": text}]
    try:
        think, effort = choice
        stream = model.chat(extended, sampling, stream=True, enable_thinking=think, reasoning_effort=effort)
    except ContextFullError as error:
        terminal.complain(f"{error}; /clear starts a new conversation")
        return messages
    try:
        terminal.write_parts(stream.parts())
        stopped = ""
    except KeyboardInterrupt:
        stopped = " [stopped]"
    done = stream.completion
    terminal.write(f"{stopped}\n")
    if sys.stderr.isatty() and done.usage.completion_tokens > 1:
        terminal.note(f"{done.usage.completion_tokens} tokens, {done.timings.decode_tokens_per_second:.1f} tokens/s")
    if not done.text:
        return messages
    answer = {"role": "assistant", "content": done.text}
    return [*extended, {**answer, "reasoning_content": done.reasoning} if done.reasoning else answer]
