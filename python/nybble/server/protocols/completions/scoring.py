"""Log-probabilities of the tokens of a prompt, for `echo` with `logprobs`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from nybble.generation import TokenLogprob
from nybble.generation.scoring import logprob_rows

if TYPE_CHECKING:
    from nybble.model import Model


def score(model: Model, ids: Sequence[int], top: int, lora: str | None = None) -> list[TokenLogprob]:
    """The log-probability of each token after the first, in the model's own distribution.

    Args:
        model: The model.
        ids: The prompt.
        top: The number of the most likely tokens to report at each position.
        lora: The LoRA adapter to compute with; None for the model alone.

    Raises:
        ContextFullError: The tokens do not fit into the context.
        MemoryError: The logits do not fit into memory.
        ValueError: A token is unknown.
    """
    decode = model.tokenizer.decode
    top = min(top, model.info.vocabulary)
    found = []
    for row, token in zip(logprob_rows(model, ids[:-1], adapter=lora), ids[1:], strict=True):
        likeliest = np.argpartition(row, -top)[-top:] if top else np.arange(0)
        likeliest = likeliest[np.lexsort((likeliest, -row[likeliest]))]
        listed = tuple((int(other), decode([int(other)]), float(row[other])) for other in likeliest)
        found.append(TokenLogprob(token, decode([token]), float(row[token]), listed))
    return found
