"""What a pipeline needs of its stages, wherever they run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from nybble import _native, memory

if TYPE_CHECKING:
    from nybble.load_options import LoadOptions

Units = tuple[int, int]
"""The first unit of a stage, and the one after its last. Units are the layers from 0 on, then the model's output."""


@dataclass(frozen=True)
class StageInfo:
    """Properties of a stage that has loaded its part."""

    kernel: str
    threads: int
    weight_bytes: int
    bytes_per_token: int
    cache_bytes: int
    """Bytes of keys, values and states of its layers, of a sequence that fills the context."""
    available_bytes: int | None
    """Memory that its process can still use; None if the system does not report it."""


class Stages(Protocol):
    """The stages of a pipeline. The driver calls `send` and `receive` from any thread."""

    count: int
    """Number of stages."""

    def start(self, options: LoadOptions) -> Sequence[StageInfo]:
        """Starts all stages and waits until they have loaded their parts.

        Raises:
            Exception: A stage cannot be started. The others are stopped.
        """

    def send(self, plan: bytes) -> int:
        """Hands a plan to all stages and returns its ticket at once.

        Each stage gets all plans in order, and with each the reply of the stage before it; the first one gets `b""`.

        Raises:
            Exception: A stage has ended.
        """

    def receive(self, ticket: int, seconds: float) -> bytes | None:
        """Waits for the last stage's reply to a plan, at most this long. Returns None if it is not there yet.

        Raises:
            Exception: A stage has ended.
        """

    def forget(self, ticket: int) -> None:
        """Tells that nobody will receive the reply to a plan."""

    def restart(self) -> None:
        """Starts stages that have ended again. Earlier plans and their replies are forgotten.

        Raises:
            Exception: A stage cannot be started.
        """

    def close(self) -> None:
        """Ends all stages."""


def load_stage(path: str, options: LoadOptions, units: Units) -> _native.Stage:
    """Loads a stage in this process."""
    return _native.Stage.load(path, options, *units)


def describe(stage: _native.Stage) -> dict[str, Any]:
    """Returns the fields of `StageInfo`."""
    return {**stage.info(), "available_bytes": memory.available_bytes()}
