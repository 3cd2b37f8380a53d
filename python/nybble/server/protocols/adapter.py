"""The base of all adapters between a wire protocol and the internal request and events."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence

from pydantic import BaseModel

from nybble.generation import Usage
from nybble.server.errors import ApiError
from nybble.server.events import CollectedAnswer, Event
from nybble.server.generation import GenerationRequest


class Adapter(ABC):
    """A request in a wire protocol, and the format of its answers.

    Args:
        model: The name of the model that the client asks for; None for any.
        answers: The number of answers.
        streams: Whether the client asks for a stream.
    """

    end_of_stream: str | None = "[DONE]"
    """The last message of a complete stream; None if there is none."""
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
    def response(self, answers: Sequence[CollectedAnswer], usage: Usage) -> BaseModel:
        """The body of the response that holds all answers."""

    @abstractmethod
    def chunks(self, event: Event) -> Iterable[BaseModel]:
        """The messages of a stream that an event of the answers gives."""

    def frame(self, message: str) -> bytes:
        """A message of a stream as it is sent: here as a server-sent event."""
        return f"data: {message}\n\n".encode()

    def failure(self, error: ApiError) -> str:
        """The message that ends a stream with an error."""
        return error.body.model_dump_json()

    def dump(self, body: BaseModel) -> str:
        """A body or a chunk as JSON, without the fields that were not set."""
        return body.model_dump_json(exclude_unset=True)
