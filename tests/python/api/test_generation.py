"""Generation with a tiny model, whose tokens are bytes and whose output is noise."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import tiny

from nybble import Completion, ContextFullError, Model, SamplingOptions

# With this bias the model never ends a completion by itself.
END = dict.fromkeys((tiny.END_OF_TEXT, tiny.IM_START, tiny.IM_END), -math.inf)


def spell(text: str) -> dict[int, float]:
    """A bias that forces the first byte of `text`."""
    return {text.encode()[0]: 1000.0}


def test_a_prompt_is_continued(tiny_model: Model) -> None:
    done = tiny_model.generate("abc", max_tokens=8, seed=1, logit_bias=END)
    assert len(done.tokens) == 8
    assert done.text == tiny_model.detokenize(done.tokens)
    assert str(done) == done.text
    assert done.finish_reason == "length"
    assert (done.usage.prompt_tokens, done.usage.completion_tokens, done.usage.total_tokens) == (3, 8, 11)
    assert done.timings.prompt_seconds > 0
    assert done.timings.decode_tokens_per_second > 0
    assert done.logprobs is None


def test_the_same_seed_gives_the_same_text_and_another_seed_another(tiny_model: Model) -> None:
    def text(seed: int | None) -> str:
        return tiny_model.generate("abc", seed=seed, max_tokens=24, temperature=1.5, top_k=0).text

    assert text(3) == text(3)
    assert len({text(seed) for seed in range(4)}) == 4
    assert len({text(None) for _ in range(4)}) > 1


def test_greedy_takes_the_largest_logit(tiny_model: Model) -> None:
    done = tiny_model.generate("abc", temperature=0, max_tokens=5, logit_bias=END)
    ids = tiny_model.tokenize("abc")
    for token in done.tokens:
        logits = tiny_model.logits(ids)[-1]
        logits[list(END)] = -math.inf
        assert token == logits.argmax()
        ids.append(token)


def test_a_batch_gives_the_completions_of_single_calls(tiny_model: Model) -> None:
    prompts = ["a", "a longer prompt of several words", "the third"]
    options = SamplingOptions(seed=5, max_tokens=12, temperature=1.0)
    batch = tiny_model.generate(prompts, options)
    alone = [tiny_model.generate(prompt, options) for prompt in prompts]
    assert [done.tokens for done in batch] == [done.tokens for done in alone]
    assert [done.finish_reason for done in batch] == [done.finish_reason for done in alone]


def test_an_empty_batch_is_an_empty_list(tiny_model: Model) -> None:
    assert tiny_model.generate([]) == []


def test_the_pieces_of_a_stream_are_the_text(tiny_model: Model) -> None:
    options = SamplingOptions(seed=2, max_tokens=60, temperature=2.0, top_k=0, min_p=0, top_p=1)
    stream = tiny_model.stream("abc", options)
    pieces = list(stream)
    done = tiny_model.generate("abc", options)
    assert "".join(pieces) == done.text
    assert all(pieces)
    assert stream.completion.tokens == done.tokens
    assert stream.completion.finish_reason == done.finish_reason


def test_an_abandoned_stream_has_computed_only_what_was_read(tiny_model: Model) -> None:
    stream = tiny_model.stream("abc", max_tokens=50, logit_bias=spell("x"))
    assert next(stream) == "x"
    assert stream.completion.usage.completion_tokens == 1


def test_a_closed_stream_ends_and_frees_its_cache(tiny_model: Model) -> None:
    with tiny_model.stream("abc", max_tokens=50, logit_bias=spell("x")) as stream:
        assert next(stream) == "x"
    assert list(stream) == []
    assert (stream.completion.text, stream.completion.finish_reason) == ("x", "cancelled")
    assert stream._driver.stats()["cache_bytes"] == 0
    ended = tiny_model.stream("abc", max_tokens=2, logit_bias=spell("x"))
    assert "".join(ended) == "xx"
    ended.close()
    assert ended.completion.finish_reason == "length"


def test_an_abandoned_stream_frees_its_sequence(tiny_model: Model) -> None:
    stream = tiny_model.stream("abc", max_tokens=50, logit_bias=spell("x"))
    next(stream)
    driver = weakref.ref(stream._driver)
    del stream
    assert driver() is None


def test_streams_of_several_threads_are_those_of_one(tiny_model: Model) -> None:
    options = SamplingOptions(max_tokens=40, temperature=1.5, logit_bias=END)
    alone = [tiny_model.generate(f"prompt {i}", options, seed=i).text for i in range(6)]
    with ThreadPoolExecutor(6) as pool:
        streams = pool.map(lambda i: "".join(tiny_model.stream(f"prompt {i}", options, seed=i)), range(6))
        assert list(streams) == alone


@pytest.mark.parametrize("way", ["generate", "batch", "stream", "session"])
def test_the_memory_limit_holds_for_every_way_to_generate(
    tiny_model: Model, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    page = 64 * tiny_model.info.cache_bytes_per_token
    monkeypatch.setattr("nybble.memory.for_caches", lambda _: page if way != "session" else 0)
    options = SamplingOptions(max_tokens=None, logit_bias=spell("x"))
    session = tiny_model.session()
    generate: dict[str, Callable[[], object]] = {
        "generate": lambda: tiny_model.generate("abc", options),
        "batch": lambda: tiny_model.generate(["abc", "abd"], options),
        "stream": lambda: list(stream),
        "session": lambda: session.generate("abc", options),
    }
    stream = tiny_model.stream("abc", options)
    with pytest.raises(MemoryError, match="KV cache of one sequence"):
        generate[way]()
    if way == "stream":
        assert stream.completion.usage.completion_tokens == 64 - 3 + 1
        assert list(stream) == [], "it has ended"
    if way == "session":
        assert len(session) == 64 + 1
        monkeypatch.undo()
        assert session.generate(max_tokens=3, logit_bias=spell("x")).text == "xxx", "it stays usable"


def test_an_incomplete_character_at_the_end_becomes_u_fffd(tiny_model: Model) -> None:
    first_byte = {"é".encode()[0]: 1000.0}
    assert list(tiny_model.stream("abc", max_tokens=1, logit_bias=first_byte)) == ["\ufffd"]
    assert tiny_model.generate("abc", max_tokens=1, logit_bias=first_byte).text == "\ufffd"


def test_the_end_token_ends_a_completion_without_being_part_of_it(tiny_model: Model) -> None:
    done = tiny_model.generate("abc", logit_bias={tiny.IM_END: 1000.0})
    assert (done.text, done.tokens, done.finish_reason) == ("", (), "stop")
    assert done.usage.completion_tokens == 0


def test_a_completion_ends_before_a_stop_string(tiny_model: Model) -> None:
    done = tiny_model.generate("abc", logit_bias=spell("x"), stop=["xxx"], max_tokens=9)
    assert (done.text, done.finish_reason, len(done.tokens)) == ("", "stop", 3)
    pieces = list(tiny_model.stream("abc", logit_bias=spell("x"), stop="xxx", max_tokens=9))
    assert pieces == []


def test_an_incomplete_stop_string_is_part_of_the_completion(tiny_model: Model) -> None:
    done = tiny_model.generate("abc", logit_bias=spell("x"), stop=["xxy"], max_tokens=4)
    assert (done.text, done.finish_reason) == ("xxxx", "length")


def test_max_tokens_0_gives_an_empty_completion(tiny_model: Model) -> None:
    done = tiny_model.generate("abc", max_tokens=0)
    assert (done.text, done.tokens, done.finish_reason) == ("", (), "length")


def test_generation_without_max_tokens_fills_the_context(tiny_model: Model) -> None:
    done = tiny_model.generate("a" * 100, max_tokens=None, logit_bias=spell("x"))
    assert done.finish_reason == "length"
    assert done.usage.completion_tokens == tiny.CONTEXT - 100 + 1, "the last token is sampled but never computed"


def test_a_prompt_as_long_as_the_context_still_gives_a_token(tiny_model: Model) -> None:
    done = tiny_model.generate("a" * tiny.CONTEXT, logit_bias=spell("x"))
    assert (done.text, done.finish_reason) == ("x", "length")


def test_a_prompt_that_does_not_fit_is_refused_with_numbers(tiny_model: Model) -> None:
    with pytest.raises(ContextFullError, match=r"prompt has 129 tokens, but the context holds 128") as caught:
        tiny_model.generate(["short", "a" * (tiny.CONTEXT + 1)])
    assert (caught.value.used, caught.value.requested, caught.value.context) == (0, 129, 128)
    with pytest.raises(ContextFullError):
        tiny_model.stream("a" * (tiny.CONTEXT + 1))


def test_an_empty_prompt_begins_with_the_start_token(tiny_model: Model) -> None:
    done = tiny_model.generate("", max_tokens=3, logit_bias=END)
    assert done.usage.prompt_tokens == 1
    assert len(done.tokens) == 3


def test_logprobs_are_those_of_the_model(tiny_model: Model) -> None:
    done = tiny_model.generate("abc", max_tokens=4, seed=1, logprobs=3, logit_bias=END)
    assert done.logprobs is not None
    assert [entry.token for entry in done.logprobs] == list(done.tokens)
    logits = tiny_model.logits(tiny_model.tokenize("abc"))[-1].astype("float64")
    expected = logits - math.log(sum(math.exp(value) for value in logits - logits.max())) - logits.max()
    first = done.logprobs[0]
    assert first.logprob == pytest.approx(expected[first.token], abs=1e-4)
    assert [token for token, _, _ in first.top] == sorted(range(tiny.VOCABULARY), key=lambda i: -expected[i])[:3]
    assert [logprob for _, _, logprob in first.top] == pytest.approx(sorted(expected, reverse=True)[:3], abs=1e-4)


def test_a_large_presence_penalty_prevents_repeated_tokens(tiny_model: Model) -> None:
    done = tiny_model.generate("abc", temperature=0, presence_penalty=1000.0, max_tokens=40, logit_bias=END)
    assert len(set(done.tokens)) == 40


def test_a_chat_is_the_completion_of_the_rendered_template(tiny_model: Model) -> None:
    messages = [{"role": "user", "content": "Hello"}]
    prompt = "<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n"
    options = SamplingOptions(seed=4, max_tokens=10)
    done = tiny_model.chat(messages, options)
    assert isinstance(done, Completion)
    assert done.tokens == tiny_model.generate(prompt, options).tokens
    # Each special token is one token, the rest is bytes.
    assert done.usage.prompt_tokens == len("user\nHello\nassistant\n") + 3
    stream = tiny_model.chat(messages, options, stream=True)
    assert isinstance(stream, Iterator)
    assert "".join(stream) == done.text


def test_options_are_given_by_name_and_unknown_ones_refused(tiny_model: Model) -> None:
    with pytest.raises(TypeError, match="no such option: max_token "):
        tiny_model.generate("abc", max_token=3)  # type: ignore[call-overload]
    with pytest.raises(ValueError, match="top_p"):
        tiny_model.chat([{"role": "user", "content": "Hello"}], top_p=3)
