"""Memory of this process and of the machine, as the system reports it."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from nybble import _native

# The default size of the KV cache where the system does not report free memory.
_DEFAULT_CACHE_BYTES = 1 << 30


def resident_bytes() -> int | None:
    """Bytes of memory that the process holds, mapped files included. None if the system does not report it."""
    if (resident := _status("VmRSS")) is not None:
        return resident
    return _from_system()[0]


def peak_resident_bytes() -> int | None:
    """The peak of :func:`resident_bytes` so far. None if the system does not report it."""
    if (peak := _status("VmHWM")) is not None:  # On Linux, getrusage may report the peak of the parent process.
        return peak
    try:
        import resource
    except ImportError:  # Windows
        return _from_system()[1]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def huge_page_bytes() -> int | None:
    """Bytes of this process's memory that lie on huge pages. None if the system does not report them."""
    return _kibibytes("/proc/self/smaps_rollup", "AnonHugePages")


def available_bytes() -> int | None:
    """Memory that this process can still use without swap, in bytes. None if the system does not report it.

    The least that the machine and the limits of the process have left: its cgroup and that group's ancestors on Linux,
    its job on Windows.
    """
    from nybble import _native

    return _native.available_bytes()


def for_caches(model: _native.Model) -> int:
    """The default size of the KV cache in bytes: half of the available memory, and at least one full context."""
    info = model.info()
    available = available_bytes()
    return max(int(info["cache_bytes"]), _DEFAULT_CACHE_BYTES if available is None else available // 2)


def _from_system() -> tuple[int | None, int | None]:
    """Bytes that the process holds, now and at most, where a call reports them and no file."""
    from nybble import _native

    return _native.resident_bytes()


def _status(name: str) -> int | None:
    return _kibibytes("/proc/self/status", name)


def _kibibytes(path: str, name: str) -> int | None:
    """The number of KiB behind `name` in a file of Linux, in bytes."""
    if sys.platform != "linux":
        return None
    try:
        for line in Path(path).read_text(encoding="utf-8").splitlines():
            if line.startswith(f"{name}:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return None
