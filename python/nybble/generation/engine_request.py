"""`Request`: a request to an engine, its pieces and its completion, for threads and event loops."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import AsyncIterator, Generator, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol

from nybble.chat.reasoning_splitter import OutputPart
from nybble.completion import Completion, TokenLogprob
from nybble.generation.builder import CompletionBuilder
from nybble.overrides import Returned

if TYPE_CHECKING:
    from nybble import _native
    from nybble.chat.reasoning_splitter import OutputPart
    from nybble.generation.request import PreparedRequest


class _Loop(Protocol):
    """The loop of an engine."""

    def leave(self, request: Request) -> None:
        """Notifies the loop of a cancelled request."""


@dataclass(frozen=True)
class Piece:
    """The next part of a completion. `str(piece)` is its text."""

    text: str
    """Whole characters. Empty for tokens without text, such as those of a stop string at the end, and for reasoning."""
    tokens: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...] | None = None
    """One entry per token if `SamplingOptions.logprobs` was set."""
    parts: tuple[OutputPart, ...] = ()
    """Reasoning and text in their order, for requests with `separate_reasoning`."""

    @property
    def reasoning(self) -> str:
        """The next part of the reasoning, for requests with `separate_reasoning`."""
        return "".join(part.text for part in self.parts if part.kind == "reasoning")

    def __str__(self) -> str:
        return self.text


class Request(Returned):
    """A request to an engine, returned by `Engine.submit`. Any thread and any event loop may wait for it.

    `for piece in request` and `async for piece in request` yield its pieces as they are generated. `request.result()`
    and `await request` return the completion. Leaving an `async for` before its end cancels the request, as cancelling
    the task does.
    """

    _returned_by = "Engine.submit(...)"
    _instead_of_pickling = "wait for its result here and send that"

    @classmethod
    def _of(cls, engine: object, loop: _Loop, prepared: PreparedRequest, *, separates: bool = False) -> Request:
        request = cls.__new__(cls)
        request._begin(engine, loop, prepared, separates)
        return request

    def _begin(self, engine: object, loop: _Loop, prepared: PreparedRequest, separates: bool) -> None:
        # A reference to the engine keeps it running.
        self._engine = engine
        self._loop = loop
        self._prepared: PreparedRequest | None = prepared
        self._builder = CompletionBuilder(prepared, separates=separates)
        self._separates = separates
        self._splits = separates and prepared.watch is not None
        self._changed = threading.Condition()
        self._pieces: list[Piece] = []
        self._tokens = 0
        """Number of tokens in the pieces."""
        self._parts = 0
        """Number of parts in the pieces."""
        self._is_done = self._builder.finish_reason is not None
        self._is_cancelled = False
        self._error: BaseException | None = None
        self._wakers: list[tuple[asyncio.AbstractEventLoop, asyncio.Future[None]]] = []

    def cancel(self) -> None:
        """Ends the request. Its slot is free before the next step. Does nothing if the request has ended."""
        if self._finish(cancelled=True):
            self._loop.leave(self)

    def __iter__(self) -> Iterator[Piece]:
        count = 0
        while (piece := self._wait(count)) is not None:
            yield piece
            count += 1

    def __aiter__(self) -> AsyncIterator[Piece]:
        return Pieces(self)

    def result(self, timeout: float | None = None) -> Completion:
        """Waits for the end of the request. Returns its completion; that of a cancelled request is partial.

        Args:
            timeout: Seconds to wait; None for no limit.

        Raises:
            TimeoutError: The request has not ended in time. It continues.
            MemoryError: The KV cache does not fit into the memory limit.
            ModelError: The engine was closed, or the logits contain no finite value.
            EngineError: A step failed for all of its requests.
            InternalError: A bug in nybble.
        """
        with self._changed:
            if not self._changed.wait_for(lambda: self._is_done, timeout):
                raise TimeoutError(f"the request has not ended within {timeout} seconds")
        return self._outcome()

    @property
    def completion(self) -> Completion:
        """The completion so far; complete once the request has ended."""
        with self._changed:
            done = self._builder.completion()
            return replace(done, finish_reason="cancelled") if self._is_cancelled else done

    def __repr__(self) -> str:
        with self._changed:
            if self._error is not None:
                state = f"failed: {self._error!r}"
            elif self._is_cancelled:
                state = "cancelled"
            else:
                state = self._builder.describe()
        return f"<Request: {state}>"

    def __await__(self) -> Generator[Any, None, Completion]:
        return self._finished().__await__()

    async def _finished(self) -> Completion:
        try:
            while not self._is_done:
                await self._change(len(self._pieces))
        except asyncio.CancelledError:
            self.cancel()
            raise
        return self._outcome()

    def _outcome(self) -> Completion:
        if self._error is not None:
            raise self._error
        return self.completion

    def _wait(self, count: int) -> Piece | None:
        """Waits for piece `count`. Returns None if the request ended before it."""
        with self._changed:
            self._changed.wait_for(lambda: self._is_done or len(self._pieces) > count)
        return self._at(count)

    def _at(self, count: int) -> Piece | None:
        if len(self._pieces) > count:
            return self._pieces[count]
        if self._error is not None:
            raise self._error
        return None

    async def _change(self, count: int) -> None:
        """Waits until there are more than `count` pieces or the request has ended."""
        with self._changed:
            if self._is_done or len(self._pieces) > count:
                return
            loop = asyncio.get_running_loop()
            future = loop.create_future()
            self._wakers.append((loop, future))
        await future

    # --- Called by the engine's thread --------------------------------------------------------------------------------

    def _push(self, sampled: _native.Sampled, cached_tokens: int) -> None:
        """Appends a token, unless the request has ended."""
        with self._changed:
            if self._is_done:
                return
            self._builder.report_cached(cached_tokens)
            text = self._builder.push(sampled)
            is_last = self._builder.finish_reason is not None
            parts = tuple(self._builder.parts(self._parts)) if self._separates else ()
            if text or parts or is_last:
                tokens, logprobs = self._builder.since(self._tokens)
                if text or parts or tokens:
                    self._tokens += len(tokens)
                    self._parts += len(parts)
                    if self._splits and not parts:
                        # Markers that were cut off: nothing of them is content.
                        parts = (OutputPart("content", ""),)
                    self._pieces.append(Piece(text, tokens, logprobs, parts))
                self._is_done = is_last
                self._wake()

    def _finish(self, *, cancelled: bool = False, error: BaseException | None = None) -> bool:
        """Ends the request before its completion has ended. Returns False if the request had ended."""
        with self._changed:
            if self._is_done:
                return False
            self._is_done, self._is_cancelled, self._error = True, cancelled, error
            self._wake()
            return True

    def _wake(self) -> None:
        self._changed.notify_all()
        for loop, future in self._wakers:
            with contextlib.suppress(RuntimeError):  # The event loop was closed.
                loop.call_soon_threadsafe(_resolve, future)
        self._wakers.clear()


def _resolve(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)


class Pieces(AsyncIterator[Piece]):
    """The pieces of a request. Dropping the iterator cancels the request."""

    def __init__(self, request: Request) -> None:
        self._request = request
        self._count = 0

    async def __anext__(self) -> Piece:
        request = self._request
        try:
            await request._change(self._count)
        except asyncio.CancelledError:
            request.cancel()
            raise
        if (piece := request._at(self._count)) is None:
            raise StopAsyncIteration
        self._count += 1
        return piece

    async def aclose(self) -> None:
        """Cancels the request unless it has ended."""
        self._request.cancel()

    def __del__(self) -> None:
        self._request.cancel()


class PieceTexts(AsyncIterator[str]):
    """The text of each piece of a request."""

    def __init__(self, request: Request) -> None:
        self.request = request
        self._pieces = Pieces(request)

    async def __anext__(self) -> str:
        while True:
            if text := (await self._pieces.__anext__()).text:
                return text

    async def aclose(self) -> None:
        """Cancels the request unless it has ended."""
        await self._pieces.aclose()

    def __repr__(self) -> str:
        return f"<stream of {self.request!r}>"
