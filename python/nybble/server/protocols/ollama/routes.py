"""The routes of Ollama's API."""

from __future__ import annotations

import asyncio
import hashlib
import time
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse

from nybble._native import __version__
from nybble.chat.reasoning import reasoning_format
from nybble.server.delivery import respond, with_timeout
from nybble.server.errors import ApiError
from nybble.server.pool.entry import Entry
from nybble.server.pool.pool import Pool
from nybble.server.protocols.dependencies import Served
from nybble.server.protocols.embeddings import MAX_INPUTS, check_dimensions, vectors
from nybble.server.protocols.ollama.adapter import chat_adapter, generate_adapter, loaded
from nybble.server.protocols.ollama.schema import (
    KeptRequest,
    OllamaChatRequest,
    OllamaEmbeddingsRequest,
    OllamaEmbedRequest,
    OllamaGenerateRequest,
    ShowRequest,
    keep_alive_seconds,
)
from nybble.server.service import Service

Json = dict[str, Any]

_LONGEST_TOKEN = 64
"""Characters of a token, at most, in documents that are cut to the context."""
_NEVER = "2318-01-01T00:00:00Z"
"""When a model leaves memory that stays for good."""
_LONGEST = 1e9
"""Seconds that a model stays, at most, before that counts as for good."""


def add_ollama_routes(router: APIRouter, key: list[Any]) -> None:
    """Adds the routes below `/api`."""
    route: Json = {"dependencies": key, "include_in_schema": False}

    @router.post("/api/chat", **route)
    async def chat(request: Request, body: OllamaChatRequest, pool: Served) -> Response:
        if not body.messages:
            return await _loaded(pool, request, body)
        service = await _lease(pool, request, body)
        return await respond(service, request, chat_adapter(service, body))

    @router.post("/api/generate", **route)
    async def generate(request: Request, body: OllamaGenerateRequest, pool: Served) -> Response:
        if not (body.prompt or body.suffix):
            return await _loaded(pool, request, body)
        service = await _lease(pool, request, body)
        return await respond(service, request, generate_adapter(service, body))

    @router.post("/api/embed", **route)
    async def embed(request: Request, body: OllamaEmbedRequest, pool: Served) -> Response:
        inputs = [body.input] if isinstance(body.input, str) else body.input
        return await _embed(await _lease(pool, request, body), request, body, inputs)

    @router.post("/api/embeddings", **route)
    async def embeddings(request: Request, body: OllamaEmbeddingsRequest, pool: Served) -> Response:
        return await _embed(await _lease(pool, request, body), request, body, [body.prompt])

    @router.get("/api/tags", **route)
    async def tags(pool: Served) -> Json:
        return {"models": [_card(entry) for entry in pool.entries]}

    @router.get("/api/ps", **route)
    async def ps(pool: Served) -> Json:
        return {"models": [_running(entry) for entry in pool.entries if entry.state == "loaded"]}

    @router.get("/api/version", **route)
    async def version() -> Json:
        return {"version": __version__}

    @router.post("/api/show", **route)
    async def show(body: ShowRequest, pool: Served) -> Json:
        return _description(pool.names.find(body.model or body.name))

    for path in ("pull", "push", "create", "copy", "delete", "blobs/{digest}"):
        router.add_api_route(f"/api/{path}", _refused, methods=["POST", "DELETE", "HEAD"], **route)


async def _refused(request: Request) -> Response:
    raise ApiError(
        501,
        f"{request.url.path:.100}: nybble does not change models through its API. It serves those of its command "
        "line and configuration file: `nybble serve MODEL` downloads a model from the Hugging Face Hub on first use",
    )


async def _embed(
    service: Service, http: Request, body: OllamaEmbedRequest | OllamaEmbeddingsRequest, inputs: list[str]
) -> Response:
    is_list = isinstance(body, OllamaEmbedRequest)
    param, started_at = "input" if is_list else "prompt", time.perf_counter_ns()
    dimensions = body.dimensions if isinstance(body, OllamaEmbedRequest) else None
    truncates = not isinstance(body, OllamaEmbedRequest) or body.truncate is not False
    lora = service.admit(body.model, 1)
    check_dimensions(service, dimensions)
    if len(inputs) > MAX_INPUTS:
        raise ApiError(400, f"input: found {len(inputs)} inputs, expected at most {MAX_INPUTS}", param="input")
    if "" in inputs:
        raise ApiError(400, f"{param}: found an empty string, expected text", param=param)

    async def work() -> Response:
        documents: list[str | list[int]] = [*inputs]
        if truncates:
            model = service.engine.model
            context = model.info.context
            # What is far beyond the context is not tokenized.
            starts = [each[: context * _LONGEST_TOKEN] for each in inputs]
            documents = await service.in_thread(lambda: [model.tokenize(each)[:context] for each in starts])
        rows, tokens = await vectors(service, documents, dimensions, param, lora)
        found = [[float(value) for value in row] for row in rows]
        if not is_list:
            return _json({"embedding": found[0]})
        duration = time.perf_counter_ns() - started_at
        counts = {"total_duration": duration, "load_duration": 0, "prompt_eval_count": tokens}
        return _json({"model": service.name_of(body.model), "embeddings": found, **counts})

    with service.in_flight():
        return await with_timeout(service, http, work())


async def _lease(pool: Pool, http: Request, body: KeptRequest) -> Service:
    """The model of a request, which stays loaded after it for as long as the request says."""
    seconds = keep_alive_seconds(body.keep_alive) if pool.fixed is None else None
    service = await pool.lease(http, body.model)
    pool.keep(pool.names.find(body.model), seconds)
    return service


async def _loaded(pool: Pool, http: Request, body: OllamaChatRequest | OllamaGenerateRequest) -> Response:
    """Loads a model, or unloads it when its requests have ended."""
    entry = pool.names.find(body.model)
    if pool.fixed is None and keep_alive_seconds(body.keep_alive) == 0:
        pool.keep(entry, 0)
    else:
        service = await _lease(pool, http, body)
        service.admit(body.model, 1)
    return _json(loaded(pool.names.own_name(body.model), body).model_dump(exclude_none=True))


def _json(body: Json) -> Response:
    return JSONResponse(body)


def _card(entry: Entry) -> Json:
    parameters, nbytes = _figures(entry)
    digest = hashlib.sha256(f"{entry.name} {parameters} {nbytes}".encode()).hexdigest()
    return {
        "name": entry.name,
        "model": entry.name,
        "modified_at": _time(entry.created),
        "size": nbytes,
        "digest": digest,
        "details": _details(entry),
    }


def _running(entry: Entry) -> Json:
    timer = entry.timer
    # The timers of the event loop count from another time than the clock.
    left = None if timer is None else timer.when() - asyncio.get_running_loop().time()
    if left is None and entry.users:
        left = entry.idle_seconds
    ends_at = _NEVER if left is None or left > _LONGEST else _time(int(time.time() + left))
    return {**_card(entry), "expires_at": ends_at, "size_vram": 0, "context_length": entry.context}


def _figures(entry: Entry) -> tuple[int, int]:
    """The number of weights, and the bytes of them; 0 where they are not known."""
    if entry.needs is not None:  # The same figures whether the model is loaded or not.
        return entry.needs.parameters, entry.needs.weight_bytes
    info = None if entry.service is None else entry.service.engine.model.info
    return (0, 0) if info is None else (info.parameters, info.weight_bytes)


def _time(seconds: int) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(seconds))


def _details(entry: Entry) -> Json:
    parameters, _ = _figures(entry)
    family = "" if entry.needs is None else entry.needs.family
    if entry.service is not None:
        family = entry.service.engine.model.info.family
    size = f"{parameters / 1e9:.1f}B" if parameters >= 1e9 else f"{parameters / 1e6:.2f}M"
    return {
        "parent_model": "",
        "format": "gguf",
        "family": family,
        "families": [family],
        "parameter_size": size,
        "quantization_level": "",
    }


def _description(entry: Entry) -> Json:
    """What is known of a model, which is not loaded for this: without its template until it is."""
    if entry.service is None:
        family, parameters = _details(entry)["family"], _figures(entry)[0]
        return {
            "modelfile": "",
            "parameters": "",
            "template": "",
            "details": _details(entry),
            "model_info": {
                "general.architecture": family,
                "general.name": entry.name,
                "general.parameter_count": parameters,
                f"{family}.context_length": entry.context,
            },
            "capabilities": ["completion", "embedding"],
            "modified_at": _time(entry.created),
        }
    model = entry.service.engine.model
    info, template = model.info, model.tokenizer.chat_templates.get("default", "")
    return {
        "modelfile": "",
        "parameters": "",
        "template": template,
        "details": _details(entry),
        "model_info": {
            "general.architecture": info.family,
            "general.name": info.name,
            "general.parameter_count": info.parameters,
            f"{info.family}.context_length": info.context,
            f"{info.family}.embedding_length": info.hidden_size,
            f"{info.family}.block_count": info.layers,
        },
        "capabilities": [
            "completion",
            *(["tools"] if template else []),
            *(["thinking"] if reasoning_format(model.tokenizer) else []),
            "embedding",
        ],
        "modified_at": _time(entry.created),
    }
