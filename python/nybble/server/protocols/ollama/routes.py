"""The routes of Ollama's API."""

from __future__ import annotations

import hashlib
import time
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse

from nybble._native import __version__
from nybble.chat.reasoning import reasoning_format
from nybble.server.delivery import respond, with_timeout
from nybble.server.errors import ApiError
from nybble.server.protocols.embeddings import MAX_INPUTS, check_dimensions, vectors
from nybble.server.protocols.ollama.adapter import chat_adapter, generate_adapter, loaded
from nybble.server.protocols.ollama.schema import (
    OllamaChatRequest,
    OllamaEmbeddingsRequest,
    OllamaEmbedRequest,
    OllamaGenerateRequest,
    ShowRequest,
)
from nybble.server.service import Service

Json = dict[str, Any]

_LONGEST_TOKEN = 64
"""Characters of a token, at most, in documents that are cut to the context."""
_NEVER = "2318-01-01T00:00:00Z"
"""When the model leaves memory."""


def add_ollama_routes(app: FastAPI, service: Service, key: list[Any]) -> None:
    """Adds the routes below `/api`."""
    route: Json = {"dependencies": key, "include_in_schema": False}

    @app.post("/api/chat", **route)
    async def chat(request: Request, body: OllamaChatRequest) -> Response:
        asked = body.messages
        return await respond(service, request, chat_adapter(service, body)) if asked else _loaded(service, body)

    @app.post("/api/generate", **route)
    async def generate(request: Request, body: OllamaGenerateRequest) -> Response:
        asked = body.prompt or body.suffix
        return await respond(service, request, generate_adapter(service, body)) if asked else _loaded(service, body)

    @app.post("/api/embed", **route)
    async def embed(request: Request, body: OllamaEmbedRequest) -> Response:
        inputs = [body.input] if isinstance(body.input, str) else body.input
        return await _embed(service, request, body, inputs)

    @app.post("/api/embeddings", **route)
    async def embeddings(request: Request, body: OllamaEmbeddingsRequest) -> Response:
        return await _embed(service, request, body, [body.prompt])

    @app.get("/api/tags", **route)
    async def tags() -> Json:
        return {"models": [_card(service)]}

    @app.get("/api/ps", **route)
    async def ps() -> Json:
        model = service.engine.model
        running = {"expires_at": _NEVER, "size_vram": 0, "context_length": model.info.context}
        return {"models": [{**_card(service), **running}]}

    @app.get("/api/version", **route)
    async def version() -> Json:
        return {"version": __version__}

    @app.post("/api/show", **route)
    async def show(body: ShowRequest) -> Json:
        service.admit(body.model or body.name, 1)
        return _description(service)

    for path in ("pull", "push", "create", "copy", "delete", "blobs/{digest}"):
        app.add_api_route(f"/api/{path}", _refused, methods=["POST", "DELETE", "HEAD"], **route)


async def _refused(request: Request) -> Response:
    raise ApiError(
        501,
        f"{request.url.path:.100}: nybble does not change models through its API. It serves the model that its command "
        "line names: `nybble serve MODEL` downloads a model from the Hugging Face Hub on first use",
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


def _loaded(service: Service, body: OllamaChatRequest | OllamaGenerateRequest) -> Response:
    service.admit(body.model, 1)
    return _json(loaded(service, body).model_dump(exclude_none=True))


def _json(body: Json) -> Response:
    return JSONResponse(body)


def _card(service: Service) -> Json:
    info = service.engine.model.info
    digest = hashlib.sha256(f"{service.name} {info.parameters} {info.weight_bytes}".encode()).hexdigest()
    return {
        "name": service.name,
        "model": service.name,
        "modified_at": _time(service.created),
        "size": info.weight_bytes,
        "digest": digest,
        "details": _details(service),
    }


def _time(seconds: int) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(seconds))


def _details(service: Service) -> Json:
    info = service.engine.model.info
    size = f"{info.parameters / 1e9:.1f}B" if info.parameters >= 1e9 else f"{info.parameters / 1e6:.2f}M"
    return {
        "parent_model": "",
        "format": "gguf",
        "family": info.family,
        "families": [info.family],
        "parameter_size": size,
        "quantization_level": "",
    }


def _description(service: Service) -> Json:
    model = service.engine.model
    info, template = model.info, model.tokenizer.chat_templates.get("default", "")
    return {
        "modelfile": "",
        "parameters": "",
        "template": template,
        "details": _details(service),
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
        "modified_at": _time(service.created),
    }
