"""Builds the output of a response from events, and the events of its stream."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from nybble.generation import TokenLogprob
from nybble.server import events
from nybble.server.protocols.adapter import TypedEvent
from nybble.server.protocols.responses.items import sealed
from nybble.server.protocols.responses.schema import (
    CallOutput,
    MessageOutput,
    Output,
    OutputText,
    ReasoningOutput,
    ReasoningText,
    Status,
)
from nybble.server.tools.reader import new_id


class OutputBuilder:
    """The output of a response while the model generates it.

    Args:
        describe: Turns log-probabilities into what clients receive.
        shows_reasoning: Whether the output has the reasoning.
        seals_reasoning: Whether reasoning also comes as opaque content.
    """

    def __init__(
        self,
        describe: Callable[[tuple[TokenLogprob, ...]], list[Any]],
        *,
        shows_reasoning: bool,
        seals_reasoning: bool,
    ) -> None:
        self.items: list[Output] = []
        self.is_cut: bool = False
        """Whether the output was cut off by a limit."""
        self._describe = describe
        self._shows_reasoning = shows_reasoning
        self._seals_reasoning = seals_reasoning
        self._open: Output | None = None
        self._logprobs: list[Any] = []
        self._numbers = 0

    def event(self, type: str, **fields: Any) -> TypedEvent:
        """The next event of the stream."""
        self._numbers += 1
        return TypedEvent.of(type, sequence_number=self._numbers - 1, **fields)

    def push(self, event: events.Event) -> Iterator[TypedEvent]:
        """Takes an event. Yields those of the stream that follow from it."""
        match event:
            case events.LogprobsDelta(_, tokens):
                self._logprobs += self._describe(tokens)
            case events.ReasoningDelta(_, text) if text:
                self._logprobs.clear()  # Those of reasoning have no place in the output.
                if self._shows_reasoning:
                    yield from self._reasoned(text)
            case events.TextDelta(_, text) if text:
                yield from self._said(text)
            case events.ToolCallStarted(_, _, id, name):
                self._logprobs.clear()
                call = CallOutput(id=f"fc_{new_id()}", call_id=id, name=name, arguments="", status="in_progress")
                yield from self._begin(call)
            case events.ToolCallDelta(_, _, arguments) if isinstance(self._open, CallOutput):
                self._open.arguments += arguments
                yield self._of_item(self._open, "response.function_call_arguments.delta", delta=arguments)
            case events.AnswerFinished(_, reason):
                self.is_cut = reason == "length"
                if not self.items:
                    yield from self._said("")
                yield from self._end("incomplete" if self.is_cut else "completed")

    def _reasoned(self, text: str) -> Iterator[TypedEvent]:
        item = self._open
        if not isinstance(item, ReasoningOutput):
            item = ReasoningOutput(id=f"rs_{new_id()}", status="in_progress", content=[])
            yield from self._begin(item)
            item.content.append(part := ReasoningText(text=""))
            yield self._of_item(item, "response.content_part.added", content_index=0, part=part.model_dump())
        item.content[0].text += text
        yield self._of_item(item, "response.reasoning_text.delta", content_index=0, delta=text)

    def _said(self, text: str) -> Iterator[TypedEvent]:
        item = self._open
        if not isinstance(item, MessageOutput):
            item = MessageOutput(id=f"msg_{new_id()}", status="in_progress", content=[])
            yield from self._begin(item)
            item.content.append(part := OutputText(text=""))
            yield self._of_item(item, "response.content_part.added", content_index=0, part=part.model_dump())
        logprobs, self._logprobs = self._logprobs, []
        item.content[0].text += text
        item.content[0].logprobs += logprobs
        if text:
            yield self._of_item(item, "response.output_text.delta", content_index=0, delta=text, logprobs=logprobs)

    def _begin(self, item: Output) -> Iterator[TypedEvent]:
        yield from self._end("completed")
        self._open = item
        self.items.append(item)
        yield self.event("response.output_item.added", output_index=len(self.items) - 1, item=item.model_dump())

    def _end(self, status: Status) -> Iterator[TypedEvent]:
        item, self._open = self._open, None
        if item is None:
            return
        if isinstance(item, CallOutput):
            yield self._of_item(item, "response.function_call_arguments.done", name=item.name, arguments=item.arguments)
        elif isinstance(item, ReasoningOutput):
            thought = item.content[0]
            yield self._of_item(item, "response.reasoning_text.done", content_index=0, text=thought.text)
            yield self._of_item(item, "response.content_part.done", content_index=0, part=thought.model_dump())
            if self._seals_reasoning:
                item.encrypted_content = sealed(thought.text)
        else:
            said = item.content[0]
            done = {"text": said.text, "logprobs": said.logprobs}
            yield self._of_item(item, "response.output_text.done", content_index=0, **done)
            yield self._of_item(item, "response.content_part.done", content_index=0, part=said.model_dump())
        item.status = status
        yield self.event("response.output_item.done", output_index=len(self.items) - 1, item=item.model_dump())

    def _of_item(self, item: Output, type: str, **fields: Any) -> TypedEvent:
        """An event of an item, the last one."""
        return self.event(type, item_id=item.id, output_index=len(self.items) - 1, **fields)
