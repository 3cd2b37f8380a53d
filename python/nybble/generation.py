"""The loop of generation: one native step a token, text as it becomes whole, reasons to stop."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from nybble import memory
from nybble.constraint import constraint
from nybble.errors import ContextFullError
from nybble.sampling import SamplingOptions
from nybble.tokenizer.detokenizer import StopMatcher, StreamDecoder

if TYPE_CHECKING:
    from nybble import _native
    from nybble.tokenizer.tokenizer import Tokenizer

FinishReason = Literal["stop", "length", "cancelled"]

# Texts that `generate` works on at a time, and tokens of prompts in a step: nobody waits for a piece of text here.
_BATCH = 16
_CHUNK = 512


@dataclass(frozen=True)
class Usage:
    """Tokens read and written. What a session had seen before is not read again, and does not count."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int = 0
    """Tokens of the prompt that were not computed, since an earlier text had begun alike."""

    @property
    def total_tokens(self) -> int:
        """Prompt and completion together."""
        return self.prompt_tokens + self.completion_tokens


@dataclass(frozen=True)
class Timings:
    """Where the time went, in seconds. Sequences of one batch share their steps, so each reports the whole time."""

    prompt_seconds: float
    decode_seconds: float
    prompt_tokens_per_second: float
    decode_tokens_per_second: float


@dataclass(frozen=True)
class TokenLogprob:
    """How likely a token was, as the model says: before penalties, cuts and temperature."""

    token: int
    text: str
    logprob: float
    top: tuple[tuple[int, str, float], ...] = ()
    """The likeliest tokens at this place, likeliest first: id, text, log-probability."""


@dataclass(frozen=True)
class Completion:
    """What a model wrote. `str(completion)` is the text."""

    text: str
    tokens: tuple[int, ...]
    """The ids that were written, without the one that ended the text."""
    finish_reason: FinishReason
    """"stop": the model or a stop string ended the text. "length": `max_tokens` or the context did.
    "cancelled": the request to an engine was called off."""
    usage: Usage
    timings: Timings
    logprobs: tuple[TokenLogprob, ...] | None = None

    def __str__(self) -> str:
        return self.text


class Writer:
    """One sequence on its way to text: the native state, and what has been written so far."""

    def __init__(
        self,
        model: _native.Model,
        tokenizer: Tokenizer,
        prompt: Sequence[int],
        options: SamplingOptions,
        context: int,
        *,
        session: _native.Session | None = None,
    ) -> None:
        if len(prompt) > context:
            raise ContextFullError(0, len(prompt), context)
        if options.seed is None:
            options = options.replace(seed=int.from_bytes(os.urandom(8), "little"))
        held = constraint(tokenizer, options)
        # A session has seen a beginning of the prompt, and the last token is read in any case.
        self.cached_tokens = 0 if session is None else min(len(session), len(prompt) - 1)
        if session is None:
            self.sequence = model.sequence(prompt, options, held)
        else:
            self.sequence = session.resume(model, prompt, options, held)
        # The last token needs no place of its own: it is written, but never fed.
        room = context - len(prompt) + 1
        self.limit = room if options.max_tokens is None else min(room, options.max_tokens)
        self.prompt_tokens = len(prompt)
        self._tokenizer = tokenizer
        self._decoder = StreamDecoder(tokenizer, after=prompt)
        self._stops = StopMatcher(options.stop)
        self._pieces: list[str] = []
        self._tokens: list[int] = []
        self._logprobs: list[TokenLogprob] | None = None if options.logprobs is None else []
        self._began = self._first = self._last = time.perf_counter()
        self.finish_reason: FinishReason | None = "length" if self.limit == 0 else None

    def push(self, sampled: _native.Sampled) -> str:
        """Takes the token of a step and returns the text that has become whole by it, which is often none."""
        self._last = time.perf_counter()
        if not self._tokens:
            self._first = self._last
        if sampled.id in self._tokenizer.eos_ids:
            self.finish_reason = "stop"
            return self._keep(self._rest())
        self._tokens.append(sampled.id)
        if self._logprobs is not None and sampled.logprob is not None:
            self._logprobs.append(self._explain(sampled.id, sampled.logprob, sampled.top))
        text, hit = self._stops.push(self._decoder.push(sampled.id))
        if hit:
            self.finish_reason = "stop"
        elif len(self._tokens) >= self.limit:
            self.finish_reason = "length"
            text += self._rest()
        return self._keep(text)

    @property
    def tokens(self) -> Sequence[int]:
        """The ids written so far, without the one that ended the text."""
        return self._tokens

    def completion(self) -> Completion:
        """Everything so far."""
        written = len(self._tokens)
        prompt_seconds, decode_seconds = self._first - self._began, self._last - self._first
        return Completion(
            text="".join(self._pieces),
            tokens=tuple(self._tokens),
            finish_reason=self.finish_reason or "length",
            usage=Usage(self.prompt_tokens, written, self.cached_tokens),
            timings=Timings(
                prompt_seconds=prompt_seconds,
                decode_seconds=decode_seconds,
                prompt_tokens_per_second=_rate(self.prompt_tokens - self.cached_tokens, prompt_seconds),
                decode_tokens_per_second=_rate(written - 1, decode_seconds),
            ),
            logprobs=None if self._logprobs is None else tuple(self._logprobs),
        )

    def since(self, count: int) -> tuple[tuple[int, ...], tuple[TokenLogprob, ...] | None]:
        """The tokens after the first `count`, with their log-probabilities if asked for."""
        return tuple(self._tokens[count:]), None if self._logprobs is None else tuple(self._logprobs[count:])

    def _rest(self) -> str:
        """What waited for more bytes of a character or more letters of a stop string, now that nothing more comes."""
        text, hit = self._stops.push(self._decoder.finish())
        if hit:
            self.finish_reason = "stop"
            return text
        return text + self._stops.finish()

    def _keep(self, text: str) -> str:
        if text:
            self._pieces.append(text)
        return text

    def _explain(self, token: int, logprob: float, top: Sequence[tuple[int, float]]) -> TokenLogprob:
        decode = self._tokenizer.decode
        return TokenLogprob(token, decode([token]), logprob, tuple((other, decode([other]), p) for other, p in top))


def _rate(count: int, seconds: float) -> float:
    return count / seconds if count > 0 and seconds > 0 else 0.0


def run(model: _native.Model, writers: Sequence[Writer]) -> None:
    """Writes all texts, some at a time, until each has finished."""
    from nybble import _native

    cache_bytes = memory.for_caches(model)
    scheduler = _native.Scheduler(model, max_batch=_BATCH, prefill_chunk=_CHUNK, cache_bytes=cache_bytes)
    active = {
        scheduler.submit(writer.sequence, writer.limit): writer for writer in writers if writer.finish_reason is None
    }
    while active:
        for number, outcome, cached in scheduler.step(signals=True):
            if (writer := active.get(number)) is None:
                continue  # Several tokens came at once, and an earlier one ended the text.
            if isinstance(outcome, BaseException):
                raise outcome
            writer.cached_tokens = cached
            writer.push(outcome)
            if writer.finish_reason is not None:
                scheduler.cancel(number)
                del active[number]


class TextStream(Iterator[str]):
    """The pieces of a text as they are written. `completion` tells the rest: reason to stop, usage, timings."""

    def __init__(self, model: _native.Model, writer: Writer) -> None:
        self._model = model
        self._writer = writer

    def __next__(self) -> str:
        writer = self._writer
        while writer.finish_reason is None:
            (sampled,) = self._model.step([writer.sequence])
            if text := writer.push(sampled):
                return text
        raise StopIteration

    @property
    def completion(self) -> Completion:
        """What has been written so far; whole once the stream has ended."""
        return self._writer.completion()
