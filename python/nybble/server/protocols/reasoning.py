"""The parameters of a conversation that concern reasoning, under the names of several servers."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator
from pydantic_core import PydanticCustomError

from nybble.generation.reasoning import ReasoningChoice
from nybble.server.protocols.strict import Strict

Budget = Annotated[int, Field(ge=-1, le=2**31 - 1)]
Effort = Annotated[str, Field(min_length=1, max_length=40)]


class Reasoning(Strict):
    """How to reason, as in OpenAI's and OpenRouter's APIs."""

    effort: Effort | None = None
    enabled: bool | None = None
    max_tokens: Budget | None = Field(default=None, description="As reasoning_budget.")
    exclude: bool | None = Field(default=None, description="true: the answer leaves the reasoning out.")
    summary: Any = Field(default=None, description="Ignored: reasoning is given as it is.")
    generate_summary: Any = Field(default=None, description="Ignored.")


class Thinking(Strict):
    """How to reason, as in the APIs of Anthropic, DeepSeek and GLM."""

    type: Literal["enabled", "disabled", "adaptive", "auto"]
    budget_tokens: Budget | None = Field(default=None, description="As reasoning_budget.")
    clear_thinking: Any = Field(default=None, description="Ignored: the chat template decides.")


class Reasoned(Strict):
    """The parameters of a request that concern reasoning."""

    reasoning_effort: Effort | None = Field(
        default=None,
        description='How much to reason, for chat templates that know efforts; "none" turns reasoning off.',
    )
    reasoning: Reasoning | None = Field(default=None, description="Other names of these parameters in one object.")
    enable_thinking: bool | None = Field(
        default=None, description="Whether to reason; as the template does if omitted."
    )
    thinking: Thinking | None = Field(default=None, description="Other names of these parameters in one object.")
    reasoning_budget: Budget | None = Field(
        default=None, description="Extension of nybble: reasoning ends after this many tokens; -1 stands for no limit."
    )
    thinking_budget: Budget | None = Field(default=None, description="Another name of reasoning_budget.")
    reasoning_format: Literal["none", "auto", "deepseek"] | None = Field(
        default=None,
        description='"none" leaves reasoning in the content, with its markers, as llama-server does.',
    )
    include_reasoning: bool | None = Field(default=None, description="false: the answer leaves the reasoning out.")

    @model_validator(mode="after")
    def _check_reasoning(self) -> Reasoned:
        self.reasoning_choice()
        if self.reasoning_format == "none" and not self.shows_reasoning:
            raise PydanticCustomError("invalid", "reasoning_format none excludes include_reasoning false")
        return self

    def reasoning_choice(self) -> ReasoningChoice:
        """How the client wants the model to reason."""
        nested, thinking = self.reasoning or Reasoning(), self.thinking
        by_type = {"enabled": True, "disabled": False}
        enabled = _only(
            {
                "enable_thinking": self.enable_thinking,
                "reasoning.enabled": nested.enabled,
                "thinking.type": None if thinking is None else by_type.get(thinking.type),
            }
        )
        effort = _only({"reasoning_effort": self.reasoning_effort, "reasoning.effort": nested.effort})
        budget = _only(
            {
                "reasoning_budget": self.reasoning_budget,
                "thinking_budget": self.thinking_budget,
                "reasoning.max_tokens": nested.max_tokens,
                "thinking.budget_tokens": None if thinking is None else thinking.budget_tokens,
            }
        )
        return ReasoningChoice(enabled, effort, None if budget == -1 else budget)

    @property
    def shows_reasoning(self) -> bool:
        """Whether answers contain the reasoning."""
        return self.include_reasoning is not False and not (self.reasoning and self.reasoning.exclude)

    @property
    def separates_reasoning(self) -> bool:
        """Whether reasoning is apart from the content."""
        return self.reasoning_format != "none"


def _only(values: dict[str, Any]) -> Any:
    """The value of parameters that are names of one thing."""
    given = {name: value for name, value in values.items() if value is not None}
    if len(set(given.values())) > 1:
        raise PydanticCustomError(
            "invalid", "{names} contradict each other: give one of them", {"names": " and ".join(given)}
        )
    return next(iter(given.values()), None)
