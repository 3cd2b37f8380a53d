"""Log-probabilities of the tokens of a prompt, for `echo` with `logprobs`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from nybble.generation import TokenLogprob

if TYPE_CHECKING:
    from nybble.model import Model

_ROWS = 64
"""Positions that are computed at a time, which bounds the memory of intermediate values."""


def score(model: Model, ids: Sequence[int], top: int) -> list[TokenLogprob]:
    """The log-probability of each token after the first, in the model's own distribution.

    Args:
        model: The model.
        ids: The prompt.
        top: The number of the most likely tokens to report at each position.

    Raises:
        ContextFullError: The tokens do not fit into the context.
        MemoryError: The logits do not fit into memory.
        ValueError: A token is unknown.
    """
    if len(ids) < 2:
        return []
    decode = model.tokenizer.decode
    logits = model.logits(ids[:-1])
    top = min(top, logits.shape[1])
    found = []
    for start in range(0, len(logits), _ROWS):
        rows = logits[start : start + _ROWS].astype(np.float64)
        rows -= rows.max(axis=1, keepdims=True)
        rows -= np.log(np.exp(rows).sum(axis=1, keepdims=True))
        for row, token in zip(rows, ids[start + 1 :], strict=False):
            likeliest = np.argpartition(row, -top)[-top:] if top else np.arange(0)
            likeliest = likeliest[np.lexsort((likeliest, -row[likeliest]))]
            listed = tuple((int(other), decode([int(other)]), float(row[other])) for other in likeliest)
            found.append(TokenLogprob(token, decode([token]), float(row[token]), listed))
    return found
