"""Answers HTTP requests, whole or as server-sent events, and frees the slots of clients that leave or take too long."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncGenerator, Coroutine, Mapping
from dataclasses import replace
from typing import Any, TypeVar

from fastapi import Request as HttpRequest
from fastapi import Response
from starlette.types import Receive, Scope, Send

from nybble.errors import EngineError
from nybble.server.errors import INTERNAL_ERROR, ApiError, engine_failed, invalid_option, out_of_memory
from nybble.server.generation import AnswerGroup
from nybble.server.protocols.adapter import Adapter
from nybble.server.service import Service

_log = logging.getLogger("nybble.server")

T = TypeVar("T")


class ClientDisconnected(Exception):  # noqa: N818  Not an error: clients may leave.
    """The client has closed the connection."""


async def respond(service: Service, http: HttpRequest, adapter: Adapter) -> Response:
    """Generates the answers to a request and returns them in its wire protocol.

    Raises:
        ApiError: The request is invalid or the server is overloaded.
    """
    service.admit(adapter.model, adapter.answers)
    if not service.engine.model.info.generates:
        message = f"the model {service.name!r} generates no text: it is for embeddings or classification"
        raise ApiError(400, message, param="model")
    request = replace(adapter.translate(), lora=service.lora_of(adapter.model))
    group = await AnswerGroup.submit(service, http, request)
    if adapter.streams:
        return _EventStream(service, group, adapter, http.state.deadline)
    with group:
        return await with_timeout(service, http, _complete_response(group, adapter), group.parameters)


async def _complete_response(group: AnswerGroup, adapter: Adapter) -> Response:
    return Response(adapter.dump(await adapter.collected(group.stream_events())), media_type="application/json")


async def disconnected(receive: Receive) -> None:
    """Returns when the client has disconnected."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def cancel_on_disconnect(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`, which is cancelled if the client disconnects.

    Raises:
        ClientDisconnected: The client has disconnected.
    """
    task, watch = asyncio.ensure_future(work), asyncio.ensure_future(disconnected(receive))
    try:
        await asyncio.wait((task, watch), return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise ClientDisconnected
    finally:
        task.cancel()
        watch.cancel()
        await asyncio.gather(task, watch, return_exceptions=True)


async def with_timeout(
    service: Service,
    http: HttpRequest,
    work: Coroutine[Any, Any, Response],
    parameters: Mapping[str, str] | None = None,
) -> Response:
    """The response of `work`, within the time limit of requests and while the client is connected.

    Raises:
        ApiError: The time limit has passed, memory has run out, or an option turned out to be invalid. `parameters`
            are the parameters of the request that set options under other names.
    """
    try:
        return await cancel_on_disconnect(http.receive, _before(http.state.deadline, work))
    except ClientDisconnected:
        return Response(status_code=499)  # The client is gone.
    except (asyncio.TimeoutError, MemoryError, EngineError, ValueError) as error:
        raise _as_api_error(service, error, parameters) from error


async def _before(deadline: float, work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`, which is cancelled at the deadline, a time of `time.monotonic`."""
    return await asyncio.wait_for(work, max(0, deadline - time.monotonic()))


class _EventStream(Response):
    """A response that comes message by message, as server-sent events or in another format of the protocol."""

    def __init__(self, service: Service, group: AnswerGroup, adapter: Adapter, deadline: float) -> None:
        headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
        super().__init__(headers=headers, media_type=adapter.media_type)
        del self.headers["content-length"]
        self._service = service
        self._group = group
        self._adapter = adapter
        self._deadline = deadline

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Sends the events until they end, the time limit has passed, or the client disconnects."""
        with self._group, contextlib.suppress(ClientDisconnected):
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            await cancel_on_disconnect(receive, self._send(send))

    async def _send(self, send: Send) -> None:
        async def emit() -> None:
            async with contextlib.aclosing(self._messages()) as messages:
                async for message in messages:
                    await send(_body(message))
                    # `send` waits only for slow readers. A pause in between lets the server notice a lost connection.
                    await asyncio.sleep(0)

        try:
            await _before(self._deadline, emit())
            if end := self._adapter.end_of_stream:
                await send(_body(end))
        except Exception as error:
            # The status line has been sent, so the error is one more message.
            failed = _as_api_error(self._service, error, self._group.parameters)
            await send(_body(self._adapter.failure(failed)))
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _messages(self) -> AsyncGenerator[bytes, None]:
        async with contextlib.aclosing(self._group.stream_events()) as events:
            async for event in events:
                for chunk in self._adapter.chunks(event):
                    yield self._adapter.frame(chunk)


def _body(message: bytes) -> dict[str, Any]:
    return {"type": "http.response.body", "body": message, "more_body": True}


def _as_api_error(service: Service, error: Exception, parameters: Mapping[str, str] | None = None) -> ApiError:
    if isinstance(error, ApiError):
        return error
    if isinstance(error, ValueError):  # A constraint has exceeded the limits of its parser, for example.
        return invalid_option(error, "messages", parameters or {})
    if isinstance(error, asyncio.TimeoutError):
        # OpenAI's client would retry, and a second attempt would take as long.
        message = f"the answer was not complete after {service.settings.request_seconds:g} seconds"
        return ApiError(408, message, code="timeout", headers={"x-should-retry": "false"})
    if isinstance(error, MemoryError):
        return out_of_memory()
    if isinstance(error, EngineError):
        _log.error("%s", error, exc_info=error)
        return engine_failed()
    _log.error("an answer failed", exc_info=error)
    return ApiError(500, INTERNAL_ERROR)
