"""A model that a server offers: where it comes from, and how it is loaded and served."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from nybble.load_options import LoadOptions
from nybble.models import hub
from nybble.models.hub import DEFAULT_MODEL
from nybble.models.names import hub_name
from nybble.models.paths import expand
from nybble.server.options import ServeOptions


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """A model that a server offers."""

    name: str
    source: str | None
    """A path, a repository, or None for the default model."""
    load: LoadOptions
    options: ServeOptions
    """The options of the server, with those of this model."""
    aliases: tuple[str, ...] = ()
    adapters: Mapping[str, Path] = field(default_factory=dict)
    """The paths of its LoRA adapters by name."""
    chat_template: str | None = None
    """A chat template to use instead of the model's own."""
    is_named: bool = True
    """Whether the user has named the model, so its faults are those of the command. Otherwise a folder holds it."""

    @property
    def is_local(self) -> bool:
        """Whether the files are on this machine, and not in a repository on the Hub."""
        draft = self.options.draft
        return self.source is not None and is_path(self.source) and (draft is None or is_path(draft))


def is_path(source: str) -> bool:
    """Whether a source is a path, not a repository on the Hub.

    Raises:
        ValueError: It is a URL of something else.
    """
    return expand(source).exists() or hub_name(source) is None


def source_name(source: str | None, file: str) -> str:
    """The default name of a model: that of its repository, or else that of its file."""
    is_repository = source is not None and source.count("/") == 1 and not source.startswith((".", "/", "~"))
    if source is not None and is_repository and not source.endswith(".gguf") and not Path(source).exists():
        return source
    # Clients receive the name as JSON, which has no characters for bytes that are not UTF-8.
    return os.fsencode(file).decode("utf-8", "replace").removesuffix(".gguf")


def default_name(source: str | None, filename: str | None = None) -> str:
    """The default name of a model that has not been loaded.

    Args:
        source: The source of the model.
        filename: Which file of a folder it is.

    Raises:
        FileNotFoundError: There is no such file or folder.
        ModelError: A folder holds several models.
    """
    if source is None:
        return source_name(None, DEFAULT_MODEL.file)
    if not is_path(source) and (found := hub_name(source)) is not None:
        return source_name(source, found.repository)
    path = hub.resolve(source, filename=filename)
    return source_name(source, path.name or path.resolve().name)  # The path "." has no name.
