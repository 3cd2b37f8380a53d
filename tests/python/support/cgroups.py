"""Creates control groups for tests, below the group of the test process."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

ROOT = Path("/sys/fs/cgroup")
JOIN = "import sys; open(sys.argv[1] + '/cgroup.procs', 'w').write('0')\n"
"""First line of a script that joins the group whose folder is its first argument."""


def own_group(controller: str) -> tuple[Path, int]:
    """Returns the folder of this process's group for `controller`, and its cgroup version."""
    lines = [line.split(":", 2) for line in Path("/proc/self/cgroup").read_text().splitlines()]
    for _, controllers, path in lines:
        if controller in controllers.split(","):
            return ROOT / controllers / path.lstrip("/"), 1
    return ROOT / next(path for _, controllers, path in lines if not controllers).lstrip("/"), 2


@contextlib.contextmanager
def group(
    controller: str, *, first: Mapping[str, object], second: Mapping[str, object], number: int = 0
) -> Iterator[Path]:
    """Creates group `number` with limits named as in version 1 or 2. Skips the test if that is not permitted."""
    try:
        parent, version = own_group(controller)
        folder = parent / f"nybble-test-{os.getpid()}-{number}"
        folder.mkdir()
    except (OSError, StopIteration) as error:
        pytest.skip(f"cannot create a control group: {error}")
    try:
        for name, value in (first if version == 1 else second).items():
            (folder / name).write_text(str(value))
    except OSError as error:
        folder.rmdir()
        pytest.skip(f"control groups have no {controller} controller: {error}")
    try:
        yield folder
    finally:
        for _ in range(100):  # The last process may still be exiting.
            with contextlib.suppress(OSError):
                folder.rmdir()
                break
            time.sleep(0.1)
