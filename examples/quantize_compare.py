"""Quantize a checkpoint with several recipes and compare what each of them costs.

    python examples/quantize_compare.py SOURCE TEXT

SOURCE is a folder with safetensors, a GGUF file in F32, F16 or BF16, or a Hugging Face repository. TEXT is a file of
prose: its first half calibrates, its second half measures. A few hundred kilobytes are enough to compare recipes.
"""

import sys
import tempfile
from pathlib import Path
from typing import Literal

from nybble import Model, Reference, quantize

CANDIDATES: list[tuple[Literal["rtn", "gptq"], Literal["q4_0", "iq4_nl"]]] = [
    ("rtn", "q4_0"),
    ("gptq", "q4_0"),
    ("gptq", "iq4_nl"),
]

source = sys.argv[1]
text = Path(sys.argv[2]).read_text(encoding="utf-8")
middle = len(text) // 2
calibration, held_out = [text[:middle]], [text[middle:]]

with Model.load(source, quantize=None) as model:  # full precision
    reference = Reference(model, held_out)

with tempfile.TemporaryDirectory() as folder:
    for recipe, format in CANDIDATES:
        out = Path(folder) / f"{recipe}-{format}.gguf"
        report = quantize(source, out, recipe=recipe, format=format, calibration=calibration)
        with Model.load(out) as model:
            result = reference.compare(model)
        print(
            f"{recipe:5}{format:7}{report.size_bytes / 1e6:8.1f} MB, perplexity {result.perplexity:.2f}, "
            f"mean KL {result.kl_mean:.4f}, same top token {result.top_agreement:.1%}"
        )
