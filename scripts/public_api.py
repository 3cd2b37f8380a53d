"""Compares the public Rust API with its snapshot, and checks its size and shape. `make lint` runs it.

python scripts/public_api.py           # fails with a diff if the API is not the one in tests/data/public_api.txt
python scripts/public_api.py --update  # writes the snapshot; review its diff

The API is read from rustdoc's pages, which show what users see: hidden items are not part of it.
"""

from __future__ import annotations

import argparse
import difflib
import html
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
SNAPSHOT = ROOT / "tests" / "data" / "public_api.txt"
# Largest number of pages of structs, enums, traits and functions, apart from those of the module `kernels`.
MAX_PAGES = 60
# Hidden types that a documented signature may name, because they have constructors or accessors elsewhere.
HIDDEN = {"GptqOptions", "SignroundOptions"}

# The blocks of code on a page.
DECLARATION = re.compile(r'<pre class="rust item-decl"><code>(.*?)</code></pre>', re.DOTALL)
HEADER = re.compile(r'<h([34]) class="code-header">(.*?)</h\1>', re.DOTALL)
LINK = re.compile(r"<a [^>]*>(.*?)</a>", re.DOTALL)
# A type that rustdoc has not linked: neither the crate nor the standard library documents it.
UNLINKED = re.compile(r"\b(?:[A-Z][A-Z0-9]*[a-z]\w*|b?f16)\b")


def main() -> int:
    """Compares or updates the snapshot. Returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--update", action="store_true", help="write the snapshot")
    arguments = parser.parse_args()
    folder = document()
    pages = listed(folder)
    text = "\n".join([*reexports((folder / "index.html").read_text(encoding="utf-8")), ""])
    faults = []
    for page in pages:
        source = (folder / page).read_text(encoding="utf-8")
        lines = signatures(source)
        text += "\n".join(["", f"# {name(page)}", *lines, ""])
        faults += [f"{name(page)}: {fault}" for fault in shape_faults(source)]
    counted = [page for page in pages if re.search(r"(^|/)(struct|enum|trait|fn)\.", page)]
    counted = [page for page in counted if not page.startswith("kernels/")]
    if len(counted) > MAX_PAGES:
        faults.append(f"found {len(counted)} pages outside of `kernels`, expected at most {MAX_PAGES}")
    if arguments.update:
        SNAPSHOT.write_text(text, encoding="utf-8")
    else:
        faults += difference(SNAPSHOT.read_text(encoding="utf-8"), text)
    print("\n".join(faults) or f"public API: {len(counted)} pages", file=sys.stderr if faults else sys.stdout)
    return 1 if faults else 0


def document() -> Path:
    """Runs rustdoc. Returns the folder of its pages."""
    metadata = ["cargo", "metadata", "--locked", "--no-deps", "--format-version", "1"]
    done = subprocess.run(metadata, cwd=ROOT, check=True, capture_output=True, text=True)
    found = re.search(r'"target_directory":"([^"]+)"', done.stdout)
    if found is None:
        raise SystemExit("cargo metadata: no target_directory")
    # In one folder, pages with other features or with private items would replace these, and be written anew each time.
    target = Path(found[1], "public-api")
    command = ["cargo", "doc", "--locked", "--no-deps", "--quiet", "--target-dir", str(target)]
    subprocess.run(command, cwd=ROOT, check=True)
    return target / "doc" / "nybble"


def listed(folder: Path) -> list[str]:
    """The pages of items in rustdoc's index, sorted."""
    index = (folder / "all.html").read_text(encoding="utf-8")
    pages = sorted(set(re.findall(r'<li><a href="((?:\w+/)*\w+\.\w+\.html)"', index)))
    if not pages:
        raise SystemExit(f"{folder / 'all.html'}: no items; has rustdoc changed the form of its index?")
    return pages


def name(page: str) -> str:
    """The path of an item: `model/struct.Model.html` is `nybble::model::Model`."""
    *modules, file = page.split("/")
    return "::".join(["nybble", *modules, file.split(".")[1]])


def reexports(index: str) -> list[str]:
    """The re-exports of a module's page, one per line."""
    found = re.findall(r"<code>(pub use .*?;)</code>", index, re.DOTALL)
    return sorted(plain(one) for one in found)


def signatures(page: str) -> list[str]:
    """The declaration of an item, its methods and the traits that it implements."""
    declaration = DECLARATION.search(page)
    lines = plain(declaration[1]).splitlines() if declaration else []
    for level, header in HEADER.findall(section(page, "implementations")):
        lines.append(one_line(header) if level == "3" else "    " + one_line(header))
    for part, traits in (
        ("trait-implementations", ".*"),
        ("synthetic-implementations", r"impl.* !?(Send|Sync) for .*"),
    ):
        headers = [one_line(header) for level, header in HEADER.findall(section(page, part)) if level == "3"]
        lines += [header for header in headers if re.fullmatch(traits, header)]
    return lines


def section(page: str, part: str) -> str:
    """A part of a page, from its heading to the next one."""
    found = re.search(rf'<h2 id="{part}".*?(?=<h2 id=|\Z)', page, re.DOTALL)
    return found[0] if found else ""


def plain(code: str) -> str:
    """The text of a block of code."""
    code = re.sub(r"<summary.*?</summary>", "", code, flags=re.DOTALL)
    code = re.sub(r'<div class="code-attribute">(.*?)</div>', r"\1\n", code, flags=re.DOTALL)
    text = html.unescape(re.sub(r"<[^>]+>", "", code)).replace("\xa0", " ")
    return "\n".join(line.rstrip() for line in text.strip().splitlines())


def one_line(code: str) -> str:
    """The text of a block of code in one line."""
    text = re.sub(r"\s+", " ", plain(code))
    return text.removesuffix(" ⓘ").replace("( ", "(").replace(", )", ")")


def shape_faults(page: str) -> list[str]:
    """Public fields and variants that cannot grow, and types of other crates."""
    declaration = DECLARATION.search(page)
    code = declaration[1] if declaration else ""
    text = plain(code)
    can_grow = "#[non_exhaustive]" in text
    faults = []
    if not can_grow and re.search(r"^pub enum |^pub struct .*(\{\n(.*\n)*? +pub |\(pub )", text, re.MULTILINE):
        faults.append("public fields or variants, expected #[non_exhaustive]")
    # Long lists of variants are behind a summary.
    code = re.sub(r"<details[^>]*><summary.*?</summary>", "", code, flags=re.DOTALL)
    # Names that a declaration introduces are not links: the item itself, its variants, parameters of types.
    code = re.sub(r"\b(struct|enum|trait|type|fn|const)\s+\w+", "", LINK.sub("", code))
    code = plain(re.sub(r"(?m)^    [A-Z]\w*", "", code))
    methods = [LINK.sub("", header) for _, header in HEADER.findall(section(page, "implementations"))]
    words = {word for part in (code, *map(plain, methods)) for word in UNLINKED.findall(part)}
    return faults + [f"{word} is not part of the documented API" for word in sorted(words - HIDDEN - {"Self", "Item"})]


def difference(expected: str, found: str) -> list[str]:
    """The lines that differ, with what to do."""
    lines = difflib.unified_diff(expected.splitlines(), found.splitlines(), "snapshot", "crate", lineterm="", n=2)
    changed = list(lines)
    advice = "the public API has changed: review it, then run `python scripts/public_api.py --update`"
    return [*changed, advice] if changed else []


if __name__ == "__main__":
    sys.exit(main())
