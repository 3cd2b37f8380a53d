"""The content of messages in Anthropic's API: blocks of text, thinking, calls and their results."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Discriminator, Field, Tag
from pydantic_core import PydanticCustomError

from nybble.server.protocols.strict import Strict

Json = dict[str, Any]
Id = Annotated[str, Field(max_length=200)]


class Block(Strict):
    """A part of a message."""

    cache_control: Any = Field(default=None, description="Ignored: prompts are always cached.")


class TextBlock(Block):
    """Text."""

    type: Literal["text"]
    text: str
    citations: Any = Field(default=None, description="Ignored.")


class ThinkingBlock(Block):
    """What the model thought before an earlier answer."""

    type: Literal["thinking"]
    thinking: str
    signature: str | None = Field(default=None, description="Ignored.")


class RedactedThinkingBlock(Block):
    """Thoughts that only the server that wrote them can read. They are left out."""

    type: Literal["redacted_thinking"]
    data: str = Field(description="Ignored.")


class ToolUseBlock(Block):
    """A tool that the model called."""

    type: Literal["tool_use"]
    id: Id
    name: Annotated[str, Field(min_length=1, max_length=256)]
    input: Json
    caller: Any = Field(default=None, description="Ignored.")


def _only_text(blocks: Any) -> Any:
    return _only(blocks, ("text",))


class ToolResultBlock(Block):
    """What a tool returned."""

    type: Literal["tool_result"]
    tool_use_id: Id
    content: Annotated[str | list[TextBlock], BeforeValidator(_only_text)] | None = None
    is_error: bool | None = Field(default=None, description="Ignored: the content says what failed.")

    @property
    def text(self) -> str:
        """The content."""
        return text_of(self.content or "")


def _kind(block: Any) -> str:
    found = block.get("type") if isinstance(block, dict) else getattr(block, "type", None)
    return f"[{found}]"


def _only(blocks: Any, known: tuple[str, ...]) -> Any:
    """Refuses blocks of other types by name."""
    for block in blocks if isinstance(blocks, list) else ():
        kind = block.get("type") if isinstance(block, dict) else None
        if isinstance(kind, str) and kind not in known:
            raise PydanticCustomError(
                "unsupported",
                "found a block of type {kind}, expected {known}: this model reads text only",
                {"kind": repr(kind[:60]), "known": " or ".join(known)},
            )
    return blocks


def _only_known(blocks: Any) -> Any:
    return _only(blocks, ("text", "thinking", "redacted_thinking", "tool_use", "tool_result"))


# The brackets keep the tags out of the names of parameters in errors.
AnyBlock = Annotated[
    Annotated[TextBlock, Tag("[text]")]
    | Annotated[ThinkingBlock, Tag("[thinking]")]
    | Annotated[RedactedThinkingBlock, Tag("[redacted_thinking]")]
    | Annotated[ToolUseBlock, Tag("[tool_use]")]
    | Annotated[ToolResultBlock, Tag("[tool_result]")],
    Discriminator(
        _kind,
        custom_error_type="unsupported",
        custom_error_message="Input should be a block of a known type",
    ),
]
Content = Annotated[str | list[AnyBlock], BeforeValidator(_only_known)]
SystemText = Annotated[str | list[TextBlock], BeforeValidator(_only_text)]


def text_of(content: str | list[TextBlock]) -> str:
    """The text of a string or of blocks."""
    return content if isinstance(content, str) else "\n".join(block.text for block in content)
