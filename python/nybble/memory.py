"""How much memory this process takes, as the system counts it."""

from __future__ import annotations

import sys
from pathlib import Path


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


def _status(name: str) -> int | None:
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(f"{name}:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return None
