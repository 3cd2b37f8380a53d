"""Models whose output matrix has rows beyond the tokenizer's last token. Such ids are never sampled."""

from __future__ import annotations

import json
import urllib.request
from collections.abc import Iterator
from typing import Any

import pytest
from checkpoints import padded
from serving import Running, served

from nybble import Engine, Model

ROWS = 400
"""More rows than tokens, so most draws from all rows would be a missing id."""
EVERYTHING: dict[str, Any] = {"temperature": 2.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "max_tokens": 50}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Model]:
    folder = padded("llama", tmp_path_factory.mktemp("padded"), ROWS)
    with Model.load(folder, quantize=None, progress=False) as model:
        yield model


def test_missing_ids_are_the_rows_beyond_the_tokenizer(model: Model) -> None:
    tokens = model.tokenizer.vocab_size
    assert model.info.vocabulary == tokens + ROWS
    assert model.tokenizer.missing_ids(tokens + ROWS) == [(tokens, tokens + ROWS)]
    assert model.tokenizer.missing_ids(tokens) == []


def test_missing_ids_are_never_sampled_even_with_a_bias(model: Model) -> None:
    tokens = model.tokenizer.vocab_size
    bias = {tokens: 100.0, tokens + ROWS - 1: 100.0}
    for seed in range(3):
        more: dict[str, Any]
        for more in ({}, {"logit_bias": bias}, {"schema": {"type": "array"}}, {"temperature": 0.0}):
            done = model.generate("he", seed=seed, logprobs=20, **{**EVERYTHING, **more})
            assert done.finish_reason in ("stop", "length")
            assert max(done.tokens, default=0) < tokens
            assert done.logprobs is not None
            assert all(other < tokens for each in done.logprobs for other, _, _ in each.top)
        assert (
            "".join(model.stream("he", seed=seed, **EVERYTHING)) == model.generate("he", seed=seed, **EVERYTHING).text
        )


def test_requests_that_would_draw_missing_ids_leave_others_alone(model: Model) -> None:
    expected = model.generate("he the", max_tokens=60, temperature=0).text
    with Engine(model, max_batch=4) as engine:
        others = [engine.submit("he the", max_tokens=60, temperature=0) for _ in range(2)]
        odd = [engine.submit("he", seed=seed, **EVERYTHING) for seed in range(3)]
        assert [request.result().text for request in odd] == [
            model.generate("he", seed=seed, **EVERYTHING).text for seed in range(3)
        ]
        assert [request.result().text for request in others] == [expected] * 2


def test_a_prompt_may_contain_missing_ids(model: Model) -> None:
    ids = [*model.tokenizer.encode("he"), model.tokenizer.vocab_size + 3]
    with Engine(model) as engine:
        assert engine.submit(ids, max_tokens=3, temperature=0).result().usage.prompt_tokens == len(ids)


def test_the_server_answers_when_a_bias_asks_for_a_missing_id(model: Model) -> None:
    with served(model) as running:
        body = {"model": "tiny", "prompt": "he", "max_tokens": 20, "temperature": 0}
        bias = {str(model.tokenizer.vocab_size + 3): 100}
        assert complete(running, {**body, "logit_bias": bias}) == complete(running, body)


def complete(running: Running, body: dict[str, Any]) -> Any:
    """The text of a completion."""
    data = json.dumps(body).encode()
    request = urllib.request.Request(running.url + "/v1/completions", data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as answer:
        return json.loads(answer.read())["choices"][0]["text"]
