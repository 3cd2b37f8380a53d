"""Reads what the native module of a wheel is built for, what it links and what it exports, for `check_wheel.py`."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Libraries of the platform that a wheel may link, in lower case. Everything else must be inside the module.
LIBRARIES = {
    "manylinux": r"lib(c|m|dl|rt|pthread)\.so\.\d+|libgcc_s\.so\.1|ld-linux-.*\.so\.\d",
    "musllinux": r"libc\.so|libc\.musl-.*\.so\.1",
    "win": r"(kernel32|ntdll|advapi32|bcrypt|bcryptprimitives|ws2_32|userenv|ole32|msvcrt|ucrtbase)\.dll"
    r"|vcruntime140(_1)?\.dll|python3t?\.dll|python3\d+t\.dll|api-ms-win-.*\.dll",
    "macosx": r"/usr/lib/lib(system\.b|iconv\.2|resolv\.9)\.dylib",
}
ENTRY = "PyInit__native"
_MACHINES = {
    "ARCH.X86_64": "x86_64",
    "ARCH.AARCH64": "aarch64",
    "MACHINE_TYPES.AMD64": "x86_64",
    "CPU_TYPE.X86_64": "x86_64",
    "CPU_TYPE.ARM64": "aarch64",
}
_MACHINE_OF_TAG = {"amd64": "x86_64", "arm64": "aarch64"}


@dataclass(frozen=True)
class NativeModule:
    """A shared library."""

    machine: str
    """`x86_64` or `aarch64`; what the file says for others."""
    libraries: tuple[str, ...]
    exports: frozenset[str]
    oldest_system: tuple[int, ...] | None
    """The version of macOS that it needs. None on other systems."""
    has_debug_sections: bool


def read(path: Path) -> NativeModule:
    """The native module at `path`.

    Raises:
        ValueError: The file is not a shared library for Linux, Windows or macOS.
    """
    import lief  # Only those who check wheels need it.

    binary = lief.parse(path)
    if isinstance(binary, lief.ELF.Binary):
        machine, exports, system = str(binary.header.machine_type), binary.exported_symbols, None
        libraries = [str(library) for library in binary.libraries]
        names = [str(symbol.name) for symbol in exports]
    elif isinstance(binary, lief.PE.Binary):
        machine, system = str(binary.header.machine), None
        libraries = [str(library.name) for library in binary.imports]
        table = binary.get_export()
        names = [str(entry.name) for entry in table.entries] if table else []
    elif isinstance(binary, lief.MachO.Binary):
        machine = str(binary.header.cpu_type)
        libraries = [library.name for library in binary.libraries if library.name != _own_name(binary)]
        names = [str(symbol.name).removeprefix("_") for symbol in binary.exported_symbols]
        build, earlier = binary.build_version, binary.version_min
        system = tuple(build.minos if build else earlier.version if earlier else ())[:2] or None
    else:
        raise ValueError(f"{path.name}: not a shared library for Linux, Windows or macOS")
    debug = any(re.match(r"\.?(z?debug_|__debug)", str(section.name)) for section in binary.sections)
    return NativeModule(_MACHINES.get(machine, machine), tuple(sorted(libraries)), frozenset(names), system, debug)


def _own_name(binary: Any) -> str | None:
    """The name that a library for macOS gives itself, which its list of libraries contains, too."""
    names = [str(command.name) for command in binary.commands if str(command.command).endswith(".ID_DYLIB")]
    return names[0] if names else None


def faults(module: NativeModule, platform_tag: str) -> list[str]:
    """What is wrong with a module in a wheel with this tag, such as `win_amd64` or `macosx_11_0_arm64`."""
    system = platform_tag.partition("_")[0]
    machine = next((tag for tag in ("x86_64", "aarch64", "amd64", "arm64") if platform_tag.endswith(tag)), platform_tag)
    machine = _MACHINE_OF_TAG.get(machine, machine)
    allowed = re.compile(LIBRARIES.get(system.removesuffix("2014"), "(?!)"))
    found = [
        f"links {library}, which not every machine has"
        for library in module.libraries
        if not allowed.fullmatch(library.lower())
    ]
    if module.machine != machine:
        found.append(f"is built for {module.machine}, expected {machine}")
    if ENTRY not in module.exports:
        found.append(f"does not export {ENTRY}")
    if module.has_debug_sections:
        found.append("has debug information, expected a stripped file")
    if system == "macosx":
        tag = tuple(int(number) for number in platform_tag.split("_")[1:3])
        if module.oldest_system is None or module.oldest_system > tag:
            needs = ".".join(map(str, module.oldest_system or ("?",)))
            found.append(f"needs macOS {needs}, but the tag promises {'.'.join(map(str, tag))}")
    return found
