"""Every family continues saved, forked, cached and speculated sequences as it computes them in one go."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from goldens import GOLDENS, golden

from nybble import Engine, Model, SamplingOptions

GREEDY = SamplingOptions(temperature=0, max_tokens=24)
# Seconds after which a test that still waits fails.
LONG = 60


@pytest.mark.parametrize("family", sorted(path.name for path in GOLDENS.iterdir()))
def test_ways_to_continue_a_sequence_change_nothing(family: str, tmp_path: Path) -> None:
    ids = [int(token) for token in golden(family, "input_ids")[0]]
    # More than a page of 64 tokens, with repetitions that drafts find.
    prompt = ids + ids
    source = shutil.copytree(GOLDENS / family, tmp_path / "model")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        if not (source / name).exists():
            shutil.copy(GOLDENS / "llama" / name, source)
    with Model.load(source, threads=1) as model:
        whole = model.generate(prompt, GREEDY).tokens
        half = GREEDY.replace(max_tokens=12)
        session = model.session()
        first = session.generate(prompt, half).tokens
        session.save(tmp_path / "session")
        fork, loaded = session.fork(), model.load_session(tmp_path / "session")
        # A turn after a completion begins with its last token, which is not computed yet.
        rests = [each.generate([5, 6, 7], half).tokens for each in (session, fork, loaded)]
        alone = model.generate([*prompt, *first, 5, 6, 7], half).tokens
        assert rests == [alone] * 3
        with Engine(model, speculation="on") as engine:
            for cached in (False, True):
                completion = engine.submit(prompt, GREEDY).result(LONG)
                assert completion.tokens == whole
                assert (completion.usage.cached_tokens > 0) == cached
            # A completion that repeats itself is drafted for certain.
            repeating = GREEDY.replace(logit_bias={7: 1000.0})
            assert engine.submit(prompt, repeating).result(LONG).tokens == model.generate(prompt, repeating).tokens
            assert engine.stats().accepted_tokens > 0
