"""The state that all routes share: the engine, the settings, and the requests in flight."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TypeVar

from anyio import CapacityLimiter, to_thread

from nybble.engine import Engine, Request
from nybble.server.errors import ApiError, overloaded
from nybble.server.metrics import Metrics
from nybble.server.options import Settings
from nybble.server.protocols.responses.store import ResponseStore

T = TypeVar("T")

_RECOVERY_SECONDS = 10
"""How long a health check waits for an engine that has failed."""


@dataclass
class Service:
    """An engine that is served under a name."""

    engine: Engine
    name: str
    settings: Settings = field(default_factory=Settings)

    def __post_init__(self) -> None:
        self.created: int = self.now()
        self.metrics: Metrics = Metrics(self.engine.stats)
        self.draining: bool = False
        self.working: int = 0
        """Requests in flight that use the model."""
        self.embedding: asyncio.Semaphore = asyncio.Semaphore(1)
        """Embeddings are computed outside the engine's loop, one request at a time."""
        self.long_prompts: asyncio.Semaphore = asyncio.Semaphore(1)
        self.responses: ResponseStore = ResponseStore(self.settings.store_bytes)
        self._threads: CapacityLimiter | None = None
        self._running: set[Request] = set()

    def admit(self, model: str | None, answers: int) -> str | None:
        """Refuses requests for other models and requests beyond the limits, before they cost any work.

        Returns:
            The name of the LoRA adapter to compute with; None for the model alone.

        Raises:
            ApiError: The request is refused.
        """
        if self.draining:
            raise overloaded("the server is shutting down", 503, "shutting_down")
        if model is not None and model not in (self.name, f"{self.name}:latest") and self.lora_of(model) is None:
            names = " and ".join(repr(name) for name in self.models())
            message = f"the model {model!r} does not exist; this server serves {names}"
            raise ApiError(404, message, param="model", code="model_not_found")
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
        return lora if base == self.name and lora in self.engine.model.adapters else None

    def name_of(self, model: str | None) -> str:
        """The name of the model that answers a request for `model`."""
        lora = self.lora_of(model)
        return self.name if lora is None else f"{self.name}:{lora}"

    def models(self) -> list[str]:
        """The names of all models: the base, and the base with each of its LoRA adapters."""
        return [self.name, *(f"{self.name}:{lora}" for lora in self.engine.model.adapters)]

    async def in_thread(self, work: Callable[[], T]) -> T:
        """The result of `work`, which would block the event loop for too long."""
        # Two threads for embeddings and long prompts and two for short prompts. More would wait for each other, and
        # each holds memory. Some versions of anyio create a limiter only where an event loop runs.
        self._threads = self._threads or CapacityLimiter(4)
        return await to_thread.run_sync(work, limiter=self._threads)

    @staticmethod
    def now() -> int:
        """The creation time of answers, in seconds since 1970."""
        return int(time.time())

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
        self.working += 1
        try:
            yield
        finally:
            self.working -= 1

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
