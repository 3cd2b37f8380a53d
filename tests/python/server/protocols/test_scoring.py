"""`echo` with `logprobs`: the log-probabilities of a given prompt, as evaluation harnesses ask for them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest
from serving import Running, served

from nybble import Model
from nybble.generation import TokenLogprob
from nybble.server.protocols.completions.adapter import _named

IDS = [104, 101, 108, 108, 111, 32]


@pytest.fixture(scope="module")
def server(tiny_model: Model) -> Iterator[Running]:
    with served(tiny_model) as running:
        yield running


def expected(model: Model, ids: Sequence[int]) -> list[float]:
    """The log-probability of each token after the first."""
    logits = model.logits(ids).astype(np.float64)
    logits -= logits.max(-1, keepdims=True)
    logprobs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    return [float(row[token]) for row, token in zip(logprobs, ids[1:], strict=False)]


def test_an_echo_scores_the_prompt(server: Running, tiny_model: Model) -> None:
    found = server.complete(prompt=[IDS], max_tokens=1, echo=True, logprobs=2).choice["logprobs"]
    assert {len(found[name]) for name in found} == {len(IDS) + 1}
    assert (found["token_logprobs"][0], found["top_logprobs"][0]) == (None, None)
    np.testing.assert_allclose(found["token_logprobs"][1:-1], expected(tiny_model, IDS), atol=1e-4)
    for top, logprob in zip(found["top_logprobs"][1:], found["token_logprobs"][1:], strict=True):
        assert len(top) == 2
        assert max(top.values()) >= logprob - 1e-6
    assert found["text_offset"] == [0, 1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("prompt", ["hello", [[104, 101], [108, 108]], ["he", "ll"]], ids=str)
@pytest.mark.parametrize("logprobs", [None, 0, 1])
def test_an_echo_comes_before_the_completion_in_streams_too(prompt: Any, logprobs: Any, server: Running) -> None:
    asked: dict[str, Any] = {"prompt": prompt, "max_tokens": 3, "logprobs": logprobs, "n": 2, "seed": 1}
    plain = server.complete(**asked).json["choices"]
    echoed = server.complete(**asked, echo=True).json["choices"]
    texts = ["hello"] if isinstance(prompt, str) else ["he", "ll"]
    assert [choice["text"] for choice in echoed] == [texts[i // 2] + choice["text"] for i, choice in enumerate(plain)]
    streamed = [""] * len(echoed)
    tokens: list[list[str]] = [[] for _ in echoed]
    for event in server.complete(**asked, echo=True, stream=True).events:
        (choice,) = event["choices"]
        streamed[choice["index"]] += choice["text"]
        tokens[choice["index"]] += (choice["logprobs"] or {"tokens": []})["tokens"]
    assert streamed == [choice["text"] for choice in echoed]
    if logprobs is not None:
        assert tokens == [choice["logprobs"]["tokens"] for choice in echoed]


def test_an_echo_alone_generates_nothing(server: Running) -> None:
    reply = server.complete(prompt="hello", max_tokens=0, echo=True, logprobs=1)
    assert (reply.choice["text"], len(reply.choice["logprobs"]["tokens"])) == ("hello", 5)
    assert reply.json["usage"]["completion_tokens"] == 0


def test_without_an_echo_only_the_completion_is_scored(server: Running) -> None:
    found = server.complete(prompt=[IDS], max_tokens=2, echo=False, logprobs=1).choice["logprobs"]
    assert len(found["token_logprobs"]) == 2


def test_tokens_of_the_same_text_keep_their_log_probabilities() -> None:
    top = ((5, "\ufffd", -0.1), (6, "\ufffd", -0.5), (7, "a", -3.0))
    likeliest = _named(TokenLogprob(5, "\ufffd", -0.1, top))
    assert likeliest == {"\ufffd": -0.1, "token_id:6": -0.5, "a": -3.0}
    # The token itself keeps its text, so that a client does not take it for the likeliest.
    second = _named(TokenLogprob(6, "\ufffd", -0.5, top))
    assert second == {"token_id:5": -0.1, "\ufffd": -0.5, "a": -3.0}
    assert _named(TokenLogprob(9, "a", -4.0, top)) == {"\ufffd": -0.1, "token_id:6": -0.5, "token_id:7": -3.0}
