"""Finds the file of a model: a path, a folder, a repository on the Hugging Face Hub, or the default model."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path

from nybble.models.cache import CachedModel, cached_models
from nybble.models.default_model import DEFAULT_MODEL, resolve_default_model
from nybble.models.fetching import reported
from nybble.models.files import choose, is_companion
from nybble.models.names import hub_name
from nybble.models.paths import cache_dir, expand
from nybble.models.repository import download
from nybble.progress import Progress

__all__ = ["DEFAULT_MODEL", "CachedModel", "cache_dir", "cached_models", "resolve"]


def resolve(
    source: str | os.PathLike[str] | None = None,
    *,
    filename: str | None = None,
    revision: str | None = None,
    only_tokenizer: bool = False,
    progress: Progress = None,
) -> Path:
    """The local file or folder of a model, downloaded if needed.

    Args:
        source: A file; a folder; a repository on the Hugging Face Hub as `organization/name`, also with the name of a
            quantization (`organization/name:Q4_K_M`) or as a URL; or None for the default model. An existing path is
            never looked up on the Hub.
        filename: A name or a pattern (`*Q4_K_M.gguf`) of the GGUF file to take from a folder or repository. The shards
            of a split file count as one.
        revision: Branch, tag or commit of a repository.
        only_tokenizer: Download only the tokenizer's files of a repository with a `tokenizer.json`, and return their
            folder.
        progress: How to report a download: None draws a progress bar on a terminal or in a notebook if it takes more
            than a second, True always reports, False never. A function is called with the number of bytes downloaded
            and their total. An exception that it raises stops the download.

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
        with reported(progress, DEFAULT_MODEL.name) as report:
            return resolve_default_model(report)
    path = expand(source)
    named = hub_name(source) if isinstance(source, str) and not path.exists() else None
    if named is not None:
        for name, given, found in (("filename", filename, named.filename), ("revision", revision, named.revision)):
            if None not in (given, found) and given != found:
                raise ValueError(f"{name}: found {given!r}, but the source {source!r} names {found!r}")
        with reported(progress, named.repository) as report:
            return download(
                named.repository, filename or named.filename, revision or named.revision, only_tokenizer, report
            )
    if revision is not None:
        raise ValueError(f"revision: found {revision!r}, but {path} is not a repository on the Hub")
    if path.is_dir():
        return _in_folder(path, filename)
    if filename is not None and path.exists():
        raise ValueError(f"filename: found {filename!r}, but {path} is a file, not a folder or a repository")
    if not path.exists():
        raise FileNotFoundError(errno.ENOENT, _missing(path), str(path))
    return path


def _in_folder(folder: Path, filename: str | None) -> Path:
    """The model of a folder: a file in it, the folder itself, or a file in one of its subfolders."""
    where = f"folder {folder}"
    names = [entry.name for entry in folder.iterdir() if entry.is_file()]
    is_checkpoint = "config.json" in names and any(name.endswith(".safetensors") for name in names)
    models = [name for name in names if name.lower().endswith(".gguf") and not is_companion(name)]
    if not is_checkpoint and (filename is not None or not models):
        # As in repositories, each quantization may have a folder of its own.
        deeper = [file for depth in ("*/*", "*/*/*") for file in folder.glob(depth) if file.suffix.lower() == ".gguf"]
        names += [file.relative_to(folder).as_posix() for file in deeper if file.is_file()]
    if chosen := choose(names, filename, where, _is_model(folder)):
        return folder / chosen[0]
    if not any(name.endswith(".json") for name in names):
        companions = [name for name in names if name.lower().endswith(".gguf")]
        found = f"no model among {', '.join(companions)}" if companions else "no .gguf and no config.json"
        raise FileNotFoundError(errno.ENOENT, f"the folder holds no model ({found})", str(folder))
    return folder


def _is_model(folder: Path) -> Callable[[str], bool]:
    """Whether a file of the folder is a model, by its keys."""

    def ask(name: str) -> bool:
        from nybble import _native

        try:
            keys = _native.GgufFile(folder / name).metadata
        except (OSError, ValueError):
            return True  # Loading it says what is wrong.
        kind = keys.get("general.type", "model")
        return kind == "model" and keys.get("general.architecture") != "clip"

    return ask


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
    if near:
        return f"no such file or folder (did you mean {path.with_name(near[0])}?)"
    is_name = path.parent == Path() and path.suffix.lower() != ".gguf"
    hint = " (a repository on the Hub has the form organization/name)" if is_name else ""
    return f"no such file or folder{hint}"
