"""Counts the tokens of a prompt, as clients ask before they send it."""

from __future__ import annotations

from collections.abc import Mapping

from fastapi import Request

from nybble.server.errors import ApiError, as_api_errors
from nybble.server.protocols.adapter import Adapter, renamed
from nybble.server.service import Service


async def count_tokens(service: Service, http: Request, adapter: Adapter, names: Mapping[str, str]) -> int:
    """The number of tokens of the prompt of a request, which is not answered.

    Args:
        service: The service.
        http: The HTTP request.
        adapter: The request.
        names: The parameters of the protocol by those of chats, for errors.

    Raises:
        ApiError: The request is invalid.
    """
    request = renamed(adapter.translate(), names)

    def count() -> int:
        ((prompt, _), *_) = request.prepare()
        return len(prompt)

    with as_api_errors(request.param, request.parameters):
        async with service.long_prompts:
            if await http.is_disconnected():
                raise ApiError(400, "the client has disconnected")
            return await service.in_thread(count)
