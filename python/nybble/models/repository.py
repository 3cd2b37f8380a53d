"""Downloads models from the Hugging Face Hub, and takes them from the Hub's cache if the Hub is unreachable."""

from __future__ import annotations

import contextlib
import errno
import glob
import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from nybble.errors import ModelError
from nybble.models.files import TOKENIZER, TOKENIZER_FILES, choose, choose_checkpoint, sha256
from nybble.models.paths import snapshot_folder

if TYPE_CHECKING:
    from huggingface_hub.hf_api import RepoSibling

log: logging.Logger = logging.getLogger("nybble")

HUB_SECONDS = 10.0
"""How long the Hub may take to list a repository before the cache is used instead."""


class UnreachableError(Exception):
    """The Hub did not answer, or not with a valid answer."""


@contextlib.contextmanager
def hub_errors(repository: str, revision: str | None) -> Iterator[None]:
    """Turns errors of the Hub's client into Python's own, with advice for the user.

    Raises:
        PermissionError: The repository needs its terms accepted.
        FileNotFoundError: There is no such repository or revision.
        UnreachableError: The Hub cannot be reached.
    """
    from huggingface_hub import constants
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    try:
        yield
    except GatedRepoError as error:
        page = f"{constants.ENDPOINT}/{repository}"
        raise PermissionError(errno.EACCES, f"accept its terms at {page} and set HF_TOKEN", repository) from error
    except RevisionNotFoundError as error:
        raise FileNotFoundError(errno.ENOENT, f"the repository has no revision {revision!r}", repository) from error
    except RepositoryNotFoundError as error:
        reason = (
            f"no such file or folder, and no such repository at {constants.ENDPOINT} (a private one needs HF_TOKEN)"
        )
        raise FileNotFoundError(errno.ENOENT, reason, repository) from error
    except Exception as error:  # The client's error for a broken connection depends on its HTTP library.
        if isinstance(error, OSError) and error.errno is not None:
            raise  # An error of the disk, not of the Hub.
        raise UnreachableError(f"{constants.ENDPOINT} cannot be reached: {one_line(error)}") from error


def download(repository: str, filename: str | None, revision: str | None, only_tokenizer: bool) -> Path:
    """The file or folder of a model in the Hub's cache, downloaded if needed. See `nybble.models.hub.resolve`.

    The Hub is asked for the current files of the repository. If it is unreachable, the cached copy is used.
    """
    from huggingface_hub import HfApi, constants

    where = f"repository {repository}"
    if constants.HF_HUB_OFFLINE:
        return _cached(repository, filename, revision, only_tokenizer, "HF_HUB_OFFLINE is set")
    try:
        with hub_errors(repository, revision):
            api = HfApi(library_name="nybble")
            info = api.model_info(repository, revision=revision, timeout=HUB_SECONDS, files_metadata=True)
    except UnreachableError as error:
        return _cached(repository, filename, revision, only_tokenizer, str(error))
    files = {file.rfilename: _HubFile.of(file) for file in info.siblings or ()}
    for_tokenizer = only_tokenizer and filename is None and TOKENIZER in files
    chosen = [name for name in files if name in TOKENIZER_FILES] if for_tokenizer else choose(files, filename, where)
    as_folder = for_tokenizer or not chosen
    chosen = chosen or choose_checkpoint(files, where)
    snapshot = snapshot_folder(repository, info.sha)
    if missing := [name for name in chosen if not files[name].is_complete(snapshot / name)]:
        snapshot = _fetch(repository, revision, snapshot, {name: files[name] for name in missing}, where)
    return snapshot if as_folder else snapshot / chosen[0]


@dataclass(frozen=True)
class _HubFile:
    """The Hub's description of a file. It has a hash for large files only."""

    size: int | None
    sha256: str | None

    @classmethod
    def of(cls, file: RepoSibling) -> _HubFile:
        return cls(file.size, file.lfs.sha256 if file.lfs is not None else None)

    def is_complete(self, path: Path) -> bool:
        """Whether the file exists in its full length. Hashing it each time would take longer than loading it."""
        return path.is_file() and self.size in (None, path.stat().st_size)


def _fetch(repository: str, revision: str | None, snapshot: Path, files: Mapping[str, _HubFile], where: str) -> Path:
    """Downloads files that are missing or have a wrong length, and verifies their hashes. Returns the snapshot."""
    from huggingface_hub import snapshot_download

    for name in files:
        _discard(snapshot / name)
    patterns = [glob.escape(name) for name in files]
    for attempt in range(2):
        try:
            with hub_errors(repository, revision):
                fetched = snapshot_download(
                    repository, revision=revision, allow_patterns=patterns, library_name="nybble"
                )
        except UnreachableError as error:
            raise ConnectionError(f"{where}: {next(iter(files))}: download failed: {error}") from error
        except OSError as error:
            if error.filename is not None or error.errno is None:
                raise
            # The error of a full disk does not name the file.
            left = next((name for name in files if not (snapshot / name).is_file()), "")
            raise OSError(error.errno, error.strerror, str(snapshot / left)) from error
        wrong = ""
        for path, file in ((Path(fetched) / name, file) for name, file in files.items()):
            if file.sha256 is not None and (found := sha256(path)) != file.sha256:
                wrong = f"{path}: found SHA-256 {found}, expected {file.sha256}"
                _discard(path)  # Or the next call would use it as the cached model.
        if not wrong:
            break
        log.warning("%s; removed%s", wrong, "" if attempt else ", downloading it again")
    else:
        raise ModelError(f"{wrong}; the file was removed")
    return Path(fetched)


def _discard(path: Path) -> None:
    """Removes a file from the Hub's cache: the link in the snapshot, and its target."""
    from huggingface_hub import constants

    target = path.resolve()
    if target.is_relative_to(Path(constants.HF_HUB_CACHE).resolve()):
        target.unlink(missing_ok=True)
    path.unlink(missing_ok=True)


def _cached(repository: str, filename: str | None, revision: str | None, only_tokenizer: bool, reason: str) -> Path:
    """The file or folder of a model from the Hub's cache alone."""
    from huggingface_hub import constants

    snapshot = snapshot_folder(repository, revision or constants.DEFAULT_REVISION)
    names = [file.relative_to(snapshot).as_posix() for file in snapshot.rglob("*.gguf")]
    for_tokenizer = only_tokenizer and filename is None and (snapshot / TOKENIZER).is_file()
    is_checkpoint = not names and filename is None and any(snapshot.glob("*.safetensors"))
    if not names and not for_tokenizer and not is_checkpoint:
        raise ConnectionError(f"repository {repository}: {reason}, and {constants.HF_HUB_CACHE} holds no copy")
    log.info("%s; using the cached copy of %s", reason, repository)
    as_folder = for_tokenizer or is_checkpoint
    return snapshot if as_folder else snapshot / choose(names, filename, f"cached repository {repository}")[0]


def one_line(error: BaseException) -> str:
    """The message of an error on one line."""
    return " ".join(str(error).split()) or type(error).__name__
