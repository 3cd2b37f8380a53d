"""`Engine`: many requests over one model at the same time.

A thread owns the scheduler and computes all requests together. Other threads put requests into its inbox and wait for
their pieces.
"""

from __future__ import annotations

import asyncio
import ctypes
import math
import os
import threading
import weakref
from collections import deque
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, replace
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, overload

from nybble.chat.reasoning import NO_LIMIT
from nybble.completion import Completion, Prompt, Prompts
from nybble.engine_options import EngineOptions, EngineOverrides, merge_engine_options
from nybble.errors import EngineError, ModelError, QueueFullError
from nybble.generation.driver import SAVING_SECONDS, Driver
from nybble.generation.engine_request import Piece, PieceTexts, Request
from nybble.generation.request import as_prompts, prepare
from nybble.overrides import cannot_pickle
from nybble.sampling import SamplingOptions, SamplingOverrides, merge

if TYPE_CHECKING:
    from typing_extensions import Self, Unpack

    from nybble.model import Model

__all__ = ["Engine", "EngineStats", "Piece", "Prompt", "Request"]


@dataclass(frozen=True)
class EngineStats:
    """Counts since the engine started, and its state after the latest step."""

    running: int = 0
    """Requests in the batch."""
    waiting: int = 0
    """Requests that wait for a slot."""
    cached_pages: int = 0
    """Pages of 64 tokens in the prefix cache, those in use included."""
    cache_bytes: int = 0
    """Bytes of KV cache now."""
    prompt_tokens: int = 0
    """Tokens of the prompts of all requests."""
    reused_tokens: int = 0
    """Prompt tokens that were not computed, because their keys and values were in the prefix cache."""
    completion_tokens: int = 0
    """Tokens sampled."""
    cancelled: int = 0
    """Requests that were cancelled."""
    finished: int = 0
    """Requests whose completion ended by itself."""
    steps: int = 0
    """Steps computed."""
    drafted_tokens: int = 0
    """Draft tokens computed."""
    accepted_tokens: int = 0
    """Draft tokens accepted."""
    disk_cache_hits: int = 0
    """Requests with keys and values from `cache_dir`."""
    restored_tokens: int = 0
    """Tokens whose keys and values were read from `cache_dir`."""
    disk_cache_errors: int = 0
    """Files in `cache_dir` that could not be read or written, or were read too slowly."""
    disk_cache_bytes: int = 0
    """Bytes of the files in `cache_dir`."""


class Engine:
    """Serves many requests over one model at the same time.

    Requests join and leave the batch between steps. Batching never changes output: each completion is bit-identical to
    that of `Model.generate`. Closing the model does not stop the engine. In a process forked from this one, such as a
    worker of a server, the engine starts anew with the first request; requests of the other process raise `ModelError`.

    Args:
        model: The model to compute with.
        options: Limits and features; the defaults of `EngineOptions` if None.
        draft: A smaller model with the same vocabulary, for draft tokens. Without one they come from the requests
            themselves. Needs `speculation`.
        **overrides: Single options by name, such as `max_batch=4`.

    Raises:
        ValueError: An option is out of range, or the draft model has another vocabulary.
        ModelError: The model is closed.

    Example:
        ```python
        with Engine(model, max_batch=8) as engine:
            requests = [engine.submit(prompt, max_tokens=100) for prompt in prompts]
            for request in requests:
                print(request.result())
        ```

        In a coroutine:

        ```python
        completion = await engine.generate("Once upon a time")
        async for text in engine.stream("Once upon a time"):
            print(text, end="", flush=True)
        ```
    """

    def __init__(
        self,
        model: Model,
        options: EngineOptions | None = None,
        *,
        draft: Model | None = None,
        **overrides: Unpack[EngineOverrides],
    ) -> None:
        chosen = merge_engine_options(options, overrides)
        for name, given in (("model", model), ("draft", draft)):
            if given is not None and not hasattr(given, "_native"):
                raise TypeError(f"{name}: found {type(given).__name__}, expected a Model, which Model.load returns")
        if draft is not None:
            _check_draft(model, draft, chosen.speculation)
        self.model: Model = model
        self._loop = _Loop(lambda: Driver(model, chosen, draft), chosen.max_batch, chosen.max_queue)
        # Also when the engine is garbage collected, and at the end of the process while Python still runs.
        self._ended = weakref.finalize(self, self._loop.close, drain=False)

    def submit(
        self,
        prompt: Prompt,
        options: SamplingOptions | None = None,
        *,
        separate_reasoning: bool = False,
        **overrides: Unpack[SamplingOverrides],
    ) -> Request:
        """Queues a request and returns at once. Any thread may call it.

        Args:
            prompt: Text or token ids.
            options: As in `Model.generate`.
            separate_reasoning: Keep reasoning apart from the text, as `Model.chat` does: in `Completion.reasoning`, and
                in the `parts` of each piece.
            **overrides: As in `Model.generate`.

        Raises:
            ContextFullError: The prompt does not fit into the context.
            QueueFullError: `max_queue` requests are waiting.
            ValueError: An option is out of range, or a token is unknown.
            ModelError: The engine or the model is closed.
        """
        return self._submit(prompt, merge(options, overrides), separates=separate_reasoning)

    def _submit(
        self, prompt: Prompt, options: SamplingOptions, name: str = "prompt", *, separates: bool = False
    ) -> Request:
        self._loop.check(self._loop.has_capacity())
        if separates and options.reasoning_budget is None:
            options = options.replace(reasoning_budget=NO_LIMIT)
        prepared = prepare(self.model, prompt, options, name)
        request = Request._of(self, self._loop, prepared, separates=separates)
        self._loop.add(request)
        return request

    def stream(
        self, prompt: Prompt, options: SamplingOptions | None = None, **overrides: Unpack[SamplingOverrides]
    ) -> AsyncIterator[str]:
        """Generates the completion of a prompt piece by piece: `async for text in engine.stream("Once"): ...`.

        Leaving the loop, or cancelling the task, cancels the request. Raises as `submit` does, when called.
        """
        return PieceTexts(self.submit(prompt, options, **overrides))

    @overload
    async def generate(
        self,
        prompt: Prompts,
        options: SamplingOptions | None = None,
        **overrides: Unpack[SamplingOverrides],
    ) -> list[Completion]: ...
    @overload
    async def generate(
        self, prompt: Prompt, options: SamplingOptions | None = None, **overrides: Unpack[SamplingOverrides]
    ) -> Completion: ...
    async def generate(
        self,
        prompt: Prompt | Prompts,
        options: SamplingOptions | None = None,
        **overrides: Unpack[SamplingOverrides],
    ) -> Completion | list[Completion]:
        """Generates the completion of a prompt, or of several prompts. Cancelling the task cancels the requests.

        Args:
            prompt: A prompt (text or token ids), or a list of prompts.
            options: As in `Model.generate`.
            **overrides: As in `Model.generate`.

        Raises:
            Exception: As `submit` and `Request.result` do, for the first prompt that fails. The other requests are
                cancelled.
        """
        chosen = merge(options, overrides)
        prompts, is_one = as_prompts(prompt)
        requests: list[Request] = []
        try:
            for number, each in enumerate(prompts):
                requests.append(self._submit(each, chosen, "prompt" if is_one else f"prompt[{number}]"))
            done = [await request for request in requests]
        except BaseException:
            for request in requests:
                request.cancel()
            raise
        return done[0] if is_one else done

    def stats(self) -> EngineStats:
        """Returns counts and the state after the latest step."""
        return self._loop.stats()

    def close(self, *, drain: bool = False, saving_seconds: float = SAVING_SECONDS) -> None:
        """Stops the engine. Later requests raise `ModelError`. The model stays open.

        Args:
            drain: Finish all running and waiting requests first. Otherwise they fail with `ModelError`.
            saving_seconds: Approximate limit, in seconds, for writing the prefix cache to `cache_dir` afterwards. What
                is not written by then is computed again. With 0, nothing more is written.

        Raises:
            TypeError: `saving_seconds` is not a number.
            ValueError: `saving_seconds` is negative or NaN.
        """
        if not isinstance(saving_seconds, int | float):
            raise TypeError(f"saving_seconds: found {saving_seconds!r:.80}, expected a number")
        if not saving_seconds >= 0:
            raise ValueError(f"saving_seconds: found {saving_seconds}, expected 0 or more")
        self._loop.close(drain=drain, saving_seconds=saving_seconds)
        self._ended.detach()

    @property
    def failure(self) -> Exception | None:
        """The error of the latest step if it failed as a whole, which ends every running request with `EngineError`.

        Later requests are tried with a new scheduler. None after a step that succeeds.
        """
        return self._loop.failure

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close(drain=error is None)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # Waiting for the requests in this thread would stop the tasks that read them.
        try:
            await asyncio.to_thread(self.close, drain=error is None)
        except asyncio.CancelledError:
            self.close()
            raise

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise cannot_pickle(self, "load the model and create an engine in the other process")

    def __repr__(self) -> str:
        stats = self.stats()
        return f"<Engine of {self.model!r}: {stats.running} running, {stats.waiting} waiting>"


def _check_draft(model: Model, draft: Model, speculation: str) -> None:
    if speculation == "off":
        raise ValueError('draft: found a model, but speculation is "off", expected "on" or "auto"')
    if speculation == "mtp":
        raise ValueError('draft: found a model, but speculation is "mtp", which drafts with the model\'s own head')
    ours, theirs = model.tokenizer, draft.tokenizer
    if ours.vocab_size != theirs.vocab_size:
        raise ValueError(f"draft: found {theirs.vocab_size} tokens, expected the {ours.vocab_size} of the model")
    for token in range(ours.vocab_size):
        if ours.token_text(token) != theirs.token_text(token):
            found, expected = theirs.token_text(token), ours.token_text(token)
            raise ValueError(f"draft: found {found!r} as token {token}, expected {expected!r} as in the model")


class _Loop:
    """The thread that steps the driver, and its inbox."""

    def __init__(self, new_driver: Callable[[], Driver[Request]], max_batch: int, max_queue: int | None) -> None:
        self._new_driver = new_driver
        # None after a step that failed, until the next request.
        self._driver: Driver[Request] | None = new_driver()
        self._capacity = None if max_queue is None else max_batch + max_queue
        self._max_batch = max_batch
        self._changed = threading.Condition()
        self._new: deque[Request] = deque()
        self._cancelled: deque[Request] = deque()
        # Requests that have not ended.
        self._requests: set[Request] = set()
        self._ending: Literal["drain", "now"] | None = None
        self._saving_seconds = math.inf
        self.failure: Exception | None = None
        """The error of the latest step, if it failed."""
        self._stats = EngineStats()
        self._driver_stats: dict[str, int] = {}
        # None in a forked process, until the first request.
        self._thread: threading.Thread | None = None
        self._start()
        _LOOPS.add(self)

    def _start(self) -> None:
        # A daemon, so that a program can exit without closing its engine. The finalizer stops the thread before that.
        thread = threading.Thread(target=self._run, name="nybble-engine", daemon=True)
        thread.start()
        self._thread = thread

    # --- From any thread ----------------------------------------------------------------------------------------------

    def check(self, has_capacity: bool) -> None:
        """Raises unless the engine accepts a request."""
        if self._ending is not None:
            raise ModelError("the engine is closed")
        if not has_capacity:
            raise QueueFullError(max(len(self._requests) - self._max_batch, 0))

    def has_capacity(self) -> bool:
        """Whether one more request may wait."""
        return self._capacity is None or len(self._requests) < self._capacity

    def add(self, request: Request) -> None:
        """Puts a request into the inbox."""
        with self._changed:
            self.check(self.has_capacity())
            if self._thread is None:
                self._start()
            self._count(prompt_tokens=request._builder.prompt_tokens)
            if request._is_done:  # Its max_tokens is 0.
                self._count(finished=1)
                return
            self._requests.add(request)
            self._new.append(request)
            self._changed.notify()

    def leave(self, request: Request) -> None:
        """Notifies the thread of a cancelled request."""
        with self._changed:
            if request in self._requests:
                self._count(cancelled=1)
                self._cancelled.append(request)
                self._changed.notify()

    def stats(self) -> EngineStats:
        with self._changed:
            counts = self._driver_stats
            running = min(counts.get("running", 0), len(self._requests))
            waiting = len(self._requests) - running - len(self._cancelled)
            return replace(self._stats, **{**counts, "running": running, "waiting": max(waiting, 0)})

    def close(self, *, drain: bool, saving_seconds: float = SAVING_SECONDS) -> None:
        with self._changed:
            self._saving_seconds = min(self._saving_seconds, saving_seconds)
            self._ending = "drain" if drain and self._ending != "now" else "now"
            if self._ending == "now" and self._driver is not None:
                self._driver.interrupt()
            self._changed.notify()
        if self._thread is not None and threading.current_thread() is not self._thread:
            self._thread.join()

    def _count(self, **more: int) -> None:
        self._stats = replace(self._stats, **{name: getattr(self._stats, name) + n for name, n in more.items()})

    # --- In the thread ------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        while True:
            try:
                while self._take():
                    self._step()
                break
            except Exception as error:
                if self._ending == "now":
                    break
                self._recover(error)
        self._fail(ModelError("the engine was closed before the request ended"))
        if self._driver is not None:
            self._driver.save_prefixes(self._saving_seconds)
        with self._changed:
            driver, self._driver = self._driver, None
        if driver is not None:
            # Outside the lock, since a disk may take its time. The KV cache is freed, even if somebody holds a request.
            driver.close()

    def _must_end(self) -> bool:
        return self._ending == "now" or (self._ending == "drain" and not self._requests)

    def _take(self) -> bool:
        """Waits for something to do, and passes the inbox to the driver. Returns False at the end."""
        with self._changed:
            while not (self._requests or self._ending):
                self._changed.wait()
            if self._must_end():
                return False
            driver = self._driver
        if driver is None:
            # Outside the lock, since it lists a folder.
            driver = self._new_driver()
        with self._changed:
            self._driver = driver
            if self._must_end():
                return False
            new, self._new = self._new, deque()
            cancelled, self._cancelled = self._cancelled, deque()
        for request in new:
            prepared, request._prepared = request._prepared, None
            if prepared is not None and not request._is_done:
                try:
                    driver.submit(prepared, request)
                except Exception as error:
                    self._drop(request, error=error)
        for request in cancelled:
            self._drop(request)
        return True

    def _step(self) -> None:
        if (driver := self._driver) is None:
            return
        tokens = 0
        for request, outcome, cached_tokens in driver.step(signals=False):
            if request._is_done:
                continue  # It was cancelled during the step, and _take drops it.
            if isinstance(outcome, BaseException):
                self._drop(request, error=outcome)
                continue
            tokens += 1
            try:
                request._push(outcome, cached_tokens)
            except Exception as error:  # Whatever goes wrong with the text of one request concerns that request alone.
                self._drop(request, error=error)
                continue
            if request._is_done and not request._is_cancelled:
                self._drop(request, finished=1)
            elif (continuation := request._builder.take_continuation()) is not None:
                try:
                    driver.proceed(request, continuation)
                except Exception as error:
                    self._drop(request, error=error)
        self.failure = None
        with self._changed:
            self._driver_stats = driver.stats()
            self._count(completion_tokens=tokens)

    def _drop(self, request: Request, finished: int = 0, error: BaseException | None = None) -> None:
        if error is not None:
            request._finish(error=error)
        if self._driver is not None:
            self._driver.cancel(request)
        with self._changed:
            self._requests.discard(request)
            self._count(finished=finished)

    def _recover(self, error: Exception) -> None:
        """Ends the requests of a step that failed as a whole. Later ones get a new driver."""
        self.failure = error
        with self._changed:
            failed = self._requests.difference(self._new)
            if self._driver is None:  # No new driver could be made, for example for lack of memory.
                failed = set(self._requests)
                self._new.clear()
            self._requests -= failed
            self._cancelled.clear()
            driver, self._driver, self._driver_stats = self._driver, None, {}
        for request in failed:
            ended = error if isinstance(error, MemoryError) else EngineError(f"the engine has failed: {error}")
            ended.__cause__ = None if ended is error else error
            request._finish(error=ended)
        if driver is not None:
            driver.close()

    def _fail(self, error: BaseException) -> None:
        """Ends all requests with an error."""
        with self._changed:
            requests = list(self._requests)
            self._requests.clear()
            self._ending = self._ending or "now"
        for request in requests:
            request._finish(error=error)

    def _after_fork(self) -> None:
        """In the child process: it has no copy of the thread, and nothing will release the locks that were held.

        The next request starts a thread and makes a new driver. Requests of the parent process fail here.
        """
        self._changed = threading.Condition()
        requests, self._requests = self._requests, set()
        self._new.clear()
        self._cancelled.clear()
        for request in requests:
            request._changed = threading.Condition()
            request._wakers = []
            request._finish(error=ModelError("the request runs in the process that this one was forked from"))
        if self._driver is not None:
            # The thread may have been in the middle of a step. Another reference keeps the driver from being freed.
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(self._driver))
        self._driver, self._thread, self.failure = None, None, None
        self._stats, self._driver_stats = EngineStats(), {}
        if self._ending == "drain":
            self._ending = "now"


_LOOPS: weakref.WeakSet[_Loop] = weakref.WeakSet()


def _after_fork() -> None:
    for loop in list(_LOOPS):
        loop._after_fork()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
