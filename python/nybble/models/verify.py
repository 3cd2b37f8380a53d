"""Compares the files of cached models with the sizes and hashes that the Hub gave for them."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from nybble.errors import ModelError
from nybble.models.default_model import DEFAULT_MODEL
from nybble.models.files import sha256
from nybble.models.listing import Listing, choose_files
from nybble.models.paths import cache_dir, hub_cache


@dataclass(frozen=True)
class Verified:
    """A file of a cached model, and what is wrong with it."""

    source: str | None
    """The repository; None for the default model."""
    filename: str
    path: Path
    problem: str | None
    """None if the file is whole."""


def verify() -> Iterator[Verified]:
    """Compares every file in the caches of nybble and the Hub with its size and hash."""
    kept = cache_dir() / "models" / DEFAULT_MODEL.file
    if kept.is_file():
        yield Verified(None, kept.name, kept, _problem(kept, DEFAULT_MODEL.size, DEFAULT_MODEL.sha256))
    seen: set[Path] = set()
    for storage in sorted(hub_cache().glob("models--*--*")):
        repository = storage.name.removeprefix("models--").replace("--", "/", 1)
        for snapshot in sorted((storage / "snapshots").glob("*")):
            yield from _snapshot(repository, snapshot, seen)


def _snapshot(repository: str, snapshot: Path, seen: set[Path]) -> Iterator[Verified]:
    """The files of a snapshot that were not seen in another one."""
    listing = Listing.read(snapshot)
    paths = sorted(path for path in snapshot.rglob("*") if path.is_symlink() or path.is_file())
    for path in paths:
        name = path.relative_to(snapshot).as_posix()
        if not path.exists():
            yield Verified(repository, name, path, "missing")
            continue
        target = path.resolve()
        if target in seen:
            continue
        seen.add(target)
        file = None if listing is None else listing.files.get(name)
        size, expected = (None, None) if file is None else (file.size, file.sha256)
        # The Hub's client names a file in its cache after its hash.
        yield Verified(repository, name, path, _problem(path, size, expected or target.name))
    for name in _lacking(listing, snapshot):
        yield Verified(repository, name, snapshot / name, "missing")


def _lacking(listing: Listing | None, snapshot: Path) -> list[str]:
    """The files that the models of a snapshot lack. Models without any fetched file are left out."""
    if listing is None:
        return []
    lacking: list[str] = []
    names = list(listing.files)
    fetched = [name for name in names if name.lower().endswith(".gguf") and (snapshot / name).is_file()]
    for pattern in [*fetched, *([None] if any(snapshot.glob("*.safetensors")) else [])]:
        try:
            chosen = choose_files(names, pattern, False, snapshot.name)
        except ModelError:  # Several models, or a repository without one.
            continue
        lacking += [
            name
            for name in chosen.names
            if name not in lacking and not (snapshot / name).exists() and not (snapshot / name).is_symlink()
        ]
    return lacking


def _problem(path: Path, size: int | None, expected: str) -> str | None:
    """What is wrong with a file. `expected` is a SHA-256, the SHA-1 of a Git object, or neither."""
    found_size = path.stat().st_size
    if size is not None and found_size != size:
        return f"found {found_size} bytes, expected {size}"
    if re.fullmatch(r"[0-9a-f]{64}", expected):
        found = sha256(path)
    elif re.fullmatch(r"[0-9a-f]{40}", expected):
        found = _git_hash(path, found_size)
    else:
        return None
    return None if found == expected else f"found hash {found}, expected {expected}"


def _git_hash(path: Path, size: int) -> str:
    """The name of a file's contents in Git."""
    digest = hashlib.sha1(b"blob %d\0" % size, usedforsecurity=False)
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()
