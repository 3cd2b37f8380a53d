"""Keeps random requests from one run to the next: drawing them takes ten times as long as sending them."""

from __future__ import annotations

import hashlib
import io
import pickle
from importlib.metadata import version
from pathlib import Path
from typing import Any

from schemathesis.core import NOT_SET

FIELDS = [
    *("method", "path_parameters", "headers", "cookies", "query"),
    *("body", "media_type", "multipart_content_types", "_meta"),
]
"""What a request consists of, besides its operation."""


class Drawn:
    """The requests of a description, drawn by Schemathesis from a fixed seed, in a file of the cache of pytest.

    They are drawn again for another description or other versions of the packages that draw, and after `--cache-clear`.
    """

    def __init__(self, cache: Any, *key: str) -> None:
        packages = [f"{name} {version(name)}" for name in ("schemathesis", "hypothesis")]
        digest = hashlib.sha256("\n".join([*packages, *key]).encode()).hexdigest()
        self._file = Path(cache.mkdir("drawn")) / digest if cache else None
        self._of: dict[str, list[bytes]] = {}
        if self._file and self._file.exists():
            self._of = pickle.loads(self._file.read_bytes())

    def cases(self, operation: Any) -> list[Any] | None:
        """The requests of an operation that were drawn before, in order. None if there are none."""
        kept = self._of.get(operation.label)
        return None if kept is None else [operation.Case(**_Reader(io.BytesIO(case)).load()) for case in kept]

    def begin(self, operation: Any) -> None:
        """Begins to keep the requests of an operation."""
        self._of[operation.label] = []

    def add(self, case: Any) -> None:
        """Keeps a request, before it is sent."""
        out = io.BytesIO()
        _Writer(out).dump({name: getattr(case, name) for name in FIELDS})
        self._of[case.operation.label].append(out.getvalue())

    def save(self) -> None:
        """Keeps all requests for the next run."""
        if self._file:
            written = self._file.with_suffix(".new")
            written.write_bytes(pickle.dumps(self._of))
            written.replace(self._file)


class _Writer(pickle.Pickler):
    """Keeps the value that is known by its identity."""

    def persistent_id(self, value: Any) -> str | None:
        return "not set" if value is NOT_SET else None


class _Reader(pickle.Unpickler):
    def persistent_load(self, _name: str) -> Any:
        return NOT_SET
