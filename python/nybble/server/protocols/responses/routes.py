"""The routes of the Responses API."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query, Request, Response

from nybble.server.delivery import respond
from nybble.server.errors import ApiError
from nybble.server.pool.pool import Pool
from nybble.server.protocols.chat import ChatAdapter
from nybble.server.protocols.counting import count_tokens
from nybble.server.protocols.dependencies import STREAM, Served
from nybble.server.protocols.responses.adapter import ResponsesAdapter, chat_request, conversation_of
from nybble.server.protocols.responses.schema import (
    Conversation,
    Deleted,
    ItemList,
    ResponseObject,
    ResponsesRequest,
    TokenCount,
)
from nybble.server.protocols.responses.store import Stored


def add_responses_routes(router: APIRouter, key: list[Any]) -> None:
    """Adds the routes below `/v1/responses`."""

    @router.post("/responses", include_in_schema=False)
    @router.post(
        "/v1/responses",
        dependencies=key,
        response_class=Response,
        responses={200: {"model": ResponseObject, "content": STREAM}},
    )
    async def create(request: Request, body: ResponsesRequest, pool: Served) -> Response:
        """Answer a conversation with items."""
        service = await pool.lease(request, body.model)
        service.admit(body.model, 1)
        return await respond(service, request, ResponsesAdapter(service, body))

    @router.post("/responses/input_tokens", include_in_schema=False)
    @router.post("/v1/responses/input_tokens", dependencies=key)
    async def count(request: Request, body: Conversation, pool: Served) -> TokenCount:
        """Count the tokens of a prompt."""
        service = await pool.lease(request, body.model)
        service.admit(body.model, 0)
        chat, names = chat_request(body, conversation_of(service, body))
        counted = await count_tokens(service, request, ChatAdapter(service, chat), names)
        return TokenCount(input_tokens=counted)

    def stored(pool: Pool, id: str) -> Stored:
        if (found := pool.shared.responses.get(id)) is None:
            message = f"the response {id!r:.100} is not stored on this server, or no longer"
            raise ApiError(404, message, param="response_id", code="response_not_found")
        return found

    @router.get("/responses/{response_id}", include_in_schema=False)
    @router.get("/v1/responses/{response_id}", dependencies=key)
    async def retrieve(response_id: str, pool: Served, stream: bool = False) -> ResponseObject:
        """Return a stored response."""
        if stream:
            raise ApiError(400, "stream: found true, expected false: stored responses are not streamed", param="stream")
        return ResponseObject.model_validate(stored(pool, response_id).response)

    @router.delete("/responses/{response_id}", include_in_schema=False)
    @router.delete("/v1/responses/{response_id}", dependencies=key)
    async def delete(response_id: str, pool: Served) -> Deleted:
        """Forget a stored response."""
        pool.shared.responses.remove(stored(pool, response_id).response["id"])
        return Deleted(id=response_id)

    @router.get("/responses/{response_id}/input_items", include_in_schema=False)
    @router.get("/v1/responses/{response_id}/input_items", dependencies=key)
    async def input_items(
        response_id: str,
        pool: Served,
        after: str | None = None,
        limit: Annotated[int, Query(ge=1, le=100)] = 20,
        order: Literal["asc", "desc"] = "desc",
    ) -> ItemList:
        """List the items before a stored response."""
        items = [*stored(pool, response_id).input]
        if order == "desc":
            items.reverse()
        if after is not None:
            place = next((index for index, item in enumerate(items) if item["id"] == after), None)
            if place is None:
                raise ApiError(400, f"after: found {after!r:.100}, expected the id of an item", param="after")
            items = items[place + 1 :]
        page = items[:limit]
        ids = [item["id"] for item in page]
        return ItemList(
            data=page,
            first_id=ids[0] if ids else None,
            last_id=ids[-1] if ids else None,
            has_more=len(items) > limit,
        )
