"""The folders in which nybble and the Hub's client keep files."""

from __future__ import annotations

import errno
import os
import sys
from pathlib import Path


def expand(path: str | os.PathLike[str]) -> Path:
    """A path with `~` expanded.

    Raises:
        FileNotFoundError: The home folder is not known.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError:
        raise FileNotFoundError(
            errno.ENOENT, "there is no such user, or the user has no home folder", os.fspath(path)
        ) from None


def cache_dir() -> Path:
    """The folder in which nybble keeps files between runs: `NYBBLE_CACHE`, or `nybble` in the user's cache folder.

    Raises:
        FileNotFoundError: The user has no home folder, and no variable names another.
    """
    if own := os.environ.get("NYBBLE_CACHE"):
        return expand(own)
    if sys.platform == "darwin":
        return _home("NYBBLE_CACHE") / "Library" / "Caches" / "nybble"
    if sys.platform == "win32":
        local = os.environ.get("LOCALAPPDATA")
        return (Path(local) if local else _home("NYBBLE_CACHE") / "AppData" / "Local") / "nybble" / "Cache"
    general = os.environ.get("XDG_CACHE_HOME")
    return (Path(general) if general else _home("NYBBLE_CACHE") / ".cache") / "nybble"


def hub_cache() -> Path:
    """The cache of the Hub's client.

    Raises:
        FileNotFoundError: The user has no home folder, and no variable names another.
    """
    from huggingface_hub import constants

    cache = Path(constants.HF_HUB_CACHE)
    if cache.parts[:1] == ("~",):  # The client leaves what it cannot expand, which would be a folder of that name.
        raise _homeless("HF_HOME")
    return cache


def _home(variable: str) -> Path:
    try:
        return Path.home()
    except RuntimeError:
        raise _homeless(variable) from None


def _homeless(variable: str) -> FileNotFoundError:
    reason = f"the user has no home folder; set {variable} to the path of a folder for models"
    return FileNotFoundError(errno.ENOENT, reason, "~")


def repository_folder(repository: str) -> Path:
    """The folder of a repository in the Hub's cache. It need not exist."""
    return hub_cache() / f"models--{repository.replace('/', '--')}"


def snapshot_folder(repository: str, revision: str | None) -> Path:
    """The folder of a revision in the Hub's cache, by its documented layout. It need not exist."""
    from huggingface_hub import constants

    storage = repository_folder(repository)
    reference = storage / "refs" / (revision or constants.DEFAULT_REVISION)
    commit = reference.read_text().strip() if reference.is_file() else revision
    return storage / "snapshots" / str(commit)
