"""Compares an output with its source. An interrupted comparison continues in the next run."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from nybble import _native
from nybble.quantization.evaluation import Reference
from nybble.quantization.loaded import SourceModel
from nybble.quantization.report import Candidate, Report

if TYPE_CHECKING:
    from nybble.quantization.datasets import Windows
    from nybble.quantization.options import QuantizeOptions

_HELD_OUT = 8
"""One window in this many is held out of a calibration text for measuring."""
_MOST_HELD_OUT = 16

Stages = Callable[[str, int, int], object]
"""Called with the name of a stage, the number of its units that are done, and their total."""


def split(windows: Windows) -> tuple[Windows, Windows]:
    """Splits windows `(windows, window)` into those to calibrate on and those to measure on.

    A single window is used for both.
    """
    import numpy as np

    if len(windows) == 1:
        return windows, windows
    held_out = np.zeros(len(windows), dtype=bool)
    held_out[np.arange(_HELD_OUT - 1, len(windows), _HELD_OUT)[:_MOST_HELD_OUT]] = True
    if not held_out.any():
        held_out[-1] = True
    return windows[~held_out], windows[held_out]


def measure(
    done: Report, path: Path, out: Path, windows: Windows, options: QuantizeOptions, progress: Stages
) -> Report:
    """Returns the report with the figures of the output and of its source on `windows`."""
    model = SourceModel(path, None, options.threads)
    reference = Reference.of_windows(
        model, windows, progress=lambda count, total: progress("measuring the source", count, total)
    )
    del model  # Frees its weights before the output is loaded.
    found = reference.compare(
        SourceModel(out, "auto", options.threads),
        progress=lambda count, total: progress("measuring the file", count, total),
    )
    candidate = Candidate(
        recipe=done.recipe,
        format=options.block_format,
        group=max((tensor.group for tensor in done.tensors if tensor.relative_error is not None), default=32),
        size_bytes=done.size_bytes,
        perplexity=found.perplexity,
        kl_mean=found.kl_mean,
        kl_median=found.kl_median,
        kl_p99=found.kl_p99,
        top_agreement=found.top_agreement,
        seconds=done.seconds,
        chosen=True,
    )
    return dataclasses.replace(
        done,
        candidates=(candidate,),
        reference_perplexity=found.reference_perplexity,
        kl_by_position=found.kl_by_position or (),
    )


class Unmeasured:
    """The record that an output is complete but not measured yet, in a file next to it."""

    def __init__(self, out: Path) -> None:
        self._out = out
        self._file = self.path(out)

    @staticmethod
    def path(out: Path) -> Path:
        """The file of the record for an output."""
        return out.with_name(f"{out.name}.resume-report")

    def exists(self) -> bool:
        """Whether there is a record, of this run or another."""
        return self._file.is_file() and self._out.is_file()

    def report(self, key: str) -> Report | None:
        """The report of the run with that key; None if the output is of another run or has changed."""
        if not self.exists():
            return None
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            record = json.loads(self._file.read_text(encoding="utf-8"))
            if record["key"] == key and record["output"] == self._stat():
                return Report.from_json(record["report"])
        return None

    @contextlib.contextmanager
    def record(self, key: str, report: Report) -> Iterator[None]:
        """Keeps the record while the output is measured, and after a failure."""
        record = {"key": key, "output": self._stat(), "report": report.to_json()}
        _native.write_file(self._file, json.dumps(record).encode(), [])
        yield
        self.remove()

    def remove(self) -> None:
        """Removes the record."""
        self._file.unlink(missing_ok=True)

    def _stat(self) -> list[int]:
        stat = self._out.stat()
        return [stat.st_size, stat.st_mtime_ns]
