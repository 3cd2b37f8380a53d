"""Downloads models from the Hugging Face Hub, and takes them from the Hub's cache if the Hub is unreachable."""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from nybble.errors import ModelError
from nybble.models.fetching import Report, hub_download
from nybble.models.files import TOKENIZER, choose, sha256
from nybble.models.hub_client import HUB_SECONDS, UnreachableError, ask, log
from nybble.models.listing import Chosen, HubFile, Listing, choose_files
from nybble.models.paths import hub_cache, repository_folder, snapshot_folder


def download(
    repository: str, filename: str | None, revision: str | None, only_tokenizer: bool, report: Report | None = None
) -> Path:
    """The file or folder of a model in the Hub's cache, downloaded if needed. See `nybble.models.hub.resolve`.

    The Hub is asked for the current files of the repository. If it is unreachable, or the download fails, the cached
    copy is used if it is whole.
    """
    from huggingface_hub import HfApi, constants

    where = f"repository {repository}"
    if constants.HF_HUB_OFFLINE:
        return _cached(repository, filename, revision, only_tokenizer, "HF_HUB_OFFLINE is set")
    api = HfApi(library_name="nybble")
    try:
        info = ask(
            repository,
            revision,
            lambda: api.model_info(repository, revision=revision, timeout=HUB_SECONDS, files_metadata=True),
        )
    except UnreachableError as error:
        return _cached(repository, filename, revision, only_tokenizer, str(error))
    files = {file.rfilename: HubFile.of(file) for file in info.siblings or ()}
    listing = Listing(revision or constants.DEFAULT_REVISION, files)
    chosen = choose_files(list(files), filename, only_tokenizer, where)
    commit = str(info.sha)
    snapshot = snapshot_folder(repository, commit)
    if missing := listing.missing(chosen, snapshot):
        listing.keep(snapshot)  # Before the download, which may end at any time.
        try:
            sizes = [files[name].size or 0 for name in missing]
            for number, name in enumerate(missing):
                fetch = functools.partial(
                    hub_download, repository, commit, name, report, sum(sizes[:number]), sum(sizes)
                )
                _fetch(repository, commit, name, snapshot / name, files[name].sha256, fetch)
        except ConnectionError as error:
            with contextlib.suppress(ConnectionError, ModelError):
                return _cached(repository, filename, revision, only_tokenizer, str(error))
            raise
    listing.keep(snapshot)
    _set_reference(repository, listing.revision, commit)
    return chosen.path(snapshot)


def _fetch(repository: str, commit: str, name: str, path: Path, expected: str | None, fetch: Callable[[], str]) -> None:
    """Downloads a file that is missing or has a wrong length, and verifies its hash.

    Raises:
        ConnectionError: The Hub cannot be reached.
        ModelError: The file has arrived damaged twice.
    """
    discard(path)
    wrong = ""
    for attempt in range(2):
        try:
            ask(repository, commit, fetch, name)
        except UnreachableError as error:
            raise ConnectionError(f"repository {repository}: {name}: download failed: {error}") from error
        except OSError as error:
            if error.filename is not None or error.errno is None:
                raise
            # The error of a full disk does not name the file.
            raise OSError(error.errno, error.strerror, str(path)) from error
        if expected is None or (found := sha256(path)) == expected:
            return
        wrong = f"{path}: found SHA-256 {found}, expected {expected}"
        discard(path)  # Or the next call would use it as the cached model.
        log.warning("%s; removed%s", wrong, "" if attempt else ", downloading it again")
    raise ModelError(f"{wrong}; the file was removed")


def _set_reference(repository: str, revision: str, commit: str) -> None:
    """Makes a whole snapshot the cached copy of a branch or tag. Before, an older one is."""
    if revision == commit:
        return
    reference = repository_folder(repository) / "refs" / revision
    with contextlib.suppress(OSError):  # A cache that cannot be written may still be read.
        if reference.is_file() and reference.read_text().strip() == commit:
            return
        reference.parent.mkdir(parents=True, exist_ok=True)
        unfinished = reference.with_name(f"{reference.name}.{os.getpid()}")
        unfinished.write_text(commit)
        unfinished.replace(reference)


def discard(path: Path) -> None:
    """Removes a file from the Hub's cache: the link in the snapshot, and its target."""
    target = path.resolve()
    if target.is_relative_to(hub_cache().resolve()):
        target.unlink(missing_ok=True)
    path.unlink(missing_ok=True)


def _cached(repository: str, filename: str | None, revision: str | None, only_tokenizer: bool, reason: str) -> Path:
    """The file or folder of a model from the Hub's cache alone, if it is whole.

    Raises:
        ConnectionError: There is no copy, or only a part of one.
    """
    where = f"cached repository {repository}"
    missing: list[str] = []
    for snapshot in _snapshots(repository, revision):
        if (listing := Listing.read(snapshot)) is None:
            chosen = _unlisted(snapshot, filename, only_tokenizer, where)
        else:
            chosen = choose_files(list(listing.files), filename, only_tokenizer, where)
            if lacking := listing.missing(chosen, snapshot):
                missing = missing or lacking
                continue
        if chosen is not None:
            log.info("%s; using the cached copy of %s", reason, repository)
            return chosen.path(snapshot)
    if missing:
        names = ", ".join(missing[:5]) + (f" and {len(missing) - 5} more" if len(missing) > 5 else "")
        raise ConnectionError(f"repository {repository}: {reason}, and the copy in {hub_cache()} lacks {names}")
    raise ConnectionError(f"repository {repository}: {reason}, and {hub_cache()} holds no copy")


def _snapshots(repository: str, revision: str | None) -> Iterator[Path]:
    """The cached snapshots of a revision: the current one, then older ones of the same branch, newest first."""
    from huggingface_hub import constants

    wanted = revision or constants.DEFAULT_REVISION
    current = snapshot_folder(repository, wanted)
    yield current
    folder = repository_folder(repository) / "snapshots"
    others = [path for path in folder.glob("*") if path != current and path.is_dir()]
    for path in sorted(others, key=lambda path: path.stat().st_mtime, reverse=True):
        listing = Listing.read(path)
        if listing is not None and listing.revision == wanted:
            yield path


def _unlisted(snapshot: Path, filename: str | None, only_tokenizer: bool, where: str) -> Chosen | None:
    """The files of a snapshot that another program has fetched, without a list of what it should hold."""
    names: Sequence[str] = [
        file.relative_to(snapshot).as_posix() for file in snapshot.rglob("*.gguf") if file.is_file()
    ]
    for_tokenizer = only_tokenizer and filename is None and (snapshot / TOKENIZER).is_file()
    chosen = choose(names, filename, where) if names and not for_tokenizer else ()
    if for_tokenizer or (not chosen and filename is None and any(snapshot.glob("*.safetensors"))):
        return Chosen([], is_folder=True)
    return Chosen(chosen, is_folder=False) if chosen else None
