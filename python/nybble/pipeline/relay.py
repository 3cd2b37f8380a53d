"""`Relay`: stages that threads of this process feed, each by a link to one stage."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol

from nybble.load_options import LoadOptions
from nybble.pipeline.stages import StageInfo, Units, describe, load_stage


class Link(Protocol):
    """A stage that this process can reach. One thread sends to it, and another one receives from it."""

    info: StageInfo

    def send(self, plan: bytes, received: bytes) -> None:
        """Hands the stage a plan, and the reply of the stage before it to the same plan.

        Raises:
            Exception: The stage has ended.
        """

    def receive(self) -> bytes:
        """Waits for the reply to the oldest plan that has got none.

        Raises:
            Exception: The stage has ended.
        """

    def close(self) -> None:
        """Ends the stage. Any thread may call it, also while others send and receive."""


Connect = Callable[[LoadOptions, Units], Link]
"""Starts a stage and waits until it has loaded its part."""


@dataclass(frozen=True)
class _Step:
    """What a stage gets."""

    epoch: int
    ticket: int
    plan: bytes
    received: bytes


class ThreadLink:
    """A stage in this process."""

    def __init__(self, path: str, options: LoadOptions, units: Units) -> None:
        self._stage = load_stage(path, options, units)
        self.info: StageInfo = StageInfo(**describe(self._stage))
        self._sent: queue.SimpleQueue[tuple[bytes, bytes] | None] = queue.SimpleQueue()

    def send(self, plan: bytes, received: bytes) -> None:
        """Hands the stage a plan, and the reply of the stage before it."""
        self._sent.put((plan, received))

    def receive(self) -> bytes:
        """Computes the oldest plan that has got no reply."""
        if (sent := self._sent.get()) is None:
            raise ConnectionError("the stage was closed")
        return self._stage.run(*sent)

    def close(self) -> None:
        """Ends the stage."""
        self._sent.put(None)


class Relay:
    """Stages that are reached by links. Two threads for each hand plans and rows on.

    Args:
        connect: Starts a stage.
        units: The units of each stage.
    """

    def __init__(self, connect: Connect, units: Sequence[Units]) -> None:
        self.count: int = len(units)
        self._connect, self._units = connect, units
        self._options = LoadOptions()
        self._links: list[Link | None] = [None] * self.count
        self._queues: list[queue.SimpleQueue[_Step | None]] = []
        """What each stage is to get."""
        self._sent: list[queue.SimpleQueue[tuple[Link, _Step] | None]] = []
        """What each stage has got and not replied to."""
        self._changed = threading.Condition()
        self._epoch = 0
        """Number of restarts. What was sent before the latest one is dropped."""
        self._last = 0
        self._replies: dict[int, bytes | None] = {}
        """By ticket; None until the reply is there."""
        self._failure: tuple[int, BaseException] | None = None
        """The stage that has ended since the latest restart, and how."""
        self._is_closed = False

    def start(self, options: LoadOptions) -> Sequence[StageInfo]:
        """Starts all stages and waits until they have loaded their parts."""
        self._options = options
        try:
            self._open(range(self.count))
        except BaseException:
            self.close()
            raise
        self._queues = [queue.SimpleQueue() for _ in range(self.count)]
        self._sent = [queue.SimpleQueue() for _ in range(self.count)]
        for number in range(self.count):
            for target in (self._feed, self._collect):
                name = f"nybble-stage-{number}"
                threading.Thread(target=target, args=(number,), name=name, daemon=True).start()
        return [link.info for link in self._links if link is not None]

    def _open(self, numbers: Sequence[int]) -> None:
        """Starts these stages at the same time."""

        def connect(number: int) -> None:
            self._links[number] = self._connect(self._options, self._units[number])

        with ThreadPoolExecutor(len(numbers) or 1) as pool:
            for done in [pool.submit(connect, number) for number in numbers]:
                done.result()

    def send(self, plan: bytes) -> int:
        """Hands a plan to all stages and returns its ticket at once."""
        with self._changed:
            self._check()
            self._last += 1
            self._replies[self._last] = None
            self._queues[0].put(_Step(self._epoch, self._last, plan, b""))
            return self._last

    def receive(self, ticket: int, seconds: float) -> bytes | None:
        """Waits for the last stage's reply to a plan, at most this long. Returns None if it is not there yet."""
        end = time.monotonic() + seconds
        with self._changed:
            while (reply := self._replies.get(ticket)) is None:
                self._check()
                if ticket not in self._replies:
                    raise ConnectionError("the plan was sent before the stages were started again")
                if (left := end - time.monotonic()) <= 0:
                    return None
                self._changed.wait(left)
            del self._replies[ticket]
            return reply

    def forget(self, ticket: int) -> None:
        """Tells that nobody will receive the reply to a plan."""
        with self._changed:
            self._replies.pop(ticket, None)

    def restart(self) -> None:
        """Starts stages that have ended again. Earlier plans and their replies are forgotten."""
        with self._changed:
            self._epoch += 1
            self._replies.clear()
            failure = self._failure
        if self._is_closed:
            self._check()
        if failure is not None and (link := self._links[failure[0]]) is not None:
            link.close()
            self._links[failure[0]] = None
        # Until all of them have started, the failure stays.
        self._open([number for number, link in enumerate(self._links) if link is None])
        with self._changed:
            if self._failure is failure:
                self._failure = None

    def close(self) -> None:
        """Ends all stages."""
        with self._changed:
            self._failure, self._is_closed = (0, ConnectionError("the pipeline was closed")), True
            self._changed.notify_all()
        for waiting in self._queues:
            waiting.put(None)
        for sent in self._sent:
            sent.put(None)
        for link in self._links:
            if link is not None:
                link.close()

    def _check(self) -> None:
        if self._failure is not None:
            number, cause = self._failure
            raise ConnectionError(f"stage {number}: {cause}") from cause

    def _fail(self, number: int, step: _Step, error: BaseException) -> None:
        with self._changed:
            if step.epoch == self._epoch and self._failure is None:
                self._failure = (number, error)
                self._changed.notify_all()

    def _feed(self, number: int) -> None:
        """In a thread of a stage: hands it plans while it still computes earlier ones."""
        while (step := self._queues[number].get()) is not None:
            link = self._links[number]
            if step.epoch != self._epoch or link is None:
                continue
            self._sent[number].put((link, step))
            try:
                link.send(step.plan, step.received)
            except Exception as error:
                self._fail(number, step, error)

    def _collect(self, number: int) -> None:
        """In a thread of a stage: hands its replies to the next stage."""
        while (sent := self._sent[number].get()) is not None:
            link, step = sent
            try:
                reply = link.receive()
            except Exception as error:
                self._fail(number, step, error)
                continue
            if step.epoch != self._epoch:
                continue
            if number + 1 < self.count:
                self._queues[number + 1].put(_Step(step.epoch, step.ticket, step.plan, reply))
                continue
            with self._changed:
                if step.epoch == self._epoch and step.ticket in self._replies:
                    self._replies[step.ticket] = reply
                    self._changed.notify_all()


def threads(path: str, units: Sequence[Units]) -> Relay:
    """Stages in this process, for tests."""
    return Relay(lambda options, own: ThreadLink(path, options, own), units)
