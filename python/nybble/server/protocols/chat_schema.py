"""The requests and responses of `/v1/chat/completions`."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, Field, model_validator
from pydantic_core import PydanticCustomError

from nybble.server.events import FinishReason
from nybble.server.protocols.messages import Message, Name
from nybble.server.protocols.reasoning import Reasoned
from nybble.server.protocols.schema import Limit, Sampling, Usage
from nybble.server.protocols.strict import Off, Strict

Json = dict[str, Any]

# --- Requests ---------------------------------------------------------------------------------------------------------


class FunctionDefinition(Strict):
    """A function that the model may call."""

    name: Name
    description: str | None = None
    parameters: Json | None = Field(default=None, description="A JSON Schema of the arguments.")
    strict: bool | None = Field(default=None, description="Ignored: required calls always follow the schema strictly.")


class Tool(Strict):
    """A tool that the model may call."""

    type: Literal["function"]
    function: FunctionDefinition
    cache_control: Any = Field(default=None, description="Ignored: prompts are always cached.")


class ChosenFunction(Strict):
    """The function that the model must call."""

    name: Name


class ChosenTool(Strict):
    """The tool that the model must call."""

    type: Literal["function"]
    function: ChosenFunction


class AllowedTools(Strict):
    """The tools that the model may call, and whether it must call one of them."""

    mode: Literal["auto", "required"]
    tools: list[ChosenTool] = Field(min_length=1, max_length=128)


class AllowedChoice(Strict):
    """A choice among some of the tools."""

    type: Literal["allowed_tools"]
    allowed_tools: AllowedTools

    def names(self) -> set[str]:
        """The names of the functions that the model may call."""
        return {tool.function.name for tool in self.allowed_tools.tools}


_RESERVED = frozenset({"self", "messages", "tools", "template", "add_generation_prompt", "continue_final_message"})
"""The variables of chat templates that the server sets itself."""


class ChatRequest(Sampling, Reasoned):
    """`POST /v1/chat/completions`."""

    messages: list[Message] = Field(min_length=1, max_length=4096)
    max_completion_tokens: Limit | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = Field(default=None, ge=0, le=20)
    tools: list[Tool] | None = Field(default=None, max_length=128)
    tool_choice: Literal["none", "auto", "required", "any"] | ChosenTool | AllowedChoice | None = Field(
        default=None, description='"any" is another name of "required", as with Mistral.'
    )
    parallel_tool_calls: bool | None = Field(default=None, description="false: only the first call is returned.")
    functions: list[FunctionDefinition] | None = Field(
        default=None, max_length=128, description="The predecessor of tools."
    )
    function_call: Literal["none", "auto"] | ChosenFunction | None = Field(
        default=None, description="The predecessor of tool_choice."
    )
    modalities: list[Literal["text"]] | None = Field(default=None, description="Answers are always text.")
    verbosity: str | None = Field(default=None, description="Ignored.")
    input: Any = Field(
        default=None, description="Ignored: a parameter of other routes. The conversation is in messages."
    )
    echo: Off | None = None
    add_generation_prompt: bool | None = Field(default=None, description="The opposite of continue_final_message.")
    continue_final_message: bool | None = Field(
        default=None, description="Extension of nybble: continue the last message, which is an answer, as with vLLM."
    )
    chat_template_kwargs: Json | None = Field(
        default=None,
        description='Extension of nybble: more variables for the chat template, such as {"enable_thinking": false}.',
    )

    @model_validator(mode="after")
    def _check_combinations(self) -> ChatRequest:
        if self.top_logprobs and not self.logprobs:
            raise PydanticCustomError("invalid", "top_logprobs requires logprobs=true")
        if self.add_generation_prompt is not None and self.add_generation_prompt == self.continues:
            raise PydanticCustomError("invalid", "add_generation_prompt must be the opposite of continue_final_message")
        if self.continues and self.messages[-1].role != "assistant":
            raise PydanticCustomError("invalid", "continue_final_message requires a last message of the role assistant")
        if self.functions and self.tools:
            raise PydanticCustomError("invalid", "functions is the predecessor of tools: give one of them")
        if self.tool_choice not in (None, "none", "auto") and not self.tools:
            raise PydanticCustomError("invalid", "tool_choice requires tools")
        if isinstance(self.function_call, ChosenFunction) and not self.functions:
            raise PydanticCustomError("invalid", "function_call requires functions")
        known = [function.name for function in (*(tool.function for tool in self.tools or ()), *(self.functions or ()))]
        for param, chosen in (("tool_choice", self.tool_choice), ("function_call", self.function_call)):
            function = chosen.function if isinstance(chosen, ChosenTool) else chosen
            named = chosen.names() if isinstance(chosen, AllowedChoice) else set()
            if isinstance(function, ChosenFunction):
                named = {function.name}
            if not named.issubset(known):
                raise PydanticCustomError(
                    "invalid", "{param} names a function that is not among the tools", {"param": param}
                )
        if len({*known}) < len(known):
            raise PydanticCustomError("invalid", "tools: found two functions of the same name")
        if taken := _RESERVED.intersection(self.chat_template_kwargs or {}):
            raise PydanticCustomError(
                "invalid", "chat_template_kwargs must not contain {names}", {"names": sorted(taken)}
            )
        return self

    @property
    def continues(self) -> bool:
        """Whether the answer continues the last message."""
        return bool(self.continue_final_message)

    @property
    def uses_functions(self) -> bool:
        """Whether the client asks for calls by the predecessors of `tools`, which allow one call per answer."""
        return bool(self.functions)

    def callable_functions(self) -> dict[str, FunctionDefinition]:
        """The functions that the model may call, by the parameter that holds their schema."""
        if self.functions:
            return {f"functions.{index}.parameters": function for index, function in enumerate(self.functions)}
        return {
            f"tools.{index}.function.parameters": tool.function
            for index, tool in enumerate(self.tools or ())
            if not isinstance(self.tool_choice, AllowedChoice) or tool.function.name in self.tool_choice.names()
        }

    def choice(self) -> Literal["none", "auto", "required"] | str:
        """Which function the model must call: none, any, or the one of this name; or whether it may call any."""
        chosen = self.function_call if self.functions else self.tool_choice
        if isinstance(chosen, ChosenTool):
            return f"function {chosen.function.name}"
        if isinstance(chosen, ChosenFunction):
            return f"function {chosen.name}"
        if isinstance(chosen, AllowedChoice):
            return chosen.allowed_tools.mode
        return "required" if chosen == "any" else chosen or "auto"

    def options(self) -> dict[str, Any]:
        """The options that were given. Without a limit, an answer may fill the context."""
        given = super().options()
        limit = self.limit if self.max_completion_tokens is None else self.max_completion_tokens
        given["max_tokens"] = None if limit == -1 else limit
        if self.logprobs:
            given["logprobs"] = self.top_logprobs or 0
        return given


# --- Responses --------------------------------------------------------------------------------------------------------


class TopLogprob(BaseModel):
    """One of the likeliest tokens at a position."""

    token: str
    logprob: float
    bytes: list[int]


class ChatLogprob(TopLogprob):
    """A token of the answer."""

    top_logprobs: list[TopLogprob]


class ChatLogprobs(BaseModel):
    """The log-probabilities of the tokens of an answer."""

    content: list[ChatLogprob]
    refusal: None = None


class CalledFunction(BaseModel):
    """The function that the model calls. `arguments` is JSON."""

    name: str
    arguments: str


class Call(BaseModel):
    """A tool call."""

    id: str
    type: Literal["function"]
    function: CalledFunction


class FunctionDelta(BaseModel):
    """The next piece of a function call: first its name, then its arguments."""

    name: str | None = None
    arguments: str


class CallDelta(BaseModel):
    """The next piece of a tool call in a stream. The first piece holds the id and the name."""

    index: int
    id: str | None = None
    type: Literal["function"] | None = None
    function: FunctionDelta


class Answer(BaseModel):
    """The message of the model."""

    role: Literal["assistant"]
    content: str | None
    reasoning_content: str | None = None
    """What the model thought before the content."""
    refusal: None
    tool_calls: list[Call] | None = None
    function_call: CalledFunction | None = None


class ChatChoice(BaseModel):
    """One of the answers."""

    index: int
    message: Answer
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason | Literal["function_call"]


class ChatCompletion(BaseModel):
    """The answers to a conversation."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage


class Delta(BaseModel):
    """The next piece of a message."""

    role: Literal["assistant"] | None = None
    content: str | None = None
    reasoning_content: str | None = None
    tool_calls: list[CallDelta] | None = None
    function_call: FunctionDelta | None = None


class ChunkChoice(BaseModel):
    """A piece of one of the answers."""

    index: int
    delta: Delta
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason | Literal["function_call"] | None


class ChatChunk(BaseModel):
    """A piece of the answers to a conversation."""

    id: str
    object: Literal["chat.completion.chunk"]
    created: int
    model: str
    choices: list[ChunkChoice]
    usage: Usage | None = None
