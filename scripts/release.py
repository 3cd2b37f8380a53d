"""Checks of `make release`, before and after the distributions are built.

python scripts/release.py --prepare       # the tree is clean, versions agree, the tag is new
python scripts/release.py --verify dist   # dist/ has one complete wheel and one source distribution with valid metadata
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tarfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
SDIST_FILES = (
    "Cargo.toml",
    "Cargo.lock",
    "pyproject.toml",
    "README.md",
    "LICENSE",
    "THIRD-PARTY-NOTICES",
    "src/lib.rs",
    "python/nybble/__init__.py",
)


def version() -> str:
    """The version in Cargo.toml, which the Python package shares."""
    found = re.search(r'^version = "([^"]+)"', (ROOT / "Cargo.toml").read_text(encoding="utf-8"), re.MULTILINE)
    if found is None:
        raise SystemExit("Cargo.toml: no line 'version = \"...\"'")
    return found[1]


def prepare() -> list[str]:
    """Returns the reasons why this commit cannot be released yet."""
    wanted = version()
    faults = []
    lock = (ROOT / "Cargo.lock").read_text(encoding="utf-8")
    if f'name = "nybble-llm"\nversion = "{wanted}"' not in lock:
        faults.append(f"Cargo.lock: nybble-llm is not at {wanted}; run `cargo update --workspace`")
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    entry = re.search(rf"^## \[{re.escape(wanted)}\] - \d{{4}}-\d\d-\d\d$", changelog, re.MULTILINE)
    if entry is None:
        faults.append(f"CHANGELOG.md: no heading '## [{wanted}] - YYYY-MM-DD'")
    if git("status", "--porcelain"):
        faults.append("the working tree has changes that are not committed")
    if git("tag", "--list", f"v{wanted}"):
        faults.append(f"the tag v{wanted} exists already; raise the version in Cargo.toml")
    return faults


def git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True)
    return done.stdout.strip()


def verify(folder: Path) -> list[str]:
    """Returns the faults of the distributions in `folder`. `check_wheel.py` has checked the contents of the wheel."""
    wanted = version()
    wheels, sources = sorted(folder.glob("*.whl")), sorted(folder.glob("*.tar.gz"))
    faults = [
        f"{folder}: found {len(found)} {what}, expected one"
        for found, what in ((wheels, "wheels"), (sources, "source distributions"))
        if len(found) != 1
    ]
    faults += [f"{path.name}: not of version {wanted}" for path in wheels + sources if f"-{wanted}" not in path.name]
    for source in sources:
        with tarfile.open(source) as archive:
            names = {name.partition("/")[2] for name in archive.getnames()}
        faults += [f"{source.name}: {name} is missing" for name in SDIST_FILES if name not in names]
    if not faults and subprocess.run(["twine", "check", "--strict", *wheels, *sources], check=False).returncode:
        faults.append("the metadata or the README would be refused by the package index")
    return faults


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    action = parser.add_mutually_exclusive_group(required=True)
    action.add_argument("--prepare", action="store_true", help="check the repository")
    action.add_argument("--verify", type=Path, metavar="FOLDER", help="check the distributions in FOLDER")
    arguments = parser.parse_args()
    faults = prepare() if arguments.prepare else verify(arguments.verify)
    print("\n".join(faults) or f"nybble {version()}: ready", file=sys.stderr if faults else sys.stdout)
    if arguments.verify and not faults:
        print(f"to publish: git tag v{version()} && git push origin v{version()}")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
