"""Any argument gives a result or a documented exception, never a crash, a hang or an `InternalError`."""

from __future__ import annotations

import contextlib
import math
from pathlib import Path
from typing import Any

import pytest
import tiny
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nybble import ContextFullError, Model, ModelError, _native

REFUSED = (ValueError, TypeError)
"""An argument that is out of range, or of a wrong type. `ModelError` is a `ValueError`."""

integers = st.one_of(
    st.integers(-3, 300), st.sampled_from([2**31, 2**32 - 1, 2**32, 2**63, 2**64 - 1, 2**64, -(2**63), 10**30])
)
numbers = st.one_of(
    st.floats(width=32), st.floats(), st.floats(0, 2), integers, st.sampled_from([math.nan, math.inf, -math.inf, 0.0])
)
anything = st.one_of(st.none(), st.booleans(), integers, numbers, st.text(max_size=5), st.binary(max_size=5))
tokens = st.lists(st.one_of(st.integers(0, tiny.VOCABULARY - 1), integers), max_size=8)

OPTIONS: dict[str, st.SearchStrategy[Any]] = {
    "temperature": numbers,
    "top_k": integers,
    "top_p": numbers,
    "min_p": numbers,
    "typical_p": numbers,
    "repetition_penalty": numbers,
    "presence_penalty": numbers,
    "frequency_penalty": numbers,
    "penalty_window": integers,
    "logit_bias": st.dictionaries(integers, numbers, max_size=3),
    "seed": integers,
    "logprobs": st.one_of(st.none(), integers),
    "stop": st.one_of(st.text(max_size=3), st.lists(st.text(max_size=3), max_size=3)),
}


@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(prompt=st.text(max_size=20), data=st.data())
def test_sampling_options_work_or_are_refused(tiny_model: Model, prompt: str, data: st.DataObject) -> None:
    names = data.draw(st.lists(st.sampled_from(sorted(OPTIONS)), unique=True, max_size=4))
    options = {name: data.draw(st.one_of(OPTIONS[name], OPTIONS[name], anything), label=name) for name in names}
    try:
        done = tiny_model.generate(prompt, max_tokens=3, **options)
    except REFUSED:
        return
    assert len(done.tokens) <= 3
    assert done.finish_reason in ("stop", "length")
    assert all(math.isfinite(token.logprob) for token in done.logprobs or ())


@settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(prompt=anything, count=anything)
def test_prompts_and_counts_of_any_type_work_or_are_refused(tiny_model: Model, prompt: Any, count: Any) -> None:
    try:
        done = tiny_model.generate(prompt, max_tokens=count, temperature=0, stop=["a"])
    except REFUSED:
        return
    assert done.usage.completion_tokens <= tiny.CONTEXT


@settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(ids=st.one_of(tokens, anything))
def test_token_ids_work_or_are_refused(tiny_model: Model, ids: Any) -> None:
    if isinstance(ids, str):
        return  # A session takes it as text.
    for call in (
        tiny_model.logits,
        tiny_model.detokenize,
        lambda ids: tiny_model.session().generate(ids, max_tokens=1),
    ):
        try:
            call(ids)
        except REFUSED:
            continue
        assert all(0 <= token < tiny.VOCABULARY for token in ids)


@settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_load_options_work_or_are_refused(tiny_file: Path, data: st.DataObject) -> None:
    strategies: dict[str, st.SearchStrategy[Any]] = {
        "threads": st.one_of(st.integers(-1, 5), integers),
        "context": st.one_of(st.integers(-1, tiny.CONTEXT + 1), integers),
        "kernel": st.one_of(st.sampled_from(["scalar", "avx2", "SCALAR", ""]), st.text(max_size=5)),
        "quantize": st.sampled_from([None, "auto", "int4", "int8", "int4:g1", "stored", "", "int4:"]),
        "cache_type": st.sampled_from([None, "f16", "int8", "f32", "F16", "q4"]),
        "mmap": st.booleans(),
        "expert_memory": st.one_of(st.sampled_from([None, "auto", "4", 0, 1.5]), integers),
        "expert_skip": st.one_of(st.sampled_from([None, 0, 0.5, 1, 1.5]), integers),
    }
    names = data.draw(st.lists(st.sampled_from(sorted(strategies)), unique=True, max_size=3))
    arguments = {name: data.draw(st.one_of(strategies[name], anything), label=name) for name in names}
    if isinstance(arguments.get("threads"), int) and 8 < arguments["threads"] <= 1024:
        return  # Valid but slow.
    try:
        with Model.load(tiny_file, progress=False, **arguments) as model:
            assert model.generate("x", max_tokens=1).usage.completion_tokens <= 1
    except REFUSED:
        pass


@settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(content=st.one_of(st.binary(max_size=200), st.binary(max_size=200).map(lambda data: b"GGUF\x03\0\0\0" + data)))
def test_a_file_of_random_bytes_is_refused_as_model_and_as_session(
    tiny_model: Model, tmp_path_factory: pytest.TempPathFactory, content: bytes
) -> None:
    path = tmp_path_factory.getbasetemp() / "any bytes"
    path.write_bytes(content)
    for load in (lambda: Model.load(path, threads=1), lambda: tiny_model.load_session(path)):
        with pytest.raises(ModelError, match="any bytes"):
            load()
    with contextlib.suppress(ModelError):
        assert _native.GgufFile(path).tensors == []  # A file without tensors is valid.


@settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    steps=st.lists(
        st.tuples(st.sampled_from(["text", "ids", "fork", "chat", "none"]), st.text(max_size=30), tokens), max_size=5
    )
)
def test_a_session_stays_consistent_after_any_calls(tiny_model: Model, steps: list[tuple[str, str, list[int]]]) -> None:
    session = tiny_model.session()
    for kind, text, ids in steps:
        before = session.tokens
        try:
            if kind == "fork":
                session = session.fork()
                assert session.tokens == before
            elif kind == "chat":
                session.chat([{"role": "user", "content": text}], max_tokens=2, temperature=0)
            else:
                prompt: str | list[int] = ids if kind == "ids" else text if kind == "text" else ""
                done = session.generate(prompt, max_tokens=2, temperature=0)
                assert session.tokens[: len(before)] == before
                assert session.tokens[len(session.tokens) - len(done.tokens) :] == done.tokens
        except (ContextFullError, *REFUSED):
            assert session.tokens == before
    if session.tokens and len(session) < tiny.CONTEXT:
        expected = tiny_model.session().generate(session.tokens, max_tokens=2, temperature=0).tokens
        assert session.generate("", max_tokens=2, temperature=0).tokens == expected
