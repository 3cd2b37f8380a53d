"""The requests and responses of Ollama's API."""

from __future__ import annotations

import math
import re
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

from nybble.server.errors import ApiError
from nybble.server.protocols.chat_schema import Tool

Json = dict[str, Any]

# --- Requests ---------------------------------------------------------------------------------------------------------


class Lenient(BaseModel):
    """A request. Unknown parameters are ignored, as Ollama does, and values are not converted."""

    model_config: ClassVar[ConfigDict] = ConfigDict(extra="ignore", strict=True)


class Options(Lenient):
    """How to sample. Options that concern how Ollama loads a model are ignored."""

    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    typical_p: float | None = None
    repeat_penalty: float | None = None
    repeat_last_n: int | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    num_predict: int | None = None
    mirostat: Literal[0, 2] | None = None
    mirostat_tau: float | None = None
    mirostat_eta: float | None = None
    tfs_z: Annotated[float, Field(ge=1, le=1)] | None = None

    def parameters(self) -> Json:
        """The options as parameters of the other protocols."""
        names = (
            "temperature", "top_k", "top_p", "min_p", "typical_p", "repeat_penalty", "presence_penalty",
            "frequency_penalty", "seed", "stop", "mirostat", "mirostat_tau", "mirostat_eta",
        )  # fmt: skip
        given = {name: value for name in names if (value := getattr(self, name)) is not None}
        if self.repeat_last_n is not None:
            given["repeat_last_n"] = max(self.repeat_last_n, -1)
        # Numbers below 0 stand for the largest effect or none, as 0 does.
        given |= {name: 0 for name in ("temperature", "top_k") if given.get(name, 0) < 0}
        # 0 loads a model without an answer, and negative numbers stand for no limit.
        given["max_tokens"] = -1 if self.num_predict is None or self.num_predict < 0 else max(self.num_predict, 1)
        return given


class KeptRequest(Lenient):
    """A request for a model, which says how long the model stays loaded."""

    model: str | None = None
    keep_alive: float | str | None = Field(
        default=None,
        description="Seconds, or a duration such as 5m. A server that loads its only model at the start ignores it.",
    )


_DURATION = re.compile(r"(\d+(?:\.\d*)?|\.\d+)(ns|us|µs|μs|ms|s|m|h)")
_UNITS = {"ns": 1e-9, "us": 1e-6, "µs": 1e-6, "μs": 1e-6, "ms": 1e-3, "s": 1, "m": 60, "h": 3600}


def keep_alive_seconds(given: float | str | None) -> float | None:
    """How long a model stays loaded after a request: infinitely for negative durations, None if not given.

    Raises:
        ApiError: It is not a duration.
    """
    if given is None or given == "":
        return None
    seconds = given if isinstance(given, int | float) else _duration(given)
    if seconds is None or math.isnan(seconds):
        message = f"keep_alive: found {given!r:.100}, expected seconds or a duration such as 5m or 1h30m"
        raise ApiError(400, message, param="keep_alive")
    return math.inf if seconds < 0 else float(seconds)


def _duration(text: str) -> float | None:
    """The seconds of a duration as Go writes it; None if it is none."""
    sign = -1 if text.startswith("-") else 1
    digits = text[1:] if text[0] in "+-" else text
    if re.fullmatch(r"\d+(\.\d*)?", digits):
        return sign * float(digits)
    if not re.fullmatch(f"(?:{_DURATION.pattern})+", digits):
        return None
    return sign * sum(float(number) * _UNITS[unit] for number, unit in _DURATION.findall(digits))


class OllamaRequest(KeptRequest):
    """A request to generate text."""

    stream: bool | None = Field(default=None, description="Answers are streams unless this is false.")
    format: Literal["", "json"] | Json | None = None
    options: Options | None = None
    think: bool | str | None = Field(default=None, description="Whether to reason, or how much.")
    logprobs: bool | None = None
    top_logprobs: int | None = None
    truncate: bool | None = Field(default=None, description="Ignored: a prompt that does not fit is an error.")
    shift: bool | None = Field(default=None, description="Ignored.")

    def parameters(self) -> Json:
        """The parameters of the other protocols."""
        given: Json = {"model": self.model, **(self.options or Options()).parameters()}
        if self.format == "json":
            given["response_format"] = {"type": "json_object"}
        elif isinstance(self.format, dict):
            given["json_schema"] = self.format
        return given

    def chat_parameters(self) -> Json:
        """The parameters that only chats have."""
        given: Json = {"logprobs": self.logprobs, "top_logprobs": self.top_logprobs if self.logprobs else None}
        if isinstance(self.think, bool):
            given["enable_thinking"] = self.think
        elif self.think:
            given["reasoning_effort"] = self.think
        return given


class OllamaFunction(Lenient):
    """A function that the model called."""

    name: str
    arguments: Json | str | None = None
    index: int | None = None


class OllamaCall(Lenient):
    """A tool call of an earlier answer."""

    id: str | None = None
    type: str | None = None
    function: OllamaFunction


def _without_images(images: list[Any] | None) -> None:
    if images:
        raise PydanticCustomError("unsupported", "this model reads text only, found images")


class OllamaMessage(Lenient):
    """One turn of a conversation."""

    role: str
    content: str | None = None
    thinking: str | None = None
    images: list[Any] | None = None
    tool_calls: list[OllamaCall] | None = None
    tool_name: str | None = None
    tool_call_id: str | None = None

    @model_validator(mode="after")
    def _check_images(self) -> OllamaMessage:
        _without_images(self.images)
        return self

    def message(self) -> Json:
        """The message as OpenAI's clients send it."""
        calls = [
            {"id": call.id, "function": {"name": call.function.name, "arguments": call.function.arguments}}
            for call in self.tool_calls or ()
        ]
        return {
            "role": self.role,
            "content": self.content or "",
            "reasoning_content": self.thinking,
            "name": self.tool_name,
            "tool_call_id": self.tool_call_id,
            "tool_calls": calls or None,
        }


class OllamaChatRequest(OllamaRequest):
    """`POST /api/chat`."""

    messages: list[OllamaMessage] | None = None
    tools: list[Tool] | None = None


class OllamaGenerateRequest(OllamaRequest):
    """`POST /api/generate`."""

    prompt: str | None = None
    system: str | None = None
    raw: bool | None = Field(default=None, description="Use the prompt as it is, without the chat template.")
    suffix: str | None = Field(default=None, description="The text after the answer. The prompt is used as it is.")
    template: Literal[""] | None = None
    context: Annotated[list[Any], Field(max_length=0)] | None = None
    images: list[Any] | None = None
    width: Literal[0] | None = None
    height: Literal[0] | None = None
    steps: Literal[0] | None = None

    @model_validator(mode="after")
    def _check_images(self) -> OllamaGenerateRequest:
        _without_images(self.images)
        return self


class OllamaEmbedRequest(KeptRequest):
    """`POST /api/embed`."""

    input: str | list[str]
    truncate: bool | None = Field(default=None, description="false: an input that does not fit is an error.")
    dimensions: int | None = Field(default=None, ge=1)
    options: Options | None = None


class OllamaEmbeddingsRequest(KeptRequest):
    """`POST /api/embeddings`, the predecessor of `/api/embed`."""

    prompt: str
    options: Options | None = None


class ShowRequest(Lenient):
    """`POST /api/show`."""

    model: str | None = None
    name: str | None = Field(default=None, description="The predecessor of model.")
    verbose: bool | None = None
    system: str | None = None


# --- Responses --------------------------------------------------------------------------------------------------------


class OllamaLogprob(BaseModel):
    """The log-probability of a token."""

    token: str
    logprob: float
    bytes: list[int]
    top_logprobs: list[Json] | None = None


class AnsweredFunction(BaseModel):
    """The function that the model calls."""

    name: str
    arguments: Json


class AnsweredCall(BaseModel):
    """A tool call."""

    id: str
    function: AnsweredFunction


class AnsweredMessage(BaseModel):
    """The message of the model, or a piece of it."""

    role: Literal["assistant"] = "assistant"
    content: str
    thinking: str | None = None
    tool_calls: list[AnsweredCall] | None = None


class OllamaAnswer(BaseModel):
    """An answer, or a piece of it. Durations are in nanoseconds."""

    model: str
    created_at: str
    message: AnsweredMessage | None = None
    response: str | None = None
    thinking: str | None = None
    logprobs: list[OllamaLogprob] | None = None
    done: bool
    done_reason: Literal["stop", "length", "load", "unload"] | None = None
    total_duration: int | None = None
    load_duration: int | None = None
    prompt_eval_count: int | None = None
    prompt_eval_duration: int | None = None
    eval_count: int | None = None
    eval_duration: int | None = None
