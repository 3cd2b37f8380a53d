"""Generates a short story with the default model and prints the speed, for `make demo`."""

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
"""Results are bit-identical everywhere, so this seed always gives the same story."""


def main() -> int:
    """Loads the model and generates the story. Returns the exit code."""
    console = Console(highlight=False)
    began = time.perf_counter()
    with Model.load() as model:
        seconds = time.perf_counter() - began
        info = model.info
        console.print(f"{info.file.name} loaded in {seconds:.1f} s: {info.kernel} kernels, {info.threads} threads")
        console.print(f"\n> {PROMPT}\n", style="bold", soft_wrap=True)
        stream = model.chat([{"role": "user", "content": PROMPT}], OPTIONS, stream=True)
        try:
            show(console, stream)
        except KeyboardInterrupt:
            return 130
    return 0


def show(console: Console, stream: TextStream) -> None:
    """Prints the story as it is generated. A terminal shows the speed below it, other outputs at the end."""
    if not console.is_terminal:
        for piece in stream:
            sys.stdout.write(piece)
            sys.stdout.flush()
        console.print("\n\n" + speed(stream))
        return
    # Finished paragraphs scroll away; only the current one is redrawn.
    paragraph = ""
    with Live(console=console, refresh_per_second=10) as live:
        for piece in stream:
            *whole, paragraph = (paragraph + piece).split("\n")
            for text in whole:
                live.console.print(Text(text))
            live.update(Group(Text(paragraph), Text(), Text(speed(stream), style="green")))


def speed(stream: TextStream) -> str:
    """Formats the number of tokens so far and tokens per second."""
    done = stream.completion
    rates = done.timings
    return (
        f"{done.usage.completion_tokens} tokens, {rates.decode_tokens_per_second:.0f} tokens/s "
        f"(prompt: {done.usage.prompt_tokens} tokens, {rates.prompt_tokens_per_second:.0f} tokens/s)"
    )


if __name__ == "__main__":
    sys.exit(main())
