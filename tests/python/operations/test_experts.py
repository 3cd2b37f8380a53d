"""Models of experts that do not fit into memory, and experts that are left out."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import cgroups
import numpy as np
import pytest
import tiny

import nybble
from nybble import LoadOptions, Model, ModelError, SamplingOptions, _native, pipeline
from nybble.cli import main

IDS = [(7 * i) % 250 for i in range(24)]
RUN = (
    cgroups.JOIN
    + """
import hashlib, json
from nybble import Model
options = json.loads(sys.argv[3])
try:
    with Model.load(sys.argv[2], threads=2, progress=False, **options) as model:
        logits = model._native.logits(json.loads(sys.argv[4]))
        tokens = list(model.generate([1, 2, 3], max_tokens=8, temperature=0, ignore_eos=True).tokens)
        use = model.expert_use
        print(json.dumps([hashlib.sha256(logits.tobytes()).hexdigest(), tokens, use.needed, use.read]))
except MemoryError:
    print("null")
"""
)
"""Runs a model in a control group and prints a hash of its logits, its tokens, and what it has read."""


def run(folder: Path, file: Path, **options: object) -> object:
    arguments = [str(folder), str(file), json.dumps(options), json.dumps(IDS)]
    done = subprocess.run(
        [sys.executable, "-c", RUN, *arguments], capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.skipif(sys.platform != "linux", reason="needs control groups")
def test_a_model_twice_as_large_as_the_memory_has_the_same_results(tmp_path: Path) -> None:
    file = tiny.write_experts(tmp_path / "experts.gguf", layers=8, hidden=1024, feed_forward=2048, experts=8)
    limit = file.stat().st_size // 2
    limits = {"memory.max": limit, "memory.swap.max": 0}
    with Model.load(file, threads=2, progress=False) as model:
        digest = hashlib.sha256(model._native.logits(IDS).tobytes()).hexdigest()
        tokens = list(model.generate([1, 2, 3], max_tokens=8, temperature=0, ignore_eos=True).tokens)
        assert model.expert_use.needed == 0
    with cgroups.group("memory", first={"memory.limit_in_bytes": limit}, second=limits) as group:
        assert run(group, file) is None, "the model fits into the memory"
        for expert_memory in (limit / 3e9, "auto"):
            found = run(group, file, expert_memory=expert_memory)
            assert isinstance(found, list)
            assert found[:2] == [digest, tokens]
            assert 0 < found[3] < found[2]


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with experts of 100 kB."""
    path = tmp_path_factory.mktemp("experts") / "small.gguf"
    return tiny.write_experts(path, layers=3, hidden=128, feed_forward=256, experts=8, used=3)


def test_a_file_that_is_truncated_while_a_model_runs_is_an_error(small: Path, tmp_path: Path) -> None:
    file = tmp_path / "copy.gguf"
    file.write_bytes(small.read_bytes())
    with Model.load(file, expert_memory=0.001, progress=False) as model:
        text = model.generate([1, 2, 3], max_tokens=5, seed=1).text
        content = file.read_bytes()
        with file.open("r+b") as out:
            out.truncate(len(content) // 3)
        with pytest.raises(ModelError, match=r"copy\.gguf: the file: found .*, expected .* load the model again"):
            model.generate([5, 6, 7], max_tokens=50, seed=2, ignore_eos=True)
    file.write_bytes(content)
    with Model.load(file, expert_memory=0.001, progress=False) as model:
        assert model.generate([1, 2, 3], max_tokens=5, seed=1).text == text


def test_adapters_of_experts_work_with_some_of_them_in_memory(small: Path, tmp_path: Path) -> None:
    dice = np.random.default_rng(3)
    rank, stacks = 2, {"gate": (128, 256), "up": (128, 256), "down": (256, 128)}
    tensors = {}
    for name, (columns, rows) in stacks.items():
        for end, shape in (("lora_a", (columns, rank, 8)), ("lora_b", (rank, rows, 8))):
            values = dice.normal(0, 0.3, shape).astype(np.float32)
            tensors[f"blk.1.ffn_{name}_exps.weight.{end}"] = (tiny.F32, shape, values.tobytes())
    about = {"general.type": "adapter", "general.architecture": "llama", "adapter.type": "lora"}
    adapter = tmp_path / "adapter.gguf"
    tiny.write_gguf(adapter, {**about, "adapter.lora.alpha": 4.0}, tensors)
    found = []
    for expert_memory in (None, 0.001):
        with Model.load(small, expert_memory=expert_memory, adapter=adapter, progress=False) as model:
            found.append(model._native.logits(IDS))
    with Model.load(small, progress=False) as model:
        base = model._native.logits(IDS)
    assert np.array_equal(found[0], found[1])
    assert not np.array_equal(found[0], base)


def test_stages_of_a_pipeline_limit_their_experts(small: Path) -> None:
    options = SamplingOptions(max_tokens=6, seed=1, ignore_eos=True)
    with Model.load(small, progress=False) as whole:
        expected = whole.generate([1, 2, 3], options).tokens
    load = LoadOptions(threads=1, expert_memory=0.0005)
    with pipeline.processes(small, stages=2, load=load) as engine:
        assert engine.submit([1, 2, 3], options).result(timeout=100).tokens == expected


def evaluated(file: Path, text: Path, capsys: pytest.CaptureFixture[str], *options: str) -> dict[str, float]:
    command = ["eval", str(file), "--text", str(text), "--window", "64", "--json", *options]
    assert main(command) == 0
    figures: dict[str, float] = json.loads(capsys.readouterr().out)
    return figures


def test_eval_compares_a_model_that_leaves_out_experts_with_itself(
    small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = tmp_path / "text.txt"
    text.write_text("".join(chr(32 + i * i % 90) for i in range(700)))
    skipped = evaluated(small, text, capsys, "--expert-skip", "0.5")
    assert 0 < skipped["experts_below_0.2"] < skipped["experts_below_0.5"] < 1
    assert skipped["kl_mean"] > 0
    counted = evaluated(small, text, capsys, "--expert-skip", "0", "--expert-memory", "0.001")
    assert "kl_mean" not in counted
    assert counted["perplexity"] == skipped["reference_perplexity"]
    # Each token counts in each layer; what later layers choose depends on what earlier ones leave out.
    assert abs(counted["experts_below_0.5"] - skipped["experts_below_0.5"]) < 0.1


def test_options_of_experts_are_refused_where_they_have_no_effect(
    small: Path, tiny_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    refused: list[tuple[dict[str, Any], str]] = [
        ({"expert_memory": 1}, "expert_memory: found 1 GB for a model without experts"),
        ({"expert_skip": 0.1}, "expert_skip: found 0.1 for a model without experts"),
    ]
    for options, message in refused:
        with pytest.raises(ValueError, match=message):
            Model.load(tiny_file, progress=False, **options)
    for expert_memory in ("4", "none", -1, float("nan"), 0):
        with pytest.raises(ValueError, match="expert_memory: found"):
            Model.load(small, progress=False, expert_memory=expert_memory)
    assert main(["run", str(small), "a", "--expert-memory", "much"]) != 0
    assert "'much'" in capsys.readouterr().err
    assert main(["run", str(small), "a", "--max-tokens", "1", "--expert-memory", "auto"]) == 0


DOCUMENTS = ["".join(chr(32 + (i * i + n) % 90) for i in range(900)) for n in range(6)]


def test_quantize_keeps_the_experts_that_tokens_choose_most(small: Path, tmp_path: Path) -> None:
    out = tmp_path / "pruned.gguf"
    report = nybble.quantize(
        small, out, recipe="rtn", prune_experts=5, calibration=DOCUMENTS, calibration_tokens=4096, progress=False
    )
    found = report.pruning
    assert found is not None
    assert (found.before, found.after) == (8, 5)
    # Three of eight are left out, those that are chosen least.
    assert 0 < found.left_out < 3 / 8
    assert found.kl_mean > 0
    assert 0 < found.top_agreement <= 1
    assert nybble.Report.from_json(report.to_json()) == report
    assert _native.GgufFile(out).metadata["llama.expert_count"] == 5
    with Model.load(out, expert_skip=0, progress=False) as model, Model.load(small, progress=False) as whole:
        model.generate([1, 2, 3], max_tokens=20, seed=1)
        assert [len(layer) for layer in model.expert_use.chosen] == [5, 5, 5]
        experts = 3 * 256 * 128 * 3 * 3
        assert whole.info.parameters - model.info.parameters == experts + 3 * 3 * 128


def test_numbers_of_experts_that_a_model_cannot_have_are_refused(small: Path, tiny_file: Path, tmp_path: Path) -> None:
    for count in (2, 8):
        with pytest.raises(ValueError, match=f"prune_experts: found {count}, expected 3 to 7"):
            nybble.quantize(small, tmp_path / "out.gguf", recipe="rtn", prune_experts=count, calibration=DOCUMENTS)
    with pytest.raises(ValueError, match="prune_experts: found 4 for a model without experts"):
        nybble.quantize(tiny_file, tmp_path / "out.gguf", recipe="rtn", prune_experts=4, calibration=DOCUMENTS)
    with pytest.raises(ValueError, match="prune_experts: found 0, expected a number of experts"):
        nybble.QuantizeOptions(prune_experts=0)
    assert not (tmp_path / "out.gguf").exists()


def test_needs_count_the_memory_of_experts_up_to_the_limit(small: Path) -> None:
    whole, limited = (_native.model_needs(small, LoadOptions(expert_memory=limit)) for limit in (None, 0.001))
    assert 1_000_000 < whole["weight_bytes"] - limited["weight_bytes"] < whole["weight_bytes"] - 1_000_000
    assert _native.model_needs(small, LoadOptions(expert_memory="auto")) == whole
