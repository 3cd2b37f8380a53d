"""What a quantization did and cost: as values, as JSON, and as one page of HTML."""

from __future__ import annotations

import dataclasses
import json
import os
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class TensorReport:
    """What became of one matrix."""

    name: str
    type: str
    group: int
    """Weights that share a scale."""
    recipe: str
    """How its codes were found; "encoded" for types that leave no choice."""
    relative_error: float | None
    """Error of the layer's outputs, relative to them; None where it was not measured."""
    seconds: float


@dataclass(frozen=True)
class Candidate:
    """One attempt, and how far it is from the source."""

    recipe: str
    format: str
    group: int
    size_bytes: int
    perplexity: float | None
    kl_mean: float | None
    kl_median: float | None
    kl_p99: float | None
    top_agreement: float | None
    seconds: float
    chosen: bool


@dataclass(frozen=True)
class Report:
    """What a quantization did and cost."""

    source: Path
    out: Path
    recipe: str
    size_bytes: int
    bits_per_weight: float
    """Average over the linear layers, scales included."""
    seconds: float
    tensors: tuple[TensorReport, ...]
    chosen_because: str | None = None
    candidates: tuple[Candidate, ...] = ()
    """All attempts in the order in which they were made; none where nothing was measured."""
    reference_perplexity: float | None = None
    """The source's own."""
    kl_by_position: tuple[float, ...] = ()
    """The mean divergence of the file at each scored position of a window."""

    @property
    def chosen(self) -> Candidate | None:
        """The attempt that became the file; None where nothing was measured."""
        return next((candidate for candidate in self.candidates if candidate.chosen), None)

    @classmethod
    def from_json(cls, text: str) -> Report:
        """Reads what `to_json` wrote. Keys that are not known are passed over."""
        value = json.loads(text)
        reference = value.get("reference") or {}
        # Candidates that differ in nothing else have the usual format of the file's layers.
        usual = {"format": _usual(value["tensors"], "type", "").lower(), "group": _usual(value["tensors"], "group", 32)}
        return cls(
            source=Path(value["source"]),
            out=Path(value["out"]),
            recipe=value["recipe"],
            size_bytes=value["size_bytes"],
            bits_per_weight=value["bits_per_weight"],
            seconds=value["seconds"],
            tensors=tuple(_read(TensorReport, tensor) for tensor in value["tensors"]),
            chosen_because=value.get("chosen_because"),
            candidates=tuple(_read(Candidate, {**usual, **candidate}) for candidate in value.get("candidates") or ()),
            reference_perplexity=reference.get("perplexity"),
            kl_by_position=tuple(value.get("kl_by_position") or ()),
        )

    def to_json(self, *, indent: int | None = None) -> str:
        """Everything, as one JSON object."""
        value = dataclasses.asdict(self)
        value["source"], value["out"] = str(self.source), str(self.out)
        value["reference"] = {"perplexity": value.pop("reference_perplexity")}
        return json.dumps(value, indent=indent)

    def to_html(self) -> str:
        """Everything as a page with plots, which needs no other file."""
        from nybble.quantization import report_page

        return report_page.render(self)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the page to `path`, or JSON where its name ends in `.json`."""
        path = Path(path)
        text = self.to_json(indent=1) if path.suffix.lower() == ".json" else self.to_html()
        path.write_text(text, encoding="utf-8")


def _usual(tensors: list[dict[str, Any]], key: str, default: Any) -> Any:
    """The commonest value among the matrices whose codes a recipe found."""
    found = Counter(tensor[key] for tensor in tensors if tensor["relative_error"] is not None)
    return found.most_common(1)[0][0] if found else default


def _read(kind: type[Any], value: dict[str, Any]) -> Any:
    names = {field.name for field in dataclasses.fields(kind)}
    return kind(**{name: item for name, item in value.items() if name in names})
