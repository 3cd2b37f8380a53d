"""`ModelInfo`: properties of a loaded model. `ExpertUse`: what its tokens chose. `kernels`: instruction sets."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from nybble import memory


@dataclass(frozen=True)
class ModelInfo:
    """Properties of a loaded model."""

    file: Path
    name: str
    """The model's name in the file; may be empty."""
    family: str
    parameters: int
    """Number of weights in matrices."""
    layers: int
    hidden_size: int
    vocabulary: int
    context: int
    """Number of tokens that fit, prompt and completion together."""
    kernel: str
    threads: int
    pooling: Literal["mean", "cls", "last"]
    """How `Model.embed` pools by default: as the file says, otherwise "mean"."""
    weight_bytes: int
    """Bytes of the packed weights in memory."""
    bytes_per_token: int
    """Bytes of weights that decoding one token reads. Memory bandwidth divided by this bounds the decoding speed."""
    cache_type: str
    """Type of the KV cache: "f16", "int8" or "f32"."""
    cache_bytes_per_token: int
    """Bytes of KV cache per token. Tokens outside of a window take less."""
    cache_bytes: int
    """Bytes of KV cache and recurrent states of a sequence that fills the context. A shorter sequence takes less.

    A step of a model with recurrent states takes more for a moment: a copy of the states, and vectors of up to 16 rows.
    """
    state_bytes: int = 0
    """Bytes of the recurrent states of a sequence, whatever its length. 0 for models of attention alone."""
    embedding_size: int = 0
    """Numbers of an embedding: `hidden_size`, or the width of the last dense module."""
    labels: tuple[str, ...] = ()
    """Names of the scores of `Model.classify`; empty for a model without a classification head."""
    generates: bool = True
    """Whether the model generates text. Models for embeddings and classification do not."""
    mtp: bool = False
    """Whether the model has a head for multi-token prediction, which `speculation="mtp"` drafts with."""

    @property
    def resident_bytes(self) -> int | None:
        """Memory that this process holds now, all models included. None if the system does not report it."""
        return memory.resident_bytes()

    @property
    def peak_resident_bytes(self) -> int | None:
        """Most memory that this process has held so far. None if the system does not report it."""
        return memory.peak_resident_bytes()

    @property
    def huge_page_bytes(self) -> int | None:
        """Memory of this process that lies on huge pages, all models included. None if the system does not report it.

        Linux only. Weights and large caches ask for huge pages, which speed up decoding; the system may refuse them.
        """
        return memory.huge_page_bytes()


@dataclass(frozen=True)
class ExpertUse:
    """What tokens have chosen of the experts of a model so far."""

    needed: int
    """Experts that steps needed; each counts once per layer and step. 0 if all experts are in memory."""
    read: int
    """Experts of these that were not in memory and were read from the file."""
    weight_shares: tuple[tuple[int, ...], ...]
    """For each layer with experts: how many of the chosen ones have which weight.

    Weights are shares of the largest one of the token. The first hundred numbers count those of 0 to 1, 1 to 2, ...
    hundredths, the last one those that are the largest. Empty unless the model has `LoadOptions.expert_skip`.
    """
    chosen: tuple[tuple[int, ...], ...]
    """For each layer with experts: how many tokens chose each expert, also where it was left out.

    Empty unless the model has `LoadOptions.expert_skip`.
    """

    def below(self, ratio: float) -> float:
        """Returns the share of chosen experts that `expert_skip=ratio` leaves out, in steps of 0.01.

        Raises:
            ValueError: The model does not count weights, or nothing was computed yet.
        """
        total = sum(map(sum, self.weight_shares))
        if total == 0:
            raise ValueError("expert_use: found no counts, expected a model with expert_skip that has computed tokens")
        return sum(sum(layer[: round(100 * ratio)]) for layer in self.weight_shares) / total


def kernels() -> list[str]:
    """Returns the instruction sets that this CPU can compute with, best first, for `LoadOptions.kernel`."""
    from nybble import _native

    return _native.kernels()
