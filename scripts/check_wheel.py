"""Checks the wheels in a folder, for `make wheel`, `make wheels` and `make test-wheel`.

python scripts/check_wheel.py dist             # tags, size, contents, symbols and linked libraries of each wheel
python scripts/check_wheel.py dist --generate  # also installs the only wheel without a compiler and generates
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import venv
import zipfile
from pathlib import Path
from typing import Any

import native_module
import notices

MAX_BYTES = 15_000_000
MAX_GLIBC = (2, 28)
REQUIRED = (
    "nybble/__init__.py",
    "nybble/_native.pyi",
    "nybble/py.typed",
    "nybble/server/page/index.html",
    "nybble/server/page/app/main.js",
    "nybble/server/page/vendor/manifest.json",
    *(
        f"nybble/server/page/vendor/{path.relative_to(notices.VENDORED).as_posix()}"
        for path in notices.vendored_files()
    ),
)
# Interpreter and ABI: the stable ABI of Python 3.10, and free-threaded Python, which has no stable one yet.
ABIS = ("cp310-abi3", "cp314-cp314t")
# The platforms of wheels, by the ends of their tags, and the target whose crates they contain.
TARGETS = {
    r"manylinux_\d+_\d+_x86_64|musllinux_\d+_\d+_x86_64": "x86_64-unknown-linux-gnu",
    r"manylinux_\d+_\d+_aarch64|musllinux_\d+_\d+_aarch64": "aarch64-unknown-linux-gnu",
    r"win_amd64": "x86_64-pc-windows-msvc",
    r"macosx_\d+_\d+_x86_64": "x86_64-apple-darwin",
    r"macosx_\d+_\d+_arm64": "aarch64-apple-darwin",
}

# In the folder `licenses` of the wheel's metadata.
LICENSES = ("LICENSE", "THIRD-PARTY-NOTICES")

GENERATE = """
import pathlib, shutil, sys
for tool in ("cargo", "rustc", "cc", "gcc", "clang", "zig"):
    assert shutil.which(tool) is None, f"{tool} is in PATH, expected no compiler"
import nybble
assert pathlib.Path(nybble.__file__).is_relative_to(sys.prefix), nybble.__file__
with nybble.Model.load() as model:
    done = model.generate("The capital of France is", max_tokens=16, temperature=0)
    assert done.usage.completion_tokens > 0 and "Paris" in done.text, done
    print(f"{model.info.kernel}: {done.text!r}")
"""


def main() -> int:
    """Checks the wheels and prints the result. Returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="folder with wheels")
    parser.add_argument("--generate", action="store_true", help="install the wheel and generate with the default model")
    arguments = parser.parse_args()
    wheels = sorted(arguments.folder.glob("*.whl"))
    if not wheels or (arguments.generate and len(wheels) > 1):
        expected = "one" if arguments.generate else "at least one"
        print(f"{arguments.folder}: found {len(wheels)} wheels, expected {expected}", file=sys.stderr)
        return 1
    all_faults = []
    for wheel in wheels:
        faults = inspect(wheel)
        print(f"{wheel.name}: {wheel.stat().st_size / 1e6:.1f} MB, {f'{len(faults)} faults' if faults else 'good'}")
        all_faults += [f"{wheel.name}: {fault}" for fault in faults]
    if all_faults:
        print("\n".join(all_faults), file=sys.stderr)
        return 1
    if arguments.generate:
        generate(wheels[0].resolve())
    return 0


def inspect(wheel: Path) -> list[str]:
    """Returns the faults of the wheel."""
    faults = []
    if wheel.stat().st_size > MAX_BYTES:
        faults.append(f"found {wheel.stat().st_size} bytes, expected at most {MAX_BYTES}")
    _, _, interpreter, abi, tags = wheel.stem.rsplit("-", 4)
    if f"{interpreter}-{abi}" not in ABIS:
        faults.append(f"is for {interpreter}-{abi}, expected {' or '.join(ABIS)}")
    tag = tags.split(".")[-1]
    target = next((target for pattern, target in TARGETS.items() if re.fullmatch(pattern, tag)), None)
    if target is None:
        return [*faults, f"is for the platform {tags}, expected a platform in TARGETS"]
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        texts = {Path(name).name: archive.read(name).decode() for name in names if ".dist-info/licenses/" in name}
        bills = [json.loads(archive.read(name)) for name in names if ".dist-info/sboms/" in name]
        modules = [name for name in names if re.fullmatch(r"nybble/_native\..*(so|pyd)", name)]
        with tempfile.TemporaryDirectory() as folder:
            for name in modules:
                module = native_module.read(Path(archive.extract(name, folder)))
                faults += [f"{name} {fault}" for fault in native_module.faults(module, tag)]
    if modules != [module_name(abi, target)]:
        faults.append(f"the native module is {modules}, expected {module_name(abi, target)}")
    faults += [f"{file} is missing" for file in REQUIRED if file not in names]
    faults += [f"licenses/{file} is missing" for file in LICENSES if file not in texts]
    faults += notice_faults(texts.get("THIRD-PARTY-NOTICES", ""), bills, target)
    if tag.startswith("manylinux"):
        faults += glibc_faults(wheel)
    # That of free-threaded Python has no stable ABI to compare with.
    if abi == "abi3" and subprocess.run(["abi3audit", "--strict", str(wheel)], check=False).returncode:
        faults.append("uses what is not in the stable ABI of Python 3.10")
    return faults


def module_name(abi: str, target: str) -> str:
    """The file name of the native module. Wheels without the stable ABI are for Linux."""
    if abi == "abi3":
        return "nybble/_native.pyd" if "windows" in target else "nybble/_native.abi3.so"
    return f"nybble/_native.cpython-{abi.removeprefix('cp')}-{target.partition('-')[0]}-linux-gnu.so"


def glibc_faults(wheel: Path) -> list[str]:
    """Whether the wheel needs a newer glibc than it says."""
    shown = subprocess.run(["auditwheel", "show", "--json", str(wheel)], check=True, capture_output=True, text=True)
    tag = json.loads(shown.stdout)["overall_tag"]
    glibc = re.match(r"manylinux_(\d+)_(\d+)_", tag)
    if glibc is None or (int(glibc[1]), int(glibc[2])) > MAX_GLIBC:
        return [f"auditwheel found {tag}, expected manylinux_2_28 or older"]
    if tag not in wheel.name:
        print(f"{wheel.name}: also satisfies {tag}")
    return []


def notice_faults(text: str, bills: list[dict[str, Any]], target: str | None = None) -> list[str]:
    """Crates and libraries that the notices omit, or list but the wheel does not contain; crates that bills omit.

    Args:
        text: THIRD-PARTY-NOTICES.
        bills: The bills of materials.
        target: The platform of the wheel; this machine's if None.
    """
    listed = set(re.findall(r"^(\S+ \d\S*): ", text, re.MULTILINE))
    libraries = {str(library) for library in notices.vendored()}
    linked = {str(crate) for crate in notices.linked(target or notices.host())}
    known = {f"{part['name']} {part.get('version')}" for bill in bills for part in bill.get("components", [])}
    return [
        *(f"THIRD-PARTY-NOTICES: {crate} is missing" for crate in sorted((linked | libraries) - listed)),
        *(f"THIRD-PARTY-NOTICES: {crate} is not in the wheel" for crate in sorted(listed - linked - libraries)),
        *(f"the bill of materials: {crate} is missing" for crate in sorted(linked - known)),
    ]


def generate(wheel: Path) -> None:
    """Installs the wheel into an empty environment and generates, with only that environment in PATH."""
    with tempfile.TemporaryDirectory() as folder:
        venv.create(folder, with_pip=True, symlinks=os.name != "nt")
        commands = Path(folder, "Scripts" if os.name == "nt" else "bin")
        python = str(commands / "python")
        environment = {**os.environ, "PATH": str(commands)}
        for name in ("VIRTUAL_ENV", "PYTHONPATH", "PYO3_PYTHON"):
            environment.pop(name, None)
        install = [python, "-m", "pip", "install", "--quiet", "--only-binary", ":all:", str(wheel)]
        subprocess.run(install, check=True, env=environment, cwd=folder)
        subprocess.run([python, "-c", GENERATE], check=True, env=environment, cwd=folder)


if __name__ == "__main__":
    sys.exit(main())
