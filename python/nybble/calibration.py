"""What a quantizer looks at: a text of the user's, the sample that comes with the package, or what the model writes."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from importlib import resources
from typing import TYPE_CHECKING

from nybble import texts
from nybble.sampling import SamplingOptions

if TYPE_CHECKING:
    from nybble.model import Model
    from nybble.texts import Windows

WINDOW = 512
"""Tokens that are read together."""
SAMPLE = "sample"
"""The name of the text that comes with the package: a few thousand tokens, enough to try things out."""
SELF = "self"
"""The name of what the model writes by itself."""
_TOGETHER = 8


def documents(source: str | os.PathLike[str] | Sequence[str]) -> tuple[list[str], str]:
    """The documents of a calibration, and what to call them: those of a file, of a list, or of `SAMPLE`.

    Raises:
        FileNotFoundError, PermissionError, ModelError, TypeError: as in `texts.as_documents`.
    """
    if source == SAMPLE:
        text = resources.files("nybble").joinpath("data/calibration.txt").read_text(encoding="utf-8")
        return [text], "the sample"
    return texts.as_documents(source)


def generate(
    model: Model,
    tokens: int,
    *,
    window: int = WINDOW,
    seed: int = 0,
    progress: Callable[[int, int], object] | None = None,
) -> Windows:
    """Has a model write texts, at temperature 1, each from its start token or else from a token drawn at random.

    A text that ends is followed by whatever the model begins then.
    """
    import numpy as np

    count = max(1, tokens // window)
    native, tokenizer = model._native, model.tokenizer
    random = np.random.default_rng(seed)
    plain = [i for i in range(tokenizer.vocab_size) if i not in tokenizer.special_ids]
    start = texts.start_token(tokenizer)
    written = np.empty((count, window), dtype=np.int32)
    done = 0
    for first in range(0, count, _TOGETHER):
        rows = range(first, min(first + _TOGETHER, count))
        for row in rows:
            written[row, 0] = random.choice(plain) if start is None else start
        options = [SamplingOptions(temperature=1, seed=seed * 1_000_003 + row) for row in rows]
        sequences = [native.sequence([int(written[row, 0])], option) for row, option in zip(rows, options, strict=True)]
        for column in range(1, window):
            for row, sampled in zip(rows, native.step(sequences), strict=True):
                written[row, column] = sampled.id
            done += len(sequences)
            if progress is not None:
                progress(done, count * (window - 1))
    return written
