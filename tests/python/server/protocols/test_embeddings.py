"""Embeddings for indexing: many inputs, token ids, dimensions, and errors that say what is wrong."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from serving import Reply, Running, served

from nybble import Model


@pytest.fixture(scope="module")
def server(tiny_model: Model) -> Iterator[Running]:
    with served(tiny_model, max_body_bytes=8_000_000) as running:
        yield running


def embed(server: Running, given: Any, **parameters: Any) -> Reply:
    return server.request("POST", "/v1/embeddings", {"input": given, **parameters})


def vectors(reply: Reply) -> np.ndarray[Any, Any]:
    assert reply.status == 200, reply.text
    return np.array([item["embedding"] for item in reply.json["data"]])


def test_a_thousand_inputs_are_taken_in_order(server: Running, tiny_model: Model) -> None:
    texts = [f"text {i}" for i in range(1000)]
    reply = embed(server, texts)
    found = vectors(reply)
    assert [item["index"] for item in reply.json["data"]] == list(range(1000))
    assert np.allclose(found[[0, 500, 999]], tiny_model.embed([texts[0], texts[500], texts[999]]))
    assert reply.json["usage"]["prompt_tokens"] == sum(map(len, texts))


def test_the_width_of_the_model_changes_nothing(server: Running) -> None:
    plain = vectors(embed(server, ["a"]))
    assert np.array_equal(vectors(embed(server, ["a"], dimensions=plain.shape[1])), plain)


def test_fewer_dimensions_need_a_model_that_allows_them(server: Running, tiny_model: Model) -> None:
    reply = embed(server, "a", dimensions=32)
    assert (reply.status, reply.json["error"]["param"]) == (400, "dimensions")
    assert "found 32, expected 64" in reply.error
    assert "--matryoshka" in reply.error
    assert "this model's vectors have no more" in embed(server, "a", dimensions=65).error
    with served(tiny_model, matryoshka=True) as running:
        (cut,) = vectors(embed(running, "a", dimensions=32))
    (whole,) = vectors(embed(server, "a"))
    assert cut.shape == (32,)
    assert np.allclose(cut, whole[:32] / np.linalg.norm(whole[:32]), atol=1e-6)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["a"] * 5000, "input: List should have at most 2048 items after validation, not 5000"),
        (["a", 5], "input.1: Input should be a valid string"),
        ([1, 2], "input: found token ids, expected strings"),
        ([[1, 2]], "input: found token ids, expected strings"),
        (5, "input: Input should be a valid string or a valid list"),
        ([], "input: List should have at least 1 item"),
        ("", "input: String should have at least 1 character"),
        (["a", ""], "input.1: String should have at least 1 character"),
        ("a" * 200, "the prompt has 200 tokens, but the context holds 128"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_errors_say_what_is_wrong_with_the_input(given: Any, message: str, server: Running) -> None:
    reply = embed(server, given)
    assert (reply.status, message in reply.error) == (400, True), reply.text
