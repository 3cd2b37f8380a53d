"""Writes THIRD-PARTY-NOTICES: the crates in the native module of a wheel, the libraries of its chat page, and their
licenses.

python scripts/notices.py                                  # for all platforms with a wheel; the file in the repository
python scripts/notices.py --check                          # whether that file and the list in deny.toml are up to date
python scripts/notices.py --target host -- maturin build   # for one platform while the command runs, then as before
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
NOTICES = ROOT / "THIRD-PARTY-NOTICES"
VENDORED = ROOT / "python" / "nybble" / "server" / "page" / "vendor"
# The platforms with a wheel, as in .github/workflows/wheels.yml, and their names in the file.
TARGETS = {
    "x86_64-unknown-linux-gnu": "Linux",
    "aarch64-unknown-linux-gnu": "Linux on Arm",
    "x86_64-apple-darwin": "macOS on Intel",
    "aarch64-apple-darwin": "macOS",
    "x86_64-pc-windows-msvc": "Windows",
}
# Of several licenses that a crate offers, the first of these applies. Each has a phrase by which its text is found.
PHRASES = {
    "Apache-2.0": "Apache License",
    "MIT": "Permission is hereby granted, free of charge",
    "MIT-0": "Permission is hereby granted, free of charge",
    "BSD-2-Clause": "Redistribution and use in source and binary forms",
    "BSD-3-Clause": "Redistribution and use in source and binary forms",
    "Zlib": "freely, subject to the following restrictions",
    "ISC": "Permission to use, copy, modify, and",
    "Unicode-3.0": "UNICODE LICENSE V3",
    "Unlicense": "This is free and unencumbered software",
}
FILES = ("LICEN", "COPYING", "UNLICENSE")
# Files that go with the license.
EXTRA_FILES = ("NOTICE", "COPYRIGHT")
# Of crates that are published without the text of their license.
MIT = """Permission is hereby granted, free of charge, to any person obtaining a copy of this software and associated
documentation files (the "Software"), to deal in the Software without restriction, including without limitation the
rights to use, copy, modify, merge, publish, distribute, sublicense, and/or sell copies of the Software, and to permit
persons to whom the Software is furnished to do so, subject to the following conditions:

The above copyright notice and this permission notice shall be included in all copies or substantial portions of the
Software.

THE SOFTWARE IS PROVIDED "AS IS", WITHOUT WARRANTY OF ANY KIND, EXPRESS OR IMPLIED, INCLUDING BUT NOT LIMITED TO THE
WARRANTIES OF MERCHANTABILITY, FITNESS FOR A PARTICULAR PURPOSE AND NONINFRINGEMENT. IN NO EVENT SHALL THE AUTHORS OR
COPYRIGHT HOLDERS BE LIABLE FOR ANY CLAIM, DAMAGES OR OTHER LIABILITY, WHETHER IN AN ACTION OF CONTRACT, TORT OR
OTHERWISE, ARISING FROM, OUT OF OR IN CONNECTION WITH THE SOFTWARE OR THE USE OR OTHER DEALINGS IN THE SOFTWARE.
"""
RULE = "-" * 80


@dataclass(frozen=True)
class Crate:
    """A crate of the dependency graph, or a library of the chat page."""

    name: str
    version: str
    license: str
    url: str
    folder: Path
    authors: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.name} {self.version}"


def main() -> int:
    """Writes or checks the file, or runs a command while it is that of one platform. Returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="compare instead of writing")
    parser.add_argument("--target", help="a platform in Rust's terms, or host")
    parser.add_argument("command", nargs="*", help="what to run while the file is that of the platform")
    arguments = parser.parse_args()
    if arguments.check:
        faults = check()
        print("\n".join(faults) or f"{NOTICES.name}: up to date", file=sys.stderr if faults else sys.stdout)
        return 1 if faults else 0
    if arguments.target is None:
        NOTICES.write_text(for_all_targets(), encoding="utf-8")
        return 0
    target = host() if arguments.target == "host" else arguments.target
    before = NOTICES.read_bytes()
    NOTICES.write_text(notices(linked(target), target), encoding="utf-8")
    if not arguments.command:
        return 0
    try:
        return subprocess.run(arguments.command, check=False, cwd=ROOT).returncode
    finally:
        NOTICES.write_bytes(before)


def check() -> list[str]:
    """Whether the file in the repository is right, and deny.toml allows the licenses found and no others."""
    faults = []
    if not NOTICES.is_file() or NOTICES.read_text(encoding="utf-8") != for_all_targets():
        faults.append(f"{NOTICES.name}: does not list what is linked now; run `python scripts/notices.py`")
    entries = re.search(
        r"^allow = \[(.*?)\]", (ROOT / "deny.toml").read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL
    )
    allowed = set(re.findall(r'"([^"]+)"', entries[1])) if entries else set()
    crates = [crate_of(package) for package in metadata()["packages"]]
    faults += [
        f"deny.toml: {crate} is under {crate.license}, expected one of {', '.join(sorted(allowed))}"
        for crate in crates
        if not is_allowed(crate.license, allowed)
    ]
    unused = {name for name in allowed if all(is_allowed(crate.license, allowed - {name}) for crate in crates)}
    return faults + [f"deny.toml: {name} is allowed, but no crate needs it" for name in sorted(unused)]


def is_allowed(expression: str, allowed: Iterable[str]) -> bool:
    """Whether the licenses in `allowed` satisfy an SPDX expression."""
    tokens = re.findall(r"\(|\)|[^\s()]+(?: WITH [^\s()]+)?", expression.replace("/", " OR "))
    words = {"(": "(", ")": ")", "OR": "or", "AND": "and"}
    # Only the four words above and True and False remain.
    return bool(eval(" ".join(words.get(token, str(token in allowed)) for token in tokens)))  # noqa: S307


def host() -> str:
    """The platform of this machine in Rust's terms."""
    done = subprocess.run(["rustc", "-vV"], check=True, capture_output=True, text=True)
    return next(line.split()[1] for line in done.stdout.splitlines() if line.startswith("host:"))


def metadata(*arguments: str) -> dict[str, Any]:
    """What `cargo metadata` says about the wheel's features."""
    wanted = ["--no-default-features", "--features", "python"]
    command = ["cargo", "metadata", "--locked", "--format-version", "1", *wanted, *arguments]
    done = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def crate_of(package: dict[str, Any]) -> Crate:
    """A package of `cargo metadata`."""
    folder, license_file = Path(package["manifest_path"]).parent, package["license_file"]
    return Crate(
        package["name"],
        package["version"],
        package["license"] or f"see {license_file}",
        package["repository"] or f"https://crates.io/crates/{package['name']}",
        folder,
        tuple(package["authors"]),
    )


def linked(target: str) -> list[Crate]:
    """The crates whose code is in the native module for `target`: no build scripts, macros or tests, and not nybble."""
    found = metadata("--filter-platform", target)
    packages = {package["id"]: package for package in found["packages"]}
    nodes = {node["id"]: node for node in found["resolve"]["nodes"]}
    root = found["resolve"]["root"]
    seen, left = set(), [root]
    while left:
        package = left.pop()
        macros = any("proc-macro" in kind for kinds in packages[package]["targets"] for kind in kinds["kind"])
        if package not in seen and not macros:
            seen.add(package)
            left += [
                dependency["pkg"]
                for dependency in nodes[package]["deps"]
                if any(kind["kind"] is None for kind in dependency["dep_kinds"])
            ]
    return sorted((crate_of(packages[package]) for package in seen - {root}), key=str)


def vendored() -> list[Crate]:
    """The libraries of the chat page, which every wheel contains."""
    return [
        Crate(each["name"], each["version"], each["license"], each["url"], (VENDORED / each["file"]).parent, ())
        for each in sorted(_listed(), key=lambda each: str(each["name"]))
    ]


def vendored_files() -> list[Path]:
    """The files of these libraries."""
    return [VENDORED / each["file"] for each in _listed()]


def _listed() -> list[dict[str, str]]:
    listed: list[dict[str, str]] = json.loads((VENDORED / "manifest.json").read_text(encoding="utf-8"))
    return listed


def for_all_targets() -> str:
    """The notices of everything that is linked on some platform with a wheel."""
    platforms = defaultdict(list)
    for target, name in TARGETS.items():
        for crate in linked(target):
            platforms[crate].append(name)
    only = {crate: f" (only {', '.join(names)})" for crate, names in platforms.items() if len(names) < len(TARGETS)}
    return notices(sorted(platforms, key=str), "the platforms with a wheel", only)


def notices(crates: list[Crate], platform: str, only: dict[Crate, str] | None = None) -> str:
    """The file: a list of crates and libraries, and each text of a license once, with those that it applies to."""
    standard_library = "Rust standard library"
    lines = [f"nybble's native module for {platform} contains these crates and the {standard_library}.", ""]
    texts: defaultdict[str, list[str]] = defaultdict(list)
    texts[apache()].append(standard_library)
    libraries = vendored()
    lines += [f"{crate}{(only or {}).get(crate, '')}: {crate.license}, {crate.url}" for crate in crates]
    lines += ["", "nybble's chat page contains these JavaScript libraries.", ""]
    lines += [f"{library}: {library.license}, {library.url}" for library in libraries]
    for crate in [*crates, *libraries]:
        for text in terms_of(crate):
            texts[text].append(str(crate))
    for text, users in texts.items():
        lines += ["", RULE, *wrapped(users), RULE, "", text.rstrip()]
    return "\n".join(lines) + "\n"


def terms_of(crate: Crate) -> list[str]:
    """The license of a crate that applies, and its copyright notices."""
    files = sorted(path for path in crate.folder.iterdir() if path.is_file())
    read = {
        path: path.read_text(encoding="utf-8", errors="replace")
        for path in files
        if is_named(path, FILES + EXTRA_FILES)
    }
    texts = {path: text for path, text in read.items() if is_named(path, FILES)}
    extra = [text for path, text in read.items() if is_named(path, EXTRA_FILES)]
    offered = re.split(r"\s+OR\s+|\s*/\s*", crate.license)
    chosen = next((name for name in PHRASES if name in offered), None)
    if chosen == "Apache-2.0":
        return [apache(), *extra]
    if texts and (chosen is None or " AND " in crate.license or len(texts) == 1):
        return [*texts.values(), *extra]
    phrase = PHRASES.get(chosen or "", crate.license)
    found = [text for text in texts.values() if phrase in " ".join(text.split())]
    if not found and chosen == "MIT":
        found = [f"Copyright (c) {', '.join(crate.authors) or f'the authors of {crate.name}'}\n\n{MIT}"]
    if not found:
        raise SystemExit(f"{crate}: found no text of {crate.license} in {crate.folder.name}, expected a file LICENSE")
    return found + extra


def is_named(path: Path, beginnings: tuple[str, ...]) -> bool:
    """Whether the name of a file begins with one of these, in any case."""
    return path.name.upper().startswith(beginnings)


def apache() -> str:
    """The text of the Apache License, which is nybble's own license, too."""
    return (ROOT / "LICENSE").read_text(encoding="utf-8")


def wrapped(names: list[str]) -> list[str]:
    """A list of names in lines of up to 80 characters."""
    lines = [""]
    for name in names:
        longer = f"{lines[-1]}, {name}" if lines[-1] else name
        if len(longer) > 79:
            lines[-1] += ","
            longer = name
            lines.append("")
        lines[-1] = longer
    return lines


if __name__ == "__main__":
    sys.exit(main())
