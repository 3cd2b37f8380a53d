"""A model that is served: its engine, settings and requests in flight; and what the models of a server share."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import InitVar, dataclass, field
from typing import TypeVar

from anyio import CapacityLimiter, to_thread

from nybble.engine import Engine, Request
from nybble.server.errors import ApiError, overloaded, shutting_down, unknown_model
from nybble.server.metrics import Metrics
from nybble.server.options import Settings
from nybble.server.protocols.responses.store import ResponseStore

T = TypeVar("T")

_RECOVERY_SECONDS = 10
"""How long a health check waits for an engine that has failed."""


@dataclass
class Shared:
    """What the models of a server have in common."""

    metrics: Metrics
    responses: ResponseStore
    draining: bool = False
    working: int = 0
    """Requests in flight that use a model."""


@dataclass
class Service:
    """An engine that is served under a name, and under other names if it has any.

    `in_common` is what the service shares with those of the other models of the server; its own if None.
    """

    engine: Engine
    name: str
    settings: Settings = field(default_factory=Settings)
    aliases: tuple[str, ...] = ()
    in_common: InitVar[Shared | None] = None

    def __post_init__(self, in_common: Shared | None) -> None:
        self.created: int = self.now()
        self.shared: Shared = in_common or Shared(
            Metrics(lambda: {None: self.engine.stats()}), ResponseStore(self.settings.store_bytes)
        )
        self.embedding: asyncio.Semaphore = asyncio.Semaphore(1)
        """Embeddings are computed outside the engine's loop, one request at a time."""
        self.long_prompts: asyncio.Semaphore = asyncio.Semaphore(1)
        # Two threads for embeddings and long prompts and two for short prompts. More would wait for each other, and
        # each holds memory.
        self._threads: asyncio.Semaphore = asyncio.Semaphore(4)
        self._running: set[Request] = set()

    @property
    def metrics(self) -> Metrics:
        """The metrics of the server."""
        return self.shared.metrics

    @property
    def responses(self) -> ResponseStore:
        """The responses that clients may continue, whatever model has given them."""
        return self.shared.responses

    @property
    def draining(self) -> bool:
        """Whether the server shuts down."""
        return self.shared.draining

    @property
    def working(self) -> int:
        """Requests in flight that use a model of the server."""
        return self.shared.working

    def admit(self, model: str | None, answers: int) -> str | None:
        """Refuses requests for other models and requests beyond the limits, before they cost any work.

        Returns:
            The name of the LoRA adapter to compute with; None for the model alone.

        Raises:
            ApiError: The request is refused.
        """
        if self.draining:
            raise shutting_down()
        if model is not None and not self._is_base(model) and self.lora_of(model) is None:
            raise unknown_model(model, self.models())
        limit = self.settings.max_answers
        if answers > limit:
            message = f"found {answers} answers in one request, expected at most {limit}"
            raise ApiError(400, message, code="too_many_answers")
        if len(self._running) + answers > limit:
            raise overloaded("the server has too many requests at the moment", 429, "queue_full")
        return self.lora_of(model)

    def lora_of(self, model: str | None) -> str | None:
        """The name of the LoRA adapter that the model `base:name` has; None for the base and unknown models."""
        base, _, lora = (model or "").rpartition(":")
        return lora if base in (self.name, *self.aliases) and lora in self.engine.model.adapters else None

    def _is_base(self, model: str) -> bool:
        return any(model in (name, f"{name}:latest") for name in (self.name, *self.aliases))

    def name_of(self, model: str | None) -> str:
        """The name of the model that answers a request for `model`."""
        lora = self.lora_of(model)
        return self.name if lora is None else f"{self.name}:{lora}"

    def models(self) -> list[str]:
        """The names of all models: the base, and the base with each of its LoRA adapters."""
        return [self.name, *(f"{self.name}:{lora}" for lora in self.engine.model.adapters)]

    async def in_thread(self, work: Callable[[], T]) -> T:
        """The result of `work`, which would block the event loop for too long.

        A caller that is cancelled waits until the work has ended: the work uses the model, which must stay loaded.
        """
        async with self._threads:
            # The limiter belongs to this call. That of anyio is shared by everything in the process.
            task = asyncio.ensure_future(to_thread.run_sync(work, limiter=CapacityLimiter(1)))
            try:
                return await asyncio.shield(task)
            except asyncio.CancelledError:
                await _ended(task)
                raise

    @staticmethod
    def now() -> int:
        """The creation time of answers, in seconds since 1970."""
        return int(time.time())

    def observe_first_token(self, seconds: float) -> None:
        """Counts the time from a prompt to the first piece of its answer."""
        self.metrics.observe_first_token(self.name, seconds)

    async def recovers(self) -> bool:
        """Whether the engine, which has failed, computes a token again."""
        try:
            await asyncio.wait_for(self._one_token(), _RECOVERY_SECONDS)
        except Exception:
            return False
        return True

    async def _one_token(self) -> None:
        await self.engine.submit([0], max_tokens=1)

    @contextlib.contextmanager
    def in_flight(self) -> Iterator[None]:
        """Counts a request that uses the model, for the duration of the block."""
        self.shared.working += 1
        try:
            yield
        finally:
            self.shared.working -= 1

    @contextlib.contextmanager
    def tracked(self, request: Request) -> Iterator[Request]:
        """Lets `stop` end a request for the duration of the block, which frees its slot at the end."""
        self._running.add(request)
        try:
            yield request
        finally:
            request.cancel()
            self._running.discard(request)

    def stop(self) -> None:
        """Cancels all answers. Their clients receive an error."""
        for request in list(self._running):
            request.cancel()


async def _ended(task: asyncio.Future[T]) -> None:
    """Waits until a task has ended, even if the caller is cancelled again."""
    while not task.done():
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.wait([task])
    if not task.cancelled():
        task.exception()  # Otherwise asyncio logs an error that nobody has asked for.
