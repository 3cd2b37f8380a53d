"""Generation in the calling thread: a stream of text, or whole completions."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from nybble.engine_options import EngineOptions
from nybble.generation.builder import CompletionBuilder
from nybble.generation.driver import Driver
from nybble.overrides import Returned

if TYPE_CHECKING:
    from nybble import _native
    from nybble.chat.reasoning_splitter import OutputPart
    from nybble.completion import Completion
    from nybble.generation.request import PreparedRequest, TextModel

# Callers wait for whole completions, so prompts may take large steps.
_BATCH = EngineOptions(max_batch=16, prefill_chunk=512)
# A lone sequence has no other sequence to share a prefix with.
_SINGLE = EngineOptions(max_batch=1, prefill_chunk=512, prefix_cache=False)


def generate(model: TextModel, requests: Sequence[PreparedRequest], *, separates: bool = False) -> list[Completion]:
    """Computes requests together. Returns their completions, in the same order.

    Args:
        model: The model to compute with.
        requests: The requests.
        separates: Whether completions keep reasoning apart from the text.
    """
    builders = [CompletionBuilder(request, separates=separates) for request in requests]
    driver: Driver[CompletionBuilder] = Driver(model, _SINGLE if len(requests) == 1 else _BATCH)
    for request, builder in zip(requests, builders, strict=True):
        if builder.finish_reason is None:
            driver.submit(request, builder)
    while len(driver) > 0:
        _advance(driver)
    return [builder.completion() for builder in builders]


class TextStream(Returned, Iterator[str]):
    """The text of a completion, piece by piece as it is generated.

    `completion` has the finish reason, usage and timings. `close`, or a `with` block, ends the stream and
    frees its KV cache at once; otherwise the cache is freed when the stream is garbage collected.

    Example:
        ```python
        stream = model.stream("Once upon a time")
        for piece in stream:
            print(piece, end="", flush=True)
        print(stream.completion.finish_reason)
        ```
    """

    _returned_by = "Model.stream(...)"
    _instead_of_pickling = "iterate over it here and send its text"
    _driver: Driver[CompletionBuilder]
    _builder: CompletionBuilder
    _seen: int
    """Parts that `parts` has yielded."""

    @classmethod
    def _of(
        cls, model: TextModel, request: PreparedRequest, *, keep_session: bool = False, separates: bool = False
    ) -> TextStream:
        stream = cls.__new__(cls)
        stream._driver = Driver(model, _SINGLE, keep_sessions=keep_session)
        stream._builder = CompletionBuilder(request, separates=separates)
        stream._seen = 0
        if stream._builder.finish_reason is None:
            stream._driver.submit(request, stream._builder)
        return stream

    def __next__(self) -> str:
        while self._builder in self._driver:
            if text := _advance(self._driver):
                return text
        raise StopIteration

    def parts(self) -> Iterator[OutputPart]:
        """Yields the parts of the output as they are generated. A part has a `text` and a `kind`.

        The kind is "reasoning" or "content". Only streams of `chat` have reasoning. Iterating over the stream itself
        yields the content alone.
        """
        while True:
            fresh = self._builder.parts(self._seen)
            self._seen += len(fresh)
            yield from (part for part in fresh if part.text)
            if not fresh:
                if self._builder not in self._driver:
                    return
                _advance(self._driver)

    @property
    def _error(self) -> Exception | None:
        """The error that ended the completion. Interruptions do not count: the completion can continue."""
        return self._builder.error

    @property
    def completion(self) -> Completion:
        """The completion so far; complete once the stream has ended."""
        return self._builder.completion()

    def close(self) -> None:
        """Ends the stream and frees its KV cache. Unless it had ended before, its finish reason is "cancelled"."""
        if self._builder.finish_reason is None:
            self._builder.finish_reason = "cancelled"
        self._driver.cancel(self._builder)

    def __enter__(self) -> TextStream:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def tokens(self) -> Sequence[int]:
        """The token ids so far, without the one that ended the completion."""
        return self._builder.tokens

    @property
    def _session(self) -> _native.Session | None:
        """The KV cache as of the latest step, for `nybble.Session`. None if there is none, or it was not kept."""
        return self._driver.session(self._builder)

    def __repr__(self) -> str:
        return f"<TextStream: {self._builder.describe()}>"


def _advance(driver: Driver[CompletionBuilder]) -> str:
    """Computes one step. Returns the new text of all sequences.

    Raises:
        Exception: The error of the first sequence that failed.
    """
    text = ""
    for builder, outcome, cached_tokens in driver.step(signals=True):
        if isinstance(outcome, BaseException):
            # Others end the program, as Ctrl-C in a logits processor does.
            builder.error = outcome if isinstance(outcome, Exception) else None
            raise outcome
        builder.report_cached(cached_tokens)
        text += builder.push(outcome)
        if builder.finish_reason is not None:
            driver.cancel(builder)
        elif (continuation := builder.take_continuation()) is not None:
            driver.proceed(builder, continuation)
    return text
