"""The Hub's list of a revision's files, kept next to the snapshot, so that a part is not taken for the whole."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nybble.models.files import TOKENIZER, TOKENIZER_FILES, choose, choose_checkpoint

if TYPE_CHECKING:
    from huggingface_hub.hf_api import RepoSibling


@dataclass(frozen=True)
class HubFile:
    """The Hub's description of a file. It has a hash for large files only."""

    size: int | None
    sha256: str | None

    @classmethod
    def of(cls, file: RepoSibling) -> HubFile:
        """The description in an answer of the Hub."""
        return cls(file.size, file.lfs.sha256 if file.lfs is not None else None)

    def is_complete(self, path: Path) -> bool:
        """Whether the file exists in its full length. Hashing it each time would take longer than loading it."""
        return path.is_file() and self.size in (None, path.stat().st_size)


@dataclass(frozen=True)
class Chosen:
    """The files of a model in a repository."""

    names: Sequence[str]
    is_folder: bool
    """Whether the model is the folder of the files, not the first of them."""

    def path(self, snapshot: Path) -> Path:
        """The model in a snapshot."""
        return snapshot if self.is_folder else snapshot / self.names[0]


def choose_files(names: Sequence[str], filename: str | None, only_tokenizer: bool, where: str) -> Chosen:
    """The files to take from a repository with these files.

    Raises:
        ModelError: There is no model, or several match.
    """
    if only_tokenizer and filename is None and TOKENIZER in names:
        return Chosen([name for name in names if name in TOKENIZER_FILES], is_folder=True)
    if chosen := choose(names, filename, where):
        return Chosen(chosen, is_folder=False)
    return Chosen(choose_checkpoint(names, where), is_folder=True)


@dataclass(frozen=True)
class Listing:
    """The files of a revision of a repository."""

    revision: str
    """The branch or tag that was asked for, or the commit."""
    files: Mapping[str, HubFile]

    def missing(self, chosen: Chosen, snapshot: Path) -> list[str]:
        """The files of a model that a snapshot lacks, or has in another length."""
        return [name for name in chosen.names if not self.files[name].is_complete(snapshot / name)]

    def keep(self, snapshot: Path) -> None:
        """Writes the list. A cache that cannot be written keeps none."""
        from nybble import _native

        file = _file(snapshot)
        files = {name: [each.size, each.sha256] for name, each in self.files.items()}
        data = json.dumps({"revision": self.revision, "files": files}).encode()
        with contextlib.suppress(OSError):
            if not file.is_file() or file.read_bytes() != data:
                file.parent.mkdir(parents=True, exist_ok=True)
                _native.write_file(file, data, [])

    @classmethod
    def read(cls, snapshot: Path) -> Listing | None:
        """The list of a snapshot; None if there is none, or a damaged one."""
        try:
            value: Any = json.loads(_file(snapshot).read_bytes())
            files = {str(name): HubFile(size, sha256) for name, (size, sha256) in value["files"].items()}
            return cls(str(value["revision"]), files)
        except (OSError, ValueError, TypeError, KeyError, AttributeError):
            return None


def _file(snapshot: Path) -> Path:
    return snapshot.parent.parent / "nybble" / f"{snapshot.name}.json"
