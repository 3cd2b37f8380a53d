"""Follows the reasoning of a completion: its budget, and what applies only to the answer after it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from nybble.chat.reasoning import NO_LIMIT, ReasoningFormat, reasoning_format, template_variables
from nybble.chat.reasoning_splitter import Specials, Splitter, new_splitter

if TYPE_CHECKING:
    from nybble.tokenizer.tokenizer import Tokenizer

_TAIL = 64
"""Tokens at the end of a prompt that may open reasoning."""


@dataclass(frozen=True)
class ReasoningChoice:
    """What a program asks of the reasoning of an answer. None leaves it to the model."""

    enabled: bool | None = None
    effort: str | None = None
    budget: int | None = None
    """The largest number of tokens."""


def chat_prompt(
    tokenizer: Tokenizer,
    messages: Sequence[Mapping[str, Any]],
    choice: ReasoningChoice,
    *,
    tools: Sequence[Any] | None = None,
    variables: Mapping[str, Any] | None = None,
    continues: bool = False,
    answers_now: bool = False,
    constrained: bool = False,
) -> tuple[str, int | None]:
    """Writes a conversation as a prompt.

    Args:
        tokenizer: The tokenizer, with the chat template.
        messages: The turns.
        choice: How to reason.
        tools: Descriptions of functions, for templates that know them.
        variables: More variables of the template. They count more than those of `choice`.
        continues: Whether the model continues the last message.
        constrained: Whether a constraint restricts the answer. It would forbid the model to begin the reasoning that
            `choice` asks for, so the prompt does.
        answers_now: Whether the caller appends the beginning of the answer, so that no reasoning precedes it.

    Returns:
        The prompt, and the budget of reasoning; None if the model does not mark reasoning.

    Raises:
        ModelError, TypeError, ValueError: As `Tokenizer.apply_chat_template`.
    """
    templates, known = tokenizer.chat_templates, reasoning_format(tokenizer)
    name = "tool_use" if tools and "tool_use" in templates else "default"
    source, names = templates.get(name, ""), tokenizer.template_variables(name)
    budget, is_off = choice.budget, choice.enabled is False or choice.effort == "none"
    chosen = template_variables(source, names, enabled=choice.enabled, effort=choice.effort, budget=budget)
    if is_off and not chosen.keys() - {"thinking_budget"}:  # The template has no switch.
        budget = 0
        chosen = template_variables(source, names, budget=budget)
    prompt = tokenizer.apply_chat_template(
        messages,
        add_generation_prompt=not continues,
        continue_final_message=continues,
        tools=tools,
        **{**chosen, **(variables or {})},
    )
    if known is None:
        return prompt, None
    if answers_now:
        # The answer of a model with channels begins with a header of its own.
        prompt = prompt if known.channels else known.closed(prompt)
    elif budget == 0:
        prompt = known.closed(prompt)
    elif constrained and not is_off and (choice.enabled or choice.effort is not None):
        prompt = known.opened(prompt)
    return prompt, NO_LIMIT if budget is None else budget


class ReasoningWatch:
    """The reasoning of one completion.

    Args:
        known: How the model marks reasoning.
        tokenizer: The tokenizer of the model.
        prompt: The token ids of the prompt.
        budget: The largest number of tokens of reasoning.
    """

    def __init__(self, known: ReasoningFormat, tokenizer: Tokenizer, prompt: Sequence[int], budget: int) -> None:
        tail = spelled(tokenizer, prompt[-_TAIL:])
        self.splitter: Splitter = new_splitter(known, tail, Specials.of(tokenizer, known))
        self.is_open: bool = known.is_open(tail)
        """Whether the prompt ends where reasoning comes next."""
        self._closing = known.closing
        self._tokenizer = tokenizer
        self._budget = budget
        self._is_closed = False

    @property
    def is_exhausted(self) -> bool:
        """Whether reasoning has used up its budget, and must end now."""
        splitter = self.splitter
        return splitter.is_reasoning and not self._is_closed and splitter.reasoning_tokens >= self._budget

    def close(self) -> list[int]:
        """The token ids that end reasoning by force."""
        self._is_closed = True
        self.splitter.drop_partial_marker()
        return self._tokenizer.encode(self._closing, add_special=False)


def watch(tokenizer: Tokenizer, prompt: Sequence[int], budget: int | None) -> ReasoningWatch | None:
    """The watch of a completion; None without a budget, or if the model does not mark reasoning."""
    if budget is None or (known := reasoning_format(tokenizer)) is None:
        return None
    return ReasoningWatch(known, tokenizer, prompt, budget)


def spelled(tokenizer: Tokenizer, ids: Sequence[int]) -> str:
    """The text of token ids, special tokens spelled out."""
    parts: list[str] = []
    run: list[int] = []
    for token in ids:
        if token in tokenizer.special_ids:
            parts += [tokenizer.decode(run), tokenizer.token_text(token)]
            run = []
        else:
            run.append(token)
    return "".join([*parts, tokenizer.decode(run)])
