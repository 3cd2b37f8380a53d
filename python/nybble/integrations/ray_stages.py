"""The stages of a pipeline as actors of Ray."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

import ray

from nybble.load_options import LoadOptions
from nybble.pipeline.stages import StageInfo, Units, describe, load_stage


class StageActor:
    """A stage in a process of Ray. It finds or downloads the model on its own machine."""

    def __init__(self, source: str | None, options: LoadOptions, units: Units) -> None:
        from nybble.models import hub

        path = hub.resolve(source, filename=options.filename, revision=options.revision, progress=False)
        self._stage = load_stage(str(path), options, units)

    def describe(self) -> dict[str, Any]:
        """Returns the fields of `StageInfo`."""
        return describe(self._stage)

    def is_alive(self) -> bool:
        """Returns True, unless the process has ended."""
        return True

    def run(self, plan: bytes, received: bytes) -> bytes:
        """Lets the stage follow a plan. Returns its reply."""
        return self._stage.run(plan, received)


class RayStages:
    """Stages that are actors. Their rows go from actor to actor.

    Args:
        source: The model, as in `Model.load`.
        units: The units of each stage.
        threads: CPUs that Ray reserves for each stage.
    """

    def __init__(self, source: str | None, units: Sequence[Units], threads: int) -> None:
        self.count: int = len(units)
        self._source, self._units = source, units
        self._actors: list[Any] = []
        self._options = LoadOptions()
        # Spread over the machines, so that each holds as little as possible.
        self._class = ray.remote(num_cpus=threads, max_restarts=0, scheduling_strategy="SPREAD")(StageActor)
        self._lock = threading.Lock()
        self._last = 0
        self._replies: dict[int, Any] = {}

    def start(self, options: LoadOptions) -> Sequence[StageInfo]:
        """Starts all stages and waits until they have loaded their parts."""
        self._options = options
        self._actors = [self._new(units) for units in self._units]
        return [StageInfo(**found) for found in ray.get([actor.describe.remote() for actor in self._actors])]

    def _new(self, units: Units) -> Any:
        return self._class.remote(self._source, self._options, units)

    def send(self, plan: bytes) -> int:
        """Hands a plan to all stages and returns its ticket at once."""
        with self._lock:
            # An actor runs its calls in the order in which they were made.
            reply: Any = b""
            for actor in self._actors:
                reply = actor.run.remote(plan, reply)
            self._last += 1
            self._replies[self._last] = reply
            return self._last

    def receive(self, ticket: int, seconds: float) -> bytes | None:
        """Waits for the last stage's reply to a plan, at most this long. Returns None if it is not there yet."""
        with self._lock:
            reply = self._replies.get(ticket)
        if reply is None:
            raise ConnectionError("the plan was sent before the stages were started again")
        ready, _ = ray.wait([reply], timeout=seconds)
        if not ready:
            return None
        self.forget(ticket)
        found: bytes = ray.get(reply)
        return found

    def forget(self, ticket: int) -> None:
        """Tells that nobody will receive the reply to a plan."""
        with self._lock:
            self._replies.pop(ticket, None)

    def restart(self) -> None:
        """Starts stages that have ended again. Earlier plans and their replies are forgotten."""
        with self._lock:
            self._replies.clear()
            asked = [actor.is_alive.remote() for actor in self._actors]
            for number, answer in enumerate(asked):
                try:
                    ray.get(answer)
                except ray.exceptions.RayError:
                    ray.kill(self._actors[number])
                    self._actors[number] = self._new(self._units[number])
            ray.get([actor.is_alive.remote() for actor in self._actors])

    def close(self) -> None:
        """Ends all stages."""
        with self._lock:
            self._replies.clear()
            actors, self._actors = self._actors, []
        if ray.is_initialized():
            for actor in actors:
                ray.kill(actor)
