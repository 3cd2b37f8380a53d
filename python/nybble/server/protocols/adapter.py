"""The bases of all adapters between a wire protocol and the internal request and events."""

from __future__ import annotations

import dataclasses
import json
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from typing import Any, ClassVar, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from nybble.server.errors import ApiError, invalid_request
from nybble.server.events import AnswerUsage, CollectedAnswer, Event, collect
from nybble.server.generation import GenerationRequest

Body = TypeVar("Body", bound=BaseModel)


class Adapter(ABC):
    """A request in a wire protocol, and the format of its answers.

    Args:
        model: The name of the model that the client asks for; None for any.
        answers: The number of answers.
        streams: Whether the client asks for a stream.
    """

    end_of_stream = b"data: [DONE]\n\n"
    """What follows the last message of a complete stream."""
    media_type = "text/event-stream"
    """The type of a stream."""

    def __init__(self, model: str | None, answers: int, streams: bool) -> None:
        self.model = model
        self.answers = answers
        self.streams = streams

    @abstractmethod
    def translate(self) -> GenerationRequest:
        """The internal request.

        Raises:
            ApiError: The request asks for something that the model or the server does not support.
        """

    @abstractmethod
    async def collected(self, events: AsyncIterator[Event]) -> BaseModel:
        """The body of the response that holds all answers."""

    @abstractmethod
    def chunks(self, event: Event) -> Iterable[BaseModel]:
        """The messages of a stream that an event of the answers gives."""

    def frame(self, chunk: BaseModel) -> bytes:
        """A message of a stream as it is sent: here as a server-sent event."""
        return f"data: {self.dump(chunk)}\n\n".encode()

    def failure(self, error: ApiError) -> bytes:
        """What ends a stream with an error."""
        return f"data: {error.body.model_dump_json()}\n\n".encode()

    def dump(self, body: BaseModel) -> str:
        """A body or a chunk as JSON, without the fields that were not set."""
        return body.model_dump_json(exclude_unset=True)


class CollectingAdapter(Adapter):
    """An adapter whose whole responses are made from collected answers."""

    async def collected(self, events: AsyncIterator[Event]) -> BaseModel:
        """The body of the response that holds all answers."""
        return self.response(*await collect(events))

    @abstractmethod
    def response(self, answers: Sequence[CollectedAnswer], usage: AnswerUsage) -> BaseModel:
        """The body of the response that holds all answers."""


class TypedEvent(BaseModel):
    """An event of a stream. The fields depend on its type."""

    model_config: ClassVar[ConfigDict] = ConfigDict(extra="allow")

    type: str

    @classmethod
    def of(cls, type: str, **fields: Any) -> TypedEvent:
        """An event with fields."""
        return cls.model_validate({"type": type, **fields})


class TypedEventAdapter(Adapter):
    """An adapter of a protocol whose events have types, and whose whole responses are what its events add up to."""

    end_of_stream = b""

    async def collected(self, events: AsyncIterator[Event]) -> BaseModel:
        """The body of the response that holds all answers."""
        async for event in events:
            for _ in self.chunks(event):
                pass
        return self.result()

    @abstractmethod
    def result(self) -> BaseModel:
        """The response, after its last event."""

    def frame(self, chunk: BaseModel) -> bytes:
        """A server-sent event with its type as its name."""
        kind = chunk.type if isinstance(chunk, TypedEvent) else "message"
        return f"event: {kind}\ndata: {self.dump(chunk)}\n\n".encode()


def inner_request(kind: type[Body], values: Mapping[str, Any], names: Mapping[str, str] | None = None) -> Body:
    """A request of another protocol.

    Args:
        kind: The request.
        values: Its parameters. None stands for none.
        names: The parameters of the own protocol by those of the other, for errors.

    Raises:
        ApiError: A parameter is invalid.
    """
    try:
        return kind.model_validate({name: value for name, value in values.items() if value is not None})
    except ValidationError as error:
        found = invalid_request(error.errors())
        first, dot, rest = (found.param or "").partition(".")
        if names is None or first not in names:
            raise found from None
        own = names[first] + dot + rest
        message = str(found).replace(found.param or "", own, 1)
        raise ApiError(found.status, message, param=own, code=found.code) from None


def renamed(request: GenerationRequest, names: Mapping[str, str]) -> GenerationRequest:
    """A request whose errors name the parameters of another protocol.

    Args:
        request: The request.
        names: The other protocol's names of parameters.
    """
    given = {option: names.get(name, name) for option, name in request.parameters.items()}
    return dataclasses.replace(request, param=names.get(request.param, request.param), parameters={**names, **given})


def call_values(arguments: str) -> dict[str, Any]:
    """The arguments of a call of the model, which are text if they are not a JSON object."""
    try:
        found = json.loads(arguments or "{}")
    except (ValueError, RecursionError):
        found = None
    return found if isinstance(found, dict) else {"arguments": arguments}
