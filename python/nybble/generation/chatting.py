"""`Chatting`: the method `chat` of models and sessions."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal, overload

from nybble.overrides import Returned
from nybble.sampling import SamplingOptions, SamplingOverrides, merge

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from nybble.completion import Completion, Message
    from nybble.generation.stream import TextStream


class Chatting(Returned, ABC):
    """Something that generates the next turn of a conversation."""

    @overload
    def chat(
        self,
        messages: Sequence[Message],
        options: SamplingOptions | None = None,
        *,
        stream: Literal[False] = False,
        **overrides: Unpack[SamplingOverrides],
    ) -> Completion: ...
    @overload
    def chat(
        self,
        messages: Sequence[Message],
        options: SamplingOptions | None = None,
        *,
        stream: Literal[True],
        **overrides: Unpack[SamplingOverrides],
    ) -> TextStream: ...
    @overload
    def chat(
        self,
        messages: Sequence[Message],
        options: SamplingOptions | None = None,
        *,
        stream: bool,
        **overrides: Unpack[SamplingOverrides],
    ) -> Completion | TextStream: ...
    def chat(
        self,
        messages: Sequence[Message],
        options: SamplingOptions | None = None,
        *,
        stream: bool = False,
        **overrides: Unpack[SamplingOverrides],
    ) -> Completion | TextStream:
        """Generates the next turn of a conversation, with the model's chat template.

        A session computes only the new tokens. It then holds the conversation: its tokens after their common prefix are
        dropped.

        Args:
            messages: The turns so far, `[{"role": "user", "content": "Hello"}]`. Roles are system, user and assistant.
            options: As in `Model.generate`.
            stream: Return a `TextStream` instead of a completion.
            **overrides: As in `Model.generate`.

        Raises:
            ContextFullError: The conversation does not fit into the context.
            ModelError: The model has no chat template, or the template rejects the messages.
            ValueError: A message has an image or another part that is not text.
        """
        from nybble.chat.conversation import check_text_only

        check_text_only(messages)
        return self._next_turn(messages, merge(options, overrides), stream=stream)

    @abstractmethod
    def _next_turn(
        self, messages: Sequence[Message], options: SamplingOptions, *, stream: bool
    ) -> Completion | TextStream:
        """Generates the next turn."""
