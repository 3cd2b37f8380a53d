"""From a request to the engine and back, with an eye on the client: who leaves, or takes too long, frees the slots."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from typing import Any, TypeVar

from fastapi import Request as HttpRequest
from fastapi import Response
from starlette.types import Receive, Scope, Send

from nybble.engine import Piece, Request
from nybble.sampling import SamplingOptions
from nybble.server.errors import ApiError, overloaded, told_to_the_client
from nybble.server.responses import FinishReason, PromptDetails, Usage
from nybble.server.service import Service

_log = logging.getLogger("nybble.server")

T = TypeVar("T")

Prompt = str | list[int]

_LONG = 100_000
"""Bytes of a request from which on it may take a second to prepare."""


class ClientGone(Exception):  # noqa: N818  No error: clients may leave.
    """The client has closed the connection."""


class Run:
    """The answers to one request, from their submission until their slots are free."""

    def __init__(self, service: Service, requests: Sequence[Request]) -> None:
        self._service = service
        self.requests = requests
        self._began = time.perf_counter()

    @classmethod
    async def start(
        cls,
        service: Service,
        http: HttpRequest,
        param: str,
        prepare: Callable[[], Sequence[tuple[Prompt, SamplingOptions]]],
    ) -> Run:
        """Submits what `prepare` makes of a request; both in a thread, for templates and tokenizers may take a while.

        `param` is the parameter that holds the prompt. Long prompts are prepared one at a time, short ones beside them.
        """
        requests: list[Request] = []
        service.working += 1

        def submit() -> None:
            for prompt, options in prepare():
                requests.append(service.engine.submit(prompt, options))
                service.began(requests[-1])

        run = cls(service, requests)
        try:
            with told_to_the_client(param):
                if http.state.body_bytes <= _LONG:
                    await service.in_thread(submit)
                else:
                    async with service.long_prompts:
                        if await http.is_disconnected():
                            raise ApiError(400, "the client has left")
                        await service.in_thread(submit)
        except BaseException:
            run.close()
            raise
        return run

    def close(self) -> None:
        """Frees the slots of what has not ended."""
        self._service.working -= 1
        for request in self.requests:
            self._service.ended(request)

    async def pieces(self) -> AsyncIterator[tuple[int, Piece | None]]:
        """The pieces of all answers as they come, with the number of the answer; None when one has ended."""
        queue: asyncio.Queue[tuple[int, Piece | BaseException | None]] = asyncio.Queue()

        async def pump(index: int, request: Request) -> None:
            try:
                async for piece in request:
                    queue.put_nowait((index, piece))
                if request.completion.finish_reason == "cancelled":
                    raise overloaded("the server is shutting down", 503, "shutting_down")
                queue.put_nowait((index, None))
            except Exception as error:
                queue.put_nowait((index, error))

        pumps = [asyncio.ensure_future(pump(index, request)) for index, request in enumerate(self.requests)]
        try:
            open_answers, first = len(pumps), True
            while open_answers:
                index, piece = await queue.get()
                if isinstance(piece, BaseException):
                    raise piece
                if first:
                    first = False
                    self._service.metrics.first_token_seconds.observe(time.perf_counter() - self._began)
                open_answers -= piece is None
                yield index, piece
        finally:
            for task in pumps:
                task.cancel()
            await asyncio.gather(*pumps, return_exceptions=True)

    def finish_reason(self, index: int) -> FinishReason:
        """Why an answer ended."""
        return "stop" if self.requests[index].completion.finish_reason == "stop" else "length"

    def usage(self, prompts: int = 1) -> Usage:
        """The tokens of all answers; each of the `prompts` is counted once, however many answers it has."""
        usages = [request.completion.usage for request in self.requests]
        first_answers = usages[:: len(usages) // prompts]
        read, written = sum(u.prompt_tokens for u in first_answers), sum(u.completion_tokens for u in usages)
        return Usage(
            prompt_tokens=read,
            completion_tokens=written,
            total_tokens=read + written,
            prompt_tokens_details=PromptDetails(cached_tokens=sum(u.cached_tokens for u in first_answers)),
        )


async def unless_gone(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`, which is cancelled when the client leaves.

    Raises:
        ClientGone: it has left.
    """

    async def left() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    task, watch = asyncio.ensure_future(work), asyncio.ensure_future(left())
    try:
        await asyncio.wait((task, watch), return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise ClientGone
    finally:
        task.cancel()
        watch.cancel()
        await asyncio.gather(task, watch, return_exceptions=True)


async def limited(service: Service, http: HttpRequest, work: Coroutine[Any, Any, Response]) -> Response:
    """The answer that `work` makes, within the time that there is for it and while the client is there."""
    try:
        return await unless_gone(http.receive, asyncio.wait_for(work, service.settings.request_seconds))
    except ClientGone:
        return Response(status_code=499)  # Nobody reads it.
    except (asyncio.TimeoutError, MemoryError) as error:
        raise _explained(service, error) from error


async def whole(service: Service, http: HttpRequest, run: Run, work: Coroutine[Any, Any, Response]) -> Response:
    """The answer that `work` makes of a run, whose slots are free afterwards."""
    try:
        return await limited(service, http, work)
    finally:
        run.close()


class EventStream(Response):
    """Server-sent events, one for each text that `events` gives, and the one that says that it was all."""

    media_type = "text/event-stream"

    def __init__(self, service: Service, run: Run, events: AsyncIterator[str]) -> None:
        super().__init__(headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._service = service
        self._run = run
        self._events = events

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Sends the events until they end, the time is over, or the client leaves."""
        try:
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            await unless_gone(receive, self._send(send))
        except ClientGone:
            pass
        finally:
            self._run.close()

    async def _send(self, send: Send) -> None:
        async def emit() -> None:
            async for event in self._events:
                await send(_event(event))
                # Sending waits only where the other side reads slowly, and a lost connection is noticed in between.
                await asyncio.sleep(0)

        try:
            await asyncio.wait_for(emit(), self._service.settings.request_seconds)
            await send(_event("[DONE]"))
        except Exception as error:
            # The head of the answer is out, so an error is one more event.
            await send(_event(_explained(self._service, error).body.model_dump_json()))
        await send({"type": "http.response.body", "body": b"", "more_body": False})


def _event(text: str) -> dict[str, Any]:
    return {"type": "http.response.body", "body": f"data: {text}\n\n".encode(), "more_body": True}


def _explained(service: Service, error: Exception) -> ApiError:
    if isinstance(error, ApiError):
        return error
    if isinstance(error, asyncio.TimeoutError):
        # Trying again would only take as long again, and OpenAI's client would.
        message = f"the answer was not complete after {service.settings.request_seconds:g} seconds"
        return ApiError(408, message, code="timeout", headers={"x-should-retry": "false"})
    if isinstance(error, MemoryError):
        return overloaded("there is no memory for this at the moment", 503, "out_of_memory")
    _log.error("an answer failed", exc_info=error)
    return ApiError(500, "the server failed: its log tells why")
