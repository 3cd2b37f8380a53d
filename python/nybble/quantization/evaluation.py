"""Perplexity of a model on a text and its divergence from a reference, defined as in llama.cpp's perplexity tool."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from nybble import _native
from nybble.progress import Progress, counts
from nybble.quantization import datasets

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from nybble.quantization.loaded import Computes, LoadedModel

WINDOW = 512
"""Tokens per window by default. The second half of each window is scored."""

Documents = str | os.PathLike[str] | Sequence[str]
"""The path of a file (prose, or JSONL with one document per line), or a list of documents."""

_TITLES = {
    "perplexity": "perplexity",
    "reference_perplexity": "perplexity of the reference",
    "perplexity_ratio": "ratio",
    "kl_mean": "KL divergence, mean",
    "kl_median": "KL divergence, median",
    "kl_p99": "KL divergence, 99th percentile",
    "top_agreement": "same top token",
}
"""The figures that a notebook shows."""


@dataclass(frozen=True)
class Evaluation:
    """The figures of an evaluation. Each `_error` is the standard error of the figure before it.

    Figures that compare with a reference are None without one.
    """

    tokens: int
    """Scored tokens: the last `n - 1 - n // 2` of each window of `n`."""
    perplexity: float
    perplexity_error: float
    reference_perplexity: float | None = None
    reference_perplexity_error: float | None = None
    perplexity_ratio: float | None = None
    """The perplexity divided by that of the reference."""
    perplexity_ratio_error: float | None = None
    kl_mean: float | None = None
    """Mean Kullback-Leibler divergence of the model's distribution from that of the reference, in nats per token."""
    kl_mean_error: float | None = None
    kl_median: float | None = None
    kl_p90: float | None = None
    kl_p99: float | None = None
    kl_max: float | None = None
    top_agreement: float | None = None
    """Share of positions at which both models predict the same token."""
    top_agreement_error: float | None = None
    rms_dp: float | None = None
    """Root mean square difference of the probabilities of the token that follows."""
    rms_dp_error: float | None = None
    kl_by_position: tuple[float, ...] | None = None
    """Mean divergence at each scored position of a window, in nats."""

    def _repr_html_(self) -> str:
        """The figures in a notebook."""
        from nybble.quantization.html_table import html_table

        rows = {"tokens scored": f"{self.tokens:,}"}
        for name, title in _TITLES.items():
            value, error = getattr(self, name), getattr(self, f"{name}_error", None)
            if value is not None:
                rows[title] = f"{value:.6g}" + ("" if error is None else f" ± {error:.2g}")
        return html_table(rows)


class Reference:
    """The predictions of a model on a text, with which other models are compared. The model may be closed afterwards.

    A temporary file holds them: about two bytes per scored token and vocabulary entry.
    """

    def __init__(
        self,
        model: LoadedModel,
        text: Documents,
        *,
        window: int = WINDOW,
        max_tokens: int | None = None,
        progress: Progress = None,
    ) -> None:
        """Records the predictions of a model on a text.

        Args:
            model: The reference.
            text: A file or a list of documents.
            window: Tokens per window.
            max_tokens: Use at most this many tokens of the text.
            progress: As in `evaluate`.

        Raises:
            Exception: As `evaluate` does.
        """
        self._record(model, _windows(model, text, window, max_tokens), progress)

    @classmethod
    def of_windows(cls, model: Computes, windows: npt.NDArray[np.int32], *, progress: Progress = None) -> Reference:
        """Records the predictions of a model on token ids of shape `(windows, window)`."""
        reference = cls.__new__(cls)
        reference._record(model, windows, progress)
        return reference

    def _record(self, model: Computes, windows: npt.NDArray[np.int32], progress: Progress) -> None:
        self._shape = windows.shape
        with counts(progress, "evaluating the reference") as report:
            self._native = _native.Reference(model._native, windows, report)

    def compare(self, model: Computes, *, progress: Progress = None) -> Evaluation:
        """Evaluates another model on the same tokens. `progress` is that of `evaluate`.

        Raises:
            ValueError: The vocabularies differ.
        """
        with counts(progress, "evaluating") as report:
            return _evaluation(self._native.compare(model._native, report))

    def __repr__(self) -> str:
        return f"<Reference of {self._shape[0]} windows of {self._shape[1]} tokens>"


def evaluate(
    model: LoadedModel,
    text: Documents,
    *,
    reference: LoadedModel | None = None,
    window: int = WINDOW,
    max_tokens: int | None = None,
    progress: Progress = None,
) -> Evaluation:
    """Measures the perplexity of a model on a text and, with a reference, its divergence from it.

    The text is cut into windows. Each is a separate sequence, and its second half is scored.

    Args:
        model: The model to measure.
        text: The path of a file, or a list of documents.
        reference: A model with the same vocabulary, such as the same model in full precision.
        window: Tokens per window.
        max_tokens: Use at most this many tokens of the text.
        progress: None draws a progress bar on a terminal or in a notebook if it takes more than a second, True always
            reports, False never. A function is called with the number of windows that are done, and the total; first
            for the reference.

    Raises:
        FileNotFoundError, PermissionError: The text cannot be read.
        ModelError: The text does not fill a window, or the model computes NaN.
        ValueError: The window has fewer than 4 tokens or more than the model's context, or the vocabularies differ.

    Example:
        ```python
        with Model.load("model.gguf") as model, Model.load("model-f16.gguf") as full:
            print(evaluate(model, "prose.txt", reference=full).kl_mean)
        ```
    """
    if reference is not None:
        recorded = Reference(reference, text, window=window, max_tokens=max_tokens, progress=progress)
        return recorded.compare(model, progress=progress)
    cut = _windows(model, text, window, max_tokens)
    with counts(progress, "evaluating") as report:
        return _evaluation(_native.perplexity(model._native, cut, report))


def _windows(model: LoadedModel, text: Documents, window: int, max_tokens: int | None) -> datasets.Windows:
    if window < 4:
        raise ValueError(f"window: found {window}, expected at least 4 tokens")
    if window > model.info.context:
        raise ValueError(f"window: found {window}, expected at most {model.info.context}, the context of the model")
    documents, what = datasets.as_documents(text)
    return datasets.windows(model.tokenizer, documents, window, max_tokens, what)


def _evaluation(figures: dict[str, float | int | list[float]]) -> Evaluation:
    if "kl_by_position" in figures:
        figures = {**figures, "kl_by_position": tuple(figures["kl_by_position"])}  # type: ignore[arg-type, dict-item]
    return Evaluation(**figures)  # type: ignore[arg-type]
