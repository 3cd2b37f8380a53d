"""Generation: `request` prepares a request, `driver` computes it, `builder` assembles its completion."""

from nybble.completion import Completion, FinishReason, Timings, TokenLogprob, Usage
from nybble.generation.stream import TextStream

__all__ = ["Completion", "FinishReason", "TextStream", "Timings", "TokenLogprob", "Usage"]
