"""Calibration text: a file or list of documents, the sample in the package, or text that the model generates."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING

from nybble.quantization import datasets
from nybble.quantization.datasets import Source
from nybble.quantization.documents import Document
from nybble.sampling import SamplingOptions

if TYPE_CHECKING:
    from nybble.quantization.datasets import Windows
    from nybble.quantization.loaded import Generates

WINDOW = 512
"""Tokens per window."""
SAMPLE = "sample"
"""The name of the text in the package: a few thousand tokens, enough for a first try."""
SELF = "self"
"""The name of text that the model generates."""
_BATCH = 8
"""Windows that are generated together."""


def documents(source: Source) -> tuple[list[Document], str]:
    """Returns calibration documents and a name for messages, from a file, a list of documents, or `SAMPLE`.

    Raises:
        FileNotFoundError, PermissionError, ModelError, TypeError: As in `datasets.as_documents`.
    """
    if source == SAMPLE:
        text = resources.files("nybble.quantization").joinpath("data/calibration.txt").read_text(encoding="utf-8")
        return [text], "the sample"
    return datasets.as_documents(source)


def generate(
    model: Generates,
    tokens: int,
    *,
    window: int = WINDOW,
    seed: int = 0,
    progress: Callable[[int, int], object] | None = None,
    keep: Path | None = None,
    key: str = "",
) -> Windows:
    """Generates calibration text at temperature 1.

    Each window begins with the start token, or with a random token if the model has none. After an end token generation
    continues. Finished batches are kept in the file `keep`, and read from there by a
    later call with the same `key`.

    Args:
        model: The model that generates.
        tokens: Number of tokens, rounded down to whole windows; at least one window.
        window: Tokens per window.
        seed: Seed of the random tokens and of sampling.
        progress: Called with the number of tokens generated, and the total.
        keep: The file for finished batches; None keeps nothing.
        key: Identifies the model.

    Returns:
        Token ids `(windows, window)`.
    """
    import numpy as np

    count = max(1, tokens // window)
    native, tokenizer = model._native, model.tokenizer
    random = np.random.default_rng(seed)
    plain = [i for i in range(tokenizer.vocab_size) if i not in tokenizer.special_ids]
    start = datasets.start_token(tokenizer)
    generated = np.empty((count, window), dtype=np.int32)
    for row in range(count):
        generated[row, 0] = random.choice(plain) if start is None else start
    known = [] if keep is None else _read_kept(keep, f"{key} {count} {window} {seed}", _BATCH * window)
    for number, batch in enumerate(known[: count // _BATCH]):
        ids = np.frombuffer(batch, dtype=np.int32).reshape(_BATCH, window)
        generated[number * _BATCH : (number + 1) * _BATCH] = ids
    begin = min(len(known), count // _BATCH) * _BATCH
    done = begin * (window - 1)
    for first in range(begin, count, _BATCH):
        rows = range(first, min(first + _BATCH, count))
        options = [SamplingOptions(temperature=1, seed=seed * 1_000_003 + row) for row in rows]
        sequences = [
            native.sequence([int(generated[row, 0])], option) for row, option in zip(rows, options, strict=True)
        ]
        for column in range(1, window):
            for row, sampled in zip(rows, native.step(sequences), strict=True):
                generated[row, column] = sampled.id
            done += len(sequences)
            if progress is not None:
                progress(done, count * (window - 1))
        if keep is not None and len(rows) == _BATCH:
            batch = generated[rows.start : rows.stop].tobytes()
            with keep.open("ab") as file:
                file.write(batch + zlib.crc32(batch).to_bytes(4, "little"))
    return generated


def _read_kept(path: Path, key: str, tokens: int) -> list[bytes]:
    """Reads the whole batches of `tokens` ids of a file with that key, and cuts the file off after the last one."""
    head = f"nybble text 2 {key}\n".encode()
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
