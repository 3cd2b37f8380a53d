"""What clients may ask: OpenAI's parameters that are supported, and ours. Others are refused by name."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, StringConstraints, model_validator
from pydantic_core import PydanticCustomError

Number = Annotated[float, Field(allow_inf_nan=False)]
Penalty = Annotated[float, Field(ge=-2, le=2, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1, le=2**31 - 1)]
TokenId = Annotated[int, Field(ge=0, le=2**31 - 1)]
Stop = Annotated[str, StringConstraints(min_length=1, max_length=1000)]
Text = Annotated[str, StringConstraints(min_length=1)]
Grammar = Annotated[str, StringConstraints(min_length=1, max_length=100_000)]
Name = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_.-]{1,64}$")]
Json = dict[str, Any]

MOST_CHOICES = 16


class Strict(BaseModel):
    """A part of a request: no conversions, no parameters that nobody looks at."""

    model_config = ConfigDict(extra="forbid", strict=True)


class StreamOptions(Strict):
    """What a stream holds besides the text."""

    include_usage: bool = False


class Sampling(Strict):
    """What chat and completions have in common. What is not given is as in `nybble.SamplingOptions`."""

    model: str | None = Field(default=None, description="The name of the model; the one that is served if not given.")
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: int | None = Field(
        default=None, ge=1, le=MOST_CHOICES, description="How many answers; with a seed, answer i takes seed + i."
    )
    temperature: Annotated[float, Field(ge=0, le=2, allow_inf_nan=False)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)] | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    logit_bias: dict[str, Annotated[float, Field(ge=-100, le=100, allow_inf_nan=False)]] | None = Field(
        default=None, max_length=1024, description="Token ids, as strings, with what is added to their logits."
    )
    seed: int | None = Field(default=None, ge=-(2**63), lt=2**64)
    stop: Stop | Annotated[list[Stop], Field(max_length=16)] | None = None
    max_tokens: Count | None = None
    user: str | None = Field(default=None, description="Taken from clients that send it, and used for nothing.")
    top_k: TokenId | None = Field(default=None, description="Not OpenAI's: keep the K likeliest tokens; 0 keeps all.")
    min_p: Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)] | None = Field(
        default=None, description="Not OpenAI's: drop tokens less likely than this share of the likeliest one."
    )
    typical_p: Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)] | None = Field(
        default=None, description="Not OpenAI's: keep the most typical tokens that reach this probability."
    )
    repetition_penalty: Annotated[float, Field(gt=0, le=10, allow_inf_nan=False)] | None = Field(
        default=None, description="Not OpenAI's: divide the logits of tokens seen before."
    )
    penalty_window: TokenId | None = Field(
        default=None, description="Not OpenAI's: how many of the last tokens the penalties look at; 0: all."
    )
    regex: Grammar | None = Field(default=None, description="Not OpenAI's: a regular expression of the whole text.")
    grammar: Grammar | None = Field(default=None, description="Not OpenAI's: a Lark grammar of the whole text.")

    @model_validator(mode="after")
    def _fits_together(self) -> Sampling:
        if self.stream_options is not None and not self.stream:
            raise PydanticCustomError("invalid", "stream_options is for requests with stream=true")
        return self

    def options(self) -> dict[str, Any]:
        """The options as `nybble.SamplingOptions` names them, those that were given."""
        names = (
            "temperature", "top_p", "top_k", "min_p", "typical_p", "presence_penalty", "frequency_penalty",
            "repetition_penalty", "penalty_window", "stop", "max_tokens", "regex", "grammar",
        )  # fmt: skip
        given = {name: value for name in names if (value := getattr(self, name)) is not None}
        if self.logit_bias:
            given["logit_bias"] = {_token(key): bias for key, bias in self.logit_bias.items()}
        return given

    def seeds(self, count: int) -> list[int | None]:
        """A seed for each of `count` answers."""
        return [None if self.seed is None else (self.seed + i) % 2**64 for i in range(count)]


def _token(key: str) -> int:
    if not (key.isascii() and key.isdigit() and len(key) < 10):
        raise ValueError(f"logit_bias: found {key[:20]!r}, expected the id of a token")
    return int(key)


# --- Chat -------------------------------------------------------------------------------------------------------------


class TextPart(Strict):
    """A part of a message."""

    type: Literal["text"]
    text: str


def _only_text(content: Any) -> Any:
    for part in content if isinstance(content, list) else ():
        kind = part.get("type") if isinstance(part, dict) else None
        if isinstance(kind, str) and kind != "text":
            raise PydanticCustomError(
                "unsupported", "found a part of type {kind}, but this model reads text only", {"kind": repr(kind[:40])}
            )
    return content


Content = Annotated[str | list[TextPart], BeforeValidator(_only_text)]


class FunctionCall(Strict):
    """What the model called."""

    name: Name
    arguments: str = Field(description="A JSON object.")


class ToolCall(Strict):
    """One call of a function, as an earlier answer gave it."""

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
    def _fits_its_role(self) -> Message:
        if self.content is None and self.role != "assistant":
            raise PydanticCustomError("missing", "content is missing")
        if self.tool_calls and self.role != "assistant":
            raise PydanticCustomError("invalid", "tool_calls are for messages of the assistant")
        return self

    def for_template(self) -> dict[str, Any]:
        """The message as chat templates know it: content as one string, arguments as values."""
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
    """Something that the model may call."""

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
    """A JSON Schema, which the answer follows."""

    name: Name
    description: str | None = None
    # "schema" is a method of pydantic's models.
    definition: Json = Field(alias="schema")
    strict: bool | None = Field(default=None, description="Every schema is followed strictly, whatever this says.")


class ResponseFormat(Strict):
    """What form the answer has."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def _has_its_schema(self) -> ResponseFormat:
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise PydanticCustomError("invalid", "json_schema is what type json_schema needs, and no other")
        return self

    def schema_of_answer(self) -> Json | None:
        """The JSON Schema that the answer follows; None for any text."""
        if self.json_schema is not None:
            return self.json_schema.definition
        return {"type": "object"} if self.type == "json_object" else None


_OURS = frozenset({"self", "messages", "tools", "template", "add_generation_prompt"})
"""What chat templates get from the server, and clients do not set."""


class ChatRequest(Sampling):
    """`POST /v1/chat/completions`."""

    messages: list[Message] = Field(min_length=1, max_length=4096)
    max_completion_tokens: Count | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = Field(default=None, ge=0, le=20)
    tools: list[Tool] | None = Field(default=None, max_length=128)
    tool_choice: Literal["none", "auto", "required"] | ChosenTool | None = None
    parallel_tool_calls: bool | None = Field(default=None, description="false: only the first call is given.")
    response_format: ResponseFormat | None = None
    chat_template_kwargs: Json | None = Field(
        default=None,
        description='Not OpenAI\'s: what else the chat template looks at, such as {"enable_thinking": false}.',
    )

    @model_validator(mode="after")
    def _is_consistent(self) -> ChatRequest:
        if self.top_logprobs is not None and not self.logprobs:
            raise PydanticCustomError("invalid", "top_logprobs is for requests with logprobs=true")
        if self.tool_choice not in (None, "none") and not self.tools:
            raise PydanticCustomError("invalid", "tool_choice is for requests with tools")
        if isinstance(self.tool_choice, ChosenTool):
            name = self.tool_choice.function.name
            if all(tool.function.name != name for tool in self.tools or ()):
                raise PydanticCustomError("invalid", "tool_choice names a function that is not among the tools")
        if taken := _OURS.intersection(self.chat_template_kwargs or {}):
            raise PydanticCustomError("invalid", "chat_template_kwargs must not hold {names}", {"names": sorted(taken)})
        return self

    def options(self) -> dict[str, Any]:
        """As for all, and what only chat has; an answer may be as long as the context allows."""
        given = super().options()
        given["max_tokens"] = self.max_completion_tokens or self.max_tokens
        if self.logprobs:
            given["logprobs"] = self.top_logprobs or 0
        return given


# --- The others -------------------------------------------------------------------------------------------------------

Prompt = str | list[TokenId] | list[str] | list[list[TokenId]]


def texts_of(prompt: Prompt) -> list[str | list[int]]:
    """The prompts of a field that holds one or several."""
    if isinstance(prompt, str):
        return [prompt]
    if prompt and isinstance(prompt[0], int):
        return [[token for token in prompt if isinstance(token, int)]]
    return [item for item in prompt if not isinstance(item, int)]


class CompletionRequest(Sampling):
    """`POST /v1/completions`."""

    prompt: Prompt = Field(description="A text, ids of tokens, or several of either.")
    logprobs: int | None = Field(default=None, ge=0, le=20)
    echo: Literal[False] | None = None

    def options(self) -> dict[str, Any]:
        """As for all. Without a limit a completion has 16 tokens, as OpenAI's."""
        given = {"max_tokens": 16, **super().options()}
        if self.logprobs is not None:
            given["logprobs"] = self.logprobs
        return given


class EmbeddingRequest(Strict):
    """`POST /v1/embeddings`."""

    model: str | None = None
    input: Text | Annotated[list[Text], Field(min_length=1, max_length=256)] = Field(description="A text, or several.")
    encoding_format: Literal["float", "base64"] | None = None
    user: str | None = None
