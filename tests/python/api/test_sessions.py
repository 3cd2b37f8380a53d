"""Sessions: continued, forked and saved, with the tokens that one long prompt would give."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import Literal

import pytest
import tiny

from nybble import ContextFullError, Model, ModelError, SamplingOptions, Session

GREEDY = SamplingOptions(max_tokens=12, temperature=0)


def alone(model: Model, ids: tuple[int, ...], count: int) -> tuple[int, ...]:
    """The completion of `ids` in a new session."""
    return model.session().generate(ids, max_tokens=count, temperature=0).tokens


def test_a_session_gives_the_completions_of_one_long_prompt(tiny_model: Model) -> None:
    session = tiny_model.session()
    first = session.generate("Once upon", GREEDY)
    assert first.text == tiny_model.generate("Once upon", GREEDY).text
    assert session.tokens == (*tiny_model.tokenize("Once upon"), *first.tokens)
    second = session.generate(" a time", GREEDY)
    ids = (*tiny_model.tokenize("Once upon"), *first.tokens, *tiny_model.tokenize(" a time", add_special=False))
    assert second.tokens == alone(tiny_model, ids, 12)
    assert session.tokens == (*ids, *second.tokens)
    assert len(session) == len(session.tokens)
    assert session.text == tiny_model.detokenize(session.tokens)


def test_only_new_tokens_are_computed(tiny_model: Model) -> None:
    session = tiny_model.session()
    first = session.generate("a" * 40, max_tokens=5, temperature=0)
    assert first.usage.prompt_tokens == 40
    # The last token of the first completion was sampled, and is computed with the second prompt.
    usage = session.generate("bc", max_tokens=1, temperature=0).usage
    assert usage.prompt_tokens - usage.cached_tokens == 3
    usage = session.generate(max_tokens=1, temperature=0).usage
    assert usage.prompt_tokens - usage.cached_tokens == 1


def test_penalties_count_all_tokens_of_a_session(tiny_model: Model) -> None:
    options = SamplingOptions(temperature=0, repetition_penalty=1.5, penalty_window=0)
    whole = tiny_model.generate("abcabc", options, max_tokens=20)
    session = tiny_model.session()
    parts = [session.generate(text, options, max_tokens=10).tokens for text in ("abcabc", "")]
    assert (*parts[0], *parts[1]) == whole.tokens


def test_an_empty_session_starts_with_the_start_token(tiny_model: Model) -> None:
    assert tiny_model.session().generate("", GREEDY).text == tiny_model.generate("", GREEDY).text
    with pytest.raises(ValueError, match="prompt: found no tokens"):
        tiny_model.session().generate([], GREEDY)


def test_a_session_keeps_the_tokens_of_an_abandoned_stream(tiny_model: Model) -> None:
    session = tiny_model.session()
    stream = session.stream("Once", GREEDY)
    begun = next(stream)
    written = stream.completion.tokens
    assert begun
    assert session.tokens == (*tiny_model.tokenize("Once"), *written)
    rest = session.generate(max_tokens=12 - len(written), temperature=0)
    assert (*written, *rest.tokens) == tiny_model.generate("Once", GREEDY).tokens


def test_a_session_forks_and_saves_in_the_middle_of_a_stream(tiny_model: Model, tmp_path: Path) -> None:
    whole = tiny_model.generate("Once", GREEDY).tokens
    session = tiny_model.session()
    stream = session.stream("Once", GREEDY)
    next(stream)
    session.save(tmp_path / "session")
    count = len(session) - len(tiny_model.tokenize("Once"))
    for copy in (session.fork(), tiny_model.load_session(tmp_path / "session")):
        rest = copy.generate(max_tokens=12 - count, temperature=0)
        assert rest.usage.prompt_tokens - rest.usage.cached_tokens == 1
        assert rest.tokens == whole[count:]
    assert len(session) == len(tiny_model.tokenize("Once")) + count, "it keeps what it had at the fork"
    list(stream)
    assert stream.completion.tokens == whole, "the stream continues by itself"


def test_a_session_that_fills_the_context_in_turns_fits_into_the_memory_limit(
    tiny_model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nybble.memory.for_caches", lambda _: tiny_model.info.cache_bytes)
    session = tiny_model.session()
    for _ in range(9):
        session.generate("abc", max_tokens=10, temperature=0, logit_bias={ord("x"): 1000.0})
    assert len(session) == 9 * 13
    session.generate("", max_tokens=None, temperature=0, logit_bias={ord("x"): 1000.0})
    assert len(session) == tiny.CONTEXT + 1


def test_an_interrupted_session_continues_where_it_stopped(tiny_model: Model) -> None:
    whole = tiny_model.generate("Once", GREEDY).tokens
    session = tiny_model.session()
    stream = session.stream("Once", GREEDY)
    next(stream)
    stream._driver.interrupt()
    with pytest.raises(ModelError, match="interrupted"):
        list(stream)
    count = len(stream.tokens)
    assert session.generate(max_tokens=12 - count, temperature=0).tokens == whole[count:]


def test_a_fork_is_independent(tiny_model: Model) -> None:
    session = tiny_model.session()
    session.generate("Once upon", GREEDY)
    before = session.tokens
    fork = session.fork()
    assert fork.tokens == before
    one, other = session.generate("x", GREEDY), fork.generate("y", GREEDY)
    assert one.tokens == alone(tiny_model, (*before, ord("x")), 12)
    assert other.tokens == alone(tiny_model, (*before, ord("y")), 12)


def test_a_chat_computes_only_the_new_turn_and_answers_like_the_model(tiny_model: Model) -> None:
    session = tiny_model.session()
    messages = [{"role": "user", "content": "Hello"}]
    # ASCII only, so that the text of an answer has the same tokens again.
    bias = dict.fromkeys((*range(128, 256), tiny.IM_START, tiny.END_OF_TEXT, tiny.IM_END), -float("inf"))
    options = SamplingOptions(max_tokens=4, temperature=0, logit_bias=bias)
    for turn in ("And then?", "And now?", "Goodbye"):
        answer, expected = session.chat(messages, options), tiny_model.chat(messages, options)
        assert answer.text == expected.text
        messages += [{"role": "assistant", "content": answer.text}, {"role": "user", "content": turn}]
        prompt = expected.usage.prompt_tokens
    assert answer.usage.prompt_tokens == prompt
    assert answer.usage.cached_tokens > prompt / 2
    assert "".join(session.chat(messages, options, stream=True)) == tiny_model.chat(messages, options).text
    # A conversation with another beginning.
    other = [{"role": "user", "content": "Help"}]
    assert session.chat(other, options).text == tiny_model.chat(other, options).text


def test_a_prompt_that_does_not_fit_leaves_the_session_unchanged(tiny_model: Model) -> None:
    session = tiny_model.session()
    session.generate("abc", GREEDY)
    before = session.tokens
    with pytest.raises(ContextFullError):
        session.generate("x" * tiny.CONTEXT, GREEDY)
    with pytest.raises(ValueError, match="token"):
        session.generate([tiny.VOCABULARY], GREEDY)
    with pytest.raises(ValueError, match="token"):
        session.generate([-1], GREEDY)
    assert session.tokens == before
    full = session.generate(temperature=0, max_tokens=tiny.CONTEXT)
    assert full.finish_reason in ("stop", "length")


@pytest.mark.parametrize("cache_type", ["f16", "int8", "f32"])
def test_a_loaded_session_continues_like_the_saved_one(
    tiny_file: Path, tmp_path: Path, cache_type: Literal["f16", "int8", "f32"]
) -> None:
    path = tmp_path / "a session"
    with Model.load(tiny_file, threads=2, cache_type=cache_type) as model:
        session = model.session()
        session.generate("Once upon a time " * 5, max_tokens=3, temperature=0)
        session.save(path)
        tokens = session.tokens
        expected = session.generate("and", max_tokens=20, seed=5)
    with Model.load(tiny_file, threads=1, cache_type=cache_type, kernel="scalar") as model:
        loaded = model.load_session(path)
        assert loaded.tokens == tokens
        done = loaded.generate("and", max_tokens=20, seed=5)
    assert (done.text, done.usage) == (expected.text, expected.usage)
    assert done.usage.prompt_tokens - done.usage.cached_tokens == 4, "no saved token is computed again"


@pytest.mark.skipif(os.name != "posix", reason="permissions of POSIX")
def test_only_the_user_may_read_a_session(tiny_model: Model, tmp_path: Path) -> None:
    session = tiny_model.session()
    session.generate("secret", max_tokens=1)
    session.save(tmp_path / "session")
    assert stat.S_IMODE((tmp_path / "session").stat().st_mode) == 0o600


def test_a_session_of_another_model_is_refused(tiny_model: Model, tmp_path: Path) -> None:
    path = tmp_path / "session"
    tiny_model.session().save(path)
    other = tiny.write_model(tmp_path / "other.gguf", layers=1)
    with (
        Model.load(other, threads=1) as model,
        pytest.raises(ModelError, match=r'session: key "model": found the hash'),
    ):
        model.load_session(path)


def test_a_damaged_or_missing_session_file_is_refused(tiny_model: Model, tmp_path: Path) -> None:
    path = tmp_path / "session"
    session = tiny_model.session()
    session.generate("abc", max_tokens=3)
    session.save(path)
    data = bytearray(path.read_bytes())
    for at in range(0, len(data), 97):
        path.write_bytes(data[:at] + bytes([data[at] ^ 4]) + data[at + 1 :])
        with pytest.raises(ModelError, match=r"session: .*: found .*, expected "):
            tiny_model.load_session(path)
        path.write_bytes(data[:at])
        with pytest.raises(ModelError, match=r"session: the file: found .*, expected "):
            tiny_model.load_session(path)
    with pytest.raises(FileNotFoundError):
        tiny_model.load_session(tmp_path / "nothing")
    with pytest.raises(OSError, match="directory"):
        tiny_model.load_session(tmp_path)
    with pytest.raises(FileNotFoundError):
        tiny_model.session().save(tmp_path / "no folder" / "session")


def test_a_session_of_a_closed_model_is_an_error(tiny_file: Path, tmp_path: Path) -> None:
    with Model.load(tiny_file, threads=1) as model:
        session: Session = model.session()
    with pytest.raises(ModelError, match="closed"):
        session.generate("x")
    with pytest.raises(ModelError, match="closed"):
        session.save(tmp_path / "session")
    with pytest.raises(ModelError, match="closed"):
        model.session()
