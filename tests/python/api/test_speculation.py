"""Draft tokens save steps and never change a completion."""

from __future__ import annotations

import logging
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
from goldens import GOLDENS, MTP, golden

import nybble
from nybble import Engine, Model, SamplingOptions, _native

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


@pytest.mark.parametrize("family", ["deepseek_v3", "glm4_moe", "qwen3_5"])
def test_a_head_drafts_as_in_transformers_and_changes_nothing(family: str, tmp_path: Path) -> None:
    file = tmp_path / "model.gguf"
    _native.convert(MTP / family, file, "f32")
    for source in (MTP / family, file):
        with Model.load(source, quantize=None, threads=1) as model:
            assert model.info.mtp
            prompts, greedy = golden(family, "input_ids", MTP), golden(family, "greedy", MTP)
            head = golden(family, "mtp_logits", MTP)
            np.testing.assert_allclose(model.mtp_logits(prompts[1].tolist()), head[1], atol=2e-3)
            before = model.info.weight_bytes
            for options in ({"speculation": "mtp"}, {"speculation": "mtp", "draft_tokens": 1}, {"speculation": "auto"}):
                assert drafted(model, prompts, greedy, options) > 0
            assert model.info.weight_bytes == before


def drafted(model: Model, prompts: Any, greedy: Any, options: dict[str, Any]) -> int:
    sampling = SamplingOptions(temperature=0, max_tokens=greedy.shape[1], logit_bias={0: -math.inf, 2: -math.inf})
    alone = [model.generate(prompt.tolist(), sampling).tokens for prompt in prompts]
    with Engine(model, **options) as engine:
        requests = [engine.submit(prompt.tolist(), sampling) for prompt in prompts]
        assert [request.result(LONG).tokens for request in requests] == alone
        stats = engine.stats()
        assert 0 < stats.accepted_tokens <= stats.drafted_tokens
        return stats.drafted_tokens


def test_a_quantized_file_keeps_the_head(tmp_path: Path) -> None:
    file = tmp_path / "model.gguf"
    nybble.quantize(MTP / "glm4_moe", file, recipe="rtn")
    with Model.load(file, threads=1) as model:
        found, expected = model.mtp_logits([5, 6, 7, 8]), None
        with Model.load(MTP / "glm4_moe", quantize=None, threads=1) as exact:
            expected = exact.mtp_logits([5, 6, 7, 8])
        assert np.corrcoef(found.ravel(), expected.ravel())[0, 1] > 0.9
        prompts, greedy = golden("glm4_moe", "input_ids", MTP), golden("glm4_moe", "greedy", MTP)
        drafted(model, prompts, greedy, {"speculation": "mtp", "draft_tokens": 2})


def test_a_model_without_a_head_refuses_to_draft_with_one(
    tiny_file: Path, tiny_model: Model, caplog: pytest.LogCaptureFixture
) -> None:
    assert not tiny_model.info.mtp
    with pytest.raises(ValueError, match=r'^speculation: found "mtp" for .*, which has none, expected a model with'):
        Engine(tiny_model, speculation="mtp")
    with pytest.raises(ValueError, match="which has none"):
        tiny_model.mtp_logits([1, 2])
    with (
        Model.load(tiny_file, threads=1) as draft,
        pytest.raises(ValueError, match='draft: found a model, but speculation is "mtp"'),
    ):
        Engine(tiny_model, speculation="mtp", draft=draft)
    for wrong in (0, 9, -1):
        with pytest.raises(ValueError, match=f"draft_tokens: found {wrong}, expected None, or 1 to 8"):
            Engine(tiny_model, speculation="on", draft_tokens=wrong)
    with caplog.at_level(logging.INFO, "nybble"), Model.load(GOLDENS / "deepseek_v3", threads=1) as part:
        assert not part.info.mtp
        with pytest.raises(ValueError, match=r"model\.layers\.2\.input_layernorm\.weight"):
            Engine(part, speculation="mtp")
    assert [record.message.count("without the head") for record in caplog.records] == [1]
    with (
        Model.load(MTP / "glm4_moe", threads=1, mtp=False) as without,
        pytest.raises(ValueError, match="which has none"),
    ):
        Engine(without, speculation="mtp")
