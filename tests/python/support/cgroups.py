"""Control groups for tests, within the one that they run in themselves."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

ROOT = Path("/sys/fs/cgroup")
JOIN = "import sys; open(sys.argv[1] + '/cgroup.procs', 'w').write('0')\n"
"""What a script begins with whose first argument is the folder of its group."""


def own_group(controller: str) -> tuple[Path, int]:
    """The folder of this process's group for `controller`, and the version of control groups that it is of."""
    lines = [line.split(":", 2) for line in Path("/proc/self/cgroup").read_text().splitlines()]
    for _, controllers, path in lines:
        if controller in controllers.split(","):
            return ROOT / controllers / path.lstrip("/"), 1
    return ROOT / next(path for _, controllers, path in lines if not controllers).lstrip("/"), 2


@contextlib.contextmanager
def group(controller: str, *, first: Mapping[str, object], second: Mapping[str, object]) -> Iterator[Path]:
    """A new group with these limits, by the names of version 1 or 2. Skips the test where none can be made."""
    try:
        parent, version = own_group(controller)
        folder = parent / f"nybble-test-{os.getpid()}"
        folder.mkdir()
    except (OSError, StopIteration) as error:
        pytest.skip(f"no control group can be made here: {error}")
    try:
        for name, value in (first if version == 1 else second).items():
            (folder / name).write_text(str(value))
    except OSError as error:
        folder.rmdir()
        pytest.skip(f"a control group has no {controller} here: {error}")
    try:
        yield folder
    finally:
        for _ in range(100):  # The last process may be on its way out.
            with contextlib.suppress(OSError):
                folder.rmdir()
                break
            time.sleep(0.1)
