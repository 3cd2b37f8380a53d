"""The messages of a conversation, as clients send them, and as chat templates receive them."""

from __future__ import annotations

from typing import Annotated, Any, Literal, get_args

from pydantic import BeforeValidator, Field, StringConstraints, model_validator
from pydantic_core import PydanticCustomError, from_json

from nybble.server.protocols.strict import Strict

Name = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_.-]{1,128}$")]
"""The name of a function. OpenAI allows 64 characters, Anthropic 128."""
Json = dict[str, Any]


class Part(Strict):
    """A part of a message."""

    type: Literal["text", "input_text", "output_text", "refusal", "thinking", "reasoning"]
    text: str | None = None
    refusal: str | None = None
    thinking: str | None = Field(default=None, description="Passed on to the chat template.")
    reasoning: str | None = Field(default=None, description="Passed on to the chat template.")
    signature: str | None = Field(default=None, description="Ignored.")
    cache_control: Any = Field(default=None, description="Ignored: prompts are always cached.")
    annotations: Any = Field(default=None, description="Ignored.")
    logprobs: Any = Field(default=None, description="Ignored.")

    @model_validator(mode="after")
    def _check_text(self) -> Part:
        name = self.type.rpartition("_")[2]
        if getattr(self, name) is None and not self.is_thought:
            raise PydanticCustomError("missing", "{name} is missing", {"name": name})
        return self

    @property
    def is_thought(self) -> bool:
        """Whether the part is what the model thought before an earlier answer."""
        return self.type in ("thinking", "reasoning")

    @property
    def content(self) -> str:
        """The text of the part."""
        return str(getattr(self, self.type.rpartition("_")[2]) or "")


_PARTS = get_args(Part.model_fields["type"].annotation)


def _only_text(content: Any) -> Any:
    for part in content if isinstance(content, list) else ():
        kind = part.get("type") if isinstance(part, dict) else None
        if isinstance(kind, str) and kind not in _PARTS:
            raise PydanticCustomError(
                "unsupported", "this model reads text only, found a part of type {kind}", {"kind": repr(kind[:40])}
            )
    return content


Content = Annotated[str | list[Part], BeforeValidator(_only_text)]


class FunctionCall(Strict):
    """A function that the model called, and its arguments."""

    name: str = Field(min_length=1, max_length=256)
    arguments: str | Json | None = Field(
        default=None, description="A JSON object, or the text of one. It may be cut off, as an answer may be."
    )
    parsed_arguments: Any = Field(default=None, description="Ignored.")

    def for_template(self) -> Json:
        """The call for a chat template, with the arguments as values."""
        return {"name": self.name, "arguments": _values(self.arguments)}


def _values(arguments: str | Json | None) -> Json:
    """The arguments of an earlier call, as far as they can be read."""
    if isinstance(arguments, dict):
        return arguments
    text = (arguments or "").strip()
    if not text:
        return {}
    try:
        found = from_json(text, allow_partial="trailing-strings")
        if isinstance(found, str):  # JSON within JSON.
            found = from_json(found, allow_partial="trailing-strings")
    except ValueError:
        found = text
    return found if isinstance(found, dict) else {} if found is None else {"arguments": found}


class ToolCall(Strict):
    """A tool call of an earlier answer."""

    id: str | None = None
    type: Literal["function"] = "function"
    function: FunctionCall
    index: int | None = Field(default=None, description="Ignored.")
    extra_content: Any = Field(default=None, description="Ignored.")
    provider_specific_fields: Any = Field(default=None, description="Ignored.")
    caller: Any = Field(default=None, description="Ignored.")


class Message(Strict):
    """One turn of a conversation. An earlier answer may come back as it was sent."""

    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: Content | None = None
    name: str | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None
    function_call: FunctionCall | None = None
    refusal: str | None = None
    reasoning_content: str | None = Field(default=None, description="Passed on to the chat template.")
    reasoning: Any = Field(default=None, description="Another name of reasoning_content, if it is a string.")
    annotations: Any = Field(default=None, description="Ignored.")
    cache_control: Any = Field(default=None, description="Ignored: prompts are always cached.")
    parsed: Any = Field(default=None, description="Ignored.")
    provider_specific_fields: Any = Field(default=None, description="Ignored.")
    extra_content: Any = Field(default=None, description="Ignored.")
    reasoning_details: Any = Field(default=None, description="Ignored.")
    thinking_blocks: Any = Field(default=None, description="Ignored.")
    type: Literal["text", "message"] | None = Field(default=None, description="Ignored.")
    id: str | None = Field(default=None, description="Ignored.")
    index: int | None = Field(default=None, description="Ignored.")

    @model_validator(mode="after")
    def _check_role(self) -> Message:
        if self.content is None and self.role in ("system", "developer", "user"):
            raise PydanticCustomError("missing", "content is missing")
        for name in ("tool_calls", "function_call"):
            if getattr(self, name) and self.role != "assistant":
                raise PydanticCustomError("invalid", "{name} requires the role assistant", {"name": name})
        return self

    def for_template(self) -> Json:
        """The message for a chat template: the content as one string, the arguments of tool calls as values."""
        role = {"developer": "system", "function": "tool"}.get(self.role, self.role)
        turn: Json = {"role": role, "content": self._text()}
        for name in ("name", "tool_call_id"):
            if (value := getattr(self, name)) is not None:
                turn[name] = value
        if reasoning := self._reasoning():
            turn["reasoning_content"] = reasoning
        calls = [(call.id, call.function) for call in self.tool_calls or ()]
        if self.function_call is not None:
            calls.append((None, self.function_call))
        if calls:
            turn["tool_calls"] = [
                # Mistral's templates require ids of nine characters.
                {"id": id or f"call{index:05}", "type": "function", "function": function.for_template()}
                for index, (id, function) in enumerate(calls)
            ]
        return turn

    def _reasoning(self) -> str:
        """What the model thought before this answer."""
        for given in (self.reasoning_content, self.reasoning):
            if isinstance(given, str) and given:
                return given
        parts = self.content if isinstance(self.content, list) else []
        return "\n".join(part.content for part in parts if part.is_thought and part.content)

    def _text(self) -> str:
        if isinstance(self.content, str):
            return self.content
        if self.content is None:
            return self.refusal or ""
        return "\n".join(part.content for part in self.content if not part.is_thought)
