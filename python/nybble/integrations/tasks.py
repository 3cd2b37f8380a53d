"""Compares a quantized file with its source in tasks of lm-evaluation-harness: `pip install 'nybble[lm-eval]'`."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nybble.progress import StageProgress, stages
from nybble.quantization.report_data import TaskScore

if TYPE_CHECKING:
    from nybble.quantization.measuring import Stages
    from nybble.quantization.report import Report

__all__ = ["compare_tasks"]

_BOOTSTRAP = 100
"""Resamplings for the errors of metrics that are not means, such as perplexities."""


def compare_tasks(
    report: Report,
    tasks: str | Sequence[str],
    *,
    folder: str | os.PathLike[str] | None = None,
    limit: int | None = None,
    threads: int | None = None,
    progress: StageProgress = None,
) -> Report:
    """Measures a quantized file and its source in tasks of lm-evaluation-harness.

    Args:
        report: The report of the quantization, which names both files.
        tasks: Names of tasks or of groups of tasks: a list, or a text with commas between them.
        folder: A folder with tasks of your own: YAML files as the harness reads them.
        limit: Use only the first documents of each task.
        threads: Number of threads; None takes the default.
        progress: As in `nybble.quantize`.

    Returns:
        The report with `tasks`.

    Raises:
        ImportError: lm-evaluation-harness is not installed.
        FileNotFoundError: The folder does not exist.
        ModelError: A file is damaged.
        ValueError: There is no such task, its data cannot be loaded, or the limit is below 1.

    Example:
        ```python
        report = nybble.quantize("org/model", "model.gguf")
        compare_tasks(report, ["arc_easy"], limit=200).save("model.html")
        ```
    """
    found = Tasks(tasks, folder, limit, threads)
    with stages(progress, "tasks") as shown:
        return found.compare(report, shown or (lambda stage, done, total: None))


class Tasks:
    """Tasks that are found and loaded before a quantization, which may take hours."""

    def __init__(
        self, names: str | Sequence[str], folder: str | os.PathLike[str] | None, limit: int | None, threads: int | None
    ) -> None:
        """Loads the tasks and their data. The arguments and errors are those of `compare_tasks`."""
        from nybble.integrations import lm_eval  # Says how to install the harness.

        self._adapter = lm_eval
        listed = names.split(",") if isinstance(names, str) else names
        self._names = [*dict.fromkeys(stripped for name in listed if (stripped := name.strip()))]
        self._limit, self._threads = limit, threads
        if not self._names:
            raise ValueError(f"tasks: found {names!r}, expected names of tasks")
        if limit is not None and limit < 1:
            raise ValueError(f"limit: found {limit}, expected a number of documents")
        if folder is not None and not Path(folder).is_dir():
            raise FileNotFoundError(f"{folder}: there is no such folder, expected one with tasks")
        self._manager = _manager(self._names, None if folder is None else Path(folder))
        for name in self._names:
            try:
                self._manager.load_task_or_group([name])
            except Exception as error:  # Of any library that reads data, and of the task's own code.
                raise ValueError(f"tasks: {name} cannot be loaded: {type(error).__name__}: {error}") from error

    def compare(self, report: Report, progress: Stages) -> Report:
        """Returns the report with the figures of the output and of its source."""
        before = self._measure(report.source, None, "the source", progress)
        after = self._measure(report.out, "auto", "the file", progress)
        return dataclasses.replace(report, tasks=scores(before, after))

    def _measure(self, path: Path, quantize: str | None, what: str, progress: Stages) -> Mapping[str, Any]:
        from nybble.model import Model

        with Model.load(path, quantize=quantize, threads=self._threads, progress=False) as model:
            harness = self._adapter.NybbleLM(model)
            harness.report = lambda done, total: progress(f"tasks with {what}", done, total)
            return self._adapter.evaluate(harness, self._names, self._manager, limit=self._limit, bootstrap=_BOOTSTRAP)


def _manager(names: Sequence[str], folder: Path | None) -> Any:
    """The harness's index of tasks: those of the folder, and its own if one of them is asked for.

    Raises:
        ValueError: There is no such task.
    """
    from lm_eval.tasks import TaskManager

    include = None if folder is None else str(folder)
    manager = TaskManager(include_path=include, include_defaults=folder is None)
    if not set(names) <= {*manager.all_tasks} and folder is not None:
        manager = TaskManager(include_path=include)
    if unknown := [name for name in names if name not in manager.all_tasks]:
        where = "lm-evaluation-harness" if folder is None else f"{folder} or of lm-evaluation-harness"
        raise ValueError(f"tasks: found {', '.join(unknown)}, expected tasks of {where}")
    return manager


def scores(before: Mapping[str, Any], after: Mapping[str, Any]) -> tuple[TaskScore, ...]:
    """The figures of both models, from what the harness returns."""
    found = []
    for task, metrics in {**after["results"], **after.get("groups", {})}.items():
        own = {**before["results"], **before.get("groups", {})}[task]
        for key, figure in metrics.items():
            metric, _, kind = key.partition(",")
            value, source = _number(figure), _number(own.get(key))
            if not kind or metric.endswith("_stderr") or value is None or source is None:
                continue
            error = f"{metric}_stderr,{kind}"
            found.append(
                TaskScore(
                    task=task,
                    metric=metric if kind == "none" else f"{metric} ({kind})",
                    samples=_samples(after, task, metrics),
                    source=source,
                    source_error=_number(own.get(error)),
                    value=value,
                    error=_number(metrics.get(error)),
                    higher_is_better=after.get("higher_is_better", {}).get(task, {}).get(metric),
                )
            )
    return tuple(found)


def _samples(results: Mapping[str, Any], task: str, metrics: Mapping[str, Any]) -> int | None:
    """The number of documents that a task was measured on; None for a group whose tasks have their own."""
    count = results.get("n-samples", {}).get(task, {}).get("effective", metrics.get("sample_len"))
    return None if count is None else int(count)


def _number(value: object) -> float | None:
    """The value of a figure; None for text and NaN, which the harness gives where it could not compute one."""
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool) and not math.isnan(value)
    return float(value) if is_number else None  # type: ignore[arg-type]
