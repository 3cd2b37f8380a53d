"""Checks the wheel in a folder, for `make wheel` and `make test-wheel`.

python scripts/check_wheel.py dist             # tag, size, contents and linked libraries
python scripts/check_wheel.py dist --generate  # also installs it without a compiler and generates
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
import venv
import zipfile
from pathlib import Path
from typing import Any

import notices

MAX_BYTES = 15_000_000
MAX_GLIBC = (2, 28)
REQUIRED = (
    "nybble/__init__.py",
    "nybble/_native.abi3.so",
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
    """Checks the wheel and prints the result. Returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="folder with exactly one wheel")
    parser.add_argument("--generate", action="store_true", help="install the wheel and generate with the default model")
    arguments = parser.parse_args()
    wheels = sorted(arguments.folder.glob("*.whl"))
    if len(wheels) != 1:
        print(f"{arguments.folder}: found {len(wheels)} wheels, expected one", file=sys.stderr)
        return 1
    (wheel,) = wheels
    if faults := inspect(wheel):
        print("\n".join(f"{wheel.name}: {fault}" for fault in faults), file=sys.stderr)
        return 1
    print(f"{wheel.name}: {wheel.stat().st_size / 1e6:.1f} MB")
    if arguments.generate:
        generate(wheel.resolve())
    return 0


def inspect(wheel: Path) -> list[str]:
    """Returns the faults of the wheel."""
    faults = []
    if wheel.stat().st_size > MAX_BYTES:
        faults.append(f"found {wheel.stat().st_size} bytes, expected at most {MAX_BYTES}")
    if "-cp310-abi3-" not in wheel.name:
        faults.append("expected a wheel for the stable ABI of Python 3.10 (cp310-abi3)")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        texts = {Path(name).name: archive.read(name).decode() for name in names if ".dist-info/licenses/" in name}
        bills = [json.loads(archive.read(name)) for name in names if ".dist-info/sboms/" in name]
    faults += [f"{file} is missing" for file in REQUIRED if not any(name.endswith(file) for name in names)]
    faults += [f"licenses/{file} is missing" for file in LICENSES if file not in texts]
    faults += notice_faults(texts.get("THIRD-PARTY-NOTICES", ""), bills)
    if platform.system() == "Linux":
        shown = subprocess.run(["auditwheel", "show", "--json", str(wheel)], check=True, capture_output=True, text=True)
        tag = json.loads(shown.stdout)["overall_tag"]
        glibc = re.match(r"manylinux_(\d+)_(\d+)_", tag)
        if glibc is None or (int(glibc[1]), int(glibc[2])) > MAX_GLIBC:
            faults.append(f"auditwheel found {tag}, expected manylinux_2_28 or older")
        if tag not in wheel.name:
            print(f"{wheel.name}: also satisfies {tag}")
    return faults


def notice_faults(text: str, bills: list[dict[str, Any]]) -> list[str]:
    """Crates and libraries that the notices omit, or list but the wheel does not contain; crates that bills omit."""
    listed = set(re.findall(r"^(\S+ \d\S*): ", text, re.MULTILINE))
    libraries = {str(library) for library in notices.vendored()}
    linked = {str(crate) for crate in notices.linked(notices.host())}
    known = {f"{part['name']} {part.get('version')}" for bill in bills for part in bill.get("components", [])}
    return [
        *(f"THIRD-PARTY-NOTICES: {crate} is missing" for crate in sorted((linked | libraries) - listed)),
        *(f"THIRD-PARTY-NOTICES: {crate} is not in the wheel" for crate in sorted(listed - linked - libraries)),
        *(f"the bill of materials: {crate} is missing" for crate in sorted(linked - known)),
    ]


def generate(wheel: Path) -> None:
    """Installs the wheel into an empty environment and generates, with only that environment in PATH."""
    with tempfile.TemporaryDirectory() as folder:
        venv.create(folder, with_pip=True, symlinks=True)
        commands = Path(folder, "bin")
        python = str(commands / "python")
        environment = {**os.environ, "PATH": str(commands)}
        for name in ("VIRTUAL_ENV", "PYTHONPATH", "PYO3_PYTHON"):
            environment.pop(name, None)
        install = [python, "-m", "pip", "install", "--quiet", "--only-binary", ":all:", str(wheel)]
        subprocess.run(install, check=True, env=environment, cwd=folder)
        subprocess.run([python, "-c", GENERATE], check=True, env=environment, cwd=folder)


if __name__ == "__main__":
    sys.exit(main())
