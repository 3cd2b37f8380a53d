"""The report of a quantization: values, JSON, and an HTML page."""

from __future__ import annotations

import dataclasses
import json
import os
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nybble import _native
from nybble.quantization.report_data import Candidate, Pruning, ReportData, TaskScore, TensorReport

__all__ = ["Candidate", "Report", "TensorReport"]


@dataclass(frozen=True)
class Report(ReportData):
    """The report of a quantization.

    Example:
        ```python
        report = nybble.quantize("org/model", "model.gguf", measure=True)
        print(report.bits_per_weight, report.chosen.kl_mean)
        report.save("model.html")
        ```
    """

    @classmethod
    def from_json(cls, text: str) -> Report:
        """Reads the output of `to_json`. Unknown keys are ignored."""
        value = json.loads(text)
        reference = value.get("reference") or {}
        # Older reports do not give the format of candidates: it is that of most layers.
        default = {
            "format": _most_common(value["tensors"], "type", "").lower(),
            "group": _most_common(value["tensors"], "group", 32),
        }
        return cls(
            source=Path(value["source"]),
            out=Path(value["out"]),
            recipe=value["recipe"],
            size_bytes=value["size_bytes"],
            bits_per_weight=value["bits_per_weight"],
            seconds=value["seconds"],
            tensors=tuple(_read(TensorReport, tensor) for tensor in value["tensors"]),
            chosen_because=value.get("chosen_because"),
            candidates=tuple(_read(Candidate, {**default, **candidate}) for candidate in value.get("candidates") or ()),
            reference_perplexity=reference.get("perplexity"),
            kl_by_position=tuple(value.get("kl_by_position") or ()),
            sparsity=value.get("sparsity", 0.0),
            experts=value.get("experts", 0),
            experts_unreached=value.get("experts_unreached", 0),
            experts_rounded=value.get("experts_rounded", 0),
            pruning=_read(Pruning, value["pruning"]) if value.get("pruning") else None,
            tasks=tuple(_read(TaskScore, score) for score in value.get("tasks") or ()),
        )

    def to_json(self, *, indent: int | None = None) -> str:
        """Returns the report as one JSON object."""
        value = dataclasses.asdict(self)
        value["source"], value["out"] = str(self.source), str(self.out)
        value["reference"] = {"perplexity": value.pop("reference_perplexity")}
        return json.dumps(value, indent=indent)

    def to_html(self) -> str:
        """Returns the report as an HTML page with plots that needs no other file."""
        from nybble.quantization.report_page import render

        return render(self)

    def _repr_html_(self) -> str:
        """The summary in a notebook. `to_html` has the plots and all matrices."""
        from nybble.quantization.html_table import html_table, report_rows

        return html_table(report_rows(self))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the HTML page to `path`, or JSON if its name ends in `.json`.

        Raises:
            ValueError: `path` is the source, a file of its folder, or the output, or is not a regular file.
            OSError: The file cannot be written.
        """
        path = Path(path)
        text = self.to_json(indent=1) if path.suffix.lower() == ".json" else self.to_html()
        _native.write_file(path, text.encode(), [self.source, self.out])


def _most_common(tensors: list[dict[str, Any]], key: str, default: Any) -> Any:
    """Returns the most common value among the matrices that a recipe quantized."""
    found = Counter(tensor[key] for tensor in tensors if tensor["relative_error"] is not None)
    return found.most_common(1)[0][0] if found else default


def _read(kind: type[Any], value: dict[str, Any]) -> Any:
    names = {field.name for field in dataclasses.fields(kind)}
    return kind(**{name: item for name, item in value.items() if name in names})
