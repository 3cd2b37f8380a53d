"""Perplexity and divergence from Python and from the command line."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import tiny

from nybble import Evaluation, Model, ModelError, Reference, evaluate
from nybble.cli import main
from nybble.quantization import datasets

TEXT = "It was a dark and stormy night; the rain fell in torrents, except at occasional intervals. " * 4
WINDOW = 40


@pytest.fixture(scope="module")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(TEXT, encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def rounded(tiny_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Another model with the same vocabulary."""
    return tiny.write_model(tmp_path_factory.mktemp("other") / "other.gguf", layers=1)


def expected(model: Model) -> tuple[float, int]:
    """The perplexity by its definition, and the number of tokens."""
    ids = model.tokenize(TEXT, add_special=False)
    found = []
    for first in range(0, len(ids) - WINDOW + 1, WINDOW):
        window = ids[first : first + WINDOW]
        logits = model.logits(window).astype(np.float64)
        logs = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
        found += [-logs[i, window[i + 1]] for i in range(WINDOW // 2, WINDOW - 1)]
    return float(np.exp(np.mean(found))), len(found)


def test_perplexity_agrees_with_its_definition(tiny_model: Model, text_file: Path) -> None:
    perplexity, tokens = expected(tiny_model)
    found = evaluate(tiny_model, text_file, window=WINDOW)
    assert found.tokens == tokens
    assert found.perplexity == pytest.approx(perplexity, rel=1e-5)
    assert found.kl_mean is None
    assert evaluate(tiny_model, [TEXT], window=WINDOW) == found


def test_a_reference_outlives_its_model(tiny_model: Model, tiny_file: Path, rounded: Path, text_file: Path) -> None:
    with Model.load(tiny_file) as model:
        reference = Reference(model, text_file, window=WINDOW)
    itself = reference.compare(tiny_model)
    assert itself.top_agreement == 1
    assert itself.kl_mean == pytest.approx(0, abs=1e-5)
    assert itself.perplexity_ratio == pytest.approx(1, abs=1e-4)
    with Model.load(rounded) as other:
        found = reference.compare(other)
        assert found == evaluate(other, text_file, reference=tiny_model, window=WINDOW)
    assert found.kl_mean is not None
    assert found.kl_mean > 0.01
    assert found.kl_by_position is not None
    assert len(found.kl_by_position) == WINDOW - 1 - WINDOW // 2
    assert found.reference_perplexity == pytest.approx(expected(tiny_model)[0], rel=1e-5)


def test_progress_counts_windows_and_can_stop_the_evaluation(tiny_model: Model) -> None:
    seen: list[tuple[int, int]] = []
    evaluate(tiny_model, [TEXT], window=100, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(0, 3), (1, 3), (2, 3), (3, 3)]

    def stop(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        evaluate(tiny_model, [TEXT], window=100, progress=stop)


def test_each_window_begins_with_the_start_token(tmp_path: Path) -> None:
    path = tiny.write_model(tmp_path / "start.gguf", tokenizer__ggml__add_bos_token=True)
    with Model.load(path) as model:
        cut = datasets.windows(model.tokenizer, [TEXT], WINDOW)
        plain = model.tokenize(TEXT, add_special=False)
    assert (cut[:, 0] == tiny.IM_START).all()
    assert cut[0, 1:].tolist() == plain[: WINDOW - 1]
    assert cut[1, 1:].tolist() == plain[WINDOW : 2 * WINDOW - 1]


def test_documents_of_jsonl_are_concatenated(tmp_path: Path, tiny_model: Model) -> None:
    path = tmp_path / "documents.jsonl"
    lines = [json.dumps("first"), "", json.dumps({"text": "second\nline"}), json.dumps({"content": "third"})]
    path.write_text("\n".join(lines), encoding="utf-8")
    assert datasets.read(path) == ["first", "second\nline", "third"]
    assert datasets.tokens(tiny_model.tokenizer, datasets.read(path)) == list(b"firstsecond\nlinethird")


@pytest.mark.parametrize("line", ["{", "[1]", '{"title": "x"}', "7"])
def test_an_invalid_line_of_jsonl_is_refused_by_its_number(tmp_path: Path, line: str) -> None:
    path = tmp_path / "documents.jsonl"
    path.write_text(f'"fine"\n{line}\n', encoding="utf-8")
    with pytest.raises(ModelError, match="line 2"):
        datasets.read(path)


def test_text_and_windows_out_of_range_are_refused(tiny_model: Model, tmp_path: Path, rounded: Path) -> None:
    with pytest.raises(ModelError, match="found 5 tokens, expected at least 40"):
        evaluate(tiny_model, ["short"], window=WINDOW)
    with pytest.raises(ValueError, match="window"):
        evaluate(tiny_model, [TEXT], window=3)
    with pytest.raises(ValueError, match="window: found 512, expected at most 128, the context of the model"):
        evaluate(tiny_model, [TEXT])
    with pytest.raises(FileNotFoundError):
        evaluate(tiny_model, tmp_path / "absent.txt", window=WINDOW)
    (tmp_path / "bytes.txt").write_bytes(b"fine \xff\xfe")
    with pytest.raises(ModelError, match="invalid UTF-8 at byte 5"):
        evaluate(tiny_model, tmp_path / "bytes.txt", window=WINDOW)


def test_eval_prints_every_key_as_json(
    tiny_file: Path, rounded: Path, text_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    call = ["eval", str(rounded), "--text", str(text_file), "--window", str(WINDOW), "--json"]
    assert main([*call, "--reference", str(tiny_file)]) == 0
    found = json.loads(capsys.readouterr().out)
    names = {"perplexity", "kl_mean", "kl_median", "kl_p99", "top_agreement", "rms_dp", "tokens"}
    assert names <= set(found)
    assert main([*call, "--max-tokens", "80"]) == 0
    assert json.loads(capsys.readouterr().out)["tokens"] == 2 * (WINDOW - 1 - WINDOW // 2)


def test_eval_prints_a_table_of_80_columns(
    tiny_file: Path, rounded: Path, text_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["eval", str(rounded), "--text", str(text_file), "--window", "64", "--reference", str(tiny_file)]) == 0
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= 80
    for name in ("perplexity", "of the reference", "KL divergence, mean", "same top token", "±"):
        assert name in out


def test_eval_refuses_a_missing_model_before_it_reads_the_reference(
    tiny_file: Path,
    text_file: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("the reference was loaded")

    monkeypatch.setattr("nybble.cli.eval.load_model", refuse)
    missing = tmp_path / "missing.gguf"
    assert main(["eval", str(missing), "--text", str(text_file), "--reference", str(tiny_file)]) == 1
    assert str(missing) in capsys.readouterr().err


def test_every_error_field_belongs_to_a_figure() -> None:
    fields = set(Evaluation.__dataclass_fields__)
    errors = {name for name in fields if name.endswith("_error")}
    assert {name.removesuffix("_error") for name in errors} <= fields
