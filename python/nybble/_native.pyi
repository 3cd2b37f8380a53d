"""The compiled half of nybble: files, models, sampling and scheduling. Private: use `nybble.Model`."""

import os
from collections.abc import Callable, Mapping
from collections.abc import Sequence as _Sequence
from typing import Any, Protocol, final

import numpy as np
import numpy.typing as npt

from nybble.engine_options import EngineOptions
from nybble.load_options import LoadOptions
from nybble.sampling import SamplingOptions

__all__ = [
    "Constraint",
    "GgufFile",
    "Model",
    "Reference",
    "Sampled",
    "Scheduler",
    "SentencePiece",
    "Sequence",
    "Session",
    "TensorInfo",
    "Vocabulary",
    "__version__",
    "available_bytes",
    "check_output",
    "convert",
    "default_threads",
    "kernels",
    "perplexity",
    "quantize",
    "write_file",
]
__version__: str

def kernels() -> list[str]: ...
def available_bytes() -> int | None: ...
def check_output(
    path: str | os.PathLike[str], sources: _Sequence[str | os.PathLike[str]], is_working: bool = False
) -> None: ...
def write_file(path: str | os.PathLike[str], data: bytes, sources: _Sequence[str | os.PathLike[str]]) -> None: ...
def convert(
    source: str | os.PathLike[str],
    out: str | os.PathLike[str],
    type: str,
    progress: Callable[[int, int], object] | None = None,
) -> None: ...

class _QuantizeOptions(Protocol):
    @property
    def recipe(self) -> str: ...
    @property
    def search(self) -> bool: ...
    @property
    def block_format(self) -> str: ...
    @property
    def group_size(self) -> int: ...
    @property
    def bits_per_weight(self) -> float | None: ...
    @property
    def output_type(self) -> str: ...
    @property
    def keep(self) -> Mapping[str, str] | None: ...
    @property
    def target(self) -> float | None: ...
    @property
    def budget(self) -> float | None: ...
    @property
    def seed(self) -> int: ...
    @property
    def threads(self) -> int | None: ...
    @property
    def force(self) -> bool: ...

def quantize(
    source: str | os.PathLike[str],
    out: str | os.PathLike[str],
    options: _QuantizeOptions,
    *,
    windows: npt.NDArray[np.int32] | None = None,
    evaluation: npt.NDArray[np.int32] | None = None,
    progress: Callable[[str, int, int], object] | None = None,
    read: _Sequence[str | os.PathLike[str]] = ...,
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
    def prefix(self, len: int) -> Session: ...
    def __len__(self) -> int: ...

@final
class Model:
    @staticmethod
    def load(
        path: str | os.PathLike[str],
        options: LoadOptions,
        progress: Callable[[int, int], object] | None = None,
    ) -> Model: ...
    def sequence(
        self,
        tokens: _Sequence[int],
        options: SamplingOptions,
        constraint: Constraint | None = None,
        session: Session | None = None,
        excluded: _Sequence[tuple[int, int]] = (),
    ) -> Sequence: ...
    def session(self) -> Session: ...
    def save_session(self, session: Session, tokens: _Sequence[int], path: str | os.PathLike[str]) -> None: ...
    def load_session(self, path: str | os.PathLike[str]) -> tuple[Session, list[int]]: ...
    def step(self, sequences: _Sequence[Sequence]) -> list[Sampled]: ...
    def logits(self, ids: _Sequence[int]) -> npt.NDArray[np.float32]: ...
    def hidden_states(self, ids: _Sequence[int]) -> npt.NDArray[np.float32]: ...
    def info(self) -> dict[str, Any]: ...
    def machine_limits(self) -> tuple[float, float]: ...

@final
class Scheduler:
    def __new__(cls, model: Model, options: EngineOptions, draft: Model | None = None) -> Scheduler: ...
    def submit(self, sequence: Sequence, limit: int) -> int: ...
    def cancel(self, id: int) -> Session | None: ...
    def session(self, id: int) -> Session | None: ...
    def step(self, signals: bool) -> list[tuple[int, Sampled | Exception, int, Session | None]]: ...
    def interrupt(self) -> None: ...
    def stats(self) -> dict[str, int]: ...

@final
class Reference:
    def __new__(
        cls, model: Model, windows: npt.NDArray[np.int32], progress: Callable[[int, int], object] | None = None
    ) -> Reference: ...
    def compare(self, model: Model, progress: Callable[[int, int], object] | None = None) -> dict[str, Any]: ...

def perplexity(
    model: Model, windows: npt.NDArray[np.int32], progress: Callable[[int, int], object] | None = None
) -> dict[str, Any]: ...
