"""The requests and responses of `/v1/messages`."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, Field, StringConstraints, model_validator
from pydantic_core import PydanticCustomError

from nybble.server.protocols.anthropic.blocks import Content, Json, SystemText, ToolResultBlock, ToolUseBlock
from nybble.server.protocols.messages import Name
from nybble.server.protocols.reasoning import Effort
from nybble.server.protocols.schema import Count, Repetition, Stop
from nybble.server.protocols.strict import Off, Strict

# --- Requests ---------------------------------------------------------------------------------------------------------


class Message(Strict):
    """One turn of a conversation."""

    role: Literal["user", "assistant", "system"]
    content: Content

    @model_validator(mode="after")
    def _check_role(self) -> Message:
        for block in self.content if isinstance(self.content, list) else ():
            expected = {ToolResultBlock: "user", ToolUseBlock: "assistant"}.get(type(block), self.role)
            if self.role != expected:
                raise PydanticCustomError(
                    "invalid", "blocks of type {kind} require the role {role}", {"kind": block.type, "role": expected}
                )
        return self


def _only_custom(tools: Any) -> Any:
    for tool in tools if isinstance(tools, list) else ():
        kind = tool.get("type") if isinstance(tool, dict) else None
        if isinstance(kind, str) and kind != "custom":
            raise PydanticCustomError(
                "unsupported",
                "tools of type {kind} are not supported, expected custom tools, which the client runs",
                {"kind": repr(kind[:60])},
            )
    return tools


class Tool(Strict):
    """A tool that the model may call."""

    name: Name
    description: str | None = None
    input_schema: Json = Field(description="A JSON Schema of the input.")
    type: Literal["custom"] | None = None
    strict: bool | None = Field(default=None, description="Ignored: required calls always follow the schema strictly.")
    cache_control: Any = Field(default=None, description="Ignored: prompts are always cached.")
    eager_input_streaming: bool | None = Field(default=None, description="Ignored: input always comes at once.")
    input_examples: list[Json] | None = Field(default=None, description="Ignored: no chat template has a place for it.")
    allowed_callers: list[Literal["direct"]] | None = None
    defer_loading: Off | None = None


class ToolChoice(Strict):
    """Whether the model must call a tool, and which."""

    type: Literal["auto", "any", "tool", "none"]
    name: Name | None = None
    disable_parallel_tool_use: bool | None = Field(default=None, description="true: only the first call is returned.")

    @model_validator(mode="after")
    def _check_name(self) -> ToolChoice:
        if (self.type == "tool") != (self.name is not None):
            raise PydanticCustomError("invalid", "type tool requires name, and other types exclude it")
        return self


class Thinking(Strict):
    """Whether to reason, and for how many tokens."""

    type: Literal["enabled", "disabled", "adaptive"]
    budget_tokens: Annotated[int, Field(ge=0, le=2**31 - 1)] | None = None
    display: Literal["summarized", "omitted"] | None = Field(
        default=None, description="omitted: the answer leaves the reasoning out. Otherwise it is given as it is."
    )


class OutputFormat(Strict):
    """The JSON Schema that the answer follows."""

    type: Literal["json_schema"]
    # "schema" is a method of pydantic's models.
    definition: Json = Field(alias="schema")


class OutputConfig(Strict):
    """How the model answers."""

    effort: Effort | None = Field(default=None, description="How much to reason, for chat templates that know efforts.")
    format: OutputFormat | None = None


class ClearThinking(Strict):
    """Which earlier reasoning the prompt has."""

    type: Annotated[str, StringConstraints(pattern=r"^clear_thinking_\d+$")]
    keep: Any = None


class ContextManagement(Strict):
    """How a long conversation is shortened."""

    edits: list[ClearThinking] | None = Field(
        default=None, description="Ignored: the chat template decides which earlier reasoning the prompt has."
    )


class Metadata(Strict):
    """Who sends the request."""

    user_id: str | None = Field(default=None, description="Ignored.")


class Conversation(Strict):
    """The parameters of a request that its prompt depends on."""

    model: str | None = Field(default=None, description="The name of the model; the served model if omitted.")
    messages: list[Message] = Field(min_length=1, max_length=8192)
    system: SystemText | None = None
    tools: Annotated[list[Tool], Field(max_length=128), BeforeValidator(_only_custom)] | None = None
    tool_choice: ToolChoice | None = None
    thinking: Thinking | None = None
    output_config: OutputConfig | None = None
    context_management: ContextManagement | None = None
    cache_control: Any = Field(default=None, description="Ignored: prompts are always cached.")
    chat_template_kwargs: Json | None = Field(
        default=None, description="Extension of nybble: more variables for the chat template."
    )

    @model_validator(mode="after")
    def _check_tools(self) -> Conversation:
        chosen = self.tool_choice
        if chosen is None or chosen.type in ("auto", "none"):
            return self
        names = [tool.name for tool in self.tools or ()]
        if not names:
            raise PydanticCustomError("invalid", "tool_choice requires tools")
        if chosen.name is not None and chosen.name not in names:
            raise PydanticCustomError("invalid", "tool_choice names a tool that is not among the tools")
        return self


class MessagesRequest(Conversation):
    """`POST /v1/messages`."""

    max_tokens: Count
    stream: bool | None = None
    stop_sequences: Annotated[list[Stop], Field(max_length=16)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2, allow_inf_nan=False)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)] | None = None
    top_k: Annotated[int, Field(ge=-1, le=2**31 - 1)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)] | None = Field(
        default=None, description="Extension of nybble."
    )
    repetition_penalty: Repetition | None = Field(default=None, description="Extension of nybble.")
    seed: int | None = Field(default=None, ge=-(2**63), lt=2**64, description="Extension of nybble.")
    metadata: Metadata | None = None
    service_tier: str | None = Field(default=None, description="Ignored.")
    inference_geo: str | None = Field(default=None, description="Ignored.")
    user_profile_id: str | None = Field(default=None, description="Ignored.")
    workspace_id: str | None = Field(default=None, description="Ignored.")
    diagnostics: Any = Field(default=None, description="Ignored: prompts are always cached.")
    speed: Literal["standard"] | None = None


# --- Responses --------------------------------------------------------------------------------------------------------


class AnsweredText(BaseModel):
    """Text of the model."""

    type: Literal["text"] = "text"
    text: str
    citations: None = None


class AnsweredThinking(BaseModel):
    """What the model thought."""

    type: Literal["thinking"] = "thinking"
    thinking: str
    signature: str


class AnsweredCall(BaseModel):
    """A tool that the model calls."""

    type: Literal["tool_use"] = "tool_use"
    id: str
    name: str
    input: Json


AnsweredBlock = AnsweredText | AnsweredThinking | AnsweredCall
StopReason = Literal["end_turn", "max_tokens", "stop_sequence", "tool_use"]


class MessageUsage(BaseModel):
    """The tokens of a request and its answer. `input_tokens` are those that were computed."""

    input_tokens: int
    cache_creation_input_tokens: int = 0
    cache_read_input_tokens: int = 0
    output_tokens: int


class AnsweredMessage(BaseModel):
    """The message of the model."""

    id: str
    type: Literal["message"] = "message"
    role: Literal["assistant"] = "assistant"
    model: str
    content: list[AnsweredBlock]
    stop_reason: StopReason | None = None
    stop_sequence: str | None = None
    usage: MessageUsage


class TokenCount(BaseModel):
    """The tokens of a prompt."""

    input_tokens: int


class ErrorDetail(BaseModel):
    """An error."""

    type: str
    message: str


class ErrorResponse(BaseModel):
    """The body of every response that is not a success."""

    type: Literal["error"]
    error: ErrorDetail
