"""Reads documents for calibration and evaluation, and cuts them into windows of tokens."""

from __future__ import annotations

import errno
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nybble.errors import ModelError
from nybble.quantization import documents
from nybble.quantization.documents import Document

Source = str | os.PathLike[str] | Sequence[str | Mapping[str, Any]]
"""A file of documents, or a list of str and of records such as `{"messages": [...]}`."""

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from nybble.tokenizer.tokenizer import Tokenizer

    Windows = npt.NDArray[np.int32]
    """Token ids `(windows, window)`."""


def read(path: str | os.PathLike[str]) -> list[Document]:
    """Reads the documents of a file: prose, JSON, JSON Lines or Parquet.

    A record is a string; an object with a string under `text` or `content`; a conversation under `messages` or
    `conversations`; or a prompt and its answer, such as `prompt` and `completion`.

    Raises:
        FileNotFoundError, PermissionError, IsADirectoryError: The file cannot be read.
        ModelError: The file is not UTF-8, or a record is not a document.
    """
    path = Path(path)
    try:
        data = path.read_bytes()
    except OSError as error:
        reason = f"{(error.strerror or 'cannot be read').lower()}, expected a text"
        raise type(error)(error.errno or errno.EIO, reason, str(path)) from None
    if data[:4] == b"PAR1":
        return documents.parquet(path)
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ModelError(f"{path}: found invalid UTF-8 at byte {error.start}, expected a text") from None
    return documents.parse(text.replace("\r\n", "\n").replace("\r", "\n"), path)


def tokens(tokenizer: Tokenizer, texts: Sequence[Document]) -> list[int]:
    """Returns the token ids of all documents in sequence, each after the start token if the model expects one.

    Raises:
        ModelError: The chat template refuses a conversation.
    """
    start = start_token(tokenizer)
    ids: list[int] = []
    for document in texts:
        if isinstance(document, str):
            own = tokenizer.encode(document, add_special=False, parse_special=False)
        else:
            own = document.ids(tokenizer)
        # Chat templates may write the start token themselves.
        if start is not None and own[:1] != [start]:
            ids.append(start)
        ids += own
    return ids


def start_token(tokenizer: Tokenizer) -> int | None:
    """Returns the token with which the model expects every text to begin; None if it expects none."""
    begins = tokenizer.encode("", parse_special=False)[:1]
    return tokenizer.bos_id if begins == [tokenizer.bos_id] else None


def windows(
    tokenizer: Tokenizer, texts: Sequence[Document], window: int, max_tokens: int | None = None, what: str = "the text"
) -> Windows:
    """Cuts the tokens of documents into windows `(windows, window)` and drops an incomplete one at the end.

    Each window begins with the start token if the model expects one. `what` names the text in the error.

    Raises:
        ModelError: The text does not fill one window.
    """
    import numpy as np

    ids = tokens(tokenizer, texts)[:max_tokens]
    count = len(ids) // window
    if count == 0:
        raise ModelError(f"{what}: found {len(ids)} tokens, expected at least {window}, one window")
    cut = np.array(ids[: count * window], dtype=np.int32).reshape(count, window)
    start = start_token(tokenizer)
    if start is not None:
        cut[:, 0] = start
    return cut


def as_documents(source: Source) -> tuple[list[Document], str]:
    """Returns documents and a name for messages, from the path of a file or from a list of documents.

    Raises:
        TypeError: `source` is neither. Otherwise as `read`.
    """
    if isinstance(source, (str, os.PathLike)):
        return read(source), os.fspath(source)
    return documents.from_list(source), "the documents"
