"""The loop of all generation: steps a native scheduler and passes each token to the job it belongs to."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Generic, TypeVar

from nybble import _native, memory
from nybble.generation.request import prepare_tokens
from nybble.models.paths import expand

if TYPE_CHECKING:
    from nybble.engine_options import EngineOptions
    from nybble.generation.builder import Continuation
    from nybble.generation.request import PreparedRequest, TextModel

Job = TypeVar("Job")

_log = logging.getLogger("nybble")

_PAGE = 64
"""Tokens per page of the KV cache."""
SAVING_SECONDS = 10.0
"""How long the end of an engine waits for the prefix cache to be written to disk, by default."""
_CACHE_DIR_BYTES = 10_000_000_000
"""The default of `cache_dir_bytes` on a large disk."""


class Driver(Generic[Job]):
    """Computes requests together, step by step. A job is any hashable object that stands for a request.

    One thread at a time may use a driver, except for `interrupt`.

    Args:
        model: The model to compute with.
        options: Limits of the scheduler. Without `cache_bytes`, they follow the memory that is free now.
        draft: A model for draft tokens.
        keep_sessions: Keep the session of each job after its end, for `session`.
    """

    def __init__(
        self,
        model: TextModel,
        options: EngineOptions,
        draft: TextModel | None = None,
        *,
        keep_sessions: bool = False,
    ) -> None:
        native = model._native
        if options.cache_bytes is None:
            # The session keeps its last page and its states, which the sequence copies.
            own = _PAGE * model.info.cache_bytes_per_token + model.info.state_bytes
            kept = own if keep_sessions else 0
            limit = memory.for_caches(native) if model._cache_limit is None else model._cache_limit
            options = options.replace(cache_bytes=limit + kept)
        if options.cache_dir is not None:
            folder = expand(options.cache_dir)
            options = options.replace(cache_dir=folder)
            if options.cache_dir_bytes is None:
                options = options.replace(cache_dir_bytes=_default_size(folder))
        self._keeps_prefixes = options.cache_dir is not None
        self._model = model
        self._scheduler = _native.Scheduler(native, options, None if draft is None else draft._native)
        self._jobs: dict[int, Job] = {}
        self._ids: dict[Job, int] = {}
        self._sessions: dict[Job, _native.Session] | None = {} if keep_sessions else None
        self._log_reports()

    def __contains__(self, job: Job) -> bool:
        """Whether a job is waiting or running."""
        return job in self._ids

    def __len__(self) -> int:
        """Number of jobs that are waiting or running."""
        return len(self._ids)

    def submit(self, request: PreparedRequest, job: Job) -> None:
        """Queues a request. Its events carry `job`.

        Raises:
            ValueError: The limit of the request is 0, or its sequence belongs to another model.
        """
        number = self._scheduler.submit(request.sequence, request.limit)
        self._jobs[number], self._ids[job] = job, number

    def step(self, *, signals: bool) -> Iterator[tuple[Job, _native.Sampled | BaseException, int]]:
        """Computes one step. Yields for each job its next tokens, or the exception that ended it.

        With each comes the number of prompt tokens that were not computed. A job that has been cancelled meanwhile gets
        no more events.

        Args:
            signals: Run signal handlers during the step, as the main thread can. An exception from a handler, such as
                `KeyboardInterrupt`, ends the step within a layer; the driver is then as it was before the step.
        """
        stepped = self._scheduler.step(signals)
        self._log_reports()
        for number, outcome, cached_tokens, session in stepped:
            if (job := self._jobs.get(number)) is not None:
                if session is not None or isinstance(outcome, BaseException):
                    self._forget(job, number, session)
                yield job, outcome, cached_tokens

    def proceed(self, job: Job, continuation: Continuation) -> None:
        """Continues a job with other tokens or another constraint.

        Keys and values of the common beginning are kept.
        """
        session = self._scheduler.cancel(number) if (number := self._ids.get(job)) is not None else None
        if number is not None:
            self._forget(job, number, None)
        ids = continuation.tokens
        if session is not None:
            session = session.prefix(min(len(session), len(ids) - 1))
        request = prepare_tokens(self._model, ids, continuation.options, session, continuation.constraint)
        self.submit(request, job)

    def cancel(self, job: Job) -> None:
        """Ends a job and frees its slot. Does nothing if it has ended."""
        if (number := self._ids.get(job)) is not None:
            self._forget(job, number, self._scheduler.cancel(number))

    def session(self, job: Job) -> _native.Session | None:
        """Returns the KV cache of a job as of its latest step. None if it has ended and sessions are not kept."""
        if (number := self._ids.get(job)) is not None:
            return self._scheduler.session(number)
        return None if self._sessions is None else self._sessions.get(job)

    def interrupt(self) -> None:
        """Stops the current step, and all later ones, with an error. Any thread may call it."""
        self._scheduler.interrupt()

    def stats(self) -> dict[str, int]:
        """Returns the scheduler's counts by name."""
        return self._scheduler.stats()

    def save_prefixes(self, seconds: float) -> None:
        """Writes the prefix cache to `cache_dir`, if there is one, for at most this long."""
        if self._keeps_prefixes and seconds > 0:
            self._scheduler.save_prefixes(seconds)
            self._log_reports()

    def close(self) -> None:
        """Frees the KV cache and leaves `cache_dir`. Only `interrupt` may be called later."""
        self._scheduler.close()

    def _log_reports(self) -> None:
        if self._keeps_prefixes:
            for report in self._scheduler.take_reports():
                _log.warning("cache_dir: %s", report)

    def _forget(self, job: Job, number: int, session: _native.Session | None) -> None:
        del self._jobs[number], self._ids[job]
        if self._sessions is not None and session is not None:
            self._sessions[job] = session


def _default_size(folder: Path) -> int:
    """The default of `cache_dir_bytes`: 10 GB, but at most a tenth of the disk that holds the folder."""
    try:
        existing = next(path for path in (folder.absolute() / "_").parents if path.exists())
        return min(_CACHE_DIR_BYTES, shutil.disk_usage(existing).total // 10)
    except OSError:
        # A folder that cannot be reached is reported when it is opened.
        return _CACHE_DIR_BYTES
