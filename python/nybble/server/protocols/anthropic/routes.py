"""The routes of Anthropic's API."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI, Request, Response

from nybble.server.delivery import respond
from nybble.server.errors import error_responses
from nybble.server.pool.pool import Pool
from nybble.server.protocols.anthropic.adapter import MessagesAdapter, chat_request
from nybble.server.protocols.anthropic.schema import (
    AnsweredMessage,
    Conversation,
    ErrorResponse,
    MessagesRequest,
    TokenCount,
)
from nybble.server.protocols.chat import ChatAdapter
from nybble.server.protocols.counting import count_tokens

_ERRORS = error_responses(ErrorResponse)


def add_messages_routes(app: FastAPI, pool: Pool, key: list[Any], stream: dict[str, Any]) -> None:
    """Adds the routes below `/v1/messages`."""

    @app.post(
        "/v1/messages",
        dependencies=key,
        response_class=Response,
        responses={**_ERRORS, 200: {"model": AnsweredMessage, "content": stream}},
    )
    async def create(request: Request, body: MessagesRequest) -> Response:
        """Answer a conversation with blocks."""
        service = await pool.lease(request, body.model)
        service.admit(body.model, 1)
        return await respond(service, request, MessagesAdapter(service, body))

    @app.post("/v1/messages/count_tokens", dependencies=key, responses=_ERRORS)
    async def count(request: Request, body: Conversation) -> TokenCount:
        """Count the tokens of a prompt."""
        service = await pool.lease(request, body.model)
        service.admit(body.model, 0)
        chat, names = chat_request(body)
        return TokenCount(input_tokens=await count_tokens(service, request, ChatAdapter(service, chat), names))
