"""The requests and responses of `/v1/chat/completions`."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, Field, StringConstraints, model_validator
from pydantic_core import PydanticCustomError

from nybble.server.events import FinishReason
from nybble.server.protocols.schema import Count, Sampling, Strict, Usage

Name = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_.-]{1,64}$")]
Json = dict[str, Any]

# --- Requests ---------------------------------------------------------------------------------------------------------


class TextPart(Strict):
    """A part of a message."""

    type: Literal["text"]
    text: str


def _only_text(content: Any) -> Any:
    for part in content if isinstance(content, list) else ():
        kind = part.get("type") if isinstance(part, dict) else None
        if isinstance(kind, str) and kind != "text":
            raise PydanticCustomError(
                "unsupported", "this model reads text only, found a part of type {kind}", {"kind": repr(kind[:40])}
            )
    return content


Content = Annotated[str | list[TextPart], BeforeValidator(_only_text)]


class FunctionCall(Strict):
    """The function that the model called, and its arguments."""

    name: Name
    arguments: str = Field(description="A JSON object.")


class ToolCall(Strict):
    """A tool call of an earlier answer."""

    id: str
    type: Literal["function"] = "function"
    function: FunctionCall


class Message(Strict):
    """One turn of a conversation."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Content | None = None
    name: str | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None
    refusal: None = None

    @model_validator(mode="after")
    def _check_role(self) -> Message:
        if self.content is None and self.role != "assistant":
            raise PydanticCustomError("missing", "content is missing")
        if self.tool_calls and self.role != "assistant":
            raise PydanticCustomError("invalid", "tool_calls requires the role assistant")
        return self

    def for_template(self) -> dict[str, Any]:
        """The message for a chat template: the content as one string, the arguments of tool calls as values."""
        content = self.content if isinstance(self.content, str) else "\n".join(p.text for p in self.content or ())
        role = "system" if self.role == "developer" else self.role
        turn: dict[str, Any] = {"role": role, "content": content}
        if self.name is not None:
            turn["name"] = self.name
        if self.tool_call_id is not None:
            turn["tool_call_id"] = self.tool_call_id
        if self.tool_calls:
            turn["tool_calls"] = [
                {
                    "id": call.id,
                    "type": "function",
                    "function": {"name": call.function.name, "arguments": _arguments(call.function.arguments)},
                }
                for call in self.tool_calls
            ]
        return turn


def _arguments(text: str) -> Json:
    try:
        found = json.loads(text or "{}")
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise ValueError("messages: the arguments of a tool call are not a JSON object")
    return found


class FunctionDefinition(Strict):
    """A function that the model may call."""

    name: Name
    description: str | None = None
    parameters: Json | None = Field(default=None, description="A JSON Schema of the arguments.")
    strict: bool | None = None


class Tool(Strict):
    """A tool that the model may call."""

    type: Literal["function"]
    function: FunctionDefinition


class ChosenFunction(Strict):
    """The function that the model must call."""

    name: Name


class ChosenTool(Strict):
    """The tool that the model must call."""

    type: Literal["function"]
    function: ChosenFunction


class JsonSchema(Strict):
    """A JSON Schema that the answer follows."""

    name: Name
    description: str | None = None
    # "schema" is a method of pydantic's models.
    definition: Json = Field(alias="schema")
    strict: bool | None = Field(default=None, description="Ignored: the answer always follows the schema strictly.")


class ResponseFormat(Strict):
    """The format of the answer."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def _check_schema(self) -> ResponseFormat:
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise PydanticCustomError("invalid", "type json_schema requires json_schema, other types exclude it")
        return self

    def answer_schema(self) -> Json | None:
        """The JSON Schema that the answer follows; None for plain text."""
        if self.json_schema is not None:
            return self.json_schema.definition
        return {"type": "object"} if self.type == "json_object" else None


_RESERVED = frozenset({"self", "messages", "tools", "template", "add_generation_prompt"})
"""The variables of chat templates that the server sets itself."""


class ChatRequest(Sampling):
    """`POST /v1/chat/completions`."""

    messages: list[Message] = Field(min_length=1, max_length=4096)
    max_completion_tokens: Count | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = Field(default=None, ge=0, le=20)
    tools: list[Tool] | None = Field(default=None, max_length=128)
    tool_choice: Literal["none", "auto", "required"] | ChosenTool | None = None
    parallel_tool_calls: bool | None = Field(default=None, description="false: only the first call is returned.")
    response_format: ResponseFormat | None = None
    chat_template_kwargs: Json | None = Field(
        default=None,
        description='Extension of nybble: more variables for the chat template, such as {"enable_thinking": false}.',
    )

    @model_validator(mode="after")
    def _check_combinations(self) -> ChatRequest:
        if self.top_logprobs is not None and not self.logprobs:
            raise PydanticCustomError("invalid", "top_logprobs requires logprobs=true")
        if self.tool_choice not in (None, "none") and not self.tools:
            raise PydanticCustomError("invalid", "tool_choice requires tools")
        if isinstance(self.tool_choice, ChosenTool):
            name = self.tool_choice.function.name
            if all(tool.function.name != name for tool in self.tools or ()):
                raise PydanticCustomError("invalid", "tool_choice names a function that is not among the tools")
        if taken := _RESERVED.intersection(self.chat_template_kwargs or {}):
            raise PydanticCustomError(
                "invalid", "chat_template_kwargs must not contain {names}", {"names": sorted(taken)}
            )
        return self

    def options(self) -> dict[str, Any]:
        """The options that were given. Without a limit, an answer may fill the context."""
        given = super().options()
        given["max_tokens"] = self.max_completion_tokens or self.max_tokens
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
    refusal: None
    tool_calls: list[Call] | None = None


class ChatChoice(BaseModel):
    """One of the answers."""

    index: int
    message: Answer
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason


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
    tool_calls: list[CallDelta] | None = None


class ChunkChoice(BaseModel):
    """A piece of one of the answers."""

    index: int
    delta: Delta
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason | None


class ChatChunk(BaseModel):
    """A piece of the answers to a conversation."""

    id: str
    object: Literal["chat.completion.chunk"]
    created: int
    model: str
    choices: list[ChunkChoice]
    usage: Usage | None = None
