"""Reads the configuration file of `nybble serve`: models with their options, and options of the server, in TOML."""

from __future__ import annotations

import dataclasses
import difflib
import sys
import types
import typing
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, Literal

from nybble.chat.template import ChatTemplate
from nybble.engine_options import EngineOptions
from nybble.load_options import LoadOptions
from nybble.models.names import hub_name
from nybble.models.paths import expand
from nybble.server.options import ServeOptions, check_adapter_name, check_cache_dir
from nybble.server.pool.spec import ModelSpec, default_name

# Part of Python since 3.11.
_TOML: Any = import_module("tomllib" if sys.version_info >= (3, 11) else "tomli")

Table = Mapping[str, Any]

_PATHS = ("PATH", "FILE", "FOLDER", "DIR")
"""Placeholders of options whose values are paths, which are relative to the file."""
_NOT_IN_FILES = ("config", "name", "adapter", "cache_bytes", "cache_dir_bytes", "stages", "ray")
"""Options of the command line that a file has in other places."""
_LOAD = tuple(each.name for each in dataclasses.fields(LoadOptions) if each.name not in ("quantize", "mtp"))
_SERVE = tuple(
    each.name for each in dataclasses.fields(ServeOptions) if "help" in each.metadata and each.name not in _NOT_IN_FILES
)
_OF_MODEL = (
    *(each.name for each in dataclasses.fields(EngineOptions) if each.name in _SERVE),
    "cache_gb",
    "cache_dir_gb",
    "draft",
    "pooling",
    "matryoshka",
    "bare_calls",
)
"""Options of `ServeOptions` that each model may have for itself."""
_OWN = ("name", "source", "aliases", "adapters", "chat_template")
"""Keys of a model that are not options of the command line."""


@dataclass(frozen=True)
class Config:
    """The content of a file."""

    path: Path
    server: Table
    """Options of `ServeOptions` and `LoadOptions`."""
    models: Sequence[Table]


def read_config(path: Path) -> Config:
    """Reads a file, and checks its keys and the types of their values.

    Raises:
        OSError: The file cannot be read.
        ValueError: It is not TOML, or has an unknown key or a wrong value.
    """
    try:
        content = _TOML.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: {error}, expected TOML") from None
    models = content.pop("models", [])
    if not isinstance(models, list) or not all(isinstance(table, dict) for table in models):
        raise ValueError(f"{path}: models: found {_shown(models)}, expected tables: [[models]]")
    hints = _hints()
    _check_keys(f"{path}", content, (*_SERVE, *_LOAD), more=("models",))
    _check_values(f"{path}", content, hints)
    for number, table in enumerate(models, 1):
        where = _where(path, number, table)
        _check_keys(where, table, (*_OWN, *_LOAD, *_OF_MODEL))
        _check_values(where, table, hints)
        if "source" not in table:
            raise ValueError(f"{where}: found no source, expected a file, a folder or a repository")
    return Config(path, _with_paths(content, path.parent), models)


def with_config(
    config: Config, options: ServeOptions, load: LoadOptions, given: Collection[str]
) -> tuple[ServeOptions, LoadOptions]:
    """The options of the command line with those of a file.

    Args:
        config: The file.
        options: The options of the command line.
        load: The options of the command line for loading models.
        given: The names of the options that the command line has, which replace those of the file.

    Raises:
        ValueError: A value is out of range.
    """
    found = {name: value for name, value in config.server.items() if name not in given}
    return _replaced(f"{config.path}", options, load, found)


def configured_models(config: Config, options: ServeOptions, load: LoadOptions) -> list[ModelSpec]:
    """The models of a file, with the options of the server where a model has none of its own.

    Raises:
        ValueError: A value is out of range, or a file is missing.
    """
    return [
        _model(config.path, _where(config.path, number, table), table, options, load)
        for number, table in enumerate(config.models, 1)
    ]


def _model(file: Path, where: str, table: Table, options: ServeOptions, load: LoadOptions) -> ModelSpec:
    table = _with_paths(table, file.parent)
    own_options, own_load = _replaced(
        where, options, load, {name: value for name, value in table.items() if name not in _OWN}
    )
    if "cache_dir_gb" in table:
        try:
            check_cache_dir([own_options])
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None
    adapters = {}
    for name, path in table.get("adapters", {}).items():
        try:
            check_adapter_name(name)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None
        adapters[name] = file.parent / expand(path)
    try:
        source = _source(table["source"], file.parent)
        name = table["name"] if "name" in table else default_name(source, own_load.filename)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None
    return ModelSpec(
        name=name,
        source=source,
        load=own_load,
        options=own_options,
        aliases=tuple(table.get("aliases", ())),
        adapters=adapters,
        chat_template=_chat_template(where, file.parent, table.get("chat_template")),
    )


def _chat_template(where: str, folder: Path, name: str | None) -> str | None:
    if name is None:
        return None
    path = folder / expand(name)
    try:
        template = path.read_text(encoding="utf-8")
        ChatTemplate(template, f"{path}")  # Compiles it.
    except (OSError, ValueError) as error:
        raise ValueError(f"{where}: chat_template: {error}, expected a Jinja template") from None
    return template


def _replaced(where: str, options: ServeOptions, load: LoadOptions, found: Table) -> tuple[ServeOptions, LoadOptions]:
    """The options with some replaced. Errors name the place."""
    of_serve = {name: value for name, value in found.items() if name in _SERVE}
    for name, derived in (("cache_gb", "cache_bytes"), ("cache_dir_gb", "cache_dir_bytes")):
        if name in of_serve:
            of_serve[derived] = None
    try:
        return (
            dataclasses.replace(options, **of_serve),
            dataclasses.replace(load, **{name: value for name, value in found.items() if name in _LOAD}),
        )
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where}: {error}") from None


def _where(path: Path, number: int, table: Table) -> str:
    name = table.get("name") or table.get("source")
    return f"{path}: models[{number}]" + (f" ({name})" if isinstance(name, str) else "")


def _source(source: str, folder: Path) -> str:
    """A source whose path, if it is one, is relative to the folder of the file."""
    path = folder / expand(source)
    return str(path) if path.exists() or hub_name(source) is None else source


def _with_paths(table: Table, folder: Path) -> dict[str, Any]:
    """A table with its paths relative to the folder of the file."""
    metavars = {each.name: each.metadata.get("metavar") for each in dataclasses.fields(ServeOptions)}
    found = {}
    for name, value in table.items():
        if name == "draft":
            found[name] = _source(value, folder)
        else:
            found[name] = str(folder / expand(value)) if metavars.get(name) in _PATHS else value
    return found


# --- Checks -----------------------------------------------------------------------------------------------------------


def _check_keys(where: str, table: Table, known: Collection[str], more: Collection[str] = ()) -> None:
    for key in table:
        if key not in known:
            keys = sorted({*known, *more})
            near = difflib.get_close_matches(key, keys, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"expected one of {', '.join(keys)}"
            raise ValueError(f"{where}: found the unknown key {key!r}; {hint}")


def _check_values(where: str, table: Table, hints: Mapping[str, Any]) -> None:
    for key, value in table.items():
        if not _fits(value, hints[key]):
            raise ValueError(f"{where}: {key}: found {_shown(value)}, expected {_expected(hints[key])}")


def _hints() -> dict[str, Any]:
    """The types of all keys."""
    own = {
        "name": str,
        "source": str,
        "aliases": Sequence[str],
        "adapters": Mapping[str, str],
        "chat_template": str,
    }
    return {**typing.get_type_hints(LoadOptions), **typing.get_type_hints(ServeOptions), **own}


def _members(hint: Any) -> tuple[Any, ...]:
    """The types that a union has besides None; the type itself if it is not a union."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return tuple(each for each in typing.get_args(hint) if each is not type(None))
    return (hint,)


def _fits(value: Any, hint: Any) -> bool:
    for each in _members(hint):
        origin, arguments = typing.get_origin(each), typing.get_args(each)
        if origin is Literal:
            fits = isinstance(value, str) and value in arguments
        elif origin is Sequence:
            fits = isinstance(value, list) and all(_fits(item, arguments[0]) for item in value)
        elif origin is Mapping:
            fits = isinstance(value, dict) and all(_fits(item, arguments[1]) for item in value.values())
        elif each is float:
            fits = isinstance(value, int | float) and not isinstance(value, bool)
        else:
            fits = isinstance(value, each) and (each is bool or not isinstance(value, bool))
        if fits:
            return True
    return False


_NAMES = {int: "a whole number", float: "a number", str: "a string", bool: "true or false"}


def _expected(hint: Any) -> str:
    (first, *_) = _members(hint)
    origin, arguments = typing.get_origin(first), typing.get_args(first)
    if origin is Literal:
        return " or ".join(repr(value) for value in arguments)
    if origin is Mapping:
        return "a table of names and paths"
    return _NAMES.get(first, "a list of strings")


def _shown(value: Any) -> str:
    """A value for messages."""
    return f"{value!r:.100}"
