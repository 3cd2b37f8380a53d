"""The ASGI application and its routes."""

from __future__ import annotations

from typing import Any

from fastapi import Depends, FastAPI, Request, Response
from fastapi.security import HTTPBearer
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

# The middleware checks keys. This only describes them.
_KEY = Depends(HTTPBearer(auto_error=False, description="The API key of the server."))
# Without a schema, which some readers apply to the stream and others to each event.
_STREAM: dict[str, Any] = {"text/event-stream": {}}
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
    add_handlers(app)
    _add_api(app, pool)
    _add_tokens(app, pool)
    _add_status(app, pool)
    add_page_routes(app)
    settings = pool.settings
    key = [_KEY] if settings.api_key else []
    add_responses_routes(app, pool, key, _STREAM)
    add_messages_routes(app, pool, key, _STREAM)
    add_ollama_routes(app, pool, key)
    if settings.adapter_folder is not None:
        add_adapter_routes(app, pool, settings.adapter_folder, key)
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


def _add_api(app: FastAPI, pool: Pool) -> None:
    key = [_KEY] if pool.settings.api_key else []

    @app.post("/chat/completions", include_in_schema=False)
    @app.post("/v1/chat/completions", **_generation_route(key, ChatCompletion))
    async def chat_completions(request: Request, body: ChatRequest) -> Response:
        """Answer a conversation."""
        service = await pool.lease(request, body.model)
        return await respond(service, request, ChatAdapter(service, body))

    @app.post("/completions", include_in_schema=False)
    @app.post("/v1/completions", **_generation_route(key, TextCompletion))
    async def completions(request: Request, body: CompletionRequest) -> Response:
        """Continue prompts."""
        service = await pool.lease(request, body.model)
        return await respond(service, request, CompletionAdapter(service, body))

    @app.post("/embeddings", include_in_schema=False)
    @app.post("/v1/embeddings", dependencies=key, response_class=Response, responses={200: {"model": Embeddings}})
    async def embeddings(request: Request, body: EmbeddingRequest) -> Response:
        """Turn inputs into vectors of length 1."""
        return await embed(await pool.lease(request, body.model), request, body)

    @app.post("/rerank", include_in_schema=False)
    @app.post("/v2/rerank", include_in_schema=False)
    @app.post("/v1/rerank", dependencies=key, response_class=Response, responses={200: {"model": Ranking}})
    async def ranking(request: Request, body: RerankRequest) -> Response:
        """Sort documents by their relevance to a query."""
        return await rerank(await pool.lease(request, body.model), request, body)

    @app.get("/models", include_in_schema=False, response_model_exclude_unset=True)
    @app.get("/v1/models", dependencies=key, response_model_exclude_unset=True)
    async def models() -> ModelList:
        """List the models that are served, each followed by itself with each of its LoRA adapters."""
        return ModelList(object="list", data=model_cards(pool))

    @app.get("/models/{name:path}", include_in_schema=False, response_model_exclude_unset=True)
    @app.get("/v1/models/{name:path}", dependencies=key, response_model_exclude_unset=True)
    async def model(name: str) -> ModelCard:
        """Describe a model."""
        return model_card(pool, *pool.names.resolve(name))


def _add_tokens(app: FastAPI, pool: Pool) -> None:
    key = [_KEY] if pool.settings.api_key else []

    @app.post("/tokenize", dependencies=key)
    async def tokens_of(request: Request, body: TokenizeRequest) -> Tokens:
        """Turn a text into token ids."""
        return await tokenize(await pool.lease(request, body.model), body)

    @app.post("/detokenize", dependencies=key)
    async def text_of(request: Request, body: DetokenizeRequest) -> Text:
        """Turn token ids into a text."""
        return await detokenize(await pool.lease(request, body.model), body)

    @app.get("/tokenizer_info", dependencies=key)
    async def describe_tokenizer(request: Request, model: str | None = None) -> TokenizerInfo:
        """Describe the tokenizer of a model."""
        return tokenizer_info(await pool.lease(request, model))


def _generation_route(key: list[Any], answer: type[BaseModel]) -> dict[str, Any]:
    return {
        "dependencies": key,
        "response_class": Response,
        "responses": {200: {"model": answer, "content": _STREAM}},
    }


def _add_status(app: FastAPI, pool: Pool) -> None:
    key = [_KEY] if pool.settings.api_key else []

    @app.get("/v1/health", include_in_schema=False)
    @app.get("/ping", include_in_schema=False)
    @app.get("/health", responses={503: {"model": Health}})
    async def health(response: Response) -> Health:
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

    @app.get(
        "/metrics",
        dependencies=key,
        response_class=Response,
        responses=_METRICS,
    )
    async def metrics() -> Response:
        """Export metrics for Prometheus."""
        return Response(pool.shared.metrics.text(), media_type=CONTENT_TYPE_LATEST)

    @app.get("/version", dependencies=key)
    async def version() -> Version:
        """Name the version of nybble."""
        return Version(version=__version__)

    @app.get("/props", dependencies=key, response_model_exclude_unset=True)
    async def props(model: str | None = None) -> Properties:
        """Describe the server and a model as llama-server does."""
        return properties(pool, model)
