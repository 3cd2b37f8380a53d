"""What all routes share: the engine, the limits, and who is being served."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, TypeVar

from anyio import CapacityLimiter, to_thread

from nybble.server.errors import ApiError, overloaded
from nybble.server.metrics import Metrics

if TYPE_CHECKING:
    from collections.abc import Callable

    from nybble.engine import Engine, Request

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How a server protects itself. Times are in seconds."""

    api_key: str | None = None
    """What clients must know; None lets everyone in who can reach the server."""
    allowed_hosts: frozenset[str] | None = None
    """Names under which the server may be asked for; None for any."""
    max_body_bytes: int = 1_000_000
    max_answers: int = 144
    """Answers that are written or wait at the same time."""
    pooling: Literal["mean", "last"] = "mean"
    """How the vectors of tokens become that of a text; the card of a model for embeddings tells."""
    max_connections: int = 1024
    request_seconds: float = 600.0
    """From a request that is there whole to the end of its answer."""
    receive_seconds: float = 30.0
    """From the first byte of a request to its last."""
    stall_seconds: float = 30.0
    """How long a client may read nothing of an answer."""
    drain_seconds: float = 30.0
    """How long running answers may go on after SIGTERM."""


@dataclass
class Service:
    """One engine, served under one name."""

    engine: Engine
    name: str
    settings: Settings = field(default_factory=Settings)

    def __post_init__(self) -> None:
        self.created = self.now()
        self.metrics = Metrics(self)
        self.draining = False
        self.working = 0
        """Requests that the model is busy with, or about to be."""
        self.embedding = asyncio.Semaphore(1)
        """Embeddings are computed beside the engine's loop, so one request at a time."""
        self.long_prompts = asyncio.Semaphore(1)
        self._threads: CapacityLimiter | None = None
        self._running: set[Request] = set()

    def admit(self, model: str | None, answers: int) -> None:
        """Refuses what is not for this server or too much for it, before any work is done for it."""
        if self.draining:
            raise overloaded("the server is shutting down", 503, "shutting_down")
        if model is not None and model != self.name:
            message = f"the model {model!r} does not exist here, only {self.name!r}"
            raise ApiError(404, message, param="model", code="model_not_found")
        most = self.settings.max_answers
        if answers > most:
            message = f"found {answers} answers in one request, expected at most {most}"
            raise ApiError(400, message, code="too_many_answers")
        if len(self._running) + answers > most:
            raise overloaded("the server has as much to do as it can take on", 429, "queue_full")

    async def in_thread(self, work: Callable[[], T]) -> T:
        """The result of what takes too long for the loop."""
        # Two for those of above and two for short prompts; more would wait for each other, and each keeps memory. Some
        # versions of anyio make this only where a loop runs.
        self._threads = self._threads or CapacityLimiter(4)
        return await to_thread.run_sync(work, limiter=self._threads)

    @staticmethod
    def now() -> int:
        """The time that answers carry, in seconds since 1970."""
        return int(time.time())

    def began(self, request: Request) -> None:
        """Remembers a request, so that it can be stopped."""
        self._running.add(request)

    def ended(self, request: Request) -> None:
        """Forgets a request, and frees its slot if it has not ended by itself."""
        request.cancel()
        self._running.discard(request)

    def stop(self) -> None:
        """Ends all answers; their clients are told so."""
        for request in list(self._running):
            request.cancel()
