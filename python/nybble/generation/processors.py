"""Logits processors as the native half calls them: one function, whose errors say which processor failed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from nybble.sampling import LogitsProcessor, SamplingOptions


def processor(options: SamplingOptions) -> LogitsProcessor | None:
    """The logits processors of `options` as one function; None without any."""
    given = options.logits_processor
    processors: Sequence[LogitsProcessor] = given if isinstance(given, Sequence) else () if given is None else (given,)
    if not processors:
        return None

    def process(tokens: npt.NDArray[np.int64], logits: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        tokens.flags.writeable = False
        for each in processors:
            returned = each(tokens, logits)
            if returned is not None:
                logits = _checked(returned, each, logits.shape)
        return logits

    return process


def _checked(returned: npt.ArrayLike, by: LogitsProcessor, shape: tuple[int, ...]) -> npt.NDArray[np.float32]:
    """The logits that a processor returned, as an array that the next one may change.

    Raises:
        ValueError: They are not an array of numbers of this shape.
    """
    import numpy as np  # Only programs with processors need it here.

    name = getattr(by, "__name__", type(by).__name__)
    try:
        found = np.asarray(returned)
        if found.dtype.kind not in "fiu":
            raise TypeError
        with np.errstate(over="ignore"):  # What becomes infinite is refused later.
            logits = np.array(found, np.float32)
    except (TypeError, ValueError):
        raise ValueError(
            f"logits_processor: {name} returned {type(returned).__name__}, expected an array of shape {shape} or None"
        ) from None
    if logits.shape != shape:
        raise ValueError(f"logits_processor: {name} returned an array of shape {logits.shape}, expected {shape}")
    return logits
