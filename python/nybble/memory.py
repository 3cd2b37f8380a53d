"""How much memory this process takes, as the system counts it."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from nybble import _native

# What keys and values may take where the system does not tell how much memory there is.
_USUAL_CACHE_BYTES = 1 << 30


def resident_bytes() -> int | None:
    """Memory that the process holds now, the pages of mapped files included. None where the system does not tell."""
    return _status("VmRSS")


def peak_resident_bytes() -> int | None:
    """The most that the process has held so far. None where the system does not tell."""
    if (peak := _status("VmHWM")) is not None:  # On Linux, getrusage may report the peak of the parent process.
        return peak
    try:
        import resource
    except ImportError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def available_bytes() -> int | None:
    """Memory that this process could still take without others being moved out. None where the system does not tell."""
    free = [
        size
        for size in (
            _entry(Path("/proc/meminfo"), "MemAvailable"),
            _difference(Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")),
        )
        if size is not None
    ]
    return min(free, default=None)


def for_caches(model: _native.Model) -> int:
    """Bytes that keys and values may take by default: half of what is free, and enough for one text in any case."""
    info = model.info()
    free = available_bytes()
    return max(int(info["cache_bytes"]), _USUAL_CACHE_BYTES if free is None else free // 2)


def _difference(most: Path, current: Path) -> int | None:
    try:
        return max(int(most.read_text()) - int(current.read_text()), 0)
    except (OSError, ValueError):  # No such group, or no limit, which is "max".
        return None


def _status(name: str) -> int | None:
    return _entry(Path("/proc/self/status"), name)


def _entry(file: Path, name: str) -> int | None:
    try:
        for line in file.read_text().splitlines():
            if line.startswith(f"{name}:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return None
