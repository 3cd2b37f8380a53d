"""From a prompt to text: on a tiny model, whose tokens are bytes and whose text is noise."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import tiny

from nybble import Completion, ContextFullError, Model, SamplingOptions

# Under this bias the model never ends the text by itself.
END = dict.fromkeys((tiny.END_OF_TEXT, tiny.IM_START, tiny.IM_END), -math.inf)


def spell(text: str) -> dict[int, float]:
    """A bias under which the model cannot but write the first byte of `text`."""
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


def test_a_batch_gives_what_each_prompt_gives_alone(tiny_model: Model) -> None:
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


def test_a_stream_that_is_left_early_has_computed_no_further(tiny_model: Model) -> None:
    stream = tiny_model.stream("abc", max_tokens=50, logit_bias=spell("x"))
    assert next(stream) == "x"
    assert stream.completion.usage.completion_tokens == 1


def test_half_a_character_at_the_end_of_the_text_is_marked(tiny_model: Model) -> None:
    first_byte = {"é".encode()[0]: 1000.0}
    assert list(tiny_model.stream("abc", max_tokens=1, logit_bias=first_byte)) == ["\ufffd"]
    assert tiny_model.generate("abc", max_tokens=1, logit_bias=first_byte).text == "\ufffd"


def test_the_end_token_stops_and_is_not_part_of_the_text(tiny_model: Model) -> None:
    done = tiny_model.generate("abc", logit_bias={tiny.IM_END: 1000.0})
    assert (done.text, done.tokens, done.finish_reason) == ("", (), "stop")
    assert done.usage.completion_tokens == 0


def test_a_stop_string_ends_the_text_before_it(tiny_model: Model) -> None:
    done = tiny_model.generate("abc", logit_bias=spell("x"), stop=["xxx"], max_tokens=9)
    assert (done.text, done.finish_reason, len(done.tokens)) == ("", "stop", 3)
    pieces = list(tiny_model.stream("abc", logit_bias=spell("x"), stop="xxx", max_tokens=9))
    assert pieces == []


def test_the_beginning_of_a_stop_string_at_the_end_is_part_of_the_text(tiny_model: Model) -> None:
    done = tiny_model.generate("abc", logit_bias=spell("x"), stop=["xxy"], max_tokens=4)
    assert (done.text, done.finish_reason) == ("xxxx", "length")


def test_no_token_asked_is_no_token_written(tiny_model: Model) -> None:
    done = tiny_model.generate("abc", max_tokens=0)
    assert (done.text, done.tokens, done.finish_reason) == ("", (), "length")


def test_generation_goes_on_until_the_context_is_full(tiny_model: Model) -> None:
    done = tiny_model.generate("a" * 100, max_tokens=None, logit_bias=spell("x"))
    assert done.finish_reason == "length"
    assert done.usage.completion_tokens == tiny.CONTEXT - 100 + 1, "the last token is written, but never fed"


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


def test_logprobs_tell_how_likely_each_token_was(tiny_model: Model) -> None:
    done = tiny_model.generate("abc", max_tokens=4, seed=1, logprobs=3, logit_bias=END)
    assert done.logprobs is not None
    assert [entry.token for entry in done.logprobs] == list(done.tokens)
    logits = tiny_model.logits(tiny_model.tokenize("abc"))[-1].astype("float64")
    expected = logits - math.log(sum(math.exp(value) for value in logits - logits.max())) - logits.max()
    first = done.logprobs[0]
    assert first.logprob == pytest.approx(expected[first.token], abs=1e-4)
    assert [token for token, _, _ in first.top] == sorted(range(tiny.VOCABULARY), key=lambda i: -expected[i])[:3]
    assert [logprob for _, _, logprob in first.top] == pytest.approx(sorted(expected, reverse=True)[:3], abs=1e-4)


def test_a_penalty_on_presence_keeps_tokens_from_coming_twice(tiny_model: Model) -> None:
    done = tiny_model.generate("abc", temperature=0, presence_penalty=1000.0, max_tokens=40, logit_bias=END)
    assert len(set(done.tokens)) == 40


def test_a_chat_is_answered_in_the_form_of_the_template(tiny_model: Model) -> None:
    messages = [{"role": "user", "content": "Hello"}]
    prompt = "<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n"
    options = SamplingOptions(seed=4, max_tokens=10)
    done = tiny_model.chat(messages, options)
    assert isinstance(done, Completion)
    assert done.tokens == tiny_model.generate(prompt, options).tokens
    # Each mark is one token, the rest is bytes.
    assert done.usage.prompt_tokens == len("user\nHello\nassistant\n") + 3
    stream = tiny_model.chat(messages, options, stream=True)
    assert isinstance(stream, Iterator)
    assert "".join(stream) == done.text


def test_single_options_are_given_by_name_and_misspelled_ones_refused(tiny_model: Model) -> None:
    with pytest.raises(TypeError, match="no such option: max_token "):
        tiny_model.generate("abc", max_token=3)  # type: ignore[call-overload]
    with pytest.raises(ValueError, match="top_p"):
        tiny_model.chat([{"role": "user", "content": "Hello"}], top_p=3)
