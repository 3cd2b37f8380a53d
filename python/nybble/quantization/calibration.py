"""What a quantizer looks at: a text of the user's, the sample that comes with the package, or what the model writes."""

from __future__ import annotations

import os
import zlib
from collections.abc import Callable, Sequence
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING

from nybble.quantization import datasets
from nybble.sampling import SamplingOptions

if TYPE_CHECKING:
    from nybble.model import Model
    from nybble.quantization.datasets import Windows

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
        FileNotFoundError, PermissionError, ModelError, TypeError: as in `datasets.as_documents`.
    """
    if source == SAMPLE:
        text = resources.files("nybble.quantization").joinpath("data/calibration.txt").read_text(encoding="utf-8")
        return [text], "the sample"
    return datasets.as_documents(source)


def generate(
    model: Model,
    tokens: int,
    *,
    window: int = WINDOW,
    seed: int = 0,
    progress: Callable[[int, int], object] | None = None,
    keep: Path | None = None,
    key: str = "",
) -> Windows:
    """Has a model write texts, at temperature 1, each from its start token or else from a token drawn at random.

    A text that ends is followed by whatever the model begins then. What is written goes into the file `keep`, and is
    not written again when that has it from a call with the same `key`.
    """
    import numpy as np

    count = max(1, tokens // window)
    native, tokenizer = model._native, model.tokenizer
    random = np.random.default_rng(seed)
    plain = [i for i in range(tokenizer.vocab_size) if i not in tokenizer.special_ids]
    start = datasets.start_token(tokenizer)
    written = np.empty((count, window), dtype=np.int32)
    for row in range(count):
        written[row, 0] = random.choice(plain) if start is None else start
    known = [] if keep is None else _kept(keep, f"{key} {count} {window} {seed}", _TOGETHER * window)
    for number, batch in enumerate(known[: count // _TOGETHER]):
        ids = np.frombuffer(batch, dtype=np.int32).reshape(_TOGETHER, window)
        written[number * _TOGETHER : (number + 1) * _TOGETHER] = ids
    begin = min(len(known), count // _TOGETHER) * _TOGETHER
    done = begin * (window - 1)
    for first in range(begin, count, _TOGETHER):
        rows = range(first, min(first + _TOGETHER, count))
        options = [SamplingOptions(temperature=1, seed=seed * 1_000_003 + row) for row in rows]
        sequences = [native.sequence([int(written[row, 0])], option) for row, option in zip(rows, options, strict=True)]
        for column in range(1, window):
            for row, sampled in zip(rows, native.step(sequences), strict=True):
                written[row, column] = sampled.id
            done += len(sequences)
            if progress is not None:
                progress(done, count * (window - 1))
        if keep is not None and len(rows) == _TOGETHER:
            batch = written[rows.start : rows.stop].tobytes()
            with keep.open("ab") as file:
                file.write(batch + zlib.crc32(batch).to_bytes(4, "little"))
    return written


def _kept(path: Path, key: str, tokens: int) -> list[bytes]:
    """The batches of `tokens` ids that a file has under a key, up to the first damaged one. There it is cut off."""
    head = f"nybble texts 1 {key}\n".encode()
    data = path.read_bytes() if path.is_file() else b""
    batches: list[bytes] = []
    end, length = len(head), 4 * tokens
    while data.startswith(head) and len(data) >= end + length + 4:
        batch, checksum = data[end : end + length], data[end + length : end + length + 4]
        if zlib.crc32(batch).to_bytes(4, "little") != checksum:
            break
        batches.append(batch)
        end += length + 4
    path.write_bytes(data[:end] if batches else head)
    return batches
