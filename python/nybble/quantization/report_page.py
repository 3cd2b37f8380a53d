"""The HTML page of a report, with figures, plots and tables."""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Sequence
from importlib import resources
from typing import Any

from markupsafe import Markup

from nybble._native import __version__
from nybble.quantization.report_data import Candidate, ReportData
from nybble.quantization.report_plots import Axis, Point, Series, plot

_LAYER = re.compile(r"blk\.(\d+)\.(.+?)(?:\.weight)?$")
_BINS = 32
"""The positions of a window are averaged in this many bins, because single ones vary too much."""


def render(report: ReportData) -> str:
    """Returns the report as one HTML page."""
    import jinja2

    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters.update(size=size, number=number, percent=percent, score=score, duration=duration)
    template = environment.from_string(
        resources.files("nybble.quantization").joinpath("data/report.html.j2").read_text(encoding="utf-8")
    )
    errors = _errors(report)
    chosen = report.chosen
    return template.render(
        report=report,
        chosen=chosen,
        version=__version__,
        ratio=_ratio(report, chosen),
        errors=_error_plot(errors) if errors else None,
        legend=list(errors),
        positions=_position_plot(report.kl_by_position) if report.kl_by_position else None,
        candidates=_candidate_plot(report.candidates) if len(report.candidates) > 1 else None,
        worst=_worst(report),
        matrices=matrices(report),
    )


def _errors(report: ReportData) -> dict[str, list[Point]]:
    """Returns the points of the error plot by kind of matrix, one per layer."""
    kinds: dict[str, list[Point]] = defaultdict(list)
    for tensor in report.tensors:
        found = _LAYER.match(tensor.name)
        if found and tensor.relative_error is not None and math.isfinite(tensor.relative_error):
            text = f"{tensor.name}: {percent(tensor.relative_error)} ({tensor.type}, {tensor.recipe})"
            kinds[found[2]].append(Point(int(found[1]), 100 * tensor.relative_error, text))
    return {kind: sorted(points, key=lambda point: point.x) for kind, points in kinds.items()}


def _error_plot(kinds: dict[str, list[Point]]) -> Markup:
    series = [Series(kind, points) for kind, points in kinds.items()]
    y = Axis("relative error, %", _tick)
    return plot(series, Axis("layer", _tick), y, "Relative error of each layer's matrices")


def _position_plot(values: Sequence[float]) -> Markup:
    length = max(1, math.ceil(len(values) / _BINS))
    start = len(values) + 2  # The positions after the first half are scored: `n - 1 - n // 2` of `n`.
    points = []
    for first in range(0, len(values), length):
        piece = values[first : first + length]
        mean = sum(piece) / len(piece)
        text = f"positions {start + first} to {start + first + len(piece) - 1}: {number(mean)}"
        points.append(Point(start + first + (len(piece) - 1) / 2, mean, text))
    series = [Series("divergence", points)]
    x = Axis("position in the window", lambda value: f"{value:.0f}", from_zero=False)
    return plot(series, x, Axis("mean KL, nats", _tick), "Mean divergence by position")


def _candidate_plot(candidates: Sequence[Candidate]) -> Markup:
    points = [
        Point(
            candidate.size_bytes / 1e6,
            candidate.kl_mean,
            f"{_name(candidate)}: {size(candidate.size_bytes)}, mean KL {number(candidate.kl_mean)}",
            label=_name(candidate),
            marked=candidate.chosen,
        )
        for candidate in candidates
        if candidate.kl_mean is not None
    ]
    series = [Series("candidates", points, line=False)]
    x = Axis("size of the file, MB", lambda value: f"{value:g}", from_zero=False)
    return plot(series, x, Axis("mean KL, nats", _tick), "Size against quality")


def _name(candidate: Candidate) -> str:
    group = "rows" if candidate.group == 0 else f"g{candidate.group}"
    return f"{candidate.recipe} {candidate.format} {group}"


def _ratio(report: ReportData, chosen: Candidate | None) -> float | None:
    if chosen is None or chosen.perplexity is None or not report.reference_perplexity:
        return None
    return chosen.perplexity / report.reference_perplexity - 1


def _worst(report: ReportData) -> list[str]:
    """Returns the names of the three matrices with the largest errors."""
    known = [tensor for tensor in report.tensors if tensor.relative_error is not None]
    return [tensor.name for tensor in sorted(known, key=lambda tensor: -(tensor.relative_error or 0))[:3]]


def matrices(report: ReportData) -> list[str]:
    """Returns the number of matrices of each type and group, in the order of the file."""
    found: dict[str, int] = defaultdict(int)
    for tensor in report.tensors:
        # The group size is a choice for quantized matrices only.
        groups = f" in groups of {tensor.group}" if tensor.relative_error is not None else ""
        found[f"{tensor.type}{groups}"] += 1
    return [f"{count} {'matrix' if count == 1 else 'matrices'} of {kind}" for kind, count in found.items()]


def number(value: Any, digits: int = 3) -> str:
    """Formats a number with that many significant digits, without an exponent."""
    if value is None:
        return "–"
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    return f"{value:,.{max(0, digits - 1 - math.floor(math.log10(abs(value))))}f}"


def _tick(value: float) -> str:
    text = number(value)
    return text.rstrip("0").rstrip(".") if "." in text else text


def score(value: float, error: float | None = None) -> str:
    """Formats a figure of a task with its standard error, such as "0.412 ± 0.014"."""
    return f"{value:.4g}" if error is None else f"{value:.4g} ± {error:.2g}"


def percent(value: float | None) -> str:
    """Formats 0.0123 as "1.23%"."""
    return "–" if value is None else f"{number(100 * value)}%"


def size(count: int) -> str:
    """Formats 98362432 as "98.4 MB"."""
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"


def duration(seconds: float) -> str:
    """Formats 75 as "1 min 15 s"."""
    if seconds < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 10:
        return f"{minutes} min {rest} s"
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"
