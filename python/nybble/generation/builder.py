"""Builds a completion from sampled tokens: text, reasoning, stop strings, log-probabilities, timings."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from nybble.chat.reasoning_splitter import OutputPart
from nybble.completion import Completion, FinishReason, Timings, TokenLogprob, Usage
from nybble.generation.output import OutputText
from nybble.sampling import SamplingOptions, choice_seed

if TYPE_CHECKING:
    from nybble import _native
    from nybble.generation.request import PreparedRequest


@dataclass(frozen=True)
class Continuation:
    """How a sequence continues, if not by itself."""

    tokens: Sequence[int]
    """All tokens from the prompt on."""
    options: SamplingOptions
    constraint: _native.Constraint | None


class CompletionBuilder:
    """Assembles the completion of one request from its tokens.

    Args:
        request: The request.
        separates: Whether reasoning is kept apart from the text.
    """

    def __init__(self, request: PreparedRequest, *, separates: bool = False) -> None:
        self.prompt_tokens: int = len(request.prompt)
        self.cached_tokens: int = request.cached_tokens
        self.finish_reason: FinishReason | None = "length" if request.limit == 0 else None
        """Why the completion has ended; None before that."""
        self.error: Exception | None = None
        """The error that ended it."""
        self._continuation: Continuation | None = None
        self._request = request
        self._text = OutputText(request, separates=separates)
        self._has_proceeded = False
        self._limit = request.limit
        self._min_tokens = request.options.min_tokens
        self._tokenizer = request.tokenizer
        self._end_ids = request.tokenizer.eos_ids.union(request.options.stop_token_ids)
        self._parts: list[OutputPart] = []
        self._tokens: list[int] = []
        self._logprobs: list[TokenLogprob] | None = None if request.options.logprobs is None else []
        self._beam_score: float | None = None
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
        self._beam_score = sampled.beam_score
        if sampled.id in self._end_ids and not self._waits_for_answer:
            self.finish_reason = "stop"
            return self._finish()
        watch, text = self._request.watch, ""
        is_end = sampled.id in self._end_ids
        if not is_end:
            text = self._append(sampled.id, sampled.logprob, sampled.top)
        if watch is None or self._has_proceeded or self.finish_reason is not None:
            return text
        if is_end or watch.is_exhausted:
            for token in watch.close():
                text += self._append(token, 0.0, ()) if self.finish_reason is None else ""
            self._proceed()
        elif self._waits_for_answer and watch.splitter.has_answered:
            self._proceed()
        return text

    def _append(self, token: int, logprob: float | None, top: Sequence[tuple[int, float]]) -> str:
        self._tokens.append(token)
        if self._logprobs is not None and logprob is not None:
            self._logprobs.append(self._explain(token, logprob, top))
        parts, hit = self._text.push(token, stops=len(self._tokens) > self._min_tokens)
        text = self._keep(parts)
        if hit:
            self.finish_reason = "stop"
        elif len(self._tokens) >= self._limit:
            self.finish_reason = "length"
            text += self._finish()
        return text

    def report_cached(self, count: int) -> None:
        """Takes the number of prompt tokens that were not computed."""
        if not self._has_proceeded:  # Later on, the tokens so far are part of the prompt.
            self.cached_tokens = count

    def take_continuation(self) -> Continuation | None:
        """Returns how the sequence continues, if not by itself. To be asked after each `push`."""
        found, self._continuation = self._continuation, None
        return found

    def parts(self, start: int) -> list[OutputPart]:
        """Returns the parts of the output from the one of this number on: reasoning and content."""
        return self._parts[start:]

    def completion(self) -> Completion:
        """Returns the completion so far."""
        count, watch = len(self._tokens), self._request.watch
        prompt_seconds, decode_seconds = self._first - self._began, self._last - self._first
        return Completion(
            text=self._joined("content"),
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
            reasoning=self._joined("reasoning"),
            reasoning_tokens=0 if watch is None else watch.splitter.reasoning_tokens,
            beam_score=self._beam_score,
            stop_string=self._text.stop_string,
        )

    def since(self, count: int) -> tuple[tuple[int, ...], tuple[TokenLogprob, ...] | None]:
        """Returns the tokens after the first `count`, and their log-probabilities if the request asked for them."""
        return tuple(self._tokens[count:]), None if self._logprobs is None else tuple(self._logprobs[count:])

    def describe(self) -> str:
        """Returns the state for people: "12 tokens, running"."""
        count = len(self._tokens)
        return f"{count} {'token' if count == 1 else 'tokens'}, {self.finish_reason or 'running'}"

    def _finish(self) -> str:
        """Takes what the text has held back. Returns the text that is final now."""
        parts, hit = self._text.finish()
        if hit:
            self.finish_reason = "stop"
        return self._keep(parts)

    def _keep(self, parts: list[OutputPart]) -> str:
        self._parts += parts
        return "".join(part.text for part in parts if part.kind == "content")

    def _joined(self, kind: str) -> str:
        return "".join(part.text for part in self._parts if part.kind == kind)

    @property
    def _waits_for_answer(self) -> bool:
        """Whether the constraint concerns an answer that has not begun."""
        request = self._request
        is_calling = request.watch is not None and request.watch.splitter.is_calling
        return request.answer_constraint is not None and not self._has_proceeded and not is_calling

    def _proceed(self) -> None:
        """Continues the sequence after reasoning, under the constraint of the answer."""
        if self.finish_reason is not None:
            return
        request, count = self._request, len(self._tokens)
        options, self._has_proceeded = request.options, True
        self._continuation = Continuation(
            [*request.prompt, *self._tokens],
            options.replace(
                reasoning_budget=None,
                max_tokens=self._limit - count,
                min_tokens=min(max(options.min_tokens - count, 0), self._limit - count),
                # Not the seed itself, which would repeat the first random numbers.
                seed=None if options.seed is None else choice_seed(options.seed, _AFTER_REASONING),
            ),
            request.answer_constraint,
        )

    def _explain(self, token: int, logprob: float, top: Sequence[tuple[int, float]]) -> TokenLogprob:
        decode = self._tokenizer.decode
        return TokenLogprob(token, decode([token]), logprob, tuple((other, decode([other]), p) for other, p in top))


_AFTER_REASONING = 2**32
"""The number of the seed after reasoning. Those of several completions of a prompt are smaller."""


def _rate(count: int, seconds: float) -> float:
    return count / seconds if count > 0 and seconds > 0 else 0.0
