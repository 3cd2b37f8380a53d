"""The items of a conversation, as clients of the Responses API send them."""

from __future__ import annotations

import base64
import binascii
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Discriminator, Field, Tag, TypeAdapter
from pydantic_core import PydanticCustomError

from nybble.server.protocols.messages import Content
from nybble.server.protocols.strict import Strict

Id = Annotated[str, Field(max_length=200)]
_SEALED = "nybble:"
"""The beginning of reasoning that was given as encrypted content. It is only encoded: the client may read it anyway."""


class MessageItem(Strict):
    """A message of the user, of the developer, or an earlier one of the model."""

    type: Literal["message"] | None = None
    role: Literal["user", "assistant", "system", "developer"]
    content: Content
    id: Id | None = None
    status: str | None = Field(default=None, description="Ignored.")
    phase: str | None = Field(default=None, description="Ignored.")


class CallItem(Strict):
    """A function that the model called."""

    type: Literal["function_call"]
    call_id: Id
    name: Annotated[str, Field(min_length=1, max_length=256)]
    arguments: str
    id: Id | None = None
    status: str | None = Field(default=None, description="Ignored.")
    parsed_arguments: Any = Field(default=None, description="Ignored.")


class OutputItem(Strict):
    """What a function returned."""

    type: Literal["function_call_output"]
    call_id: Id
    output: Content
    id: Id | None = None
    status: str | None = Field(default=None, description="Ignored.")


class ThoughtPart(Strict):
    """A part of reasoning."""

    type: Literal["summary_text", "reasoning_text"]
    text: str


class ReasoningItem(Strict):
    """What the model thought before an earlier answer."""

    type: Literal["reasoning"]
    id: Id | None = None
    summary: list[ThoughtPart] | None = None
    content: list[ThoughtPart] | None = None
    encrypted_content: str | None = None
    status: str | None = Field(default=None, description="Ignored.")

    @property
    def text(self) -> str:
        """The reasoning."""
        parts = self.content or self.summary or []
        return "\n".join(part.text for part in parts) or unsealed(self.encrypted_content or "")


class ReferenceItem(Strict):
    """An item of a stored response."""

    type: Literal["item_reference"]
    id: Id


Known = MessageItem | CallItem | OutputItem | ReasoningItem
_KINDS = ("message", "function_call", "function_call_output", "reasoning", "item_reference")


def _kind(item: Any) -> str:
    found = item.get("type") if isinstance(item, dict) else getattr(item, "type", None)
    return f"[{found or 'message'}]"


def _only_known(items: Any) -> Any:
    """Refuses items of other kinds by name."""
    for item in items if isinstance(items, list) else ():
        kind = item.get("type") if isinstance(item, dict) else None
        if isinstance(kind, str) and kind not in _KINDS:
            raise PydanticCustomError(
                "unsupported",
                "items of type {kind} are not supported, expected {known}",
                {"kind": repr(kind[:60]), "known": " or ".join(_KINDS)},
            )
    return items


# The brackets keep the tags out of the names of parameters in errors.
Item = Annotated[
    Annotated[MessageItem, Tag("[message]")]
    | Annotated[CallItem, Tag("[function_call]")]
    | Annotated[OutputItem, Tag("[function_call_output]")]
    | Annotated[ReasoningItem, Tag("[reasoning]")]
    | Annotated[ReferenceItem, Tag("[item_reference]")],
    Discriminator(
        _kind,
        custom_error_type="unsupported",
        custom_error_message="Input should be an item of a known type",
    ),
]
Items = Annotated[list[Item], BeforeValidator(_only_known), Field(max_length=8192)]

ITEMS: TypeAdapter[list[Known]] = TypeAdapter(list[Item])  # type: ignore[arg-type]  # Stored items have none.


def sealed(text: str) -> str:
    """Reasoning as opaque content, which a client sends back."""
    return _SEALED + base64.b64encode(text.encode("utf-8", "replace")).decode()


def unsealed(content: str) -> str:
    """The reasoning of opaque content; empty for that of other servers."""
    if not content.startswith(_SEALED):
        return ""
    try:
        return base64.b64decode(content.removeprefix(_SEALED), validate=True).decode()
    except (binascii.Error, ValueError):
        return ""
