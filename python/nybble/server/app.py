"""The ASGI application and its routes."""

from __future__ import annotations

import functools
from typing import Any

from fastapi import APIRouter, FastAPI, Request, Response
from prometheus_client import CONTENT_TYPE_LATEST
from pydantic import BaseModel
from starlette.middleware.cors import CORSMiddleware

from nybble._native import __version__
from nybble.server.admin.adapters import add_adapter_routes
from nybble.server.conventions import Conventions
from nybble.server.delivery import respond
from nybble.server.errors import RESPONSES, add_handlers
from nybble.server.middleware import Middleware
from nybble.server.page.routes import add_page_routes
from nybble.server.pool.pool import Pool
from nybble.server.protocols.anthropic.routes import add_messages_routes
from nybble.server.protocols.chat import ChatAdapter
from nybble.server.protocols.chat_schema import ChatCompletion, ChatRequest
from nybble.server.protocols.completions.adapter import CompletionAdapter, CompletionRequest, TextCompletion
from nybble.server.protocols.dependencies import KEY, STREAM, Served
from nybble.server.protocols.embeddings import EmbeddingRequest, Embeddings, embed
from nybble.server.protocols.models import (
    Health,
    ModelCard,
    ModelList,
    Properties,
    Version,
    model_card,
    model_cards,
    properties,
)
from nybble.server.protocols.ollama.routes import add_ollama_routes
from nybble.server.protocols.rerank import Ranking, RerankRequest, rerank
from nybble.server.protocols.responses.routes import add_responses_routes
from nybble.server.protocols.tokens import (
    DetokenizeRequest,
    Text,
    TokenizeRequest,
    TokenizerInfo,
    Tokens,
    detokenize,
    tokenize,
    tokenizer_info,
)
from nybble.server.service import Service

_METRICS: dict[int | str, dict[str, Any]] = {200: {"content": {"text/plain": {"schema": {"type": "string"}}}}}


def create_app(served: Service | Pool) -> FastAPI:
    """The ASGI application of a model or of several, to run with uvicorn or to mount in another application."""
    pool = Pool.of(served)
    app = FastAPI(
        title="nybble",
        version=__version__,
        description="A language model with the APIs of OpenAI and Anthropic.",
        # FastAPI's pages load scripts from other sites. Tools read /openapi.json.
        docs_url=None,
        redoc_url=None,
        responses=RESPONSES,
    )
    app.state.pool = pool
    settings = pool.settings
    has_key = bool(settings.api_key)
    add_handlers(app)
    app.routes.extend(_routes(has_key).routes)
    add_page_routes(app)
    if settings.adapter_folder is not None:
        add_adapter_routes(app, pool, settings.adapter_folder, [KEY] if has_key else [])
    app.add_middleware(Middleware, pool=pool, paths=[route.path for route in app.routes if hasattr(route, "path")])
    if origins := [name for name in settings.allowed_origins if "://" in name or name == "*"]:
        # It answers preflight requests, which carry no key, before the middleware that checks keys.
        app.add_middleware(
            CORSMiddleware,
            allow_origins=sorted(origins),
            allow_methods=["GET", "POST", "DELETE"],
            allow_headers=["*"],
            expose_headers=["X-Request-Id"],
        )
    app.add_middleware(Conventions)
    return app


@functools.cache
def _routes(has_key: bool) -> APIRouter:
    """The routes of every application whose models need a key, or need none."""
    key = [KEY] if has_key else []
    router = APIRouter(responses=RESPONSES)
    _add_api(router, key)
    _add_tokens(router, key)
    _add_status(router, key)
    add_responses_routes(router, key)
    add_messages_routes(router, key)
    add_ollama_routes(router, key)
    return router


def _add_api(router: APIRouter, key: list[Any]) -> None:
    @router.post("/chat/completions", include_in_schema=False)
    @router.post("/v1/chat/completions", **_generation_route(key, ChatCompletion))
    async def chat_completions(request: Request, body: ChatRequest, pool: Served) -> Response:
        """Answer a conversation."""
        service = await pool.lease(request, body.model)
        return await respond(service, request, ChatAdapter(service, body))

    @router.post("/completions", include_in_schema=False)
    @router.post("/v1/completions", **_generation_route(key, TextCompletion))
    async def completions(request: Request, body: CompletionRequest, pool: Served) -> Response:
        """Continue prompts."""
        service = await pool.lease(request, body.model)
        return await respond(service, request, CompletionAdapter(service, body))

    @router.post("/embeddings", include_in_schema=False)
    @router.post("/v1/embeddings", dependencies=key, response_class=Response, responses={200: {"model": Embeddings}})
    async def embeddings(request: Request, body: EmbeddingRequest, pool: Served) -> Response:
        """Turn inputs into vectors of length 1."""
        return await embed(await pool.lease(request, body.model), request, body)

    @router.post("/rerank", include_in_schema=False)
    @router.post("/v2/rerank", include_in_schema=False)
    @router.post("/v1/rerank", dependencies=key, response_class=Response, responses={200: {"model": Ranking}})
    async def ranking(request: Request, body: RerankRequest, pool: Served) -> Response:
        """Sort documents by their relevance to a query."""
        return await rerank(await pool.lease(request, body.model), request, body)

    @router.get("/models", include_in_schema=False, response_model_exclude_unset=True)
    @router.get("/v1/models", dependencies=key, response_model_exclude_unset=True)
    async def models(pool: Served) -> ModelList:
        """List the models that are served, each followed by itself with each of its LoRA adapters."""
        return ModelList(object="list", data=model_cards(pool))

    @router.get("/models/{name:path}", include_in_schema=False, response_model_exclude_unset=True)
    @router.get("/v1/models/{name:path}", dependencies=key, response_model_exclude_unset=True)
    async def model(name: str, pool: Served) -> ModelCard:
        """Describe a model."""
        return model_card(pool, *pool.names.resolve(name))


def _add_tokens(router: APIRouter, key: list[Any]) -> None:
    @router.post("/tokenize", dependencies=key)
    async def tokens_of(request: Request, body: TokenizeRequest, pool: Served) -> Tokens:
        """Turn a text into token ids."""
        return await tokenize(await pool.lease(request, body.model), body)

    @router.post("/detokenize", dependencies=key)
    async def text_of(request: Request, body: DetokenizeRequest, pool: Served) -> Text:
        """Turn token ids into a text."""
        return await detokenize(await pool.lease(request, body.model), body)

    @router.get("/tokenizer_info", dependencies=key)
    async def describe_tokenizer(request: Request, pool: Served, model: str | None = None) -> TokenizerInfo:
        """Describe the tokenizer of a model."""
        return tokenizer_info(await pool.lease(request, model))


def _generation_route(key: list[Any], answer: type[BaseModel]) -> dict[str, Any]:
    return {
        "dependencies": key,
        "response_class": Response,
        "responses": {200: {"model": answer, "content": STREAM}},
    }


def _add_status(router: APIRouter, key: list[Any]) -> None:
    @router.get("/v1/health", include_in_schema=False)
    @router.get("/ping", include_in_schema=False)
    @router.get("/health", responses={503: {"model": Health}})
    async def health(response: Response, pool: Served) -> Health:
        """Tell load balancers whether the server accepts requests."""
        if pool.shared.draining:
            response.status_code = 503
            return Health(status="draining")
        for service in pool.services():
            if service.engine.failure is None or await service.recovers():
                continue
            if service in pool.services():  # Otherwise it was unloaded meanwhile.
                response.status_code = 503
                return Health(status="failed")
        return Health(status="ok")

    @router.get(
        "/metrics",
        dependencies=key,
        response_class=Response,
        responses=_METRICS,
    )
    async def metrics(pool: Served) -> Response:
        """Export metrics for Prometheus."""
        return Response(pool.shared.metrics.text(), media_type=CONTENT_TYPE_LATEST)

    @router.get("/version", dependencies=key)
    async def version() -> Version:
        """Name the version of nybble."""
        return Version(version=__version__)

    @router.get("/props", dependencies=key, response_model_exclude_unset=True)
    async def props(pool: Served, model: str | None = None) -> Properties:
        """Describe the server and a model as llama-server does."""
        return properties(pool, model)
