"""`Chatting`: the method `chat` of models and sessions."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal, overload

from nybble.generation.reasoning import ReasoningChoice, chat_prompt
from nybble.overrides import Returned
from nybble.sampling import SamplingOptions, SamplingOverrides, merge

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from nybble.completion import Completion, Message
    from nybble.generation.stream import TextStream
    from nybble.tokenizer.tokenizer import Tokenizer


class Chatting(Returned, ABC):
    """Something that generates the next turn of a conversation."""

    @overload
    def chat(
        self,
        messages: Sequence[Message],
        options: SamplingOptions | None = None,
        *,
        stream: Literal[False] = False,
        enable_thinking: bool | None = None,
        reasoning_effort: str | None = None,
        **overrides: Unpack[SamplingOverrides],
    ) -> Completion: ...
    @overload
    def chat(
        self,
        messages: Sequence[Message],
        options: SamplingOptions | None = None,
        *,
        stream: Literal[True],
        enable_thinking: bool | None = None,
        reasoning_effort: str | None = None,
        **overrides: Unpack[SamplingOverrides],
    ) -> TextStream: ...
    @overload
    def chat(
        self,
        messages: Sequence[Message],
        options: SamplingOptions | None = None,
        *,
        stream: bool,
        enable_thinking: bool | None = None,
        reasoning_effort: str | None = None,
        **overrides: Unpack[SamplingOverrides],
    ) -> Completion | TextStream: ...
    def chat(
        self,
        messages: Sequence[Message],
        options: SamplingOptions | None = None,
        *,
        stream: bool = False,
        enable_thinking: bool | None = None,
        reasoning_effort: str | None = None,
        **overrides: Unpack[SamplingOverrides],
    ) -> Completion | TextStream:
        """Generates the next turn of a conversation, with the model's chat template.

        A session computes only the new tokens. It then holds the conversation: its tokens after their common prefix are
        dropped.

        What the model thinks before its answer is in `completion.reasoning`, not in the text.

        Args:
            messages: The turns so far, `[{"role": "user", "content": "Hello"}]`. Roles are system, user and assistant.
            options: As in `Model.generate`.
            stream: Return a `TextStream` instead of a completion. Its `parts()` yield the reasoning, too.
            enable_thinking: Turn reasoning on or off, by the switch of the chat template. Without a switch, False ends
                reasoning at once. None as the template does.
            reasoning_effort: How much to reason, for chat templates that know efforts: "none", "minimal", "low",
                "medium", "high", "xhigh" or "max". None as the template does.
            **overrides: As in `Model.generate`.

        Raises:
            ContextFullError: The conversation does not fit into the context.
            ModelError: The model has no chat template, or the template rejects the messages.
            ValueError: A message has an image or another part that is not text.
        """
        from nybble.chat.conversation import check_text_only

        check_text_only(messages)
        chosen = merge(options, overrides)
        choice = ReasoningChoice(enable_thinking, reasoning_effort, chosen.reasoning_budget)
        is_constrained = any(form is not None for form in (chosen.schema, chosen.regex, chosen.grammar))
        prompt, budget = chat_prompt(self._tokenizer, messages, choice, constrained=is_constrained)
        return self._next_turn(prompt, chosen.replace(reasoning_budget=budget), stream=stream)

    @abstractmethod
    def _next_turn(self, prompt: str, options: SamplingOptions, *, stream: bool) -> Completion | TextStream:
        """Generates the next turn, which continues a prompt that the chat template has written."""

    @property
    @abstractmethod
    def _tokenizer(self) -> Tokenizer:
        """The tokenizer of the model."""
