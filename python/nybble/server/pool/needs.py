"""What a model takes in memory, from the headers of its files, before it is loaded."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from nybble import _native, memory
from nybble.load_options import LoadOptions
from nybble.models import hub
from nybble.progress import Progress
from nybble.server.pool.spec import ModelSpec

PAGE_TOKENS = 64
"""Tokens of a page of the KV cache."""
_DEFAULT_CACHE_BYTES = 1 << 30
"""The default size of a KV cache where the memory has no known limit."""
_FREE_SHARE = 0.9
"""The part of the free memory that models may take by default. Tokenizers, buffers and Python take some, too."""
_ADAPTER_FACTOR = 2
"""Adapters are F32 in memory, and files hold them as F16."""


@dataclass(frozen=True)
class Limits:
    """How much the models of a pool may take together."""

    max_bytes: int | None = None
    """None for no limit."""
    max_loaded: int | None = None
    models: int = 1
    """The number of models, which share the memory."""

    @classmethod
    def of(cls, max_bytes: int | None, max_loaded: int | None, models: int) -> Limits:
        """The limits that were asked for; by default nine tenths of the memory that is free now."""
        if max_bytes is None and (available := memory.available_bytes()) is not None:
            max_bytes = int(available * _FREE_SHARE)
        return cls(max_bytes, max_loaded, models)

    @property
    def share(self) -> int | None:
        """The memory of each model if the largest number of models is loaded."""
        if self.max_bytes is None:
            return None
        return self.max_bytes // max(1, min(self.models, self.max_loaded or self.models))


@dataclass(frozen=True)
class Needs:
    """What a model takes in memory."""

    family: str
    parameters: int
    context: int
    weight_bytes: int
    """The weights, at most, with those of a draft model."""
    cache_bytes: int
    """The largest size of the KV cache."""

    @property
    def total_bytes(self) -> int:
        """All of it."""
        return self.weight_bytes + self.cache_bytes

    def described(self) -> str:
        """The figures for messages."""
        parts = f"{size(self.weight_bytes)} of weights and {size(self.cache_bytes)} of KV cache"
        return f"{size(self.total_bytes)} ({parts}, for a context of {self.context:,} tokens)"


class CacheShape(Protocol):
    """What a model's KV cache takes."""

    @property
    def cache_bytes_per_token(self) -> int: ...
    @property
    def state_bytes(self) -> int: ...


@dataclass(frozen=True)
class _Header:
    """What the headers of a model's files say, as `_native.model_needs` returns it."""

    family: str
    parameters: int
    context: int
    weight_bytes: int
    cache_bytes: int
    cache_bytes_per_token: int
    state_bytes: int


def least_cache_bytes(shape: CacheShape) -> int:
    """The least size of a KV cache: a page, and the states of recurrent layers."""
    # A model of recurrent layers alone takes nothing per token. A step computes its states in a second buffer.
    return PAGE_TOKENS * shape.cache_bytes_per_token + 2 * shape.state_bytes


def check_cache_bytes(cache_bytes: int, shape: CacheShape) -> None:
    """Refuses a KV cache that is smaller than a page.

    Raises:
        ValueError: The cache is smaller than a page.
    """
    if cache_bytes < (least := least_cache_bytes(shape)):
        expected = f"at least {least / 1e9:.3g} for {PAGE_TOKENS} tokens"
        raise ValueError(f"cache_gb: found {cache_bytes / 1e9:g}, expected {expected}")


def read_needs(spec: ModelSpec, limits: Limits, progress: Progress = False) -> Needs:
    """What a model takes in memory. Downloads it first if it is not on this machine.

    Raises:
        Exception: As `Model.load` does.
    """
    header = _header(spec.source, spec.load, progress)
    weight_bytes = header.weight_bytes
    if spec.options.draft is not None:
        draft = _header(spec.options.draft, spec.load.for_draft(), progress)
        weight_bytes += draft.weight_bytes + draft.cache_bytes
    cache_bytes = spec.options.cache_bytes
    if cache_bytes is None:
        cache_bytes = _default_cache_bytes(header, weight_bytes, limits)
    else:
        check_cache_bytes(cache_bytes, header)
    return Needs(header.family, header.parameters, header.context, weight_bytes, cache_bytes)


def check_fits(name: str, needs: Needs, adapter_bytes: int, limits: Limits) -> None:
    """Refuses a model that does not fit even alone.

    Raises:
        ValueError: The model does not fit.
    """
    if limits.max_bytes is not None and needs.total_bytes + adapter_bytes > limits.max_bytes:
        more = f", and {size(adapter_bytes)} for adapters" if adapter_bytes else ""
        raise ValueError(
            f"max_memory: the model {name!r} needs {needs.described()}{more}, but models may take "
            f"{size(limits.max_bytes)}; a smaller context or KV cache needs less"
        )


def adapter_bytes(path: Path) -> int:
    """What a LoRA adapter takes in memory, about. 0 if nothing is there, which loading it complains about."""
    files = [path] if path.is_file() else [each for each in path.glob("*") if each.is_file()]
    weights = [file for file in files if file.suffix in (".gguf", ".safetensors", ".bin")]
    return _ADAPTER_FACTOR * sum(file.stat().st_size for file in weights)


def _default_cache_bytes(header: _Header, weight_bytes: int, limits: Limits) -> int:
    """Half of what the model's share of the memory leaves, and at least a full context, if that fits at all."""
    if limits.max_bytes is None or limits.share is None:
        return max(header.cache_bytes, _DEFAULT_CACHE_BYTES)
    whole_context = min(header.cache_bytes, limits.max_bytes - weight_bytes)
    return max(whole_context, (limits.share - weight_bytes) // 2, least_cache_bytes(header))


def _header(source: str | None, load: LoadOptions, progress: Progress) -> _Header:
    file = hub.resolve(source, filename=load.filename, revision=load.revision, progress=progress)
    return _Header(**_native.model_needs(file, dataclasses.replace(load, filename=None, revision=None)))


def size(nbytes: int) -> str:
    """A size for messages."""
    for unit, factor in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if nbytes >= factor:
            return f"{nbytes / factor:.3g} {unit}"
    return f"{nbytes} bytes"
