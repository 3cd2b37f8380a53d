"""Messages and completions: the input and output of generation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

Message = Mapping[str, Any]
"""One turn of a conversation: `{"role": "user", "content": "Hello"}`."""

Prompt = str | Sequence[int]
"""A prompt: text or token ids."""

Prompts = list[str] | tuple[str, ...] | list[Prompt] | Sequence[Sequence[int]]
"""Several prompts. Not `Sequence[Prompt]`, because type checkers accept a string as one."""

FinishReason = Literal["stop", "length", "cancelled"]
"""Why a completion ended: see `Completion.finish_reason`."""


@dataclass(frozen=True)
class Usage:
    """Token counts of a completion."""

    prompt_tokens: int
    """Tokens of the prompt. For a session: of everything before the completion."""
    completion_tokens: int
    """Tokens of the completion, without the one that ended it."""
    cached_tokens: int = 0
    """Prompt tokens that were not computed, because their keys and values were in the session or the prefix cache."""

    @property
    def total_tokens(self) -> int:
        """Prompt and completion together."""
        return self.prompt_tokens + self.completion_tokens


@dataclass(frozen=True)
class Timings:
    """Durations in seconds, and rates. Sequences of one batch share their steps, so each reports the whole duration."""

    prompt_seconds: float
    """Time to the first token."""
    decode_seconds: float
    """Time from the first token to the last."""
    prompt_tokens_per_second: float
    """Prompt tokens computed per second. Cached tokens do not count."""
    decode_tokens_per_second: float
    """Tokens per second after the first token."""


@dataclass(frozen=True)
class TokenLogprob:
    """The log-probability of a token (natural logarithm) in the model's own distribution.

    Bias, penalties, filters and temperature do not affect it.
    """

    token: int
    text: str
    logprob: float
    top: tuple[tuple[int, str, float], ...] = ()
    """The most likely tokens at this position, most likely first: id, text, log-probability."""


@dataclass(frozen=True)
class Completion:
    """The output of a model for one prompt. `str(completion)` is its text."""

    text: str
    tokens: tuple[int, ...]
    """The token ids, without the one that ended the completion."""
    finish_reason: FinishReason
    """Why the completion ended.

    - `"stop"`: the model ended it, or a stop string did.
    - `"length"`: it reached `max_tokens` or the end of the context.
    - `"cancelled"`: the request was cancelled or its stream closed.
    """
    usage: Usage
    timings: Timings
    logprobs: tuple[TokenLogprob, ...] | None = None
    """One entry per token if `SamplingOptions.logprobs` was set."""
    reasoning: str = ""
    """What the model thought before the text, without its markers. Only results of `chat` have it apart."""

    reasoning_tokens: int = 0
    """Number of tokens that are reasoning or end it."""
    beam_score: float | None = None
    """The score of a beam search: the log-probability of the tokens divided by a power of their number; else None."""
    stop_string: str | None = None
    """The string of `SamplingOptions.stop` that ended the text."""

    def __str__(self) -> str:
        return self.text

    def _repr_html_(self) -> str:
        """The completion in a notebook."""
        from html import escape

        rate = self.timings.decode_tokens_per_second
        counts = f"{self.usage.prompt_tokens} + {self.usage.completion_tokens} tokens"
        speed = f", {rate:.1f} tokens/s" if rate else ""
        return (
            f'<div style="white-space: pre-wrap">{escape(self.text)}</div>'
            f'<div style="opacity: 0.6; font-size: 85%">{counts}{speed}, {escape(self.finish_reason)}</div>'
        )
