"""The routes of Anthropic's API."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request, Response

from nybble.server.delivery import respond
from nybble.server.errors import error_responses
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
from nybble.server.protocols.dependencies import STREAM, Served

_ERRORS = error_responses(ErrorResponse)


def add_messages_routes(router: APIRouter, key: list[Any]) -> None:
    """Adds the routes below `/v1/messages`."""

    @router.post(
        "/v1/messages",
        dependencies=key,
        response_class=Response,
        responses={**_ERRORS, 200: {"model": AnsweredMessage, "content": STREAM}},
    )
    async def create(request: Request, body: MessagesRequest, pool: Served) -> Response:
        """Answer a conversation with blocks."""
        service = await pool.lease(request, body.model)
        service.admit(body.model, 1)
        return await respond(service, request, MessagesAdapter(service, body))

    @router.post("/v1/messages/count_tokens", dependencies=key, responses=_ERRORS)
    async def count(request: Request, body: Conversation, pool: Served) -> TokenCount:
        """Count the tokens of a prompt."""
        service = await pool.lease(request, body.model)
        service.admit(body.model, 0)
        chat, names = chat_request(body)
        return TokenCount(input_tokens=await count_tokens(service, request, ChatAdapter(service, chat), names))
