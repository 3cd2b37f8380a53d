"""Runs the unit tests of changed files, a part of `make check`: python scripts/test_changes.py [BASE]

Changed files differ from BASE (a commit, HEAD by default) or are new; in a clean tree, those of the last commit.
`make test` runs everything.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).parents[1]
SLOW = {"robustness", "integrations"}
"""Folders of tests/python that take too long here."""


def git(*arguments: str) -> list[str]:
    done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True)
    return done.stdout.splitlines()


def changed_files(base: str) -> list[str]:
    """Paths that differ from `base`, without those that were removed."""
    found = git("diff", "--name-only", base) + git("ls-files", "--others", "--exclude-standard")
    return [path for path in found if (ROOT / path).exists()]


def rust_tests(paths: Iterable[str]) -> list[list[str]]:
    """The `cargo test` commands for the changed modules and test files."""
    modules, binaries = set(), set()
    for path in map(Path, paths):
        if path.suffix != ".rs":
            continue
        match path.parts:
            case ("src", folder, _, *_):
                modules.add(f"{folder}::")
            case ("src", file):
                modules.add(f"{Path(file).stem}::")
            case ("tests", folder, _) if (ROOT / "tests" / folder / "main.rs").exists():
                binaries.add((folder, "" if path.stem == "main" else f"{path.stem}::"))
            case ("tests", file):
                binaries.add((Path(file).stem, ""))
    # After a change, level 1 compiles in a third of the time of level 2, on which all tests run faster.
    cargo = ["cargo", "test", "--locked", "--quiet", "--config", "profile.test.opt-level=1"]
    commands = []
    for name in sorted({name for name, _ in binaries}):
        parts = sorted(part for binary, part in binaries if binary == name)
        commands.append([*cargo, "--test", name, "--", *([] if "" in parts else parts)])
    if modules:
        commands.append([*cargo, "--lib", "--", *sorted(modules)])
    if modules or binaries:
        commands.append([*cargo, "--test", "architecture"])
    return commands


def python_tests(paths: Iterable[str]) -> list[str]:
    """The test files and folders for the changed modules of the package."""
    chosen = set()
    for path in map(Path, paths):
        match path.parts:
            case ("tests", "python", folder, file) if file.startswith("test_"):
                chosen.add(f"tests/python/{folder}/{file}")
            case ("python", "nybble", folder, _, *_) if folder not in SLOW:
                chosen.add(f"tests/python/{folder}")
            case ("python", "nybble", file) if path.suffix == ".py":
                chosen.add(f"tests/python/api/test_{Path(file).stem}.py")
    if chosen:
        chosen.add("tests/python/repository/test_architecture.py")
    return sorted(path for path in chosen if (ROOT / path).exists())


def main() -> int:
    base = sys.argv[1] if len(sys.argv) > 1 else "HEAD"
    paths = changed_files(base) or changed_files("HEAD~1")
    commands = rust_tests(paths)
    if tests := python_tests(paths):
        commands.append([sys.executable, "-m", "pytest", "-q", "--numprocesses", "2", *tests])
    for command in commands:
        print("$", *command, flush=True)
        if code := subprocess.run(command, cwd=ROOT, check=False).returncode:
            return code
    return 0


if __name__ == "__main__":
    sys.exit(main())
