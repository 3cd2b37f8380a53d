"""Perplexity of a model on a text and its divergence from a reference, defined as in llama.cpp's perplexity tool."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from nybble import _native
from nybble.quantization import datasets

if TYPE_CHECKING:
    from nybble.quantization.loaded import Computes, LoadedModel

WINDOW = 512
"""Tokens per window by default. The second half of each window is scored."""

Documents = str | os.PathLike[str] | Sequence[str]
"""The path of a file (prose, or JSONL with one document per line), or a list of documents."""
WindowProgress = Callable[[int, int], object]
"""Called with the number of windows that are done, and the total."""


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
        progress: WindowProgress | None = None,
    ) -> None:
        """Records the predictions of a model on a text.

        Args:
            model: The reference.
            text: A file or a list of documents.
            window: Tokens per window.
            max_tokens: Use at most this many tokens of the text.
            progress: Called with the number of windows that are done, and the total.

        Raises:
            Exception: As `evaluate` does.
        """
        self._native = _native.Reference(model._native, _windows(model, text, window, max_tokens), progress)

    @classmethod
    def of_windows(
        cls, model: Computes, windows: datasets.Windows, *, progress: WindowProgress | None = None
    ) -> Reference:
        """Records the predictions of a model on token ids of shape `(windows, window)`."""
        reference = cls.__new__(cls)
        reference._native = _native.Reference(model._native, windows, progress)
        return reference

    def compare(self, model: Computes, *, progress: WindowProgress | None = None) -> Evaluation:
        """Evaluates another model on the same tokens.

        Raises:
            ValueError: The vocabularies differ.
        """
        return _evaluation(self._native.compare(model._native, progress))


def evaluate(
    model: LoadedModel,
    text: Documents,
    *,
    reference: LoadedModel | None = None,
    window: int = WINDOW,
    max_tokens: int | None = None,
    progress: WindowProgress | None = None,
) -> Evaluation:
    """Measures the perplexity of a model on a text and, with a reference, its divergence from it.

    The text is cut into windows. Each is a separate sequence, and its second half is scored.

    Args:
        model: The model to measure.
        text: The path of a file, or a list of documents.
        reference: A model with the same vocabulary, such as the same model in full precision.
        window: Tokens per window.
        max_tokens: Use at most this many tokens of the text.
        progress: Called with the number of windows that are done, and the total; first for the reference.

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
    return _evaluation(_native.perplexity(model._native, cut, progress))


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
