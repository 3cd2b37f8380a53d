"""The responses of `/v1/models`, `/health`, `/version` and `/props`."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel

from nybble.server.service import Service


class ModelCard(BaseModel):
    """A model that is served."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    context_length: int
    max_model_len: int
    """The context again, under vLLM's name."""
    parent: str | None = None
    """The base of a model with a LoRA adapter."""


def model_card(service: Service, name: str) -> ModelCard:
    """The card of a model of this name, which is served."""
    context = service.engine.model.info.context
    return ModelCard(
        id=name,
        object="model",
        created=service.created,
        owned_by="nybble",
        context_length=context,
        max_model_len=context,
        parent=None if name == service.name else service.name,
    )


class ModelList(BaseModel):
    """All models that are served."""

    object: Literal["list"]
    data: list[ModelCard]


class Health(BaseModel):
    """Whether the server accepts requests."""

    status: Literal["ok", "draining", "failed"]


class Version(BaseModel):
    """The version of the server."""

    version: str


class GenerationSettings(BaseModel):
    """The settings of answers."""

    n_ctx: int


class Properties(BaseModel):
    """The server as llama-server describes itself."""

    default_generation_settings: GenerationSettings
    total_slots: int
    model_path: str
    chat_template: str
    build_info: str
