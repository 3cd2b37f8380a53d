"""Runs an internal request on the engine and reports its answers as events."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from fastapi import Request as HttpRequest

from nybble.chat.reasoning import reasoning_format
from nybble.chat.reasoning_splitter import OutputPart
from nybble.chat.tools.parser import AnswerParser, Part, PlainText
from nybble.chat.tools.reader import CallStart
from nybble.engine import Piece, Request
from nybble.sampling import SamplingOptions
from nybble.server import events
from nybble.server.errors import ApiError, as_api_errors, shutting_down
from nybble.server.service import Service

Prompt = str | list[int]

_LONG_BODY_BYTES = 100_000
"""Longer requests may take a second to prepare, so they are prepared one at a time."""


@dataclass(frozen=True, kw_only=True)
class GenerationRequest:
    """A request to the engine, independent of the wire protocol."""

    param: str
    """The parameter that holds the prompt, which errors name."""
    prepare: Callable[[], Sequence[tuple[Prompt, SamplingOptions]]]
    """Returns the prompt and the options of each answer. Runs in a thread: templates and tokenizers are slow."""
    parameters: Mapping[str, str] = field(default_factory=dict)
    """The parameters of the request that set options of `SamplingOptions` under other names, which errors name."""
    before: Sequence[Callable[[], None]] = ()
    """Work with the model itself that comes before the answers. Runs in a thread, one request at a time."""
    prompts: int = 1
    """The number of different prompts. The answers of one prompt follow one another."""
    new_parser: Callable[[], AnswerParser] = PlainText
    """Creates the parser of one answer, after `prepare` has returned."""
    lora: str | None = None
    """The LoRA adapter to compute with; None for the model alone."""
    separates_reasoning: bool = False
    """Whether reasoning is reported apart from the content, which alone reaches the parser."""


class AnswerGroup:
    """The answers to one request, from their submission until their slots are free.

    `AnswerGroup.submit` returns one. It is a context manager: leaving it cancels the answers that are still running.
    """

    def __init__(
        self,
        service: Service,
        request: GenerationRequest,
        answers: Sequence[Request],
        started_at: float,
        resources: contextlib.ExitStack,
    ) -> None:
        self._service = service
        self._request = request
        self._answers = answers
        self._started_at = started_at
        self._resources = resources

    @classmethod
    async def submit(cls, service: Service, http: HttpRequest, request: GenerationRequest) -> AnswerGroup:
        """Prepares a request and submits its answers to the engine.

        Raises:
            ApiError: The request is invalid, or the engine's queue is full.
        """
        started_at = time.perf_counter()
        answers: list[Request] = []
        with contextlib.ExitStack() as resources:
            resources.enter_context(service.in_flight())

            # Without reasoning, the tokens of pieces hold the special tokens of calls.
            separates = request.separates_reasoning and reasoning_format(service.engine.model.tokenizer) is not None

            def submit() -> None:
                for prompt, options in request.prepare():
                    chosen = options if request.lora is None else options.replace(adapter=request.lora)
                    answer = service.engine.submit(prompt, chosen, separate_reasoning=separates)
                    answers.append(resources.enter_context(service.tracked(answer)))

            with as_api_errors(request.param, request.parameters):
                if request.before:
                    async with service.embedding:
                        for work in request.before:
                            if await http.is_disconnected():
                                raise ApiError(400, "the client has disconnected")
                            await service.in_thread(work)
                if http.state.body_bytes <= _LONG_BODY_BYTES:
                    await service.in_thread(submit)
                else:
                    async with service.long_prompts:
                        if await http.is_disconnected():
                            raise ApiError(400, "the client has disconnected")
                        await service.in_thread(submit)
            return cls(service, request, answers, started_at, resources.pop_all())

    @property
    def parameters(self) -> Mapping[str, str]:
        """The parameters of the request that set options under other names."""
        return self._request.parameters

    def __enter__(self) -> AnswerGroup:
        return self

    def __exit__(self, *_: object) -> None:
        self._resources.close()

    async def stream_events(self) -> AsyncGenerator[events.Event, None]:
        """Yields the events of all answers in order of arrival.

        Raises:
            ApiError: The server shuts down.
            Exception: The error that ended an answer, such as MemoryError.
        """
        converters = [_Converter(answer, self._request.new_parser()) for answer in range(len(self._answers))]
        for answer, request in enumerate(self._answers):
            yield events.AnswerStarted(answer, request.completion.usage.prompt_tokens)
        async with contextlib.aclosing(self._pieces()) as pieces:
            async for answer, piece in pieces:
                converter = converters[answer]
                for event in converter.finish() if piece is None else converter.push(piece):
                    yield event
                if piece is None:
                    stop = self._answers[answer].completion.stop_string
                    yield events.AnswerFinished(answer, self._finish_reason(answer, converter.parser), stop)
        yield events.UsageReported(self._usage())

    async def _pieces(self) -> AsyncGenerator[tuple[int, Piece | None], None]:
        """Yields pieces in order of arrival, each with the number of its answer; None ends an answer."""
        queue: asyncio.Queue[tuple[int, Piece | BaseException | None]] = asyncio.Queue()

        async def pump(index: int, answer: Request) -> None:
            try:
                async for piece in answer:
                    queue.put_nowait((index, piece))
                if answer.completion.finish_reason == "cancelled":
                    raise shutting_down()
                queue.put_nowait((index, None))
            except Exception as error:
                queue.put_nowait((index, error))

        pumps = [asyncio.ensure_future(pump(index, answer)) for index, answer in enumerate(self._answers)]
        try:
            unfinished, is_first = len(pumps), True
            while unfinished:
                index, piece = await queue.get()
                if isinstance(piece, BaseException):
                    raise piece
                if is_first:
                    is_first = False
                    self._service.observe_first_token(time.perf_counter() - self._started_at)
                unfinished -= piece is None
                yield index, piece
        finally:
            for task in pumps:
                task.cancel()
            await asyncio.gather(*pumps, return_exceptions=True)

    def _finish_reason(self, answer: int, parser: AnswerParser) -> events.FinishReason:
        if self._answers[answer].completion.finish_reason != "stop":
            return "length"
        return "tool_calls" if parser.calls else "stop"

    def _usage(self) -> events.AnswerUsage:
        """The tokens of all answers. Each prompt counts once, for any number of answers."""
        completions = [answer.completion for answer in self._answers]
        usages = [completion.usage for completion in completions]
        per_prompt = usages[:: len(usages) // self._request.prompts]
        return events.AnswerUsage(
            prompt_tokens=sum(usage.prompt_tokens for usage in per_prompt),
            completion_tokens=sum(usage.completion_tokens for usage in usages),
            cached_tokens=sum(usage.cached_tokens for usage in per_prompt),
            reasoning_tokens=sum(completion.reasoning_tokens for completion in completions),
        )


class _Converter:
    """Turns the pieces of one answer into events."""

    def __init__(self, answer: int, parser: AnswerParser) -> None:
        self.parser = parser
        self._answer = answer
        self._calls = 0

    def push(self, piece: Piece) -> Iterator[events.Event]:
        """The events of a piece."""
        if piece.logprobs is not None:
            yield events.LogprobsDelta(self._answer, piece.logprobs)
        # Without parts, all of the piece is content.
        for part in piece.parts or (OutputPart("content", piece.text, piece.tokens),):
            if part.kind == "reasoning":
                yield events.ReasoningDelta(self._answer, part.text)
            else:
                yield from self._content(self.parser.push(part.text, part.tokens))

    def finish(self) -> Iterator[events.Event]:
        """The events of what the parser has held back."""
        yield from self._content(self.parser.finish())

    def _content(self, parts: Sequence[Part]) -> Iterator[events.Event]:
        for part in parts:
            if isinstance(part, str):
                yield events.TextDelta(self._answer, part)
            elif isinstance(part, CallStart):
                self._calls += 1
                yield events.ToolCallStarted(self._answer, self._calls - 1, part.id, part.name)
            else:
                yield events.ToolCallDelta(self._answer, self._calls - 1, part.text)
