"""Converted files in llama.cpp, which must continue them as transformers continued the checkpoints.

Runs where llama-cpp-python is installed: `pip install --group peers`.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from goldens import GOLDENS, golden

from nybble import _native

llama_cpp = pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed: pip install --group peers")

# llama.cpp has no graph for GPT-J, and neither a graph nor a name for OPT. In the others it fixes what models choose:
# the activation, the choice among groups of experts, the number of layers with windows, chunks, norms, or ranks.
UNKNOWN = {"gptj", "opt", "bitnet", "deepseek_v2", "deepseek_v2-lite", "exaone4", "gemma3n", "llama4_text", "phimoe"}
FAMILIES = sorted(folder.name for folder in GOLDENS.iterdir() if folder.name not in UNKNOWN)
# Families whose windows llama.cpp does not know, and how far they reach: up to there it must agree.
WINDOWLESS = {"mistral": 12}
# How far ahead the first choice must have been for a token to count.
CLEAR = 0.002


@pytest.mark.parametrize("family", FAMILIES)
def test_llama_cpp_continues_a_converted_file_like_transformers(family: str, tmp_path: Path) -> None:
    folder, file = tmp_path / family, tmp_path / f"{family}.gguf"
    shutil.copytree(GOLDENS / family, folder)
    for path in GOLDENS.glob("llama/tokenizer*.json"):  # One vocabulary does for all of them.
        shutil.copy(path, folder)
    _native.convert(folder, file, "f32")
    # A cache in F32 (type 0), because nothing is rounded in the reference.
    peer = llama_cpp.Llama(str(file), n_ctx=128, logits_all=True, type_k=0, type_v=0, n_threads=2, verbose=False)
    prompts = golden(family, "input_ids")
    if family in WINDOWLESS:
        expected = golden(family, "logits")[0][: WINDOWLESS[family]].argmax(axis=1)
        peer.eval(prompts[0][: WINDOWLESS[family]].tolist())
        assert np.array_equal(np.asarray(peer.scores)[: WINDOWLESS[family]].argmax(axis=1), expected)
        return
    rows = zip(prompts, golden(family, "greedy"), golden(family, "greedy_gap"), strict=True)
    for prompt, greedy, gap in rows:
        ids = [*prompt.tolist(), *greedy.tolist()]
        peer.reset()
        peer.eval(ids)
        # Teacher-forced, so that one tie does not decide over what follows.
        found = np.asarray(peer.scores)[len(prompt) - 1 : len(ids) - 1].argmax(axis=1)
        assert np.array_equal(found[gap > CLEAR], greedy[gap > CLEAR])
