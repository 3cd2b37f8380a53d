"""The responses of `/v1/models`, `/health`, `/version` and `/props`."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel

from nybble._native import __version__
from nybble.server.pool.entry import Entry
from nybble.server.pool.pool import Pool


class ModelCard(BaseModel):
    """A model that is served."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    context_length: int | None
    """None for a model of a repository that has not been downloaded yet."""
    max_model_len: int | None
    """The context again, under vLLM's name."""
    parent: str | None = None
    """The base of a model with a LoRA adapter."""
    loaded: bool | None = None
    """Whether the model is in memory. Not said by servers that load their only model at the start."""
    aliases: list[str] | None = None
    """Other names of the model. Not said by servers that load their only model at the start."""


def model_cards(pool: Pool) -> list[ModelCard]:
    """The cards of all models, each followed by those of itself with its LoRA adapters."""
    return [model_card(pool, entry, lora) for entry in pool.entries for lora in (None, *entry.lora_names)]


def model_card(pool: Pool, entry: Entry, lora: str | None = None) -> ModelCard:
    """The card of a model, or of the model with a LoRA adapter."""
    card = ModelCard(
        id=entry.name if lora is None else f"{entry.name}:{lora}",
        object="model",
        created=entry.created,
        owned_by="nybble",
        context_length=entry.context,
        max_model_len=entry.context,
        parent=None if lora is None else entry.name,
    )
    if pool.fixed is None:
        card.loaded = entry.state == "loaded"
        card.aliases = [*entry.aliases] if lora is None else [f"{alias}:{lora}" for alias in entry.aliases]
    return card


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

    n_ctx: int | None


class Properties(BaseModel):
    """The server as llama-server describes itself."""

    default_generation_settings: GenerationSettings
    total_slots: int
    model_path: str
    chat_template: str
    build_info: str
    models: list[ModelCard] | None = None
    """All models. Not listed by servers that load their only model at the start."""


def properties(pool: Pool, model: str | None) -> Properties:
    """The properties of the server and of a model, which is not loaded for this: its template is empty until it is.

    Raises:
        ApiError: There is no such model.
    """
    entry = pool.names.find(model)
    templates = {} if entry.service is None else entry.service.engine.model.tokenizer.chat_templates
    found = Properties(
        default_generation_settings=GenerationSettings(n_ctx=entry.context),
        total_slots=entry.settings.max_answers,
        model_path=entry.name,
        chat_template=templates.get("default", ""),
        build_info=f"nybble {__version__}",
    )
    if pool.fixed is None:
        found.models = model_cards(pool)
    return found
