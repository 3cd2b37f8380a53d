"""The folders in which nybble and the Hub's client keep files."""

from __future__ import annotations

import os
import sys
from pathlib import Path


def cache_dir() -> Path:
    """The folder in which nybble keeps files between runs: `NYBBLE_CACHE`, or `nybble` in the user's cache folder."""
    if own := os.environ.get("NYBBLE_CACHE"):
        return Path(own).expanduser()
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "nybble"
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local") / "nybble" / "Cache"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "nybble"


def snapshot_folder(repository: str, revision: str | None) -> Path:
    """The folder of a revision in the Hub's cache, by its documented layout. It need not exist."""
    from huggingface_hub import constants

    storage = Path(constants.HF_HUB_CACHE) / f"models--{repository.replace('/', '--')}"
    reference = storage / "refs" / (revision or constants.DEFAULT_REVISION)
    commit = reference.read_text().strip() if reference.is_file() else revision
    return storage / "snapshots" / str(commit)
