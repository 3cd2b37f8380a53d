"""Quantization from Python and from the command line, and its report."""

from __future__ import annotations

import dataclasses
import html
import html.parser
import json
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from nybble import Model, ModelError, QuantizeOptions, Report, _native, quantize
from nybble.cli import main
from nybble.integrations import tasks
from nybble.models import hub
from nybble.quantization import calibration
from nybble.quantization.measuring import split
from nybble.quantization.report_data import TaskScore
from nybble.quantization.report_plots import Axis, Point, Series, plot
from nybble.quantization.spec import Spec

TEXT = "The quick brown fox jumps over the lazy dog, and the dog, being lazy, does not mind at all. " * 30


@pytest.fixture(scope="module")
def source(tiny_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model in F32."""
    path = tmp_path_factory.mktemp("source") / "tiny-f32.gguf"
    _native.convert(tiny_file, path, "f32")
    return path


def test_the_output_runs_and_the_report_describes_it(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.gguf"
    report = quantize(source, out, recipe="rtn", group=64)
    assert report.out == out
    assert report.size_bytes == out.stat().st_size
    assert report.bits_per_weight == pytest.approx(4.5)
    assert report.candidates == ()
    linear = [tensor for tensor in report.tensors if tensor.name.startswith("blk.")]
    assert len(linear) == 14
    assert {tensor.type for tensor in linear} == {"Q4_0"}
    with Model.load(out) as model:
        assert model.generate("x", max_tokens=4).usage.completion_tokens <= 4


@pytest.mark.parametrize("pattern", [None, "2:4"])
@pytest.mark.parametrize("recipe", ["rtn", "gptq"])
def test_half_of_the_weights_can_be_zero(source: Path, tmp_path: Path, recipe: Any, pattern: Any) -> None:
    out = tmp_path / "out.gguf"
    report = quantize(source, out, recipe=recipe, sparsity=0.5, sparsity_pattern=pattern, calibration=[TEXT])
    assert 0.5 <= report.sparsity < 0.65
    assert Report.from_json(report.to_json()).sparsity == report.sparsity
    assert "of the weights of linear layers" in report._repr_html_()
    assert {tensor.type for tensor in report.tensors if tensor.name.startswith("blk.")} == {"Q4_0"}
    dense = quantize(source, tmp_path / "dense.gguf", recipe=recipe, calibration=[TEXT])
    assert dense.sparsity < 0.25
    with Model.load(out) as model:
        assert model.generate("x", max_tokens=4).usage.completion_tokens <= 4


def test_an_evaluation_text_gives_figures(source: Path, tmp_path: Path) -> None:
    report = quantize(
        source, tmp_path / "out.gguf", recipe="gptq", group=64, symmetric=False, calibration=[TEXT], evaluation=[TEXT]
    )
    chosen = report.chosen
    assert chosen is not None
    assert (chosen.recipe, chosen.format, chosen.group) == ("gptq", "q4_1", 64)
    assert chosen.kl_mean is not None
    assert 0 < chosen.kl_mean < 1
    assert report.reference_perplexity is not None
    assert report.kl_by_position


def test_auto_tries_recipes_and_gives_the_reason_for_its_choice(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.gguf"
    stages: list[str] = []
    report = quantize(
        source,
        out,
        group=64,
        calibration=[TEXT[::-1]],
        target=1e-6,
        progress=lambda stage, done, total: stages.append(stage),
    )
    assert len(report.candidates) > 1
    assert report.chosen is not None
    assert report.chosen.recipe == report.recipe
    assert report.chosen.kl_mean == min(candidate.kl_mean or 0 for candidate in report.candidates)
    assert report.chosen_because
    assert report.chosen_because in html.unescape(report.to_html())
    assert len(set(stages)) > 2
    assert list(tmp_path.iterdir()) == [out]


def test_windows_to_measure_on_are_held_out(source: Path, tmp_path: Path) -> None:
    windows = calibration_windows(40)
    seen, held_out = split(windows)
    assert len(held_out) == 5
    assert sorted(map(tuple, [*seen.tolist(), *held_out.tolist()])) == sorted(map(tuple, windows.tolist()))
    report = quantize(source, tmp_path / "out.gguf", recipe="rtn", calibration=[TEXT], measure=True)
    assert report.chosen is not None


def calibration_windows(count: int) -> Any:
    import numpy as np

    return np.arange(count * 4, dtype=np.int32).reshape(count, 4)


def test_the_sample_and_generated_text_serve_to_calibrate(source: Path, tmp_path: Path) -> None:
    (sample,), _ = calibration.documents("sample")
    assert isinstance(sample, str)
    assert len(sample) > 10_000
    for text in ("sample", "self"):
        report = quantize(source, tmp_path / f"{text}.gguf", recipe="gptq", calibration=text, calibration_tokens=1024)
        assert report.recipe == "gptq"
    assert len(list(tmp_path.iterdir())) == 2


def test_generated_text_depends_on_the_seed_only(source: Path) -> None:
    with Model.load(source) as model:
        first = calibration.generate(model, 200, window=50, seed=3)
        assert first.shape == (4, 50)
        assert (first == calibration.generate(model, 200, window=50, seed=3)).all()
        assert (first != calibration.generate(model, 200, window=50, seed=4)).any()


def test_generated_text_is_kept_for_the_next_run(source: Path, tmp_path: Path) -> None:
    keep, counts = tmp_path / "kept", list[int]()

    def stop_late(done: int, total: int) -> None:
        counts.append(done)
        if done > total * 0.9:
            raise KeyboardInterrupt

    with Model.load(source) as model:
        whole = calibration.generate(model, 1000, window=50)
        with pytest.raises(KeyboardInterrupt):
            calibration.generate(model, 1000, window=50, progress=stop_late, keep=keep, key="a")
        assert counts[0] == 8, "one token per window of a batch"
        data = keep.read_bytes()
        for damaged, batches in ((data, 2), (data + b"torn", 2), (data[:-1] + b"?", 1), (data[:9], 0)):
            keep.write_bytes(damaged)
            counts.clear()
            again = calibration.generate(
                model, 1000, window=50, progress=lambda done, _: counts.append(done), keep=keep, key="a"
            )
            assert (again == whole).all()
            assert counts[0] == batches * 8 * 49 + (4 if batches == 2 else 8)
            assert keep.read_bytes() == data
        counts.clear()
        calibration.generate(model, 1000, window=50, progress=lambda done, _: counts.append(done), keep=keep, key="b")
        assert counts[0] == 8


def test_a_report_survives_json_and_ignores_unknown_keys() -> None:
    report = Report.from_json(json.dumps({**REPORT, "more": 1}))
    assert Report.from_json(report.to_json()) == report
    assert report.chosen is not None
    assert report.chosen.recipe == "gptq"
    assert report.reference_perplexity == 48.9
    sparse = [{name: x for name, x in one.items() if name not in ("format", "group")} for one in REPORT["candidates"]]
    assert Report.from_json(json.dumps({**REPORT, "candidates": sparse})).candidates == report.candidates


REPORT: dict[str, Any] = {
    "source": "/models/<b>source</b>",
    "out": "out.gguf",
    "recipe": "gptq",
    "chosen_because": "it <i>is</i> & was the best",
    "size_bytes": 91_700_000,
    "bits_per_weight": 4.5,
    "seconds": 75.4,
    "tensors": [
        {
            "name": f"blk.{layer}.{kind}.weight",
            "type": "Q4_0",
            "group": 32,
            "recipe": "gptq",
            "relative_error": None if kind == "attn_q" else 0.01 * (layer + 1),
            "seconds": 0.5,
        }
        for layer in range(3)
        for kind in ("attn_q", "ffn_up", "ffn_down")
    ],
    "candidates": [
        {
            "recipe": recipe,
            "format": "q4_0",
            "group": 32,
            "size_bytes": 91_700_000,
            "perplexity": 50.0,
            "kl_mean": 0.1,
            "kl_median": 0.05,
            "kl_p99": None,
            "top_agreement": 0.8,
            "seconds": 3.0,
            "chosen": recipe == "gptq",
        }
        for recipe in ("rtn", "gptq")
    ],
    "reference": {"perplexity": 48.9},
    "kl_by_position": [0.1, 0.2, 0.15] * 20,
}


def test_a_report_has_the_figures_of_tasks() -> None:
    before = {
        "results": {
            "arc": {"alias": "arc", "sample_len": 20, "acc,none": 0.5, "acc_stderr,none": 0.1},
            "sums": {"exact_match,strict": 0.25, "exact_match_stderr,strict": "N/A"},
            "failed": {"acc,none": 0.5, "f1,none": 0.5},
        },
        "groups": {"all": {"acc,none": 0.4, "acc_stderr,none": float("nan")}},
    }
    after = {
        "results": {
            "arc": {"alias": "arc", "sample_len": 20, "acc,none": 0.45, "acc_stderr,none": 0.11},
            "sums": {"exact_match,strict": 0.2, "exact_match_stderr,strict": "N/A"},
            "failed": {"acc,none": float("nan"), "f1,none": "N/A"},
        },
        "groups": {"all": {"acc,none": 0.3, "acc_stderr,none": 0.2}},
        "n-samples": {"sums": {"original": 100, "effective": 10}},
        "higher_is_better": {"arc": {"acc": True}, "sums": {"exact_match": False}},
    }
    found = tasks.scores(before, after)
    assert found == (
        TaskScore("arc", "acc", 20, 0.5, 0.1, 0.45, 0.11, True),
        TaskScore("sums", "exact_match (strict)", 10, 0.25, None, 0.2, None, False),
        TaskScore("all", "acc", None, 0.4, None, 0.3, 0.2, None),
    )
    report = dataclasses.replace(Report.from_json(json.dumps(REPORT)), tasks=found)
    assert Report.from_json(report.to_json()) == report
    page = Page(report.to_html())
    assert page.open == []
    assert page.tags.count("tr") == 2 + 2 + 9 + 4
    assert "0.45 ± 0.11 (source: 0.5 ± 0.1)" in report._repr_html_()
    for cell in ("<td>acc ↑</td>", "<td>exact_match (strict) ↓</td>", "<td>-0.05</td>", "<td>–</td>"):
        assert cell in report.to_html()


def test_tasks_without_the_harness_are_refused_first(source: Path, tmp_path: Path) -> None:
    script = (
        "import sys; sys.modules['lm_eval'] = None; from nybble.cli import main; "
        f"sys.exit(main(['quantize', {str(source)!r}, {str(tmp_path / 'out.gguf')!r}, '--tasks', 'arc_easy']))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].endswith("needs lm_eval: pip install 'nybble[lm-eval]'")
    assert list(tmp_path.iterdir()) == []


class Page(html.parser.HTMLParser):
    """The tags and links of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.links: list[str] = []
        self.open: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [value or "" for name, value in attributes if name in ("src", "href", "action")]
        if tag not in ("meta", "line", "polyline"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_page_is_complete_and_needs_no_other_file() -> None:
    text = Report.from_json(json.dumps(REPORT)).to_html()
    page = Page(text)
    assert page.open == []
    assert page.tags.count("svg") == 3
    assert page.tags.count("tr") == 2 + 2 + 9  # Two heads, the candidates, the matrices.
    assert page.links == []
    assert "script" not in page.tags
    assert "url(" not in text
    assert "@import" not in text


def test_the_page_escapes_the_values_of_a_report() -> None:
    text = Report.from_json(json.dumps(REPORT)).to_html()
    assert "<b>source" not in text
    assert "&lt;b&gt;source" in text
    assert "it &lt;i&gt;is&lt;/i&gt; &amp; was the best" in text


@pytest.mark.parametrize("missing", ["candidates", "kl_by_position", "reference", "chosen_because", "tensors"])
def test_a_page_leaves_out_missing_values(missing: str) -> None:
    empty: dict[str, Any] = {**REPORT, missing: [] if missing != "reference" else None}
    if missing == "chosen_because":
        empty[missing] = None
    page = Page(Report.from_json(json.dumps(empty)).to_html())
    assert page.open == []


def test_the_command_writes_file_page_and_json(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, page, text = tmp_path / "out.gguf", tmp_path / "report.html", tmp_path / "text.txt"
    text.write_text(TEXT, encoding="utf-8")
    call = ["quantize", str(source), str(out), "--recipe", "rtn", "--group", "64", "--calibration", str(text)]
    assert main([*call, "--report", str(page)]) == 0
    shown = capsys.readouterr().out
    assert "divergence" in shown
    assert page.read_text(encoding="utf-8").startswith("<!doctype html>")
    report = Report.from_json(page.with_suffix(".json").read_text(encoding="utf-8"))
    assert report.chosen is not None

    for occupied in ([], ["--report", str(page)]):
        assert main([*call[:2], str(tmp_path / "new.gguf" if occupied else out), *call[3:], *occupied]) == 1
        assert "already exists; use force to overwrite it" in capsys.readouterr().err
    assert not (tmp_path / "new.gguf").exists()
    assert main([*call, "--force", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["recipe"] == "rtn"
    assert main([*call, "--force", "--report", str(tmp_path / "only.json")]) == 0
    assert json.loads((tmp_path / "only.json").read_text(encoding="utf-8"))["recipe"] == "rtn"
    assert not (tmp_path / "only.html").exists()


def test_a_source_is_not_overwritten_even_by_force(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = tmp_path / "copy.gguf"
    copy.write_bytes(source.read_bytes())
    for recipe in ("rtn", "auto"):
        assert main(["quantize", str(copy), str(copy), "--force", "--recipe", recipe]) == 1
        assert "which is read, expected another file" in capsys.readouterr().err
    assert copy.read_bytes() == source.read_bytes()


def test_the_summary_counts_matrices_and_smaller_groups(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    call = ["quantize", str(source), str(tmp_path / "out.gguf"), "--recipe", "rtn", "--force"]
    assert main([*call, "--group", "64"]) == 0
    shown = capsys.readouterr()
    assert "1 matrix of Q8_0, 12 matrices of Q4_0 in groups of 64" in " ".join(shown.out.split())
    assert "groups of 64 do not divide the rows of 2 matrices: groups of 32 there" in shown.err
    assert main([*call, "--group", "32"]) == 0
    assert "groups of" not in capsys.readouterr().err
    assert main([*call, "--group", "0"]) == 0
    shown = capsys.readouterr()
    assert "2 matrices of Q4_0 in groups of 96" in " ".join(shown.out.split())
    assert "groups of" not in shown.err


def test_a_source_that_is_quantized_already_is_reported(
    tiny_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["quantize", str(tiny_file), str(tmp_path / "out.gguf"), "--recipe", "rtn"]) == 0
    assert f"{tiny_file} holds Q4_0, Q8_0, whose weights are rounded already" in capsys.readouterr().err


def test_ctrl_c_ends_the_command_with_a_hint(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(_native, "quantize", interrupted)
    assert main(["quantize", str(source), str(tmp_path / "out.gguf"), "--recipe", "rtn"]) == 130
    assert "interrupted: the same command continues from here" in capsys.readouterr().err


KILLED = """
import os, signal, sys
from nybble import quantize

def progress(stage, done, total):
    print(stage, flush=True)
    if stage == "tuning" and done > total * float(sys.argv[4]):
        os.kill(os.getpid(), signal.SIGKILL)

quantize(sys.argv[1], sys.argv[2], recipe="gptq+tune", calibration=[sys.argv[3] * 4], progress=progress)
"""


def test_a_run_after_a_kill_continues_to_the_same_bytes(source: Path, tmp_path: Path) -> None:
    whole, out = tmp_path / "whole.gguf", tmp_path / "out.gguf"
    quantize(source, whole, recipe="gptq+tune", calibration=[TEXT * 4])
    for share in (0.3, 0.7, 0.9):
        call = [sys.executable, "-c", KILLED, str(source), str(out), TEXT, str(share)]
        killed = subprocess.run(call, check=False, capture_output=True, text=True)
        assert killed.returncode == -signal.SIGKILL, killed.stderr
        assert ("tuning: full precision" in killed.stdout) == (share < 0.5), "finished work is not repeated"
        assert not out.exists()
    quantize(source, out, recipe="gptq+tune", calibration=[TEXT * 4])
    assert out.read_bytes() == whole.read_bytes()
    assert sorted(tmp_path.iterdir()) == [out, whole]


KILLED_WHILE_MEASURING = """
import os, signal, sys
from nybble import quantize

def progress(stage, done, total):
    if stage == "measuring the source":
        os.kill(os.getpid(), signal.SIGKILL)

quantize(sys.argv[1], sys.argv[2], recipe="rtn", evaluation=[sys.argv[3]], progress=progress)
"""


def test_a_run_killed_while_measuring_continues_with_the_measurement(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.gguf"
    call = [sys.executable, "-c", KILLED_WHILE_MEASURING, str(source), str(out), TEXT]
    killed = subprocess.run(call, check=False, capture_output=True, text=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    written = out.stat().st_mtime_ns
    with pytest.raises(FileExistsError, match="already exists"):
        quantize(source, out, recipe="rtn", group=64, evaluation=[TEXT])
    report = quantize(source, out, recipe="rtn", evaluation=[TEXT])
    assert report.chosen is not None
    assert report.tensors
    assert out.stat().st_mtime_ns == written, "the output is not written again"
    assert list(tmp_path.iterdir()) == [out]
    with pytest.raises(FileExistsError, match="already exists"):
        quantize(source, out, recipe="rtn", evaluation=[TEXT])


def test_options_are_given_as_an_object_or_by_name(source: Path, tmp_path: Path) -> None:
    by_name, by_object = tmp_path / "a.gguf", tmp_path / "b.gguf"
    quantize(source, by_name, recipe="rtn", group=64, format="q4_1")
    quantize(source, by_object, QuantizeOptions(recipe="rtn", group=64), symmetric=False)
    assert by_name.read_bytes() == by_object.read_bytes()
    with pytest.raises(TypeError, match="no such option: groups"):
        quantize(source, tmp_path / "c.gguf", groups=64)  # type: ignore[call-arg]


def test_the_seed_decides_generated_text_and_the_order_of_tuning(source: Path, tmp_path: Path) -> None:
    def made(**options: Any) -> bytes:
        out = tmp_path / "out.gguf"
        quantize(source, out, force=True, **options)
        return out.read_bytes()

    tuned = {"recipe": "gptq+tune", "calibration": [TEXT * 4]}
    generated = {"recipe": "gptq", "calibration": "self", "calibration_tokens": 1024}
    for options in (tuned, generated):
        assert made(seed=3, **options) == made(seed=3, threads=1, **options)
        assert made(seed=3, **options) != made(seed=4, **options)


def test_the_command_prints_80_columns(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from nybble.cli.quantize import _print

    _print(Report.from_json(json.dumps(REPORT)), [tmp_path / "report.html"])
    assert max(map(len, capsys.readouterr().out.splitlines())) <= 80


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--recipe", "best"], "best"),
        (["--group", "48"], "group: found 48"),
        (["--asymmetric", "--format", "q4_0"], "symmetric: found False"),
        (["--bits-per-weight", "2"], "bits_per_weight: found 2"),
        (["--sparsity", "1.5"], "sparsity: found 1.5"),
        (["--sparsity", "0.5", "--sparsity-pattern", "4:8"], "'4:8' is not one of"),
        (["--sparsity", "0.6", "--sparsity-pattern", "2:4"], "sparsity: found 0.6"),
        (["--sparsity-pattern", "2:4"], "sparsity_pattern: found 2:4"),
        (["--sparsity", "0.5", "--format", "iq4_nl"], "format: found iq4_nl with sparsity"),
        (["--target", "often"], "--target: found 'often'"),
        (["--target", "200%"], "target: found 2.0"),
        (["--target", "1%", "--recipe", "gptq"], "target: found 0.01 with the recipe gptq"),
        (["--budget", "5", "--recipe", "rtn"], "budget: found 5.0 with the recipe rtn"),
        (["--budget", "0"], "budget: found 0"),
        (["--seed", "-1"], "seed: found -1"),
        (["--tasks", "arc_easy", "--task-limit", "0"], "'--task-limit': 0 is not in the range"),
        (["--task-limit", "5"], "--task-folder and --task-limit: found without --tasks"),
        (["--task-folder", "."], "--task-folder and --task-limit: found without --tasks"),
        (["--keep", "q4_0"], "--keep: found 'q4_0'"),
        (["--recipe", "rtn", "--keep", "blk.*=q9"], "q9"),
        (["--recipe", "auto", "--keep", "blk.9.*=q8_0"], 'keep: found "blk.9.*", which matches no tensor'),
        (["--recipe", "gptq", "--calibration", "absent.txt"], "absent.txt: no such file or directory, expected a text"),
        (["--recipe", "gptq", "--calibration", "."], ".: is a directory, expected a text"),
        (["--report", "absent/report.html"], "absent/report.html"),
    ],
)
def test_misuse_is_named_before_anything_is_written(
    source: Path, tmp_path: Path, arguments: list[str], complaint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["quantize", str(source), str(tmp_path / "out.gguf"), *arguments]) in (1, 2)
    assert complaint in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_too_little_text_is_refused(source: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="found 9 tokens, expected at least 128"):
        quantize(source, tmp_path / "out.gguf", recipe="gptq", calibration=["too short"])
    with pytest.raises(FileNotFoundError, match="folder"):
        quantize(source, tmp_path / "absent" / "out.gguf", recipe="rtn")


def test_a_spec_is_a_recipe_a_group_and_a_format_in_any_order() -> None:
    assert Spec.parse("int4:g128:gptq") == Spec("gptq", 128, "q4_0")
    assert Spec.parse("int4:gptq:asym:g0") == Spec("gptq", 0, "q4_1")
    assert Spec.parse("int4:iq4_nl") == Spec("rtn", 32, "iq4_nl")
    for wrong in ("int8:g128", "int4:", "int4:g48", "int4:gptq:rtn", "int4:auto", "int4:g²", "int3:gptq"):
        with pytest.raises(ValueError, match="quantize: found"):
            Spec.parse(wrong)


def test_a_model_loaded_by_a_spec_is_quantized_once(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NYBBLE_CACHE", str(tmp_path))
    seen: list[tuple[int, int]] = []
    with Model.load(source, quantize="int4:g64:rtn", progress=lambda *counts: seen.append(counts)) as model:
        logits = model.logits([1, 2, 3])
        assert model.info.file.parent == hub.cache_dir() / "quantized"
    assert seen
    (kept,) = (tmp_path / "quantized").iterdir()
    made = kept.stat().st_mtime_ns
    with Model.load(source, quantize="int4:rtn:g64") as again:
        assert (again.logits([1, 2, 3]) == logits).all()
    assert kept.stat().st_mtime_ns == made


def test_long_numbers_of_a_plot_do_not_cover_the_title_of_their_axis() -> None:
    series = Series("layers", [Point(0, 0.0001234, "a"), Point(1, 0.0003, "b")])
    page = str(plot([series], Axis("layer", str), Axis("error", "{:.9f}".format), "Errors"))
    numbers = re.findall(r'<text class="tick end" x="([\d.]+)"[^>]*>([^<]+)<', page)
    (title,) = re.findall(r"translate\(([\d.]+) ", page)
    assert all(float(x) - 7 * len(number) > float(title) for x, number in numbers)
