"""The responses of `/v1/models`, `/health`, `/version` and `/props`."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel


class ModelCard(BaseModel):
    """A model that is served."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    context_length: int
    max_model_len: int
    """The context again, under vLLM's name."""


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
