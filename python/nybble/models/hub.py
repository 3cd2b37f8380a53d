"""Finds the file of a model: a path, a folder, a repository on the Hugging Face Hub, or the default model."""

from __future__ import annotations

import errno
import os
import re
from pathlib import Path

from nybble.models.cache import CachedModel, cached_models
from nybble.models.default_model import DEFAULT_MODEL, resolve_default_model
from nybble.models.files import choose
from nybble.models.paths import cache_dir, expand
from nybble.models.repository import download

__all__ = ["DEFAULT_MODEL", "CachedModel", "cache_dir", "cached_models", "resolve"]

_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def resolve(
    source: str | os.PathLike[str] | None = None,
    *,
    filename: str | None = None,
    revision: str | None = None,
    only_tokenizer: bool = False,
) -> Path:
    """The local file or folder of a model, downloaded if needed.

    Args:
        source: A file; a folder; a repository on the Hugging Face Hub as `organization/name`; or None for the default
            model. An existing path is never looked up on the Hub.
        filename: A name or a pattern (`*Q4_K_M.gguf`) of the GGUF file to take from a folder or repository. The shards
            of a split file count as one.
        revision: Branch, tag or commit of a repository.
        only_tokenizer: Download only the tokenizer's files of a repository with a `tokenizer.json`, and return their
            folder.

    Returns:
        The file (the first shard of a split one), or the folder of a safetensors checkpoint.

    Raises:
        FileNotFoundError: There is no such file, folder or repository. The message says where it was looked for.
        ConnectionError: The Hub cannot be reached and its cache holds no copy.
        PermissionError: The repository needs its terms accepted.
        ModelError: Several files match `filename`, or none, a shard is missing, the weights are only in pickles, or a
            download has the wrong hash.
        ValueError: `filename` or `revision` does not apply to the source.
    """
    if source is not None and not isinstance(source, (str, os.PathLike)):
        raise TypeError(f"source: found {type(source).__name__}, expected a path, a repository or None")
    if source is None:
        if filename is not None or revision is not None:
            raise ValueError("filename and revision need a source, found none")
        return resolve_default_model()
    path = expand(source)
    is_repository = isinstance(source, str) and _REPOSITORY.fullmatch(source) is not None and not path.exists()
    if is_repository:
        return download(str(source), filename, revision, only_tokenizer)
    if revision is not None:
        raise ValueError(f"revision: found {revision!r}, but {path} is not a repository on the Hub")
    if path.is_dir():
        names = [entry.name for entry in path.iterdir() if entry.is_file()]
        chosen = choose(names, filename, f"folder {path}")
        if not chosen and not any(name.endswith(".json") for name in names):
            reason = "the folder holds no model (no .gguf and no config.json)"
            raise FileNotFoundError(errno.ENOENT, reason, str(path))
        return path / chosen[0] if chosen else path
    if filename is not None and path.exists():
        raise ValueError(f"filename: found {filename!r}, but {path} is a file, not a folder or a repository")
    if not path.exists():
        raise FileNotFoundError(errno.ENOENT, _missing(path), str(path))
    return path


def _missing(path: Path) -> str:
    """Why nothing is at a path."""
    import difflib

    try:
        path.stat()
    except OSError as error:
        if error.errno == errno.ELOOP:
            return "a loop of links"
    if path.is_symlink():
        return f"a link to {path.readlink()}, which does not exist"
    try:
        names = [entry.name for entry in path.parent.iterdir()]
    except OSError:
        return f"no such file or folder (the folder {path.parent} does not exist)"
    near = difflib.get_close_matches(path.name, names, n=1)
    suggestion = f" (did you mean {path.with_name(near[0])}?)" if near else ""
    return f"no such file or folder{suggestion}"
