"""Downloads a file of the Hub, and reports the bytes of downloads."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator
from typing import Any

from nybble.progress import Progress, counts

Report = Callable[[int, int], object]
"""Called with the bytes downloaded and their total. It raises no `Exception`."""


class _Stopped(BaseException):
    """An error of the caller's function, as `__cause__`. Downloads would take an `Exception` for one of their own."""


@contextlib.contextmanager
def reported(progress: Progress, what: str) -> Iterator[Report | None]:
    """Yields the function to report the download of `what` with; None if nothing is reported.

    Raises:
        Exception: The error of `progress`, which has ended the download.
    """
    with counts(progress, f"downloading {what}") as show:

        def report(done: int, total: int) -> None:
            try:
                if show is not None:
                    show(done, total)
            except Exception as error:
                raise _Stopped from error

        try:
            yield None if show is None else report
        except _Stopped as stopped:
            raise (stopped.__cause__ or stopped) from None


def hub_download(
    repository: str, revision: str, name: str, report: Report | None = None, before: int = 0, total: int | None = None
) -> str:
    """Downloads a file into the Hub's cache. Returns its path.

    Args:
        repository: The repository.
        revision: The commit, branch or tag.
        name: The file.
        report: Where to report; None reports nothing.
        before: Bytes of the files before this one.
        total: Bytes of all files; those of this one if None.
    """
    from huggingface_hub import hf_hub_download
    from tqdm import tqdm

    class Reporting(tqdm):  # type: ignore[misc]
        """What the client takes for its progress bar."""

        def __init__(self, *arguments: Any, **options: Any) -> None:
            super().__init__(*arguments, **{**options, "disable": True})
            self.n = options.get("initial", 0)

        def update(self, n: float | None = 1) -> None:
            self.n += n or 0
            if report is not None:
                report(before + int(self.n), total or int(self.total or 0))

    options: dict[str, Any] = {"revision": revision, "library_name": "nybble"}
    # Older clients always draw their own bar.
    if "tqdm_class" in inspect.signature(hf_hub_download).parameters:
        options["tqdm_class"] = Reporting
    path: str = hf_hub_download(repository, name, **options)
    return path
