"""The compiled half of nybble: files, models, and one step of generation. Private; `nybble.Model` is the way in."""

import os
from collections.abc import Callable
from collections.abc import Sequence as _Sequence
from typing import Any, final

import numpy as np
import numpy.typing as npt

from nybble.sampling import SamplingOptions

__all__ = [
    "Baseline",
    "Constraint",
    "GgufFile",
    "Model",
    "Sampled",
    "Scheduler",
    "SentencePiece",
    "Sequence",
    "Session",
    "TensorInfo",
    "Vocabulary",
    "__version__",
    "available_bytes",
    "convert",
    "default_threads",
    "kernels",
    "panic_for_tests",
    "perplexity",
    "quantize",
]
__version__: str

def kernels() -> list[str]: ...
def available_bytes() -> int | None: ...
def panic_for_tests(words: str) -> None: ...
def convert(
    source: str | os.PathLike[str],
    out: str | os.PathLike[str],
    type: str,
    progress: Callable[[int, int], object] | None = None,
) -> None: ...
def quantize(
    source: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    recipe: str = "gptq",
    grid: str = "q4_0",
    group: int = 32,
    windows: npt.NDArray[np.int32] | None = None,
    evaluation: npt.NDArray[np.int32] | None = None,
    output_type: str = "q8_0",
    keep: _Sequence[tuple[str, str]] = ...,
    bits_per_weight: float | None = None,
    target: float | None = None,
    budget_seconds: float | None = None,
    search: bool = True,
    seed: int = 0,
    threads: int | None = None,
    force: bool = False,
    progress: Callable[[str, int, int], object] | None = None,
) -> str: ...
def default_threads() -> int: ...

@final
class TensorInfo:
    @property
    def name(self) -> str: ...
    @property
    def type(self) -> str: ...
    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def offset(self) -> int: ...
    @property
    def nbytes(self) -> int: ...

@final
class GgufFile:
    def __new__(cls, path: str | os.PathLike[str], mmap: bool = True) -> GgufFile: ...
    @property
    def metadata(self) -> dict[str, Any]: ...
    @property
    def tensors(self) -> list[TensorInfo]: ...

@final
class SentencePiece:
    def __new__(
        cls,
        tokens: list[str],
        scores: _Sequence[float],
        kinds: _Sequence[int],
        *,
        add_space_prefix: bool,
        unknown: int | None = None,
        drop_space_after: _Sequence[int] = ...,
    ) -> SentencePiece: ...
    def encode(self, text: str, parse_special: bool) -> list[int]: ...

@final
class Sampled:
    @property
    def id(self) -> int: ...
    @property
    def logprob(self) -> float | None: ...
    @property
    def top(self) -> list[tuple[int, float]]: ...

@final
class Sequence: ...

@final
class Constraint: ...

@final
class Vocabulary:
    def __new__(cls, tokens: _Sequence[bytes], ends: _Sequence[int]) -> Vocabulary: ...
    def constraint(self, kind: str, text: str) -> Constraint: ...

@final
class Session:
    def __new__(cls, model: Model) -> Session: ...
    @staticmethod
    def of(sequence: Sequence) -> Session: ...
    @staticmethod
    def load(model: Model, path: str | os.PathLike[str]) -> tuple[Session, list[int]]: ...
    def save(self, model: Model, tokens: _Sequence[int], path: str | os.PathLike[str]) -> None: ...
    def prefix(self, len: int) -> Session: ...
    def resume(
        self, model: Model, tokens: _Sequence[int], options: SamplingOptions, constraint: Constraint | None = None
    ) -> Sequence: ...
    def __len__(self) -> int: ...

@final
class Model:
    @staticmethod
    def load(
        path: str | os.PathLike[str],
        kernel: str | None = None,
        threads: int | None = None,
        context: int | None = None,
        quantize: str = "auto",
        cache_type: str | None = None,
        mmap: bool = True,
        progress: Callable[[int, int], object] | None = None,
    ) -> Model: ...
    def sequence(
        self, prompt: _Sequence[int], options: SamplingOptions, constraint: Constraint | None = None
    ) -> Sequence: ...
    def step(self, sequences: _Sequence[Sequence]) -> list[Sampled]: ...
    def logits(self, ids: _Sequence[int]) -> npt.NDArray[np.float32]: ...
    def hidden_states(self, ids: _Sequence[int]) -> npt.NDArray[np.float32]: ...
    def info(self) -> dict[str, Any]: ...
    def machine_limits(self) -> tuple[float, float]: ...

@final
class Scheduler:
    def __new__(
        cls,
        model: Model,
        *,
        draft: Model | None = None,
        max_batch: int = 16,
        cache_bytes: int | None = None,
        prefix_cache: bool = True,
        prefill_chunk: int | None = None,
        speculation: str = "off",
    ) -> Scheduler: ...
    def submit(self, sequence: Sequence, limit: int) -> int: ...
    def cancel(self, id: int) -> bool: ...
    def step(self, signals: bool) -> list[tuple[int, Sampled | Exception, int]]: ...
    def interrupt(self) -> None: ...
    def stats(self) -> dict[str, int]: ...

@final
class Baseline:
    def __new__(
        cls, model: Model, windows: npt.NDArray[np.int32], progress: Callable[[int, int], object] | None = None
    ) -> Baseline: ...
    def compare(self, model: Model, progress: Callable[[int, int], object] | None = None) -> dict[str, Any]: ...

def perplexity(
    model: Model, windows: npt.NDArray[np.int32], progress: Callable[[int, int], object] | None = None
) -> dict[str, Any]: ...
