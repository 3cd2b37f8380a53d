"""The interfaces that calibration and evaluation require of a loaded model. `nybble.Model` implements them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from nybble import _native as native_module
from nybble.load_options import LoadOptions

if TYPE_CHECKING:
    from nybble.tokenizer.tokenizer import Tokenizer


class Computes(Protocol):
    """A model that computes logits."""

    @property
    def _native(self) -> native_module.Model: ...


class Generates(Computes, Protocol):
    """A model with a tokenizer."""

    @property
    def tokenizer(self) -> Tokenizer: ...


class Info(Protocol):
    """The part of a model's `info` that evaluation reads."""

    @property
    def context(self) -> int: ...


class LoadedModel(Generates, Protocol):
    """A model that knows its context length."""

    @property
    def info(self) -> Info: ...


class SourceModel:
    """The model at a path, loaded without a progress bar."""

    def __init__(self, path: Path, quantize: str | None, threads: int | None) -> None:
        """Loads the model; `quantize` is that of `LoadOptions`."""
        self._native = native_module.Model.load(path, LoadOptions(quantize=quantize, threads=threads), None)


class SourceGenerator(SourceModel):
    """A model with its tokenizer."""

    def __init__(self, path: Path, tokenizer: Tokenizer, quantize: str | None, threads: int | None) -> None:
        """Loads the model and keeps the tokenizer."""
        super().__init__(path, quantize, threads)
        self.tokenizer = tokenizer
