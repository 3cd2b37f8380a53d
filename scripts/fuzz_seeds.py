"""Writes small valid files for the fuzzer to start from: `fuzz_seeds.py FOLDER`."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import mutations

CORPUS = Path(sys.argv[1])


def main() -> None:
    """A GGUF file and a checkpoint of every family, and a vocabulary with a text."""
    with tempfile.TemporaryDirectory() as folder:
        for original in mutations.files(Path(folder)):
            (data,) = original.files.values()
            for target in ("gguf", "model"):
                (CORPUS / target / original.name).write_bytes(data)
    for original in mutations.folders():
        config = original.files["config.json"].replace(b"\n", b" ")
        (CORPUS / "checkpoint" / original.name).write_bytes(config + b"\n" + original.files["model.safetensors"])
    pieces = [
        "2<unk>",
        "3<s>",
        "1\u2581",
        "1a",
        "1b",
        "1ab",
        "1\u2581a",
        *(f"6<0x{byte:02X}>" for byte in range(256)),
        "4<turn>",
    ]
    text = "\n".join(pieces) + "\n\nab a b\u00e9<turn> <s>"
    (CORPUS / "vocabulary" / "pieces").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
