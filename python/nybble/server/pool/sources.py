"""The models of the command line and of a folder, and the pool of all models of a server."""

from __future__ import annotations

import logging
import os
import re
import stat
from collections.abc import Iterator, Sequence
from pathlib import Path

from nybble import _native
from nybble.errors import ModelError
from nybble.load_options import LoadOptions
from nybble.models.files import group_shards, is_companion
from nybble.server.options import ServeOptions
from nybble.server.pool.entry import Entry
from nybble.server.pool.names import check_names
from nybble.server.pool.needs import Limits, check_fits, read_needs, size
from nybble.server.pool.pool import Pool
from nybble.server.pool.spec import ModelSpec, default_name

_DEPTH = 3
"""Levels of folders that are searched for models, as a repository or an author may have one each."""

_ENDING = re.compile(r"(-\d{5}-of-\d{5})?\.gguf$", re.IGNORECASE)
"""What the name of a model leaves out of that of its first file."""

_log = logging.getLogger("nybble.server")


def named_models(sources: Sequence[str | None], options: ServeOptions, load: LoadOptions) -> list[ModelSpec]:
    """The models of the command line.

    Raises:
        ValueError: An option for one model is given for several.
    """
    for name in ("name", "adapter"):
        if getattr(options, name) and len(sources) != 1:
            raise ValueError(f"{name}: found {len(sources)} models, expected one; a file for --config has it per model")
    return [
        ModelSpec(
            name=options.name or default_name(source, load.filename),
            source=source,
            load=load,
            options=options,
            adapters=options.adapters(),
        )
        for source in sources
    ]


def models_in(folder: Path, options: ServeOptions, load: LoadOptions) -> list[ModelSpec]:
    """The models in a folder and its subfolders: GGUF files, and folders with `config.json` and safetensors files.

    Raises:
        ValueError: The folder holds no model, or does not exist.
    """
    if not folder.is_dir():
        raise ValueError(f"models_dir: found {str(folder)!r}, expected a folder")
    found = []
    load = load.replace(filename=None, revision=None)  # They choose among the files of a repository.
    for path in _paths(folder, _DEPTH):
        # Clients receive the name as JSON, which has no characters for bytes that are not UTF-8.
        name = os.fsencode(path.relative_to(folder).as_posix()).decode("utf-8", "replace")
        name = _ENDING.sub("", name) if path.is_file() else name
        found.append(ModelSpec(name=name, source=str(path), load=load, options=options, is_named=False))
    if not found:
        raise ValueError(f"models_dir: found no model in {str(folder)!r}, expected GGUF files or checkpoint folders")
    return found


def _paths(folder: Path, depth: int) -> Iterator[Path]:
    """The files and folders of models, those of a folder before those of its subfolders."""
    entries = sorted(entry for entry in folder.iterdir() if not entry.name.startswith("."))
    modes = {entry: _mode(entry) for entry in entries}
    files = {entry.name: entry for entry in entries if stat.S_ISREG(modes[entry])}
    for name in sorted(group_shards((name, path) for name, path in files.items())):
        if not is_companion(name) and _is_model(path := folder / name):
            yield path
    for subfolder in (entry for entry in entries if stat.S_ISDIR(modes[entry])):
        try:
            names = [each.name for each in subfolder.iterdir()]
            is_checkpoint = "config.json" in names and any(name.endswith(".safetensors") for name in names)
            found = [subfolder] if is_checkpoint else [*_paths(subfolder, depth - 1)] if depth > 1 else []
        except OSError as error:
            _log.warning("models_dir: a folder is left out, because it cannot be read: %s", error)
            continue
        yield from found


def _mode(path: Path) -> int:
    """The mode of a file or folder, which says what it is. 0 if there is none, or if it cannot be reached."""
    try:
        return path.stat().st_mode
    except FileNotFoundError:  # A link to nothing.
        return 0
    except OSError as error:
        _log.warning("models_dir: a file is left out, because it cannot be read: %s", error)
        return 0


def _is_model(file: Path) -> bool:
    """Whether a GGUF file holds a model, by its keys. A damaged one does: loading it says what is wrong."""
    try:
        keys = _native.GgufFile(file).metadata
    except (OSError, ValueError):
        return True
    return keys.get("general.type", "model") == "model" and keys.get("general.architecture") != "clip"


def new_pool(specs: Sequence[ModelSpec], options: ServeOptions, allowed_hosts: frozenset[str] | None) -> Pool:
    """The pool of models that are loaded on demand.

    The headers of files on this machine are read now, those of repositories when the first request comes.

    Raises:
        ValueError: Two models have the same name, or one never fits into memory.
        OSError: There is no such file.
    """
    check_names(specs)
    limits = Limits.of(options.max_memory_bytes, options.max_loaded, len(specs))
    entries = []
    for spec in specs:
        settings = spec.options.settings(context=None, allowed_hosts=allowed_hosts)
        entry = Entry(spec.name, settings, spec, unload_after=options.unload_after, adapters=dict(spec.adapters))
        _check_adapters(spec)
        entries.append(entry)
    pool = Pool(entries, options.settings(context=None, allowed_hosts=allowed_hosts), limits)
    for entry, spec in zip(entries, specs, strict=True):
        if spec.is_local:
            _read_header(pool, entry, spec)
    known = sorted((entry.needed_bytes for entry in entries), reverse=True)[: limits.max_loaded]
    if limits.max_bytes is not None and sum(known) > limits.max_bytes:
        _log.info(
            "the models need up to %s together, and may take %s: those that were used least recently are unloaded",
            size(sum(known)),
            size(limits.max_bytes),
        )
    return pool


def _read_header(pool: Pool, entry: Entry, spec: ModelSpec) -> None:
    """Reads what a model on this machine needs. A damaged file is an error of the requests for it."""
    try:
        needs = read_needs(spec, pool.limits)
    except FileNotFoundError:
        raise
    except (OSError, ModelError) as error:
        _log.warning("the model %s cannot be loaded: %s", entry.name, error)
        return
    except ValueError as error:  # An option that does not suit the model.
        if spec.is_named:
            raise ValueError(f"the model {entry.name!r}: {error}") from None
        _log.warning("the model %s cannot be loaded: %s", entry.name, error)
        return
    pool.set_needs(entry, needs)
    try:
        check_fits(entry.name, needs, entry.adapter_bytes, pool.limits)
    except ValueError as error:
        if spec.is_named:
            raise
        _log.warning("%s", error)


def _check_adapters(spec: ModelSpec) -> None:
    for name, path in spec.adapters.items():
        if not path.exists():
            raise ValueError(f"adapter: {name}: found {str(path)!r}, which does not exist")
