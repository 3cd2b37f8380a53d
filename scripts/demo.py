"""`make demo`: the default model writes a short story, and the line below it tells how fast."""

from __future__ import annotations

import sys
import time

from rich.console import Console, Group
from rich.live import Live
from rich.text import Text

from nybble import Model, SamplingOptions
from nybble.generation import TextStream

PROMPT = "Write a short story of about 150 words about an old lighthouse keeper who finds a message in a bottle."
OPTIONS = SamplingOptions(max_tokens=320, temperature=0.6, repetition_penalty=1.1, seed=4)
"""The bits are the same everywhere, so this seed's story is, too."""


def main() -> int:
    """Loads, writes, reports. Returns the exit code."""
    console = Console(highlight=False)
    began = time.perf_counter()
    with Model.load() as model:
        seconds = time.perf_counter() - began
        info = model.info
        console.print(f"{info.file.name} is ready after {seconds:.1f} s: {info.kernel} kernels, {info.threads} threads")
        console.print(f"\n> {PROMPT}\n", style="bold", soft_wrap=True)
        stream = model.chat([{"role": "user", "content": PROMPT}], OPTIONS, stream=True)
        try:
            show(console, stream)
        except KeyboardInterrupt:
            return 130
    return 0


def show(console: Console, stream: TextStream) -> None:
    """Prints the text while it is written. On a terminal the speed stands below it all the time, else at the end."""
    if not console.is_terminal:
        for piece in stream:
            sys.stdout.write(piece)
            sys.stdout.flush()
        console.print("\n\n" + speed(stream))
        return
    # Whole paragraphs scroll away above; what is drawn again and again is only the one in writing.
    paragraph = ""
    with Live(console=console, refresh_per_second=10) as live:
        for piece in stream:
            *whole, paragraph = (paragraph + piece).split("\n")
            for text in whole:
                live.console.print(Text(text))
            live.update(Group(Text(paragraph), Text(), Text(speed(stream), style="green")))


def speed(stream: TextStream) -> str:
    """Tokens so far and tokens a second, for a person."""
    done = stream.completion
    rates = done.timings
    return (
        f"{done.usage.completion_tokens} tokens, {rates.decode_tokens_per_second:.0f} tokens/s "
        f"(prompt: {done.usage.prompt_tokens} tokens, {rates.prompt_tokens_per_second:.0f} tokens/s)"
    )


if __name__ == "__main__":
    sys.exit(main())
