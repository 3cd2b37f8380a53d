"""A model of a pool: whether it is in memory, and the requests that use it or wait for it."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import itertools
import math
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from nybble.engine import Engine, EngineStats
from nybble.generation.driver import SAVING_SECONDS
from nybble.model import Model
from nybble.server.metrics import GAUGES
from nybble.server.options import Settings
from nybble.server.pool.job import Job
from nybble.server.pool.needs import Limits, Needs, adapter_bytes, read_needs
from nybble.server.pool.spec import ModelSpec
from nybble.server.service import Service, Shared

State = Literal["unloaded", "preparing", "loading", "loaded", "unloading"]


@dataclass
class Loaded:
    """A model in memory."""

    service: Service
    nbytes: int
    """The weights, and the largest size of the KV cache. Adapters are not counted."""
    resources: contextlib.ExitStack

    def close(self, saving_seconds: float = SAVING_SECONDS) -> None:
        """Frees the model, whose requests have ended.

        Args:
            saving_seconds: How long writing the prefix cache to its folder may take, about.
        """
        self.service.engine.close(saving_seconds=saving_seconds)
        self.resources.close()


class Ticket:
    """A request that waits for a model. Those with lower numbers came earlier."""

    _numbers = itertools.count()

    def __init__(self) -> None:
        self.number: int = next(self._numbers)
        self.is_admitted: bool = False
        """Whether the request uses the model, even if nobody waits for it any more."""
        self.ended: asyncio.Future[Service] = asyncio.get_running_loop().create_future()
        """The service once the request may use it, or the error that ended the wait."""

    def admit(self, service: Service) -> None:
        """Ends the wait."""
        self.is_admitted = True
        self.ended.set_result(service)

    def refuse(self, error: Exception) -> None:
        """Ends the wait with an error."""
        self.ended.set_exception(error)
        self.ended.exception()  # Nobody may ask for it, if the request is gone.


@dataclass(eq=False)
class Entry:
    """A model of a pool."""

    name: str
    settings: Settings
    """Those of the model's service."""
    spec: ModelSpec | None = None
    """How to load it; None for a model that stays loaded."""
    needs: Needs | None = None
    """None until the files are on this machine and their headers have been read."""
    state: State = "unloaded"
    is_stale: bool = False
    """Whether the headers must be read again, because the model could not be loaded."""
    nbytes: int = 0
    """Memory that is reserved for the model."""
    lost_bytes: int = 0
    """Memory that the model may still take, because unloading it has failed."""
    loaded: Loaded | None = None
    users: int = 0
    """Requests that use the model."""
    waiting: deque[Ticket] = field(default_factory=deque)
    used_at: int = 0
    """A number that grows with each use of any model."""
    adapters: dict[str, Path] = field(default_factory=dict)
    """The paths of the LoRA adapters that the model is loaded with."""
    adapter_sizes: dict[str, int] = field(default_factory=dict)
    """What each adapter of the loaded model takes, as part of `nbytes`. Its files may have changed since."""
    job: Job[Needs] | Job[Loaded] | Job[None] | None = None
    timer: asyncio.TimerHandle | None = None
    """Unloads the model when it has been idle for long enough."""
    unload_after: float | None = None
    """Seconds without a request after which the model is unloaded; None for never."""
    kept_for: float | None = None
    """What the latest request wants instead of `unload_after`."""
    created: int = field(default_factory=Service.now)
    loads: int = 0
    unloads: int = 0
    failures: int = 0
    _earlier: EngineStats = field(default_factory=EngineStats)
    """The counts of engines that have been closed."""

    @property
    def plan(self) -> tuple[ModelSpec, Needs]:
        """How to load the model, and what it needs.

        Raises:
            RuntimeError: The model was not prepared.
        """
        if self.spec is None or self.needs is None:
            raise RuntimeError(f"the model {self.name!r} was not prepared")
        return self.spec, self.needs

    @property
    def service(self) -> Service | None:
        """The service of the model while it is loaded."""
        return None if self.loaded is None else self.loaded.service

    @property
    def aliases(self) -> tuple[str, ...]:
        """Other names of the model."""
        if self.spec is not None:
            return self.spec.aliases
        return () if self.service is None else self.service.aliases

    @property
    def lora_names(self) -> tuple[str, ...]:
        """The names of the LoRA adapters."""
        return tuple(self.adapters) if self.service is None else self.service.engine.model.adapters

    @property
    def idle_seconds(self) -> float | None:
        """Seconds without a request after which the model is unloaded now; None for never."""
        seconds = self.unload_after if self.kept_for is None else self.kept_for
        return None if seconds is None or math.isinf(seconds) else seconds

    @property
    def adapter_bytes(self) -> int:
        """What the LoRA adapters take in memory, about."""
        return sum(adapter_bytes(path) for path in self.adapters.values())

    @property
    def needed_bytes(self) -> int:
        """What the model takes in memory; 0 if that is not known."""
        return 0 if self.needs is None else self.needs.total_bytes + self.adapter_bytes

    @property
    def is_in_memory(self) -> bool:
        """Whether memory is reserved for the model."""
        return self.state in ("loading", "loaded", "unloading")

    @property
    def context(self) -> int | None:
        """The context in tokens; None until it is known."""
        if self.service is not None:
            return self.service.engine.model.info.context
        return None if self.needs is None else self.needs.context

    def stats(self) -> EngineStats:
        """The counts since the server started, and the present state."""
        if self.service is None:
            return self._earlier
        return _sum(self._earlier, self.service.engine.stats())

    def unload(self) -> Loaded | None:
        """Takes the loaded model out of the entry, to be closed. Its counts stay."""
        loaded, self.loaded = self.loaded, None
        self.adapter_sizes = {}
        if loaded is not None:
            stats = loaded.service.engine.stats()
            self._earlier = dataclasses.replace(_sum(self._earlier, stats), **dict.fromkeys(GAUGES, 0))
        return loaded

    def cancel_timer(self) -> None:
        """Keeps the model from being unloaded for being idle."""
        if self.timer is not None:
            self.timer.cancel()
            self.timer = None

    def tickets(self, before: int | None) -> Iterator[Ticket]:
        """Takes the tickets with numbers below `before` out of the queue; all if None."""
        while self.waiting and (before is None or self.waiting[0].number < before):
            yield self.waiting.popleft()


def prepare(spec: ModelSpec, limits: Limits, job: Job[Needs]) -> Needs:
    """Downloads a model if needed, and reads what it needs."""
    return read_needs(spec, limits, job.report)


def load(
    spec: ModelSpec, adapters: dict[str, Path], needs: Needs, settings: Settings, shared: Shared, job: Job[Loaded]
) -> Loaded:
    """Loads a model, and starts its engine.

    Raises:
        Exception: As `Model.load` and `Engine` do.
    """
    with contextlib.ExitStack() as stack:
        model = stack.enter_context(Model.load(spec.source, spec.load, adapters=adapters, progress=job.report))
        if spec.chat_template is not None:
            model.tokenizer.replace_chat_template(spec.chat_template)
        draft = None
        if spec.options.draft is not None:
            draft = stack.enter_context(Model.load(spec.options.draft, spec.load.for_draft(), progress=job.report))
        engine = Engine(model, spec.options.engine().replace(cache_bytes=needs.cache_bytes), draft=draft)
        stack.callback(engine.close)
        service = Service(engine, spec.name, settings, spec.aliases, shared)
        # The engine may have loaded a head for multi-token prediction. A draft model has a cache of its own.
        weight_bytes = needs.weight_bytes if draft is not None else model._native.info()["weight_bytes"]
        return Loaded(service, weight_bytes + needs.cache_bytes, stack.pop_all())


def _sum(first: EngineStats, second: EngineStats) -> EngineStats:
    """The counts of two engines together, with the state of the second."""
    both = {each.name: getattr(second, each.name) for each in dataclasses.fields(EngineStats)}
    counts = {name: value + getattr(first, name) for name, value in both.items() if name not in GAUGES}
    return dataclasses.replace(second, **counts)
