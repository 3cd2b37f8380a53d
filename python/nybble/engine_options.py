"""Options of `Engine`, defined once for Python and for the command line."""

from __future__ import annotations

import dataclasses
import os
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, TypedDict

from nybble.overrides import check_types, chosen, doc

if TYPE_CHECKING:
    from typing_extensions import Unpack


@dataclass(frozen=True, kw_only=True)
class EngineOptions:
    """Options of `Engine`, which also takes each of them by name.

    Example:
        ```python
        options = EngineOptions(max_batch=4, speculation="auto")
        engine = Engine(model, options)
        same = Engine(model, max_batch=4, speculation="auto")
        ```

    Raises:
        TypeError: An option has the wrong type.
        ValueError: `max_queue`, `draft_tokens` or `cache_dir_bytes` is out of range, or `cache_dir` comes without
            `prefix_cache`. `Engine` checks the other options.
    """

    max_batch: int = field(default=16, metadata=doc("Requests to compute at the same time."))
    """Largest number of requests in a batch. Others wait in order of arrival."""
    max_queue: int | None = field(default=None, metadata=doc("Requests that may wait; more are refused."))
    """Largest number of requests that may wait; None for no limit. Beyond it, `submit` raises `QueueFullError`."""
    cache_bytes: int | None = field(
        default=None, metadata=doc("Limit of the KV cache in bytes, the prefix cache included.")
    )
    """Limit of the KV cache in bytes, the prefix cache included.

    None takes half of the memory that is free now, and at least enough for one sequence that fills the context.
    """
    prefix_cache: bool = field(default=True, metadata=doc("Compute the common prefix of prompts once."))
    """Keep keys and values of sequences, so that prompts with a common prefix compute it once."""
    prefill_chunk: int | None = field(default=None, metadata=doc("Largest number of prompt tokens in a step."))
    """Largest number of prompt tokens in a step.

    None chooses the number from measurements, so that a step with prompt tokens takes about two and a half times as
    long as one without.
    """
    speculation: Literal["off", "on", "auto", "mtp"] = field(
        default="off", metadata=doc("Confirm several draft tokens per step: same output, often faster.")
    )
    """Whether to use draft tokens: `"off"`, `"on"`, `"auto"` or `"mtp"`. They change the speed, never the output.

    `"mtp"` takes them from the model's own head for multi-token prediction, which some files have. `"auto"` takes them
    from that head or from the text itself, whichever has paid so far, and pauses when few draft tokens are accepted or
    many requests run.
    """
    draft_tokens: int | None = field(
        default=None, metadata=doc("Draft tokens per request and step, at most 8; chosen by acceptance if not given.")
    )
    """Largest number of draft tokens of a request in a step, 1 to 8; with `"mtp"`, their number.

    None chooses it by how many were accepted.
    """
    cache_dir: str | os.PathLike[str] | None = field(
        default=None, metadata=doc("Folder that keeps the prefix cache between runs.", "DIR")
    )
    """A folder that keeps the prefix cache after the end of the process, for any number of models.

    It needs `prefix_cache`, and is made if it does not exist. Files in it hold prompts and answers, so only the user
    may read them.
    """
    cache_dir_bytes: int | None = field(default=None, metadata=doc("Limit of the files in that folder in bytes."))
    """Limit of the files in `cache_dir` in bytes. The least recently used ones are removed.

    None takes 10 GB, but at most a tenth of the disk.
    """

    def __post_init__(self) -> None:
        names = ("max_batch", "max_queue", "cache_bytes", "prefill_chunk", "draft_tokens", "cache_dir_bytes")
        numbers = dict.fromkeys(names, int)
        folder = (str, os.PathLike)
        check_types(self, {**numbers, "prefix_cache": bool, "speculation": str, "cache_dir": folder})
        if self.cache_dir is not None:
            if not os.fspath(self.cache_dir):
                raise ValueError("cache_dir: found an empty path, expected a folder, or a name for a new one")
            if not self.prefix_cache:
                raise ValueError("cache_dir: found a folder, but prefix_cache=False, expected True")
        for name in ("cache_bytes", "cache_dir_bytes"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < 2**64:
                raise ValueError(f"{name}: found {value}, expected None, or 0 to 2**64 - 1")
        if self.max_queue is not None and self.max_queue < 0:
            raise ValueError(f"max_queue: found {self.max_queue}, expected None, or 0 or more")
        if self.draft_tokens is not None and not 1 <= self.draft_tokens <= 8:
            raise ValueError(f"draft_tokens: found {self.draft_tokens}, expected None, or 1 to 8")

    def replace(self, **overrides: Unpack[EngineOverrides]) -> EngineOptions:
        """Returns a copy with some options changed."""
        return dataclasses.replace(self, **overrides)


class EngineOverrides(TypedDict, total=False):
    """Names and types of the fields of `EngineOptions`, for type checkers."""

    max_batch: int
    max_queue: int | None
    cache_bytes: int | None
    prefix_cache: bool
    prefill_chunk: int | None
    speculation: Literal["off", "on", "auto", "mtp"]
    draft_tokens: int | None
    cache_dir: str | os.PathLike[str] | None
    cache_dir_bytes: int | None


def merge_engine_options(options: EngineOptions | None, overrides: EngineOverrides) -> EngineOptions:
    """Returns `options`, or the defaults, with single options replaced.

    Raises:
        TypeError: `options` is of another type, or an override is not an option. The message lists the options.
    """
    return chosen(EngineOptions, options, overrides)
