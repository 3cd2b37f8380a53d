"""Loads and unloads LoRA adapters while the server runs, with vLLM's routes and names."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Annotated, Any, Literal

from fastapi import FastAPI, Request
from pydantic import BaseModel, Field

from nybble.server.errors import ApiError, as_api_errors
from nybble.server.options import check_adapter_name
from nybble.server.pool.entry import Entry
from nybble.server.pool.pool import Pool
from nybble.server.protocols.models import ModelCard, model_card
from nybble.server.protocols.strict import Strict
from nybble.server.service import Service

MAX_ADAPTERS = 256
"""Adapters that clients may load. Each takes memory."""


class LoadAdapterRequest(Strict):
    """`POST /v1/load_lora_adapter`."""

    lora_name: str = Field(description="The name of the adapter. The model `base:name` has it.")
    lora_path: str = Field(description="The folder or file, relative to the server's folder of adapters.")
    model: str | None = Field(default=None, description="The base; the first model of the server if not given.")


class UnloadAdapterRequest(Strict):
    """`POST /v1/unload_lora_adapter`."""

    lora_name: Annotated[str, Field(description="The name of the adapter.")]
    model: str | None = Field(default=None, description="The base; the first model of the server if not given.")


class Unloaded(BaseModel):
    """An adapter that was removed. Answers that it computes are finished."""

    id: str
    object: Literal["model"]
    deleted: bool


def add_adapter_routes(app: FastAPI, pool: Pool, folder: Path, key: list[Any]) -> None:
    """Adds the routes, which load adapters from `folder` and from nowhere else."""

    @app.post("/v1/load_lora_adapter", dependencies=key)
    async def load(request: Request, body: LoadAdapterRequest) -> ModelCard:
        """Load a LoRA adapter, or replace the one of this name."""
        with as_api_errors("lora_name"):
            check_adapter_name(body.lora_name)
        entry = pool.names.find(body.model)
        _check_free(pool, entry, body.lora_name)
        path = _inside(folder, body.lora_path)
        service = await pool.lease(request, entry.name)
        # One at a time, as other work with the model itself.
        async with service.embedding:
            loaded = service.engine.model.adapters
            if body.lora_name not in loaded and len(loaded) >= MAX_ADAPTERS:
                message = f"found {MAX_ADAPTERS} adapters, expected fewer; unload one"
                raise ApiError(400, message, code="too_many_adapters")
            async with pool.adding_adapter(entry, body.lora_name, path):
                await service.in_thread(lambda: _load(service, body.lora_name, path))
        return model_card(pool, entry, body.lora_name)

    @app.post("/v1/unload_lora_adapter", dependencies=key)
    async def unload(body: UnloadAdapterRequest) -> Unloaded:
        """Remove a LoRA adapter."""
        entry = pool.names.find(body.model)
        if body.lora_name not in entry.lora_names:
            message = f"the adapter {body.lora_name!r:.200} does not exist"
            raise ApiError(404, message, param="lora_name", code="adapter_not_found")
        # One at a time with loading, so that an adapter is removed after it has been loaded.
        async with contextlib.nullcontext() if entry.service is None else entry.service.embedding:
            pool.remove_adapter(entry, body.lora_name)
        return Unloaded(id=f"{entry.name}:{body.lora_name}", object="model", deleted=True)


def _check_free(pool: Pool, entry: Entry, name: str) -> None:
    """Refuses a name with which a request would ask for another model.

    Raises:
        ApiError: There is such a model.
    """
    for base in (entry.name, *entry.aliases):
        if pool.names.is_taken(model := f"{base}:{name}"):
            raise ApiError(400, f"lora_name: found {name!r}, but {model!r} is another model", param="lora_name")


def _inside(folder: Path, name: str) -> Path:
    """The path of an adapter in the folder, after links.

    Raises:
        ApiError: The path leaves the folder, or nothing is there.
    """
    refused = ApiError(400, f"lora_path: found {name!r:.200}, expected a path in the folder", param="lora_path")
    try:
        folder = folder.resolve()
        path = (folder / name).resolve()
        exists = path.exists()
    except (OSError, ValueError, RuntimeError):  # Too long, a zero byte, a circle of links.
        raise refused from None
    if path == folder or not path.is_relative_to(folder):
        raise refused
    if not exists:
        raise ApiError(404, f"lora_path: found {name!r:.200}, which does not exist", param="lora_path")
    return path


def _load(service: Service, name: str, path: Path) -> None:
    try:
        service.engine.model.load_adapter(name, path)
    except MemoryError:
        raise
    except Exception as error:
        raise ApiError(400, str(error), param="lora_path", code="invalid_adapter") from error
