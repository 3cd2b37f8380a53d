"""Log-probabilities of given tokens, in the model's own distribution."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from nybble.generation.request import check_generates

if TYPE_CHECKING:
    from nybble.model import Model

_ROWS = 64
"""Positions that are computed at a time, which bounds the memory of intermediate values."""


def logprob_rows(
    model: Model, ids: Sequence[int], first: int = 0, adapter: str | None = None
) -> Iterator[npt.NDArray[np.float64]]:
    """The log-probabilities of all tokens after each token, from position `first` on.

    Args:
        model: The model.
        ids: The tokens.
        first: The position of the first token to report.
        adapter: The name of the adapter to compute with; None for the model alone.

    Raises:
        ContextFullError: The tokens do not fit into the context.
        MemoryError: The logits do not fit into memory.
        ModelError: The model does not predict the next token.
        ValueError: A token is unknown.
    """
    check_generates(model)
    if not ids:
        return
    logits = model.logits(ids, adapter=adapter)
    for start in range(first, len(logits), _ROWS):
        rows = logits[start : start + _ROWS].astype(np.float64)
        rows -= rows.max(axis=1, keepdims=True)
        rows -= np.log(np.exp(rows).sum(axis=1, keepdims=True))
        yield from rows
