"""Draft tokens save steps and never change a completion."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import tiny

from nybble import Engine, Model, SamplingOptions

# Under this bias the model never ends the text by itself.
END = dict.fromkeys((tiny.END_OF_TEXT, tiny.IM_START, tiny.IM_END), -math.inf)
# Seconds after which a test that still waits fails.
LONG = 60


def test_accepted_drafts_save_steps_and_change_nothing(tiny_model: Model) -> None:
    options = SamplingOptions(temperature=0, max_tokens=60, logit_bias={b"x"[0]: 1000.0})
    with Engine(tiny_model, speculation="on") as engine:
        assert engine.submit("abc", options).result(LONG).tokens == tiny_model.generate("abc", options).tokens
        stats = engine.stats()
        assert stats.accepted_tokens > 40
        assert stats.steps < 30


def test_a_draft_model_never_changes_a_completion(tmp_path: Path, tiny_file: Path, tiny_model: Model) -> None:
    small = tiny.write_model(tmp_path / "small.gguf", layers=1)
    options = SamplingOptions(seed=3, max_tokens=60, temperature=1.0, logit_bias=END)
    alone = tiny_model.generate("abc", options)
    for file in (tiny_file, small):
        with (
            Model.load(file, threads=1) as draft,
            Engine(tiny_model, speculation="on", draft=draft) as engine,
        ):
            assert engine.submit("abc", options).result(LONG).tokens == alone.tokens
            stats = engine.stats()
            assert stats.drafted_tokens > 0
            assert (stats.accepted_tokens == stats.drafted_tokens) == (file == tiny_file)


def test_a_draft_model_with_another_vocabulary_is_refused(tmp_path: Path, tiny_model: Model) -> None:
    tokens = tiny.metadata()["tokenizer.ggml.tokens"]
    other = tiny.write_model(tmp_path / "other.gguf", tokenizer__ggml__tokens=[tokens[1], tokens[0], *tokens[2:]])
    with Model.load(other, threads=1) as draft:
        with pytest.raises(ValueError, match=r"draft: found .* as token 0"):
            Engine(tiny_model, speculation="on", draft=draft)
        with pytest.raises(ValueError, match='speculation is "off"'):
            Engine(tiny_model, draft=draft)
