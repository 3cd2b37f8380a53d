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
from nybble.server.errors import RESPONSES, ApiError, add_handlers
from nybble.server.middleware import Middleware
from nybble.server.page.routes import add_page_routes
from nybble.server.protocols.anthropic.routes import add_messages_routes
from nybble.server.protocols.chat import ChatAdapter
from nybble.server.protocols.chat_schema import ChatCompletion, ChatRequest
from nybble.server.protocols.completions.adapter import CompletionAdapter, CompletionRequest, TextCompletion
from nybble.server.protocols.embeddings import EmbeddingRequest, Embeddings, embed
from nybble.server.protocols.models import (
    GenerationSettings,
    Health,
    ModelCard,
    ModelList,
    Properties,
    Version,
    model_card,
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


def create_app(service: Service) -> FastAPI:
    """The ASGI application of a service, to run with uvicorn or to mount in another application."""
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
    _add_api(app, service)
    _add_tokens(app, service)
    _add_status(app, service)
    add_page_routes(app)
    key = [_KEY] if service.settings.api_key else []
    add_responses_routes(app, service, key, _STREAM)
    add_messages_routes(app, service, key, _STREAM)
    add_ollama_routes(app, service, key)
    if service.settings.adapter_folder is not None:
        add_adapter_routes(app, service, service.settings.adapter_folder, key)
    app.add_middleware(
        Middleware, service=service, paths=[route.path for route in app.routes if hasattr(route, "path")]
    )
    if origins := [name for name in service.settings.allowed_origins if "://" in name or name == "*"]:
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


def _add_api(app: FastAPI, service: Service) -> None:
    key = [_KEY] if service.settings.api_key else []

    @app.post("/chat/completions", include_in_schema=False)
    @app.post("/v1/chat/completions", **_generation_route(key, ChatCompletion))
    async def chat_completions(request: Request, body: ChatRequest) -> Response:
        """Answer a conversation."""
        return await respond(service, request, ChatAdapter(service, body))

    @app.post("/completions", include_in_schema=False)
    @app.post("/v1/completions", **_generation_route(key, TextCompletion))
    async def completions(request: Request, body: CompletionRequest) -> Response:
        """Continue prompts."""
        return await respond(service, request, CompletionAdapter(service, body))

    @app.post("/embeddings", include_in_schema=False)
    @app.post("/v1/embeddings", dependencies=key, response_class=Response, responses={200: {"model": Embeddings}})
    async def embeddings(request: Request, body: EmbeddingRequest) -> Response:
        """Turn inputs into vectors of length 1."""
        return await embed(service, request, body)

    @app.post("/rerank", include_in_schema=False)
    @app.post("/v2/rerank", include_in_schema=False)
    @app.post("/v1/rerank", dependencies=key, response_class=Response, responses={200: {"model": Ranking}})
    async def ranking(request: Request, body: RerankRequest) -> Response:
        """Sort documents by their relevance to a query."""
        return await rerank(service, request, body)

    @app.get("/models", include_in_schema=False)
    @app.get("/v1/models", dependencies=key)
    async def models() -> ModelList:
        """List the model that is served, and the model with each of its LoRA adapters."""
        return ModelList(object="list", data=[model_card(service, name) for name in service.models()])

    @app.get("/models/{name:path}", include_in_schema=False)
    @app.get("/v1/models/{name:path}", dependencies=key)
    async def model(name: str) -> ModelCard:
        """Describe a model."""
        if name not in service.models():
            raise ApiError(404, f"the model {name!r} does not exist", param="model", code="model_not_found")
        return model_card(service, name)


def _add_tokens(app: FastAPI, service: Service) -> None:
    key = [_KEY] if service.settings.api_key else []

    @app.post("/tokenize", dependencies=key)
    async def tokens_of(body: TokenizeRequest) -> Tokens:
        """Turn a text into token ids."""
        return await tokenize(service, body)

    @app.post("/detokenize", dependencies=key)
    async def text_of(body: DetokenizeRequest) -> Text:
        """Turn token ids into a text."""
        return await detokenize(service, body)

    @app.get("/tokenizer_info", dependencies=key)
    async def describe_tokenizer() -> TokenizerInfo:
        """Describe the tokenizer."""
        return tokenizer_info(service)


def _generation_route(key: list[Any], answer: type[BaseModel]) -> dict[str, Any]:
    return {
        "dependencies": key,
        "response_class": Response,
        "responses": {200: {"model": answer, "content": _STREAM}},
    }


def _add_status(app: FastAPI, service: Service) -> None:
    key = [_KEY] if service.settings.api_key else []

    @app.get("/v1/health", include_in_schema=False)
    @app.get("/ping", include_in_schema=False)
    @app.get("/health", responses={503: {"model": Health}})
    async def health(response: Response) -> Health:
        """Tell load balancers whether the server accepts requests."""
        if service.draining:
            response.status_code = 503
            return Health(status="draining")
        if service.engine.failure is not None and not await service.recovers():
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
        return Response(service.metrics.text(), media_type=CONTENT_TYPE_LATEST)

    @app.get("/version", dependencies=key)
    async def version() -> Version:
        """Name the version of nybble."""
        return Version(version=__version__)

    @app.get("/props", dependencies=key)
    async def props() -> Properties:
        """Describe the server as llama-server does."""
        model = service.engine.model
        return Properties(
            default_generation_settings=GenerationSettings(n_ctx=model.info.context),
            total_slots=service.settings.max_answers,
            model_path=service.name,
            chat_template=model.tokenizer.chat_templates.get("default", ""),
            build_info=f"nybble {__version__}",
        )
