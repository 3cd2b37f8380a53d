"""The values of a quantization report."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class TensorReport:
    """How one matrix was quantized."""

    name: str
    type: str
    group: int
    """Weights that share a scale."""
    recipe: str
    """How the codes were chosen; "encoded" for types that leave no choice."""
    relative_error: float | None
    """Relative squared error of the layer's outputs, or of its weights without calibration; None if encoded."""
    seconds: float
    note: str | None = None
    """Why it is stored in another type than was asked for."""


@dataclass(frozen=True)
class Candidate:
    """A recipe that was tried, and how far its output is from the source."""

    recipe: str
    format: str
    group: int
    size_bytes: int
    perplexity: float | None
    kl_mean: float | None
    """Mean Kullback-Leibler divergence from the source, in nats per token; likewise the median and 99th percentile."""
    kl_median: float | None
    kl_p99: float | None
    top_agreement: float | None
    """Share of positions at which both models predict the same token."""
    seconds: float
    chosen: bool


@dataclass(frozen=True)
class Pruning:
    """The experts that were left out, and what that costs before quantization."""

    before: int
    """Experts of a layer of the source."""
    after: int
    """Experts of a layer of the output."""
    left_out: float
    """The share of the experts that tokens chose which are left out."""
    kl_mean: float
    """Mean Kullback-Leibler divergence from the source, in nats per token of the calibration text."""
    perplexity_ratio: float
    """Perplexity on that text, divided by that of the source."""
    top_agreement: float
    """Share of positions at which both predict the same token."""


@dataclass(frozen=True)
class TaskScore:
    """A figure of the output and of its source in a task of lm-evaluation-harness."""

    task: str
    """The name of the task, or of a group of tasks."""
    metric: str
    """The name of the figure, such as "acc" or "exact_match (strict-match)", by which the answers were filtered."""
    samples: int | None
    """The number of documents; None if the harness does not say."""
    source: float
    source_error: float | None
    """The standard error of the source's figure; None if the harness computes none."""
    value: float
    """The figure of the output."""
    error: float | None
    """Its standard error."""
    higher_is_better: bool | None
    """Whether a larger figure is better; None if the task does not say."""


@dataclass(frozen=True)
class ReportData:
    """The values of a report."""

    source: Path
    out: Path
    recipe: str
    size_bytes: int
    bits_per_weight: float
    """Mean over the linear layers, scales included."""
    seconds: float
    tensors: tuple[TensorReport, ...]
    chosen_because: str | None = None
    candidates: tuple[Candidate, ...] = ()
    """All recipes that were tried, in order; empty if nothing was measured."""
    reference_perplexity: float | None = None
    """The perplexity of the source."""
    kl_by_position: tuple[float, ...] = ()
    """Mean divergence of the output at each scored position of a window, in nats."""
    sparsity: float = 0.0
    """Share of zeros among the weights of linear layers."""
    experts: int = 0
    """Experts that tokens choose among, over all layers, in a run with calibration."""
    experts_unreached: int = 0
    """Those of them that no token of the calibration text reached."""
    experts_rounded: int = 0
    """Those that too few tokens reached to calibrate them. The unreached ones are among them."""
    pruning: Pruning | None = None
    """The experts that were left out, with `prune_experts`."""
    tasks: tuple[TaskScore, ...] = ()
    """The figures of the tasks that were asked for, in order."""

    @property
    def chosen(self) -> Candidate | None:
        """The candidate that became the output; None if nothing was measured."""
        return next((candidate for candidate in self.candidates if candidate.chosen), None)
