"""SVG plots without a library or script. Colors come from the style of the page."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

_WIDTH, _HEIGHT = 640, 300
_RIGHT, _TOP, _BOTTOM = 14, 12, 44
_TITLE, _DIGIT = 34, 7.5
"""Space for the title of the upward axis, and for each character of its numbers."""
_TICKS = 5
_LABEL_WIDTH, _LABEL_HEIGHT = 150, 14


@dataclass(frozen=True)
class Point:
    """A point of a plot, with the text of its tooltip."""

    x: float
    y: float
    text: str
    label: str = ""
    """Drawn next to the point."""
    marked: bool = False


@dataclass(frozen=True)
class Series:
    """Points of one color, with or without a line."""

    name: str
    points: Sequence[Point]
    line: bool = True
    dots: bool = True


@dataclass(frozen=True)
class Axis:
    """The title of an axis, and the format of its numbers."""

    title: str
    write: Callable[[float], str]
    from_zero: bool = True


def plot(series: Sequence[Series], x: Axis, y: Axis, title: str) -> Markup:
    """Draws all series, none of them empty."""
    points = [point for one in series for point in one.points]
    across = _ticks([point.x for point in points], x.from_zero)
    up = _ticks([point.y for point in points], y.from_zero)

    begin = _TITLE + _DIGIT * max(len(y.write(tick)) for tick in up)

    def at(value: float, ticks: Sequence[float], start: float, end: float) -> float:
        return start + (value - ticks[0]) / (ticks[-1] - ticks[0]) * (end - start)

    def left(value: float) -> str:
        return f"{at(value, across, begin, _WIDTH - _RIGHT):.1f}"

    def top(value: float) -> str:
        return f"{at(value, up, _HEIGHT - _BOTTOM, _TOP):.1f}"

    parts = [f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{escape(title)}">']
    for tick in up:
        parts.append(f'<line class="grid" x1="{begin:.1f}" x2="{_WIDTH - _RIGHT}" y1="{top(tick)}" y2="{top(tick)}"/>')
        parts.append(
            f'<text class="tick end" x="{begin - 8:.1f}" y="{top(tick)}" dy="0.35em">{escape(y.write(tick))}</text>'
        )
    for tick in across:
        parts.append(
            f'<text class="tick mid" x="{left(tick)}" y="{_HEIGHT - _BOTTOM + 18}">{escape(x.write(tick))}</text>'
        )
    parts.append(
        f'<text class="axis mid" x="{(begin + _WIDTH - _RIGHT) / 2:.1f}" y="{_HEIGHT - 6}">{escape(x.title)}</text>'
        f'<text class="axis mid" transform="translate(13 {(_TOP + _HEIGHT - _BOTTOM) / 2}) rotate(-90)">'
        f"{escape(y.title)}</text>"
    )
    for number, one in enumerate(series):
        parts.append(f'<g class="series s{number % 8}">')
        if one.line and len(one.points) > 1:
            line = " ".join(f"{left(point.x)},{top(point.y)}" for point in one.points)
            parts.append(f'<polyline points="{line}"/>')
        for point in one.points:
            centre = f'cx="{left(point.x)}" cy="{top(point.y)}"'
            if one.dots:
                kind = ' class="marked" r="6"' if point.marked else ' r="3"'
                parts.append(f"<circle{kind} {centre}><title>{escape(point.text)}</title></circle>")
        parts.append("</g>")
    labelled = [(float(left(point.x)), float(top(point.y)), point.label) for point in points if point.label]
    parts += [_label(x, y, text) for x, y, text in _apart(labelled)]
    parts.append("</svg>")
    # Every string was escaped above.
    return Markup("".join(parts))  # noqa: S704


def _label(x: float, y: float, text: str) -> str:
    """Draws a label next to a point, on the side with more space."""
    offset, anchor = (-10, "end") if x > _WIDTH * 0.7 else (10, "start")
    return f'<text class="label {anchor}" x="{x + offset:.1f}" y="{y:.1f}" dy="0.35em">{escape(text)}</text>'


def _apart(labels: Sequence[tuple[float, float, str]]) -> list[tuple[float, float, str]]:
    """Moves labels up where they would cover those below."""
    placed: list[tuple[float, float, str]] = []
    for x, y, text in sorted(labels, key=lambda label: -label[1]):
        near = [other for at, other, _ in placed if abs(at - x) < _LABEL_WIDTH]
        placed.append((x, min([y, *(other - _LABEL_HEIGHT for other in near if other - _LABEL_HEIGHT < y)]), text))
    return placed


def _ticks(values: Sequence[float], from_zero: bool) -> list[float]:
    """Returns at least two round numbers that enclose all values."""
    low, high = min(values), max(values)
    if from_zero:
        low = min(low, 0.0)
    if high - low < 1e-9 * max(abs(high), abs(low), 1e-9):
        spread = abs(high) * 0.05 or 1.0
        low, high = (low if from_zero else low - spread), high + spread
    rough = (high - low) / _TICKS
    unit = 10 ** math.floor(math.log10(rough))
    step = next(unit * factor for factor in (1, 2, 2.5, 5, 10) if unit * factor >= rough * 0.999)
    first, last = math.floor(low / step), math.ceil(high / step - 1e-9)
    return [i * step for i in range(first, max(last, first + 1) + 1)]
