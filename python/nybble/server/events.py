"""The events of a request's answers, which every wire protocol converts to its own format."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Literal

from nybble.generation import TokenLogprob, Usage


@dataclass(frozen=True)
class AnswerUsage(Usage):
    """The tokens of the answers of a request."""

    reasoning_tokens: int = 0


FinishReason = Literal["stop", "length", "tool_calls"]


@dataclass(frozen=True)
class AnswerEvent:
    """An event of one answer."""

    answer: int
    """The number of the answer within the request."""


@dataclass(frozen=True)
class AnswerStarted(AnswerEvent):
    """An answer begins. All answers of a request begin before the first text."""

    prompt_tokens: int = 0


@dataclass(frozen=True)
class LogprobsDelta(AnswerEvent):
    """The log-probabilities of the next tokens. They come before the text of these tokens."""

    tokens: tuple[TokenLogprob, ...]


@dataclass(frozen=True)
class TextDelta(AnswerEvent):
    """The next piece of content. It is empty if the tokens gave no text."""

    text: str


@dataclass(frozen=True)
class ReasoningDelta(AnswerEvent):
    """The next piece of reasoning."""

    text: str


@dataclass(frozen=True)
class ToolCallStarted(AnswerEvent):
    """A tool call begins."""

    call: int
    """The number of the call within its answer."""
    id: str
    name: str


@dataclass(frozen=True)
class ToolCallDelta(AnswerEvent):
    """The next piece of the arguments of a tool call, which are JSON."""

    call: int
    arguments: str


@dataclass(frozen=True)
class AnswerFinished(AnswerEvent):
    """An answer ends."""

    reason: FinishReason
    stop_string: str | None = None
    """The stop string that ended it."""


@dataclass(frozen=True)
class UsageReported:
    """The tokens of all answers. This is the last event of a request."""

    usage: AnswerUsage


Event = (
    AnswerStarted
    | LogprobsDelta
    | TextDelta
    | ReasoningDelta
    | ToolCallStarted
    | ToolCallDelta
    | AnswerFinished
    | UsageReported
)


@dataclass
class CollectedCall:
    """A whole tool call."""

    id: str
    name: str
    arguments: str = ""


@dataclass
class CollectedAnswer:
    """A whole answer."""

    pieces: list[str] = field(default_factory=list)
    thoughts: list[str] = field(default_factory=list)
    calls: list[CollectedCall] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    reason: FinishReason = "stop"

    @property
    def text(self) -> str:
        """The content."""
        return "".join(self.pieces)

    @property
    def reasoning(self) -> str:
        """What the model thought before the content."""
        return "".join(self.thoughts)


async def collect(events: AsyncIterator[Event]) -> tuple[list[CollectedAnswer], AnswerUsage]:
    """Collects the events of a request into its whole answers and their usage."""
    answers: list[CollectedAnswer] = []
    usage = AnswerUsage(0, 0)
    async for event in events:
        match event:
            case AnswerStarted():
                answers.append(CollectedAnswer())
            case LogprobsDelta(answer, tokens):
                answers[answer].logprobs += tokens
            case TextDelta(answer, text):
                answers[answer].pieces.append(text)
            case ReasoningDelta(answer, text):
                answers[answer].thoughts.append(text)
            case ToolCallStarted(answer, _, id, name):
                answers[answer].calls.append(CollectedCall(id, name))
            case ToolCallDelta(answer, call, arguments):
                answers[answer].calls[call].arguments += arguments
            case AnswerFinished(answer, reason):
                answers[answer].reason = reason
            case UsageReported(usage):
                pass
    return answers, usage
