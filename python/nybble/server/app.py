"""The routes."""

from __future__ import annotations

import base64
import hashlib
import re
from importlib import resources
from typing import Any

from fastapi import Depends, FastAPI, Request, Response
from fastapi.security import HTTPBearer
from prometheus_client import CONTENT_TYPE_LATEST

from nybble._native import __version__
from nybble.server.chat import chat
from nybble.server.completions import complete, embed
from nybble.server.errors import RESPONSES, ApiError, add_handlers
from nybble.server.guard import Guard
from nybble.server.requests import ChatRequest, CompletionRequest, EmbeddingRequest
from nybble.server.responses import ChatCompletion, Embeddings, Health, ModelCard, ModelList, TextCompletion
from nybble.server.service import Service

# The guard looks at keys before anything is parsed; this only describes them.
_KEY = Depends(HTTPBearer(auto_error=False, description="The key that the server was started with."))
_STREAM: dict[str, Any] = {"text/event-stream": {"schema": {"type": "string"}}}


def create_app(service: Service) -> FastAPI:
    """The ASGI application of a service: for uvicorn, or to be mounted elsewhere."""
    app = FastAPI(
        title="nybble",
        version=__version__,
        description="One language model, in the shapes of OpenAI's API.",
        # Pages that load scripts from elsewhere are not for this server; /openapi.json is for tools.
        docs_url=None,
        redoc_url=None,
        responses=RESPONSES,
    )
    add_handlers(app)
    _add_api(app, service)
    _add_others(app, service)
    app.add_middleware(Guard, service=service, paths=[route.path for route in app.routes if hasattr(route, "path")])
    return app


def _add_api(app: FastAPI, service: Service) -> None:
    key = [_KEY] if service.settings.api_key else []
    card = ModelCard(
        id=service.name,
        object="model",
        created=service.created,
        owned_by="nybble",
        context_length=service.engine.model.info.context,
    )

    @app.post(
        "/v1/chat/completions",
        dependencies=key,
        response_class=Response,
        responses={200: {"model": ChatCompletion, "content": _STREAM}},
    )
    async def chat_completions(request: Request, body: ChatRequest) -> Response:
        """Answer a conversation."""
        return await chat(service, request, body)

    @app.post(
        "/v1/completions",
        dependencies=key,
        response_class=Response,
        responses={200: {"model": TextCompletion, "content": _STREAM}},
    )
    async def completions(request: Request, body: CompletionRequest) -> Response:
        """Continue texts."""
        return await complete(service, request, body)

    @app.post("/v1/embeddings", dependencies=key, response_class=Response, responses={200: {"model": Embeddings}})
    async def embeddings(request: Request, body: EmbeddingRequest) -> Response:
        """Texts as vectors of length 1."""
        return await embed(service, request, body)

    @app.get("/v1/models", dependencies=key)
    async def models() -> ModelList:
        """The one model that is served."""
        return ModelList(object="list", data=[card])

    @app.get("/v1/models/{name:path}", dependencies=key)
    async def model(name: str) -> ModelCard:
        """What is known of a model."""
        if name != service.name:
            raise ApiError(404, f"the model {name!r} does not exist here", param="model", code="model_not_found")
        return card


def _add_others(app: FastAPI, service: Service) -> None:
    key = [_KEY] if service.settings.api_key else []
    page = resources.files("nybble.server").joinpath("page.html").read_text(encoding="utf-8")
    policy = _policy(page)

    @app.get("/health", responses={503: {"model": Health}})
    async def health(response: Response) -> Health:
        """Whether requests are taken: for what distributes them."""
        if service.draining:
            response.status_code = 503
            return Health(status="draining")
        return Health(status="ok")

    @app.get(
        "/metrics",
        dependencies=key,
        response_class=Response,
        responses={200: {"content": {"text/plain": {"schema": {"type": "string"}}}}},
    )
    async def metrics() -> Response:
        """Counts and times for Prometheus."""
        return Response(service.metrics.text(), media_type=CONTENT_TYPE_LATEST)

    @app.get("/", include_in_schema=False)
    async def index() -> Response:
        headers = {"Content-Security-Policy": policy, "Referrer-Policy": "no-referrer", "Cache-Control": "no-cache"}
        return Response(page, media_type="text/html", headers=headers)


def _policy(page: str) -> str:
    """Lets the page run its own script and style and ask this server, and nothing else."""

    def hashes(tag: str) -> str:
        found = re.findall(rf"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
        return " ".join(f"'sha256-{base64.b64encode(hashlib.sha256(t.encode()).digest()).decode()}'" for t in found)

    return (
        f"default-src 'none'; script-src {hashes('script')}; style-src {hashes('style')}; connect-src 'self'; "
        "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
