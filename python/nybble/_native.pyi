"""The compiled half of nybble: files, models, and one step of generation. Private; `nybble.Model` is the way in."""

import os
from collections.abc import Callable
from collections.abc import Sequence as _Sequence
from typing import Any, final

import numpy as np
import numpy.typing as npt

from nybble.sampling import SamplingOptions

__version__: str

def kernels() -> list[str]: ...
def default_threads() -> int: ...
def machine_limits(threads: int) -> tuple[float, float]: ...

@final
class TensorInfo:
    name: str
    type: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int

@final
class GgufFile:
    def __new__(cls, path: str | os.PathLike[str]) -> GgufFile: ...
    metadata: dict[str, Any]
    tensors: list[TensorInfo]

@final
class Sampled:
    id: int
    logprob: float | None
    top: list[tuple[int, float]]

@final
class Sequence:
    position: int

@final
class Model:
    @staticmethod
    def load(
        path: str | os.PathLike[str],
        kernel: str | None = None,
        threads: int | None = None,
        context: int | None = None,
        progress: Callable[[int, int], object] | None = None,
    ) -> Model: ...
    def sequence(self, prompt: _Sequence[int], options: SamplingOptions) -> Sequence: ...
    def step(self, sequences: _Sequence[Sequence]) -> list[Sampled]: ...
    def logits(self, ids: _Sequence[int]) -> npt.NDArray[np.float32]: ...
    def info(self) -> dict[str, Any]: ...
