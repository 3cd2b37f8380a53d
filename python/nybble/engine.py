"""Many requests at once over one model: a thread computes them together and hands each its text as it comes.

The thread owns the native scheduler; everybody else only puts requests into its inbox and waits at a request.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import threading
import weakref
from collections import deque
from collections.abc import AsyncIterator, Generator, Iterator, Sequence
from dataclasses import dataclass, replace
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, overload

from nybble import _native, memory
from nybble.errors import ModelError, QueueFullError
from nybble.generation import Completion, TokenLogprob, Writer
from nybble.sampling import SamplingOptions, SamplingOverrides, merge

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from nybble.model import Model

Prompt = str | Sequence[int]
"""A text, or token ids."""


@dataclass(frozen=True)
class Piece:
    """The next part of a text. `str(piece)` is its text."""

    text: str
    """Whole characters. Empty only at the end, for tokens that give no text, such as those of a stop string."""
    tokens: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...] | None = None

    def __str__(self) -> str:
        return self.text


@dataclass(frozen=True)
class EngineStats:
    """Counts since the engine was made, and its state after the latest step."""

    running: int = 0
    """Requests that are computed."""
    waiting: int = 0
    """Requests that wait for a place."""
    cached_pages: int = 0
    """Pages of 64 tokens kept for prompts that begin alike, those in use included."""
    cache_bytes: int = 0
    """Bytes of keys and values now."""
    prompt_tokens: int = 0
    """Tokens of the prompts of all requests."""
    reused_tokens: int = 0
    """Of these, tokens that were not computed because earlier requests had begun alike."""
    completion_tokens: int = 0
    cancelled: int = 0
    finished: int = 0
    """Requests whose text came to its end."""
    steps: int = 0
    drafted_tokens: int = 0
    """Tokens guessed ahead."""
    accepted_tokens: int = 0
    """Guesses that were right."""


class Request:
    """A text that an engine writes. Any thread and any event loop may wait for it.

    `for piece in request` and `async for piece in request` give its pieces as they come, `result()` and `await request`
    the whole. Leaving an `async for` before its end cancels the request, as cancelling the task does.
    """

    def __init__(self, engine: Engine, loop: _Loop, writer: Writer) -> None:
        # Whoever waits for a request keeps its engine.
        self._engine = engine
        self._loop = loop
        self._writer = writer
        self._number: int | None = None
        self._changed = threading.Condition()
        self._pieces: list[Piece] = []
        self._tokens = 0
        self._is_done = writer.finish_reason is not None
        self._is_cancelled = False
        self._error: BaseException | None = None
        self._wakers: list[tuple[asyncio.AbstractEventLoop, asyncio.Future[None]]] = []

    def cancel(self) -> None:
        """Ends the request; its place is free before the next step. Does nothing when it has ended."""
        if self._finish(cancelled=True):
            self._loop.leave(self)

    def __iter__(self) -> Iterator[Piece]:
        count = 0
        while (piece := self._wait(count)) is not None:
            yield piece
            count += 1

    def __aiter__(self) -> AsyncIterator[Piece]:
        return _Pieces(self)

    def result(self, timeout: float | None = None) -> Completion:
        """Waits for the end, and returns the whole text. A cancelled request gives what had been written.

        Raises:
            TimeoutError: it has not ended within so many seconds. It goes on.
            Exception: what ended it, if that was an error: MemoryError, ModelError, InternalError.
        """
        with self._changed:
            if not self._changed.wait_for(lambda: self._is_done, timeout):
                raise TimeoutError(f"the text was not finished within {timeout} seconds")
        return self._outcome()

    @property
    def completion(self) -> Completion:
        """What has been written so far; whole once the request has ended."""
        with self._changed:
            done = self._writer.completion()
            return replace(done, finish_reason="cancelled") if self._is_cancelled else done

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
        """The piece after `count` others, or None when there are no more."""
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
        """Returns when there are more than `count` pieces or there is an end."""
        with self._changed:
            if self._is_done or len(self._pieces) > count:
                return
            loop = asyncio.get_running_loop()
            future = loop.create_future()
            self._wakers.append((loop, future))
        await future

    # --- The engine's side --------------------------------------------------------------------------------------------

    def _push(self, sampled: _native.Sampled) -> bool:
        """Takes the token of a step. Returns whether the text goes on."""
        with self._changed:
            if self._is_done:
                return False
            text = self._writer.push(sampled)
            is_last = self._writer.finish_reason is not None
            if text or is_last:
                tokens, logprobs = self._writer.since(self._tokens)
                if text or tokens:
                    self._tokens += len(tokens)
                    self._pieces.append(Piece(text, tokens, logprobs))
                self._is_done = is_last
                self._wake()
            return not is_last

    def _finish(self, *, cancelled: bool = False, error: BaseException | None = None) -> bool:
        """Ends the request without its text being at its end. False when it had ended already."""
        with self._changed:
            if self._is_done:
                return False
            self._is_done, self._is_cancelled, self._error = True, cancelled, error
            self._wake()
            return True

    def _wake(self) -> None:
        self._changed.notify_all()
        for loop, future in self._wakers:
            with contextlib.suppress(RuntimeError):  # The loop was closed, so nobody waits there.
                loop.call_soon_threadsafe(_resolve, future)
        self._wakers.clear()


def _resolve(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)


class _Pieces(AsyncIterator[Piece]):
    """The pieces of a request. One that is given up cancels the request."""

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


class _Texts(AsyncIterator[str]):
    """The text of the pieces of a request."""

    def __init__(self, request: Request) -> None:
        self.request = request
        self._pieces = _Pieces(request)

    async def __anext__(self) -> str:
        while True:
            if text := (await self._pieces.__anext__()).text:
                return text

    async def aclose(self) -> None:
        """Cancels the request unless it has ended."""
        await self._pieces.aclose()


class Engine:
    """Serves many requests over one model at the same time: `with Engine(model) as engine: ...`.

    Requests join and leave while others are written. A text is, to the bit, the one that `Model.generate` would give
    alone, whatever else is going on.

    Args:
        model: what computes. Closing it does not stop the engine, which keeps what it needs.
        max_batch: requests that are computed at a time; others wait in the order of their coming.
        max_queue: requests that may wait; any number if None.
        cache_bytes: bytes of keys and values at most, those kept for later prompts included. If None, half of the
            memory that is free now, and enough for one text that fills the context.
        prefix_cache: keep keys and values of texts, so that prompts that begin alike are computed once.
        prefill_chunk: tokens of prompts in a step at most. If None, so many that running texts wait about two and a
            half times as long as usual.
        speculation: guess tokens ahead and confirm several in one step, which changes the speed and not the text:
            "off", "on", or "auto", which stops where too few guesses are right or too many requests run.
        draft: a smaller model of the same vocabulary to guess with; otherwise guesses come from the text itself.

    Raises:
        ValueError: a number is out of range, or the draft model has other tokens.
        ModelError: the model is closed.
    """

    def __init__(
        self,
        model: Model,
        *,
        max_batch: int = 16,
        max_queue: int | None = None,
        cache_bytes: int | None = None,
        prefix_cache: bool = True,
        prefill_chunk: int | None = None,
        speculation: Literal["off", "on", "auto"] = "off",
        draft: Model | None = None,
    ) -> None:
        if max_queue is not None and max_queue < 0:
            raise ValueError(f"max_queue: found {max_queue}, expected None, or 0 or more")
        if draft is not None:
            _check_draft(model, draft, speculation)
        self.model = model
        native = model._native
        scheduler = _native.Scheduler(
            native,
            draft=None if draft is None else draft._native,
            max_batch=max_batch,
            cache_bytes=memory.for_caches(native) if cache_bytes is None else cache_bytes,
            prefix_cache=prefix_cache,
            prefill_chunk=prefill_chunk,
            speculation=speculation,
        )
        self._loop = _Loop(scheduler, max_batch, max_queue)
        # Also when the engine is forgotten, and at the end of the process, while Python still runs.
        self._ended = weakref.finalize(self, self._loop.close, drain=False)

    def submit(
        self, prompt: Prompt, options: SamplingOptions | None = None, **overrides: Unpack[SamplingOverrides]
    ) -> Request:
        """Puts a request into the queue and returns at once. Any thread may call it.

        Args:
            prompt: the text to continue, or its token ids.
            options: as in `Model.generate`.
            **overrides: as in `Model.generate`.

        Raises:
            ContextFullError: the prompt does not fit into the context.
            QueueFullError: `max_queue` requests wait already.
            ValueError: an option is out of range, or a token unknown.
            ModelError: the engine or the model is closed.
        """
        self._loop.check(self._loop.room())
        writer = self.model._writer(prompt, merge(options, overrides))
        request = Request(self, self._loop, writer)
        self._loop.add(request)
        return request

    def stream(
        self, prompt: Prompt, options: SamplingOptions | None = None, **overrides: Unpack[SamplingOverrides]
    ) -> AsyncIterator[str]:
        """Continues a prompt piece by piece: `async for piece in engine.stream("Once"): ...`.

        Leaving the loop, or cancelling the task, cancels the request. Raises as `submit` does, at once.
        """
        return _Texts(self.submit(prompt, options, **overrides))

    @overload
    async def generate(
        self, prompt: str, options: SamplingOptions | None = None, **overrides: Unpack[SamplingOverrides]
    ) -> Completion: ...
    @overload
    async def generate(
        self,
        prompt: list[str] | tuple[str, ...],
        options: SamplingOptions | None = None,
        **overrides: Unpack[SamplingOverrides],
    ) -> list[Completion]: ...
    async def generate(
        self,
        prompt: str | list[str] | tuple[str, ...],
        options: SamplingOptions | None = None,
        **overrides: Unpack[SamplingOverrides],
    ) -> Completion | list[Completion]:
        """Continues a prompt, or several, and waits for the whole texts. Cancelling the task cancels the requests."""
        prompts = [prompt] if isinstance(prompt, str) else prompt
        requests: list[Request] = []
        try:
            requests.extend(self.submit(text, options, **overrides) for text in prompts)
            done = [await request for request in requests]
        except BaseException:
            for request in requests:
                request.cancel()
            raise
        return done[0] if isinstance(prompt, str) else done

    def stats(self) -> EngineStats:
        """Counts, as of the latest step."""
        return self._loop.stats()

    def close(self, *, drain: bool = False) -> None:
        """Takes no more requests, and ends: at once, failing those that run and wait, or after all of them (`drain`).

        The model remains open.
        """
        self._loop.close(drain=drain)
        self._ended.detach()

    def __enter__(self) -> Engine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close(drain=error is None)

    def __repr__(self) -> str:
        stats = self.stats()
        return f"<Engine of {self.model!r}: {stats.running} running, {stats.waiting} waiting>"


def _check_draft(model: Model, draft: Model, speculation: str) -> None:
    if speculation == "off":
        raise ValueError('draft: found a model, but speculation is "off", where it would never be asked')
    ours, theirs = model.tokenizer, draft.tokenizer
    if ours.vocab_size != theirs.vocab_size:
        raise ValueError(f"draft: found {theirs.vocab_size} tokens, expected the {ours.vocab_size} of the model")
    for token in range(ours.vocab_size):
        if ours.token_text(token) != theirs.token_text(token):
            found, expected = theirs.token_text(token), ours.token_text(token)
            raise ValueError(f"draft: found {found!r} as token {token}, expected {expected!r} as in the model")


class _Loop:
    """The thread that steps the scheduler, and what reaches it from others."""

    def __init__(self, scheduler: _native.Scheduler, max_batch: int, max_queue: int | None) -> None:
        self._scheduler = scheduler
        self._most = None if max_queue is None else max_batch + max_queue
        self._max_batch = max_batch
        self._changed = threading.Condition()
        self._new: deque[Request] = deque()
        self._left: deque[Request] = deque()
        # Requests that have not ended, and those of them that the scheduler has, by its numbers. The thread's own.
        self._requests: set[Request] = set()
        self._numbers: dict[int, Request] = {}
        self._ending: Literal["drain", "now"] | None = None
        self._error: BaseException | None = None
        self._stats = EngineStats()
        self._native_stats: dict[str, int] = {}
        self._pid = os.getpid()
        # A daemon, so that a program that forgets its engine ends; its end stops the thread before Python goes.
        self._thread = threading.Thread(target=self._run, name="nybble-engine", daemon=True)
        self._thread.start()
        _LOOPS.add(self)

    # --- From any thread ----------------------------------------------------------------------------------------------

    def check(self, room: bool) -> None:
        """Raises unless a request could be taken."""
        if self._pid != os.getpid():
            raise ModelError("the engine was made before this process was forked: make a new one here")
        if self._error is not None:
            raise ModelError(f"the engine has failed: {self._error}") from self._error
        if self._ending is not None:
            raise ModelError("the engine is closed")
        if not room:
            raise QueueFullError(max(len(self._requests) - self._max_batch, 0))

    def room(self) -> bool:
        """Whether one more request may wait."""
        return self._most is None or len(self._requests) < self._most

    def add(self, request: Request) -> None:
        """Puts a request into the inbox."""
        with self._changed:
            self.check(self.room())
            writer = request._writer
            self._count(prompt_tokens=writer.prompt_tokens)
            if request._is_done:  # It asked for no tokens.
                self._count(finished=1)
                return
            self._requests.add(request)
            self._new.append(request)
            self._changed.notify()

    def leave(self, request: Request) -> None:
        """Takes note that a request was cancelled."""
        with self._changed:
            if request in self._requests:
                self._count(cancelled=1)
                self._left.append(request)
                self._changed.notify()

    def stats(self) -> EngineStats:
        with self._changed:
            native = self._native_stats
            running = min(native.get("running", 0), len(self._requests))
            waiting = len(self._requests) - running - len(self._left)
            return replace(self._stats, **{**native, "running": running, "waiting": max(waiting, 0)})

    def close(self, *, drain: bool) -> None:
        if self._pid != os.getpid():
            return  # The thread is in the other process.
        with self._changed:
            self._ending = "drain" if drain and self._ending != "now" else "now"
            if self._ending == "now":
                self._scheduler.interrupt()
            self._changed.notify()
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def _count(self, **more: int) -> None:
        self._stats = replace(self._stats, **{name: getattr(self._stats, name) + n for name, n in more.items()})

    # --- In the thread ------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            while self._take():
                self._step()
            error: BaseException = ModelError("the engine was closed before the text was finished")
        except BaseException as caught:
            error = caught
            if self._ending != "now":
                self._error = caught
            else:
                error = ModelError("the engine was closed before the text was finished")
        self._fail(error)

    def _take(self) -> bool:
        """Waits until there is something to do, and tells the scheduler who came and who left. False at the end."""
        with self._changed:
            while not (self._requests or self._ending):
                self._changed.wait()
            if self._ending == "now" or (self._ending == "drain" and not self._requests):
                return False
            new, self._new = self._new, deque()
            left, self._left = self._left, deque()
        for request in new:
            if not request._is_done:
                writer = request._writer
                request._number = self._scheduler.submit(writer.sequence, writer.limit)
                self._numbers[request._number] = request
        for request in left:
            self._drop(request)
        return True

    def _step(self) -> None:
        tokens = 0
        for number, outcome, cached in self._scheduler.step(signals=False):
            request = self._numbers.get(number)
            if request is None or request._is_done:
                continue  # It was cancelled, or several tokens came at once and an earlier one ended it.
            if isinstance(outcome, BaseException):
                request._finish(error=outcome)
                self._drop(request)
                continue
            tokens += 1
            request._writer.cached_tokens = cached
            if not request._push(outcome) and not request._is_cancelled:
                self._drop(request, finished=1)
        with self._changed:
            self._native_stats = self._scheduler.stats()
            self._count(completion_tokens=tokens)

    def _drop(self, request: Request, finished: int = 0) -> None:
        if request._number is not None:
            self._scheduler.cancel(request._number)
            self._numbers.pop(request._number, None)
        with self._changed:
            self._requests.discard(request)
            self._count(finished=finished)

    def _fail(self, error: BaseException) -> None:
        """Ends whoever still waits."""
        with self._changed:
            requests = list(self._requests)
            self._requests.clear()
            self._ending = self._ending or "now"
        for request in requests:
            request._finish(error=error)

    def _after_fork(self) -> None:
        """In the new process: the thread has not come along, and whoever held a lock never lets go of it."""
        self._changed = threading.Condition()
        for request in self._requests:
            request._changed = threading.Condition()
            request._wakers = []
        self._fail(ModelError("the engine stayed in the process from which this one was forked"))


_LOOPS: weakref.WeakSet[_Loop] = weakref.WeakSet()


def _after_fork() -> None:
    for loop in list(_LOOPS):
        loop._after_fork()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
