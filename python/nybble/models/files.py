"""Chooses the files of a model among the files of a folder or repository."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

from nybble.errors import ModelError

T = TypeVar("T")

TOKENIZER = "tokenizer.json"
TOKENIZER_FILES = (
    TOKENIZER,
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
    "config.json",
)
_OLDER_FILES = ("vocab.json", "merges.txt", "tokenizer.model", "added_tokens.json")
"""Vocabularies of repositories without `tokenizer.json`."""
_PACKING_FILES = ("quantize_config.json", "quant_config.json")
"""What AutoGPTQ and AutoAWQ wrote before `config.json` had it."""
_SHARD = re.compile(r"(?P<stem>.*)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf", re.IGNORECASE)
_PICKLES = (".bin", ".pt", ".pth", ".pkl")
_PROJECTOR = re.compile(r"(?:^|[-_.])mmproj(?:[-_.]|$)", re.IGNORECASE)
_IMATRIX = re.compile(r"(?:^|[-_.])imatrix(?:[-_.]|$)", re.IGNORECASE)
_QUANTIZATION = re.compile(r"(?:^|[-_.])(?:I?Q\d|TQ\d|MXFP\d|B?F16|F32)", re.IGNORECASE)


def is_companion(name: str) -> bool:
    """Whether the name of a GGUF file is that of something else than a model.

    This can be a projector of images, an importance matrix, or what macOS writes next to a file.
    """
    name = name.rpartition("/")[2]
    is_imatrix = _IMATRIX.search(name) is not None and _QUANTIZATION.search(name) is None
    return name.startswith(".") or is_imatrix or _PROJECTOR.search(name) is not None


def group_shards(files: Iterable[tuple[str, T]]) -> Mapping[str, list[T]]:
    """Groups GGUF files by model: the shards of a split model belong together, under the name of the first shard."""
    models: dict[str, list[T]] = {}
    for name, file in files:
        if name.lower().endswith(".gguf"):
            shard = _SHARD.fullmatch(name)
            model = f"{shard['stem']}-00001-of-{shard['count']}.gguf" if shard else name
            models.setdefault(model, []).append(file)
    return models


def choose(
    names: Iterable[str], pattern: str | None, where: str, is_model: Callable[[str], bool] = lambda _: True
) -> Sequence[str]:
    """Chooses the one GGUF model among file names.

    Args:
        names: The names of all files.
        pattern: A name or a pattern that a file of the model matches; None if there is only one model.
        where: The folder or repository, for errors.
        is_model: Whether the file of a name is a model; asked if there are several.

    Returns:
        The shards of the model in order; empty if there is no GGUF file and no pattern.

    Raises:
        ModelError: Several models match, or none matches `pattern`, or a shard is missing.
    """
    models = group_shards((name, name) for name in sorted(names))
    matching = [
        shards for shards in models.values() if pattern is None or any(_matches(name, pattern) for name in shards)
    ]
    # A companion is chosen only by its own name.
    others = [shards for shards in matching if not is_companion(shards[0])]
    if others or pattern is None:
        matching = others
    if len(matching) > 1:
        matching = [shards for shards in matching if is_model(shards[0])] or matching
    if len(matching) > 1 or (pattern is not None and not matching):
        problem = f"{len(matching)} models match" if matching else "no GGUF file matches"
        wanted = "" if pattern is None else f" filename={pattern!r}"
        listed = ", ".join(shards[0] for shards in (matching or models.values())) or "none"
        hint = "" if pattern else '; choose one with filename=, for example filename="*Q4_K_M.gguf"'
        raise ModelError(f"{where}: {problem}{wanted} (GGUF files: {listed}){hint}")
    if not matching:
        return ()
    (shards,) = matching
    if (first := _SHARD.fullmatch(shards[0])) and len(shards) != int(first["count"]):
        numbers = {match["number"] for name in shards if (match := _SHARD.fullmatch(name))}
        missing = [i for i in range(1, int(first["count"]) + 1) if f"{i:05}" not in numbers]
        raise ModelError(
            f"{where}: {shards[0]}: found {len(shards)} of {first['count']} shards; the first missing one is number "
            f"{missing[0]:05}"
        )
    return shards


def choose_checkpoint(names: Iterable[str], where: str) -> list[str]:
    """Chooses the files of a safetensors checkpoint: weights, their index, configuration and tokenizer.

    Raises:
        ModelError: There is no such checkpoint.
    """
    top = [name for name in names if "/" not in name]
    weights = [name for name in top if name.endswith((".safetensors", ".safetensors.index.json"))]
    if weights and "config.json" in top:
        small = {*TOKENIZER_FILES, *_PACKING_FILES, *(() if TOKENIZER in top else _OLDER_FILES)}
        return weights + [name for name in top if name in small]
    if pickles := [name for name in top if name.endswith(_PICKLES)]:
        raise ModelError(
            f"{where}: the weights are only in {pickles[0]}, a pickle, which can run any code when it is opened; "
            "expected GGUF or safetensors"
        )
    raise ModelError(f"{where}: found no GGUF file and no safetensors checkpoint")


def _matches(name: str, pattern: str) -> bool:
    name, pattern = name.lower(), pattern.lower()
    return any(fnmatch.fnmatchcase(form, pattern) for form in (name, f"/{name}", name.rpartition("/")[2]))


def sha256(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    import hashlib

    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()
