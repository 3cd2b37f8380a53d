"""Reads documents for calibration and evaluation, and cuts them into windows of tokens."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nybble.errors import ModelError

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from nybble.tokenizer.tokenizer import Tokenizer

    Windows = npt.NDArray[np.int32]
    """Token ids `(windows, window)`."""


def read(path: str | os.PathLike[str]) -> list[str]:
    """Reads the documents of a file: the whole text, or one document per line of a JSONL file.

    A line of JSONL is a string, or an object with a string under `text` or `content`.

    Raises:
        FileNotFoundError, PermissionError, IsADirectoryError: The file cannot be read.
        ModelError: The file is not UTF-8, or a line of JSONL is not a document.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        reason = f"{(error.strerror or 'cannot be read').lower()}, expected a text"
        raise type(error)(error.errno or errno.EIO, reason, str(path)) from None
    except UnicodeDecodeError as error:
        raise ModelError(f"{path}: found invalid UTF-8 at byte {error.start}, expected a text") from None
    if path.suffix.lower() not in (".jsonl", ".ndjson"):
        return [text]
    return [_document(path, number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]


def _document(path: Path, number: int, line: str) -> str:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        value = None
    if isinstance(value, dict):
        value = value.get("text", value.get("content"))
    if not isinstance(value, str):
        raise ModelError(
            f'{path}: line {number}: found {line[:40]!r}, expected a string, or an object such as {{"text": "..."}}'
        )
    return value


def tokens(tokenizer: Tokenizer, documents: Sequence[str]) -> list[int]:
    """Returns the token ids of all documents in sequence, each after the start token if the model expects one."""
    start = start_token(tokenizer)
    before = [] if start is None else [start]
    ids: list[int] = []
    for document in documents:
        ids += [*before, *tokenizer.encode(document, add_special=False, parse_special=False)]
    return ids


def start_token(tokenizer: Tokenizer) -> int | None:
    """Returns the token with which the model expects every text to begin; None if it expects none."""
    begins = tokenizer.encode("", parse_special=False)[:1]
    return tokenizer.bos_id if begins == [tokenizer.bos_id] else None


def windows(
    tokenizer: Tokenizer, documents: Sequence[str], window: int, max_tokens: int | None = None, what: str = "the text"
) -> Windows:
    """Cuts the tokens of documents into windows `(windows, window)` and drops an incomplete one at the end.

    Each window begins with the start token if the model expects one. `what` names the text in the error.

    Raises:
        ModelError: The text does not fill one window.
    """
    import numpy as np

    ids = tokens(tokenizer, documents)[:max_tokens]
    count = len(ids) // window
    if count == 0:
        raise ModelError(f"{what}: found {len(ids)} tokens, expected at least {window}, one window")
    cut = np.array(ids[: count * window], dtype=np.int32).reshape(count, window)
    start = start_token(tokenizer)
    if start is not None:
        cut[:, 0] = start
    return cut


def as_documents(source: str | os.PathLike[str] | Sequence[str]) -> tuple[list[str], str]:
    """Returns documents and a name for messages, from the path of a file or from a list of documents.

    Raises:
        TypeError: `source` is neither. Otherwise as `read`.
    """
    if isinstance(source, (str, os.PathLike)):
        return read(source), os.fspath(source)
    documents: list[Any] = list(source)
    if not all(isinstance(document, str) for document in documents):
        raise TypeError("documents: found an item that is not a str, expected a path or a list of str")
    return documents, "the documents"
