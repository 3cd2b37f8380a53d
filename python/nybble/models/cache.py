"""Lists the models that load without a download."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from nybble.models.default_model import DEFAULT_MODEL
from nybble.models.files import group_shards, is_companion
from nybble.models.paths import cache_dir, hub_cache


@dataclass(frozen=True)
class CachedModel:
    """A model that loads without a download: `Model.load(source, filename=filename)`."""

    source: str | None
    """None for the default model."""
    filename: str | None
    path: Path
    """The first file."""
    nbytes: int
    """The size of all shards."""


def cached_models() -> list[CachedModel]:
    """The GGUF models in nybble's cache and in the cache of the Hugging Face Hub."""
    found: list[CachedModel] = []
    for path in sorted(path for path in (cache_dir() / "models").glob("*.gguf") if path.is_file()):
        is_default = path.name == DEFAULT_MODEL.file
        found.append(CachedModel(None if is_default else str(path), None, path, path.stat().st_size))
    for storage in sorted(hub_cache().glob("models--*--*")):
        repository = storage.name.removeprefix("models--").replace("--", "/", 1)
        snapshots = storage / "snapshots"
        files = [
            path
            for path in snapshots.glob("*/**/*.gguf")
            if path.is_file() and not is_companion(path.name)  # A link may lead nowhere.
        ]
        models = group_shards((path.relative_to(snapshots).as_posix().partition("/")[2], path) for path in files)
        for name, paths in sorted(models.items()):
            by_name = {path.name: path for path in sorted(paths)}  # Several revisions may hold the same file.
            nbytes = sum(path.stat().st_size for path in by_name.values())
            found.append(CachedModel(repository, name, min(by_name.values()), nbytes))
    return found
