"""Reads the names that models have elsewhere: URLs of the Hub, and repositories with the name of a quantization."""

from __future__ import annotations

import re
from dataclasses import dataclass
from urllib.parse import unquote, urlsplit

_PART = r"[A-Za-z0-9][\w.-]*"
_REPOSITORY = re.compile(rf"(?P<repository>{_PART}/{_PART})(?::(?P<tag>[\w.-]+))?")
_HUB = re.compile(r"(?:https?://)?(?:www\.)?(?:huggingface\.co|hf\.co)/", re.IGNORECASE)
_VIEWS = ("tree", "blob", "resolve", "raw")


@dataclass(frozen=True)
class HubName:
    """A repository on the Hub, and what its name says about file and revision."""

    repository: str
    filename: str | None = None
    """A name or a pattern."""
    revision: str | None = None


def hub_name(source: str) -> HubName | None:
    """The repository that a name stands for; None for other names.

    The forms are `organization/name`, with `hf.co/` or the Hub's URL before it, and with a quantization behind it, as
    llama.cpp and Ollama write it (`organization/name:Q4_K_M`). The URL of a file or a branch names that, too.

    Raises:
        ValueError: The name is a URL of something else.
    """
    path = _HUB.sub("", source, count=1)
    if path == source:
        if "://" in source:
            raise ValueError(
                f"source: found the URL {source!r}, expected a path, or a repository on the Hub as organization/name"
            )
        return _repository(source)
    path = unquote(urlsplit(path).path).strip("/")
    repository, *view = re.split(rf"/(?=(?:{'|'.join(_VIEWS)})/)", path, maxsplit=1)
    if (found := _repository(repository)) is None:
        raise ValueError(
            f"source: found {source!r}, expected the URL of a repository on the Hub, as in "
            "https://huggingface.co/organization/name"
        )
    if not view:
        return found
    _, revision, *file = view[0].split("/", 2)
    return HubName(found.repository, file[0] if file and file[0] else found.filename, revision)


def _repository(name: str) -> HubName | None:
    if (match := _REPOSITORY.fullmatch(name)) is None:
        return None
    tag = match["tag"]
    # Between separators, so that F16 is not BF16.
    return HubName(match["repository"], None if tag in (None, "latest") else f"*[-._/]{tag}[-./]*")
