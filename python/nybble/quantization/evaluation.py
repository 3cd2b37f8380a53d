"""How well a model predicts a text, and how far it is from another one, as llama.cpp's perplexity tool defines it."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from nybble import _native
from nybble.quantization import datasets

if TYPE_CHECKING:
    from nybble.model import Model

WINDOW = 512
"""Tokens that are read together, unless told otherwise; the second half of them is scored."""

Texts = str | os.PathLike[str] | Sequence[str]
"""The path of a file (prose, or JSONL with a document a line), or the texts themselves."""
Progress = Callable[[int, int], object]


@dataclass(frozen=True)
class Evaluation:
    """What was measured. Each `_error` is the standard error of the figure before it.

    The figures that compare with a reference are None where there was none.
    """

    tokens: int
    """Tokens that were scored: of each window of `n` the last `n - 1 - n // 2`."""
    perplexity: float
    perplexity_error: float
    reference_perplexity: float | None = None
    reference_perplexity_error: float | None = None
    perplexity_ratio: float | None = None
    """The perplexity divided by the reference's."""
    perplexity_ratio_error: float | None = None
    kl_mean: float | None = None
    """The Kullback-Leibler divergence from the reference's distribution to the model's, in nats: the mean a token."""
    kl_mean_error: float | None = None
    kl_median: float | None = None
    kl_p90: float | None = None
    kl_p99: float | None = None
    kl_max: float | None = None
    top_agreement: float | None = None
    """The share of tokens for which both models think the same one likeliest."""
    top_agreement_error: float | None = None
    rms_dp: float | None = None
    """The root mean square of the difference between the probabilities that both give the token that comes."""
    rms_dp_error: float | None = None
    kl_by_position: tuple[float, ...] | None = None
    """The mean divergence at each scored position of a window."""


class Reference:
    """What a model makes of a text, to compare others with. The model may be closed afterwards.

    It is kept in a temporary file: about two bytes for each token of the vocabulary and each token that is scored.
    """

    def __init__(
        self,
        model: Model,
        text: Texts,
        *,
        window: int = WINDOW,
        max_tokens: int | None = None,
        progress: Progress | None = None,
    ) -> None:
        """Has a model read a text.

        Args:
            model: the reference.
            text: what to read.
            window: tokens that are read together.
            max_tokens: read only so many.
            progress: called with how many windows are read, and how many there are.
        """
        self._native = _native.Baseline(model._native, _windows(model, text, window, max_tokens), progress)

    @classmethod
    def of_windows(cls, model: Model, windows: datasets.Windows, *, progress: Progress | None = None) -> Reference:
        """Has a model read token ids, `(windows, window)`."""
        reference = cls.__new__(cls)
        reference._native = _native.Baseline(model._native, windows, progress)
        return reference

    def compare(self, model: Model, *, progress: Progress | None = None) -> Evaluation:
        """Has another model of the same vocabulary read the same tokens."""
        return _evaluation(self._native.compare(model._native, progress))


def evaluate(
    model: Model,
    text: Texts,
    *,
    reference: Model | None = None,
    window: int = WINDOW,
    max_tokens: int | None = None,
    progress: Progress | None = None,
) -> Evaluation:
    """Measures how well a model predicts a text, and how far it is from a reference.

    The text is cut into windows, each is read by itself, and its second half is scored.

    Args:
        model: what to measure.
        text: a file's path, or texts.
        reference: a model of the same vocabulary, such as the same one in full precision.
        window: tokens that are read together.
        max_tokens: read only so many.
        progress: called with how many windows are read, and how many there are; the reference reads first.

    Raises:
        FileNotFoundError, PermissionError: the text cannot be read.
        ModelError: the text does not fill a window, or what the model computes is NaN.
        ValueError: the window is below 4 tokens or beyond the model's context, or the vocabularies differ.
    """
    if reference is not None:
        recorded = Reference(reference, text, window=window, max_tokens=max_tokens, progress=progress)
        return recorded.compare(model, progress=progress)
    cut = _windows(model, text, window, max_tokens)
    return _evaluation(_native.perplexity(model._native, cut, progress))


def _windows(model: Model, text: Texts, window: int, max_tokens: int | None) -> datasets.Windows:
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
