"""The check of wheels finds what would keep one from running on another machine."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import check_wheel
import native_module
import pytest
from native_module import NativeModule

REPOSITORY = Path(__file__).parents[3]
LINUX = NativeModule("x86_64", ("libc.so.6", "libgcc_s.so.1"), frozenset({"PyInit__native"}), None, False)
MACOS = replace(LINUX, machine="aarch64", libraries=("/usr/lib/libSystem.B.dylib",), oldest_system=(11, 0))
WINDOWS = replace(LINUX, libraries=("KERNEL32.dll", "python3.dll", "api-ms-win-core-synch-l1-2-0.dll"))


@pytest.mark.parametrize(
    ("module", "tag"),
    [
        (LINUX, "manylinux_2_28_x86_64"),
        (replace(LINUX, libraries=("libc.so",)), "musllinux_1_2_x86_64"),
        (WINDOWS, "win_amd64"),
        (MACOS, "macosx_11_0_arm64"),
    ],
)
def test_a_good_module_has_no_faults(module: NativeModule, tag: str) -> None:
    assert native_module.faults(module, tag) == []


@pytest.mark.parametrize(
    ("module", "tag", "fault"),
    [
        (LINUX, "manylinux_2_28_aarch64", "is built for x86_64, expected aarch64"),
        (LINUX, "musllinux_1_2_x86_64", "links libc.so.6, which not every machine has"),
        (replace(LINUX, libraries=("libssl.so.3",)), "manylinux_2_28_x86_64", "links libssl.so.3"),
        (replace(WINDOWS, libraries=("libgcc_s_seh-1.dll",)), "win_amd64", "links libgcc_s_seh-1.dll"),
        (replace(WINDOWS, libraries=("python312.dll",)), "win_amd64", "links python312.dll"),
        (replace(LINUX, exports=frozenset()), "manylinux_2_28_x86_64", "does not export PyInit__native"),
        (replace(LINUX, has_debug_sections=True), "manylinux_2_28_x86_64", "has debug information"),
        (replace(MACOS, oldest_system=(12, 3)), "macosx_11_0_arm64", "needs macOS 12.3, but the tag promises 11.0"),
        (replace(MACOS, oldest_system=None), "macosx_11_0_arm64", "needs macOS ?"),
        (LINUX, "freebsd_14_x86_64", "links libc.so.6"),
    ],
)
def test_what_keeps_a_module_from_running_elsewhere_is_a_fault(module: NativeModule, tag: str, fault: str) -> None:
    assert [found for found in native_module.faults(module, tag) if found.startswith(fault)]


def test_the_native_module_has_the_name_that_python_looks_for() -> None:
    names = {
        ("abi3", "x86_64-unknown-linux-gnu"): "nybble/_native.abi3.so",
        ("abi3", "aarch64-apple-darwin"): "nybble/_native.abi3.so",
        ("abi3", "x86_64-pc-windows-msvc"): "nybble/_native.pyd",
        ("cp314t", "aarch64-unknown-linux-gnu"): "nybble/_native.cpython-314t-aarch64-linux-gnu.so",
    }
    assert {key: check_wheel.module_name(*key) for key in names} == names


def test_every_platform_of_the_script_has_a_target_and_a_row_in_the_documents() -> None:
    script = (REPOSITORY / "scripts" / "wheel.sh").read_text(encoding="utf-8")
    platforms = set(re.findall(r"^        ([a-z]+)\)", script, re.MULTILINE))
    assert platforms == {"windows", "macos", "arm", "musl", "freethreaded"}
    makefile = (REPOSITORY / "Makefile").read_text(encoding="utf-8")
    page = (REPOSITORY / "docs" / "platforms.md").read_text(encoding="utf-8")
    for platform in platforms:
        assert re.search(rf"^[a-z -]*wheel-{platform}\b[a-z -]*:", makefile, re.MULTILINE), platform
        assert f"wheel-{platform}" in page
    wheels = re.findall(r"`((?:many|musl)linux_\w+|win_\w+|macosx_\w+)`", page)
    for tag in wheels:
        assert any(re.fullmatch(pattern, tag) for pattern in check_wheel.TARGETS), tag
    assert len(wheels) >= 7
