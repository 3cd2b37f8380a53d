"""Makes the table of families in docs/models.md.

python scripts/models_page.py            # writes the table
python scripts/models_page.py --check    # fails when the table is not up to date, or when a family is missing from it

The families come from tests/data/families.txt (the crate's own table), their descriptions and sizes from
docs/families.json, and what is tested from the checkpoints under tests/data. In docs/families.json, `sizes` are
published models with billions of weights, and `try` is a repository of the Hugging Face Hub.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "models.md"
BEGIN, END = "<!-- families: made by scripts/models_page.py -->\n", "<!-- end of families -->\n"
MEMORY_GB = (8, 16, 24)
# INT4 takes 4.5 bits for most weights and 8.5 for the output matrix: about 5 on average.
GB_PER_BILLION = 5.0 / 8
# The system, the process and the KV cache of some thousand tokens.
OTHER_GB = 1.5


def known_families() -> dict[str, tuple[str, set[str]]]:
    """Each model type: its GGUF architecture and all names of the type. Architectures without one are listed, too."""
    known: dict[str, tuple[str, set[str]]] = {}
    for line in (ROOT / "tests/data/families.txt").read_text().splitlines():
        architecture, _, types = line.partition(":")
        names = types.split()
        for name in names or [architecture]:
            known[name] = architecture, set(names)
    return known


def tested() -> tuple[set[str], set[str]]:
    """Model types of the folders that the tests read, and the names of the GGUF files of other converters."""
    configs = ROOT.glob("tests/data/*/*/config.json")
    folders = {json.loads(config.read_text())["model_type"] for config in configs}
    # Without adapters, which need a model.
    files = (path for path in ROOT.glob("tests/data/**/*.gguf") if "adapters" not in path.parts)
    return folders, {file.stem for file in files}


def row(family: dict[str, Any], known: dict[str, tuple[str, set[str]]]) -> str:
    """The row of a family."""
    folders, files = tested()
    types = family["types"]
    architectures = sorted({known[name][0] for name in types} | set(family.get("architectures", [])))
    missing = [name for name in types if not known[name][1] & folders]
    if missing:
        raise SystemExit(f"docs/families.json: no checkpoint under tests/data has the model type {missing[0]}")
    checks = ["folders", "GGUF"]
    if any(file.split("-")[0] in {alias for name in types for alias in known[name][1]} for file in files):
        checks[1] = "GGUF of llama.cpp"
    checks.append("embeddings" if family.get("embeds") else "INT4")
    fits = [_largest(family.get("sizes", {}), memory) for memory in MEMORY_GB]
    source = family.get("try", "FOLDER")
    example = f'`Model.load("{source}").embed(texts)`' if family.get("embeds") else f"`nybble run {source}`"
    names = ", ".join(f"`{name}`" for name in architectures)
    title, includes = family["title"], family["includes"]
    description = includes if includes.startswith(title) else f"{title}: {includes}"
    cells = [description, names, ", ".join(checks), *fits, example]
    return "| " + " | ".join(cells) + " |"


def _largest(sizes: dict[str, float], memory: int) -> str:
    """The largest of the models that fits into a memory of that many GB."""
    fitting = [(size, name) for name, size in sizes.items() if size * GB_PER_BILLION + OTHER_GB <= memory]
    return max(fitting)[1] if fitting else "-"


def table() -> str:
    """All of the table."""
    families = json.loads((ROOT / "docs/families.json").read_text())
    known = known_families()
    listed = {known[name][0] for family in families for name in family["types"]}
    listed |= {name for family in families for name in family.get("architectures", [])}
    absent = sorted({architecture for architecture, _ in known.values()} - listed)
    if absent:
        raise SystemExit(f"docs/families.json: the architecture {absent[0]} is missing")
    memory = " | ".join(f"{gb} GB" for gb in MEMORY_GB)
    head = f"| family | GGUF architecture | tested | {memory} | try it |\n|{' --- |' * (4 + len(MEMORY_GB))}\n"
    return head + "\n".join(row(family, known) for family in families) + "\n"


def main() -> None:
    """Writes or checks the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    page = PAGE.read_text()
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    wanted = f"{before}{BEGIN}{table()}{END}{after}"
    if not parser.parse_args().check:
        PAGE.write_text(wanted)
    elif page != wanted:
        sys.exit("docs/models.md: the table of families is not up to date; run python scripts/models_page.py")


if __name__ == "__main__":
    main()
