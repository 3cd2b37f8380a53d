"""Builds a completion from sampled tokens: text, stop strings, log-probabilities, timings."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from nybble.completion import Completion, FinishReason, Timings, TokenLogprob, Usage
from nybble.tokenizer.detokenizer import SpecialStops, StopMatcher, StreamDecoder

if TYPE_CHECKING:
    from nybble import _native
    from nybble.generation.request import PreparedRequest


class CompletionBuilder:
    """Assembles the completion of one request from its tokens."""

    def __init__(self, request: PreparedRequest) -> None:
        self.prompt_tokens: int = len(request.prompt)
        self.cached_tokens: int = request.cached_tokens
        self.finish_reason: FinishReason | None = "length" if request.limit == 0 else None
        """Why the completion has ended; None before that."""
        self.error: Exception | None = None
        """The error that ended it."""
        self._limit = request.limit
        self._min_tokens = request.options.min_tokens
        self._tokenizer = request.tokenizer
        self._decoder = StreamDecoder(request.tokenizer, after=request.prompt)
        self._special_stops = SpecialStops(request.tokenizer, request.options.stop or ())
        self._stops = StopMatcher(self._special_stops.stops)
        self._end_ids = request.tokenizer.eos_ids.union(request.options.stop_token_ids)
        self._pieces: list[str] = []
        self._tokens: list[int] = []
        self._logprobs: list[TokenLogprob] | None = None if request.options.logprobs is None else []
        self._began = self._first = self._last = time.perf_counter()

    @property
    def tokens(self) -> Sequence[int]:
        """The token ids so far, without the one that ended the completion."""
        return self._tokens

    def push(self, sampled: _native.Sampled) -> str:
        """Appends a token. Returns the text that is final now, which may be empty."""
        self._last = time.perf_counter()
        if not self._tokens:
            self._first = self._last
        if sampled.id in self._end_ids:
            self.finish_reason = "stop"
            return self._keep(self._rest())
        self._tokens.append(sampled.id)
        if self._logprobs is not None and sampled.logprob is not None:
            self._logprobs.append(self._explain(sampled.id, sampled.logprob, sampled.top))
        text, hit = self._decoder.push(sampled.id), False
        if len(self._tokens) > self._min_tokens:
            text, hit = self._stops.push(text + self._special_stops.of(sampled.id))
        if hit:
            self.finish_reason = "stop"
        elif len(self._tokens) >= self._limit:
            self.finish_reason = "length"
            text += self._rest()
        return self._keep(text)

    def completion(self) -> Completion:
        """Returns the completion so far."""
        count = len(self._tokens)
        prompt_seconds, decode_seconds = self._first - self._began, self._last - self._first
        return Completion(
            text="".join(self._pieces),
            tokens=tuple(self._tokens),
            finish_reason=self.finish_reason or "length",
            usage=Usage(self.prompt_tokens, count, self.cached_tokens),
            timings=Timings(
                prompt_seconds=prompt_seconds,
                decode_seconds=decode_seconds,
                prompt_tokens_per_second=_rate(self.prompt_tokens - self.cached_tokens, prompt_seconds),
                decode_tokens_per_second=_rate(count - 1, decode_seconds),
            ),
            logprobs=None if self._logprobs is None else tuple(self._logprobs),
        )

    def since(self, count: int) -> tuple[tuple[int, ...], tuple[TokenLogprob, ...] | None]:
        """Returns the tokens after the first `count`, and their log-probabilities if the request asked for them."""
        return tuple(self._tokens[count:]), None if self._logprobs is None else tuple(self._logprobs[count:])

    def describe(self) -> str:
        """Returns the state for people: "12 tokens, running"."""
        count = len(self._tokens)
        return f"{count} {'token' if count == 1 else 'tokens'}, {self.finish_reason or 'running'}"

    def _rest(self) -> str:
        """Flushes the bytes of an incomplete character and the beginning of a stop string."""
        text, hit = self._stops.push(self._decoder.finish())
        if hit:
            self.finish_reason = "stop"
            return text
        return text + self._stops.finish()

    def _keep(self, text: str) -> str:
        text = self._special_stops.visible(text)
        if text:
            self._pieces.append(text)
        return text

    def _explain(self, token: int, logprob: float, top: Sequence[tuple[int, float]]) -> TokenLogprob:
        decode = self._tokenizer.decode
        return TokenLogprob(token, decode([token]), logprob, tuple((other, decode([other]), p) for other, p in top))


def _rate(count: int, seconds: float) -> float:
    return count / seconds if count > 0 and seconds > 0 else 0.0
