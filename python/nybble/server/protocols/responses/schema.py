"""The requests and responses of `/v1/responses`."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, Field, model_validator
from pydantic_core import PydanticCustomError

from nybble.server.events import AnswerUsage
from nybble.server.protocols.messages import Name
from nybble.server.protocols.reasoning import Reasoned
from nybble.server.protocols.responses.items import Items
from nybble.server.protocols.schema import Count, Sampler
from nybble.server.protocols.strict import Off, Strict

Json = dict[str, Any]

# --- Requests ---------------------------------------------------------------------------------------------------------


class FunctionTool(Strict):
    """A function that the model may call."""

    type: Literal["function"]
    name: Name
    description: str | None = None
    parameters: Json | None = Field(default=None, description="A JSON Schema of the arguments.")
    strict: bool | None = Field(default=None, description="Ignored: required calls always follow the schema strictly.")


def _only_functions(tools: Any) -> Any:
    for tool in tools if isinstance(tools, list) else ():
        kind = tool.get("type") if isinstance(tool, dict) else None
        if isinstance(kind, str) and kind != "function":
            raise PydanticCustomError(
                "unsupported",
                "tools of type {kind} are not supported, expected functions, which the client runs",
                {"kind": repr(kind[:60])},
            )
    return tools


class ChosenFunction(Strict):
    """The function that the model must call."""

    type: Literal["function"]
    name: Name


class AllowedFunctions(Strict):
    """The functions that the model may call, and whether it must call one of them."""

    type: Literal["allowed_tools"]
    mode: Literal["auto", "required"]
    tools: list[ChosenFunction] = Field(min_length=1, max_length=128)


class TextFormat(Strict):
    """The format of the answer."""

    type: Literal["text", "json_object", "json_schema"]
    name: str | None = Field(default=None, max_length=200)
    description: str | None = None
    # "schema" is a method of pydantic's models.
    definition: Json | None = Field(default=None, alias="schema")
    strict: bool | None = Field(default=None, description="Ignored: the answer always follows the schema strictly.")

    @model_validator(mode="after")
    def _check_schema(self) -> TextFormat:
        if (self.type == "json_schema") != (self.definition is not None):
            raise PydanticCustomError("invalid", "type json_schema requires schema, and other types exclude it")
        return self


class TextConfig(Strict):
    """What the text of the answer is like."""

    format: TextFormat | None = None
    verbosity: str | None = Field(default=None, description="Ignored.")


class StreamOptions(Strict):
    """What a stream contains."""

    include_obfuscation: bool | None = Field(default=None, description="Ignored.")


Included = Literal[
    "reasoning.encrypted_content",
    "message.output_text.logprobs",
    "message.input_image.image_url",
    "file_search_call.results",
    "web_search_call.results",
    "web_search_call.action.sources",
    "computer_call_output.output.image_url",
    "code_interpreter_call.outputs",
]
"""The first two add something. The others concern items that there are none of."""


class Conversation(Sampler, Reasoned):
    """The parameters of a request that its prompt depends on."""

    model: str | None = Field(default=None, description="The name of the model; the served model if omitted.")
    input: str | Items | None = Field(
        default=None, description="A message of the user, or the items of a conversation."
    )
    instructions: str | None = Field(default=None, description="A system message before the conversation.")
    previous_response_id: Annotated[str, Field(max_length=200)] | None = Field(
        default=None, description="A stored response, whose conversation this request continues."
    )
    tools: Annotated[list[FunctionTool], Field(max_length=128), BeforeValidator(_only_functions)] | None = None
    tool_choice: Literal["none", "auto", "required"] | ChosenFunction | AllowedFunctions | None = None
    parallel_tool_calls: bool | None = Field(default=None, description="false: only the first call is returned.")
    text: TextConfig | None = None
    truncation: Literal["disabled", "auto"] | None = Field(
        default=None,
        description="auto: a conversation that does not fit loses its oldest turns. Otherwise it is an error.",
    )
    chat_template_kwargs: Json | None = Field(
        default=None, description="Extension of nybble: more variables for the chat template."
    )


class ResponsesRequest(Conversation):
    """`POST /v1/responses`."""

    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_output_tokens: Count | None = None
    top_logprobs: int | None = Field(default=None, ge=0, le=20)
    include: list[Included] | None = Field(default=None, max_length=20)
    store: bool | None = Field(
        default=None, description="Whether to keep the response for previous_response_id, true by default."
    )
    metadata: dict[str, str] | None = Field(default=None, max_length=16)
    background: Off | None = None
    max_tool_calls: int | None = Field(default=None, description="Ignored: the client runs all tools.")
    user: str | None = Field(default=None, description="Ignored.")
    safety_identifier: str | None = Field(default=None, description="Ignored.")
    service_tier: str | None = Field(default=None, description="Ignored.")
    prompt_cache_key: str | None = Field(default=None, description="Ignored: prompts are always cached.")
    prompt_cache_retention: str | None = Field(default=None, description="Ignored.")

    @model_validator(mode="after")
    def _check_stream_options(self) -> ResponsesRequest:
        if self.stream_options is not None and not self.stream:
            raise PydanticCustomError("invalid", "stream_options requires stream=true")
        return self

    @property
    def wants_logprobs(self) -> bool:
        """Whether text comes with the log-probabilities of its tokens."""
        return "message.output_text.logprobs" in (self.include or ())


# --- Responses --------------------------------------------------------------------------------------------------------


class OutputText(BaseModel):
    """The text of a message."""

    type: Literal["output_text"] = "output_text"
    text: str
    annotations: list[Any] = Field(default_factory=list)
    logprobs: list[Any] = Field(default_factory=list)


class ReasoningText(BaseModel):
    """The text of reasoning."""

    type: Literal["reasoning_text"] = "reasoning_text"
    text: str


Status = Literal["in_progress", "completed", "incomplete"]


class MessageOutput(BaseModel):
    """A message of the model."""

    type: Literal["message"] = "message"
    id: str
    status: Status
    role: Literal["assistant"] = "assistant"
    content: list[OutputText]


class ReasoningOutput(BaseModel):
    """What the model thought."""

    type: Literal["reasoning"] = "reasoning"
    id: str
    status: Status
    summary: list[Any] = Field(default_factory=list)
    content: list[ReasoningText]
    encrypted_content: str | None = None


class CallOutput(BaseModel):
    """A function that the model calls. `arguments` is JSON."""

    type: Literal["function_call"] = "function_call"
    id: str
    call_id: str
    name: str
    arguments: str
    status: Status


Output = MessageOutput | ReasoningOutput | CallOutput


class InputDetails(BaseModel):
    """Where the tokens of a prompt came from."""

    cached_tokens: int


class OutputDetails(BaseModel):
    """What the tokens of an answer are."""

    reasoning_tokens: int


class ResponseUsage(BaseModel):
    """The tokens of a request and its answer."""

    input_tokens: int
    input_tokens_details: InputDetails
    output_tokens: int
    output_tokens_details: OutputDetails
    total_tokens: int

    @classmethod
    def of(cls, usage: AnswerUsage) -> ResponseUsage:
        """The usage as clients receive it."""
        return cls(
            input_tokens=usage.prompt_tokens,
            input_tokens_details=InputDetails(cached_tokens=usage.cached_tokens),
            output_tokens=usage.completion_tokens,
            output_tokens_details=OutputDetails(reasoning_tokens=usage.reasoning_tokens),
            total_tokens=usage.total_tokens,
        )


class ResponseError(BaseModel):
    """Why an answer failed."""

    code: str
    message: str


class Incomplete(BaseModel):
    """Why an answer is incomplete."""

    reason: Literal["max_output_tokens"]


class ResponseObject(BaseModel):
    """An answer with the parameters of its request."""

    id: str
    object: Literal["response"] = "response"
    created_at: int
    completed_at: int | None = None
    status: Literal["in_progress", "completed", "incomplete", "failed"]
    background: Literal[False] = False
    error: ResponseError | None = None
    incomplete_details: Incomplete | None = None
    instructions: str | None
    max_output_tokens: int | None
    max_tool_calls: int | None
    metadata: dict[str, str]
    model: str
    output: list[Output]
    parallel_tool_calls: bool
    previous_response_id: str | None
    prompt_cache_key: str | None
    reasoning: Json
    safety_identifier: str | None
    service_tier: Literal["default"] = "default"
    store: bool
    temperature: float
    text: Json
    tool_choice: Any
    tools: list[Any]
    top_logprobs: int
    top_p: float
    truncation: Literal["disabled", "auto"] = "disabled"
    usage: ResponseUsage | None = None
    user: str | None


class ItemList(BaseModel):
    """The input of a stored response, a page at a time."""

    object: Literal["list"] = "list"
    data: list[Any]
    first_id: str | None
    last_id: str | None
    has_more: bool


class Deleted(BaseModel):
    """A response that is no longer stored."""

    id: str
    object: Literal["response"] = "response"
    deleted: Literal[True] = True


class TokenCount(BaseModel):
    """The tokens of a prompt."""

    object: Literal["response.input_tokens"] = "response.input_tokens"
    input_tokens: int
