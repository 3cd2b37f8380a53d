"""The models of a server. Requests load them, and those that do not fit into memory are unloaded.

A request leases the model that it asks for until its answer has been sent. A model that is not loaded is loaded first,
in a thread. If there is no memory left, models that no request uses are unloaded, the one that was used least recently
first. If all are in use, the models to unload take no new requests until their running ones have ended, so each request
gets its turn. All of this happens in the event loop and needs no lock.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import functools
import itertools
import logging
import threading
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from pathlib import Path

from fastapi import Request

from nybble.engine import EngineStats
from nybble.server.delivery import disconnected
from nybble.server.errors import ApiError, overloaded, shutting_down
from nybble.server.metrics import Metrics
from nybble.server.options import Settings
from nybble.server.pool.entry import Entry, Loaded, Ticket, load, prepare
from nybble.server.pool.faults import load_error
from nybble.server.pool.job import Job, StoppedError
from nybble.server.pool.metrics import add_pool_metrics
from nybble.server.pool.names import Names
from nybble.server.pool.needs import Limits, Needs, adapter_bytes, check_fits, size
from nybble.server.pool.spec import ModelSpec
from nybble.server.protocols.responses.store import ResponseStore
from nybble.server.service import Service, Shared

_STOP_SECONDS = 5
"""How long `close` waits for models that are being loaded."""
_CLOSE_SECONDS = 30
"""How long `close` waits for all models. Each may write its prefix cache to disk."""
_UNLOAD_SAVING_SECONDS = 1.0
"""How long a model that is unloaded may write its prefix cache to disk: other requests may wait for its memory."""

_log = logging.getLogger("nybble.server")


class Pool:
    """The models of a server.

    `Pool.of` makes the pool of a model that stays loaded.

    Args:
        entries: The models, the default one first.
        settings: The settings of the server.
        limits: How much the models may take together.
    """

    def __init__(self, entries: Sequence[Entry], settings: Settings, limits: Limits) -> None:
        self._set_up(entries, settings, limits)
        self.shared: Shared = Shared(Metrics(self._stats, is_labelled=True), ResponseStore(settings.store_bytes))
        add_pool_metrics(self.shared.metrics, self.entries, limits)

    def _set_up(self, entries: Sequence[Entry], settings: Settings, limits: Limits) -> None:
        self.entries: tuple[Entry, ...] = tuple(entries)
        self.settings: Settings = settings
        self.limits: Limits = limits
        self.names: Names = Names(self.entries)
        self._uses = itertools.count(1)
        self._retiring: frozenset[Entry] = frozenset()
        """Models that are in use and must be unloaded: they take no new requests."""
        self._unload_ended = asyncio.Event()
        """Set when a model has been unloaded, and then replaced."""
        self._is_closed = False

    @classmethod
    def of(cls, served: Pool | Service) -> Pool:
        """The pool of one model that stays loaded; a pool itself."""
        if isinstance(served, Pool):
            return served
        pool = cls.__new__(cls)
        entry = Entry(served.name, served.settings, created=served.created)
        entry.state, entry.loaded = "loaded", Loaded(served, 0, contextlib.ExitStack())
        pool._set_up([entry], served.settings, Limits())
        pool.shared = served.shared
        return pool

    @property
    def fixed(self) -> Service | None:
        """The only model, if it stays loaded."""
        return None if self.entries[0].spec is not None else self.entries[0].service

    @property
    def waiting(self) -> int:
        """Requests that wait for a model."""
        return sum(len(entry.waiting) for entry in self.entries)

    @property
    def used_bytes(self) -> int:
        """Memory that is reserved for models."""
        return self.lost_bytes + sum(entry.nbytes for entry in self.entries)

    @property
    def lost_bytes(self) -> int:
        """Memory that models may still take, because unloading them has failed."""
        return sum(entry.lost_bytes for entry in self.entries)

    @property
    def max_body_bytes(self) -> int:
        """The largest size of a request: that of the model which takes the largest."""
        return max(entry.settings.max_body_bytes for entry in self.entries)

    def services(self) -> list[Service]:
        """The models that are loaded."""
        return [entry.service for entry in self.entries if entry.service is not None]

    # --- Requests -----------------------------------------------------------------------------------------------------

    async def lease(self, http: Request, model: str | None) -> Service:
        """The model that a request asks for, which stays loaded until the request has been answered.

        Raises:
            ApiError: There is no such model, it cannot be loaded, or there are too many requests.
        """
        if self.shared.draining:
            raise shutting_down()
        entry = self.names.find(model)
        if entry.loaded is None or entry.waiting or entry in self._retiring:
            service = await self._wait(http, entry)
        else:
            service = self._use(entry, entry.loaded)
        http.state.leases.callback(self._release, entry)
        return service

    async def _wait(self, http: Request, entry: Entry) -> Service:
        if self.waiting >= self.settings.max_answers:
            raise overloaded("too many requests wait for models at the moment", 429, "queue_full")
        ticket = Ticket()
        entry.waiting.append(ticket)
        self._schedule()
        seconds = max(0, http.state.deadline - time.monotonic())
        departure = asyncio.ensure_future(disconnected(http.receive))
        try:
            try:
                await asyncio.wait((ticket.ended, departure), timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
            finally:
                departure.cancel()
                (left,) = await asyncio.gather(departure, return_exceptions=True)
            # Nothing is awaited from here on, so a model that was given to the request cannot be lost.
            if ticket.ended.done():
                return ticket.ended.result()
            if not isinstance(left, asyncio.CancelledError):
                raise ApiError(400, "the client has disconnected")
            message = f"the model {entry.name!r} was not loaded within {self.settings.request_seconds:g} seconds"
            raise overloaded(message, 503, "model_not_loaded")
        except BaseException:
            self._abandon(entry, ticket)
            raise

    def _abandon(self, entry: Entry, ticket: Ticket) -> None:
        """Ends the wait of a request that is gone. A load that it has started continues."""
        if ticket.is_admitted:
            self._release(entry)
        elif ticket in entry.waiting:
            entry.waiting.remove(ticket)
            self._schedule()

    def _admit(self, entry: Entry, loaded: Loaded, before: int | None) -> None:
        """Gives a model to the requests that wait for it: to those with numbers below `before`, all if None."""
        for ticket in entry.tickets(before):
            ticket.admit(self._use(entry, loaded))

    def _use(self, entry: Entry, loaded: Loaded) -> Service:
        entry.users += 1
        entry.used_at = next(self._uses)
        entry.kept_for = None
        entry.cancel_timer()
        return loaded.service

    def _release(self, entry: Entry) -> None:
        entry.users -= 1
        if not entry.users:
            self._watch_idle(entry)
        self._schedule()

    def refuse_waiting(self) -> None:
        """Ends the wait of all requests for models, because the server shuts down."""
        for entry in self.entries:
            _refuse(entry, shutting_down())

    def stop(self) -> None:
        """Cancels all answers. Their clients receive an error."""
        for service in self.services():
            service.stop()

    def close(self) -> None:
        """Ends what is being loaded, and frees all models at the same time. The event loop has ended."""
        self._is_closed = True
        threads = {}
        for entry in self.entries:
            entry.cancel_timer()
            # A daemon, so that a model that does not end keeps no process alive.
            threads[entry] = threading.Thread(target=_close, args=[entry], name="nybble-closing", daemon=True)
            threads[entry].start()
        deadline = time.monotonic() + _CLOSE_SECONDS
        for entry, thread in threads.items():
            thread.join(max(0, deadline - time.monotonic()))
            if thread.is_alive():
                _log.warning("the model %s was not unloaded within %d seconds", entry.name, _CLOSE_SECONDS)

    # --- Idle models --------------------------------------------------------------------------------------------------

    def keep(self, entry: Entry, seconds: float | None) -> None:
        """Sets after how many seconds without a request a model is unloaded, until its next request.

        None stands for the seconds of the server, infinity for never.
        """
        entry.kept_for = seconds
        entry.cancel_timer()
        if not entry.users:
            self._watch_idle(entry)

    def _watch_idle(self, entry: Entry) -> None:
        if entry.spec is not None and entry.loaded is not None and (seconds := entry.idle_seconds) is not None:
            entry.cancel_timer()
            entry.timer = asyncio.get_running_loop().call_later(seconds, self._unload_idle, entry)

    def _unload_idle(self, entry: Entry) -> None:
        entry.timer = None
        if entry.state == "loaded" and not entry.users and not entry.waiting:
            self._unload(entry)

    # --- Adapters -----------------------------------------------------------------------------------------------------

    @contextlib.asynccontextmanager
    async def adding_adapter(self, entry: Entry, name: str, path: Path) -> AsyncIterator[None]:
        """Reserves memory for an adapter, which a model in use gets in the block and has again whenever it is loaded.

        Raises:
            ApiError: There is no memory, although idle models are unloaded.
        """
        nbytes = 0 if entry.spec is None else adapter_bytes(path)
        entry.nbytes += nbytes  # An adapter that it replaces stays in memory until the block has ended.
        try:
            await self._free_memory(nbytes)
            yield
        except BaseException:
            entry.nbytes -= nbytes
            raise
        entry.nbytes -= entry.adapter_sizes.get(name, 0)
        entry.adapters[name], entry.adapter_sizes[name] = path, nbytes

    async def _free_memory(self, nbytes: int) -> None:
        """Unloads idle models until the reserved memory, that of a new adapter included, is within the limit.

        Raises:
            ApiError: The models in use take too much.
        """
        while (lacking := self._lacking()) > 0:
            leaving = sum(each.nbytes for each in self.entries if each.state == "unloading")
            idle = [each for each in self.entries if each.state == "loaded" and not each.users and each.spec]
            if lacking > leaving + sum(each.nbytes for each in idle):
                message = f"the adapter needs {size(nbytes)}, and the models that are in use leave too little memory"
                raise overloaded(message, 503, "out_of_memory")
            for each in sorted(idle, key=lambda each: each.used_at):
                if lacking > leaving:
                    leaving += each.nbytes
                    self._unload(each)
            await self._unload_ended.wait()

    def _lacking(self) -> int:
        """By how many bytes the reserved memory exceeds the limit."""
        return 0 if self.limits.max_bytes is None else max(0, self.used_bytes - self.limits.max_bytes)

    def remove_adapter(self, entry: Entry, name: str) -> None:
        """Removes an adapter of a model, loaded or not."""
        entry.adapters.pop(name, None)
        entry.nbytes -= entry.adapter_sizes.pop(name, 0)
        if entry.service is not None and name in entry.service.engine.model.adapters:
            entry.service.engine.model.unload_adapter(name)
        self._schedule()

    # --- Loading ------------------------------------------------------------------------------------------------------

    def _schedule(self) -> None:
        """Does what can be done now for the requests that wait, in the order of their arrival."""
        if self._is_closed:
            return
        for entry in self.entries:
            if entry.spec is not None and entry.waiting and entry.state == "unloaded":
                self._prepare(entry, entry.spec)
        while (first := self._next()) is not None and self._fits(first):
            self._load(first)
        # Later requests for models that must be unloaded wait until it is their turn again.
        retiring = [] if first is None else self._least_recent(first)
        self._retiring = frozenset(retiring)
        number = None if first is None else first.waiting[0].number
        for entry in self.entries:
            if entry.loaded is not None:
                self._admit(entry, entry.loaded, number if entry in self._retiring else None)
        for entry in retiring:
            if not entry.users:
                self._unload(entry)

    def _next(self) -> Entry | None:
        """The model whose turn it is to be loaded."""
        wanted = [entry for entry in self.entries if entry.waiting and entry.state in ("unloaded", "unloading")]
        return min(wanted, key=lambda entry: entry.waiting[0].number, default=None)

    def _fits(self, entry: Entry) -> bool:
        """Whether a model can be loaded at once."""
        nbytes, count = self._left(entry)
        return entry.state == "unloaded" and nbytes >= 0 and count >= 0

    def _left(self, entry: Entry) -> tuple[float, float]:
        """How many bytes and how many models are left when this one is loaded; below 0 for those that lack."""
        limits, needed = self.limits, entry.needed_bytes
        loaded = sum(each.is_in_memory for each in self.entries)
        nbytes = float("inf") if limits.max_bytes is None else limits.max_bytes - self.used_bytes - needed
        return nbytes, float("inf") if limits.max_loaded is None else limits.max_loaded - loaded - 1

    def _least_recent(self, wanted: Entry) -> list[Entry]:
        """The models to unload for one that does not fit: idle ones before those in use, each in the order of use."""
        if wanted.state != "unloaded":
            return []
        nbytes, count = self._left(wanted)
        leaving = [entry for entry in self.entries if entry.state == "unloading"]
        nbytes, count = nbytes + sum(entry.nbytes for entry in leaving), count + len(leaving)
        loaded = [entry for entry in self.entries if entry.state == "loaded" and entry.spec is not None]
        found = []
        for entry in sorted(loaded, key=lambda entry: (entry.users > 0, entry.used_at)):
            if nbytes >= 0 and count >= 0:
                break
            found.append(entry)
            nbytes, count = nbytes + entry.nbytes, count + 1
        return found

    def _prepare(self, entry: Entry, spec: ModelSpec) -> None:
        """Finds out what a model needs, if that is not known. Refuses one that never fits."""
        if entry.needs is None or entry.is_stale:
            entry.state = "preparing"
            work = functools.partial(prepare, spec, self.limits)
            entry.job = Job(work, functools.partial(self._prepared, entry))
            return
        limits = self.limits
        if limits.max_bytes is not None:
            limits = dataclasses.replace(limits, max_bytes=max(0, limits.max_bytes - self.lost_bytes))
        try:
            check_fits(entry.name, entry.needs, entry.adapter_bytes, limits)
        except ValueError as error:
            _refuse(entry, ApiError(500, str(error), code="model_too_large", headers={"x-should-retry": "false"}))

    def _prepared(self, entry: Entry, job: Job[Needs]) -> None:
        entry.job, entry.state = None, "unloaded"
        if job.result is None:
            self._failed(entry, job.error)
        else:
            self.set_needs(entry, job.result)
        self._schedule()

    def set_needs(self, entry: Entry, needs: Needs) -> None:
        """Notes what a model needs."""
        entry.needs, entry.is_stale = needs, False
        if entry.spec is not None:
            hosts = self.settings.allowed_hosts
            entry.settings = entry.spec.options.settings(context=needs.context, allowed_hosts=hosts)

    def _load(self, entry: Entry) -> None:
        spec, needs = entry.plan
        for lora, path in [*entry.adapters.items()]:
            # What a client has loaded must not keep the model from all others.
            if lora not in spec.adapters and not path.exists():
                del entry.adapters[lora]
                _log.warning("the adapter %s of the model %s is gone: %s does not exist", lora, entry.name, path)
        entry.state, entry.nbytes = "loading", entry.needed_bytes
        _log.info("loading the model %s, which needs up to %s", entry.name, needs.described())
        work = functools.partial(load, spec, dict(entry.adapters), needs, entry.settings, self.shared)
        entry.job = Job(work, functools.partial(self._loaded, entry, time.perf_counter()))

    def _loaded(self, entry: Entry, started_at: float, job: Job[Loaded]) -> None:
        entry.job = None
        if job.result is None:
            entry.state, entry.nbytes, entry.is_stale = "unloaded", 0, True
            self._failed(entry, job.error)
        else:
            entry.state, entry.loaded = "loaded", job.result
            entry.adapter_sizes = {name: adapter_bytes(path) for name, path in entry.adapters.items()}
            entry.nbytes = job.result.nbytes + sum(entry.adapter_sizes.values())
            model = job.result.service.engine.model
            for name in set(model.adapters) - set(entry.adapters):  # It was removed meanwhile.
                model.unload_adapter(name)
            entry.loads += 1
            entry.used_at = next(self._uses)
            # All requests that have come until now, even if others that came before wait for another model: loading a
            # model for each of them in turn would take longer for everybody.
            self._admit(entry, job.result, None)
            _log.info("loaded the model %s in %.1f s", entry.name, time.perf_counter() - started_at)
            if not entry.users:
                self._watch_idle(entry)
        self._schedule()

    def _failed(self, entry: Entry, error: BaseException | None) -> None:
        """Ends the requests for a model that could not be loaded. The next one tries again."""
        entry.failures += 1
        if not isinstance(error, StoppedError):
            _log.error("the model %s could not be loaded: %s", entry.name, error)
        _refuse(entry, load_error(entry.name, error))

    def _unload(self, entry: Entry) -> None:
        loaded = entry.unload()
        if loaded is None:
            return
        entry.cancel_timer()
        entry.state = "unloading"
        entry.job = Job(lambda _: loaded.close(_UNLOAD_SAVING_SECONDS), functools.partial(self._unloaded, entry))

    def _unloaded(self, entry: Entry, job: Job[None]) -> None:
        if job.error is not None:
            entry.lost_bytes += entry.nbytes
            _log.error("the model %s could not be unloaded: its memory stays reserved", entry.name, exc_info=job.error)
        else:
            _log.info("unloaded the model %s", entry.name)
        entry.job, entry.state, entry.nbytes = None, "unloaded", 0
        entry.unloads += 1
        self._unload_ended.set()
        self._unload_ended = asyncio.Event()
        self._schedule()

    def _stats(self) -> Mapping[str | None, EngineStats]:
        return {entry.name: entry.stats() for entry in self.entries}


def _refuse(entry: Entry, error: ApiError) -> None:
    for ticket in entry.tickets(None):
        ticket.refuse(error)


def _close(entry: Entry) -> None:
    """Ends what is being loaded, and frees a model that does not stay loaded. Never raises."""
    try:
        with contextlib.ExitStack() as stack:
            if entry.spec is not None and (loaded := entry.unload()) is not None:
                stack.callback(loaded.close)
            if entry.job is not None:
                entry.job.stop(_CLOSE_SECONDS if entry.state == "unloading" else _STOP_SECONDS)
                if not entry.job.is_delivered and isinstance(entry.job.result, Loaded):
                    stack.callback(entry.job.result.close)
    except Exception:
        _log.exception("the model %s could not be unloaded", entry.name)
