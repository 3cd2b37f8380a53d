"""Keys and values beyond F16: what has them fails with an error about the cache type, and nothing else does."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import checkpoints
import numpy as np
import pytest

from nybble import Engine, Model, ModelError, evaluate

TOKEN = 300
OPTIONS: dict[str, Any] = {"max_tokens": 3, "temperature": 0, "logit_bias": {TOKEN: -float("inf")}}


@pytest.fixture(scope="module", params=["v_proj", "k_proj"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with one token whose values, or keys, are beyond F16."""

    def overflow(tensors: checkpoints.Tensors) -> None:
        # A channel of the residual stream that only this token has, and that the values or keys read.
        tensors["model.embed_tokens.weight"][:, 7] = 0
        tensors["model.embed_tokens.weight"][TOKEN, 7] = 3
        for layer in range(2):
            stem = f"model.layers.{layer}."
            tensors[f"{stem}self_attn.o_proj.weight"][7] = 0
            tensors[f"{stem}mlp.down_proj.weight"][7] = 0
            tensors[f"{stem}self_attn.{request.param}.weight"][:, 7] = 1e6
            tensors[f"{stem}self_attn.o_proj.weight"] *= np.float32(1e-3)

    return checkpoints.copy("llama", tmp_path_factory.mktemp("overflow") / "model", tensors=overflow)


@pytest.fixture
def model(folder: Path) -> Iterator[Model]:
    with Model.load(folder, quantize=None, threads=1, cache_type="f16", progress=False) as model:
        yield model


@pytest.fixture
def bad(model: Model) -> str:
    """The text of the token."""
    return model.detokenize([TOKEN])


@pytest.mark.parametrize("cache_type", ["f32", "int8"])
def test_other_cache_types_compute_it(folder: Path, cache_type: str) -> None:
    options: Any = {"cache_type": cache_type}
    with Model.load(folder, quantize=None, threads=1, progress=False, **options) as model:
        assert np.isfinite(model.logits([5, TOKEN, 7])).all()


def test_every_call_names_the_cache_type(model: Model, bad: str) -> None:
    calls: list[Callable[[], object]] = [
        lambda: model.generate(bad, **OPTIONS),
        lambda: list(model.stream(bad, **OPTIONS)),
        lambda: model.embed(["fine", bad]),
        lambda: model.logits([5, TOKEN, 7]),
    ]
    for call in calls:
        with pytest.raises(ModelError, match=r"token \d+ exceed 65504.*cache_type f32 or int8"):
            call()


def test_other_requests_of_an_engine_are_not_affected(model: Model, bad: str) -> None:
    expected = model.generate("hello", **OPTIONS).tokens
    with Engine(model) as engine:
        # A prompt that fails in its first step, and one that fills pages of the prefix cache before.
        failing = [engine.submit(text, **OPTIONS) for text in (bad, bad + "x" * 150)]
        fine = engine.submit("hello", **OPTIONS)
        assert fine.result().tokens == expected
        for request in failing:
            with pytest.raises(ModelError, match="cache_type"):
                request.result()
        with pytest.raises(ModelError, match="cache_type"):
            engine.submit(bad + "x" * 150, **OPTIONS).result()


@pytest.mark.parametrize("streams", [False, True], ids=["completion", "stream"])
def test_a_session_continues_from_before_the_error(model: Model, bad: str, streams: bool) -> None:
    expected = model.session()
    expected.generate("hello", **OPTIONS)
    session = expected.fork()
    with pytest.raises(ModelError, match="cache_type"):
        list(session.stream(bad, **OPTIONS)) if streams else session.generate(bad, **OPTIONS)
    assert session.tokens == expected.tokens
    assert session.generate("more", **OPTIONS).tokens == expected.generate("more", **OPTIONS).tokens


def test_measurements_do_not_depend_on_the_cache_type(model: Model, folder: Path, bad: str) -> None:
    prose = ["hello " * 40 + bad + " world" * 40]
    found = evaluate(model, prose, window=64)
    with Model.load(folder, quantize=None, threads=1, cache_type="f32", progress=False) as exact:
        expected = evaluate(exact, prose, window=64)
    assert found.perplexity == pytest.approx(expected.perplexity, rel=0.01)


def test_hidden_states_that_are_not_finite_are_an_error(tmp_path: Path) -> None:
    def damage(tensors: checkpoints.Tensors) -> None:
        # Finite, but not when multiplied by the inputs.
        tensors["model.layers.1.mlp.down_proj.weight"][:] = 3e38

    folder = checkpoints.copy("llama", tmp_path / "model", tensors=damage)
    with Model.load(folder, quantize=None, threads=1, progress=False) as model, pytest.raises(ModelError, match="NaN"):
        model.embed("hello")
