"""Every call that takes a prompt takes text or token ids, and errors name the argument."""

from __future__ import annotations

import asyncio
from typing import Any

import numpy as np
import pytest

from nybble import Engine, Model, ModelError

TEXT = "Once upon a time"
OPTIONS: Any = {"max_tokens": 4, "seed": 3}


@pytest.fixture(scope="module")
def ids(tiny_model: Model) -> list[int]:
    return tiny_model.tokenize(TEXT)


def test_text_and_token_ids_give_the_same_completion_everywhere(tiny_model: Model, ids: list[int]) -> None:
    expected = tiny_model.generate(TEXT, **OPTIONS).tokens
    for prompt in (TEXT, ids, tuple(ids), np.array(ids)):
        given: Any = prompt
        assert tiny_model.generate(given, **OPTIONS).tokens == expected
        stream = tiny_model.stream(given, **OPTIONS)
        list(stream)
        assert stream.completion.tokens == expected
        assert tiny_model.session().generate(given, **OPTIONS).tokens == expected
        with Engine(tiny_model) as engine:
            assert engine.submit(given, **OPTIONS).result().tokens == expected
            assert asyncio.run(engine.generate(given, **OPTIONS)).tokens == expected
        assert (tiny_model.embed(given) == tiny_model.embed(TEXT)).all()
        assert (tiny_model.logits(given) == tiny_model.logits(ids)).all()


def test_a_list_of_prompts_may_mix_text_and_token_ids(tiny_model: Model, ids: list[int]) -> None:
    expected = tiny_model.generate(TEXT, **OPTIONS).tokens
    several: list[Any] = [TEXT, ids, tuple(ids)]
    assert [done.tokens for done in tiny_model.generate(several, **OPTIONS)] == [expected] * 3
    assert [done.tokens for done in tiny_model.generate([ids], **OPTIONS)] == [expected]
    with Engine(tiny_model) as engine:
        assert [done.tokens for done in asyncio.run(engine.generate(several, **OPTIONS))] == [expected] * 3
    assert len(tiny_model.embed(several)) == 3
    assert tiny_model.generate([]) == []


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        (None, "found NoneType, expected str"),
        (5, "found int, expected str"),
        (b"ab", "found bytes, expected str"),
        ({1, 2}, "found set, expected str"),
        ([1, "a"], "found 'a' at position 1, expected a token id"),
        ([1, True], "found True at position 1, expected a token id"),
        ([1, 2.5], "found 2.5 at position 1, expected a token id"),
    ],
)
def test_any_other_prompt_is_refused_by_name(tiny_model: Model, prompt: Any, message: str) -> None:
    with Engine(tiny_model) as engine:
        for call in (
            tiny_model.generate,
            tiny_model.stream,
            tiny_model.session().generate,
            engine.submit,
            tiny_model.logits,
        ):
            with pytest.raises(TypeError, match=f"^prompt: {message}"):
                call(prompt)
    with pytest.raises(TypeError, match=f"^text: {message}"):
        tiny_model.embed(prompt)


@pytest.mark.parametrize("kind", [np.int32, np.uint8, np.int64])
def test_token_ids_may_be_arrays(kind: Any, tiny_model: Model) -> None:
    expected = tiny_model.logits(range(5, 10))
    np.testing.assert_array_equal(tiny_model.logits(np.arange(5, 10, dtype=kind)), expected)
    options: Any = {"max_tokens": np.int64(3), "temperature": 0, "stop": ("zz", "yy"), "min_tokens": np.uint8(1)}
    options["logit_bias"] = {np.int64(5): np.float32(0)}
    found = tiny_model.generate([*np.arange(5, 10, dtype=kind)], **options)
    assert found.tokens == tiny_model.generate([5, 6, 7, 8, 9], max_tokens=3, temperature=0).tokens


def test_token_ids_in_two_dimensions_are_refused_by_their_shape(tiny_model: Model) -> None:
    with pytest.raises(ValueError, match=r"^prompt: found an array of shape \(1, 4\), expected .* one dimension"):
        tiny_model.logits(np.zeros((1, 4), np.int64))


def test_an_error_in_a_list_names_the_prompt(tiny_model: Model) -> None:
    several: Any = ["a", None]
    with pytest.raises(TypeError, match=r"^prompt\[1\]: found NoneType, expected str or a list of token ids"):
        tiny_model.generate(several)
    with pytest.raises(TypeError, match=r"^text\[1\]: found NoneType"):
        tiny_model.embed(several)
    with Engine(tiny_model) as engine, pytest.raises(TypeError, match=r"^prompt\[1\]: found NoneType"):
        asyncio.run(engine.generate(several))


def test_token_ids_that_are_text_are_refused_by_name(tiny_model: Model) -> None:
    for ids in ("abc", None, 5):
        given: Any = ids
        with pytest.raises(TypeError, match=r"ids: found (str|NoneType|int), expected token ids"):
            tiny_model.detokenize(given)


@pytest.mark.parametrize(
    ("messages", "kind", "message"),
    [
        (
            [{"role": "user"}],
            ValueError,
            r"messages\[0\]: found no 'content' \(keys: 'role'\), expected a role and con",
        ),
        ([{"content": "Hi"}], ValueError, r"messages\[0\]: found no 'role' \(keys: 'content'\)"),
        ([{"role": "user", "content": "Hi"}, {}], ValueError, r"messages\[1\]: found no 'role' \(keys: none\)"),
        (["Hi"], TypeError, r"messages\[0\]: found str, expected a dict"),
        ("Hi", TypeError, "messages: found str, expected a list of messages"),
        ([{"role": 5, "content": "Hi"}], TypeError, r"messages\[0\]: role: found int, expected str"),
        ([{"role": "user", "content": 5}], TypeError, r"messages\[0\]: content: found int, expected str or a list"),
    ],
)
def test_a_message_that_is_incomplete_is_refused_by_its_place(
    tiny_model: Model, messages: Any, kind: type[Exception], message: str
) -> None:
    for chat in (tiny_model.chat, tiny_model.session().chat, tiny_model.tokenizer.apply_chat_template):
        with pytest.raises(kind, match=f"^{message}") as caught:
            chat(messages)
        assert not isinstance(caught.value, ModelError), "the model is not to blame"


def test_an_answer_that_calls_tools_needs_no_content(tiny_model: Model) -> None:
    call = {"type": "function", "function": {"name": "add", "arguments": {}}}
    tiny_model.tokenizer.apply_chat_template([{"role": "assistant", "tool_calls": [call]}])


def test_former_spellings_work_with_a_warning(tiny_model: Model) -> None:
    tokenizer: Any = tiny_model.tokenizer
    messages = [{"role": "user", "content": "Hi"}]
    with pytest.warns(DeprecationWarning, match=r"Tokenizer\.encode: pass add_special by name") as caught:
        assert tokenizer.encode("a", False) == tokenizer.encode("a", add_special=False)
    assert caught[0].filename == __file__
    with pytest.warns(DeprecationWarning, match="pass add_generation_prompt by name"):
        prompt = tokenizer.apply_chat_template(messages, False)
    assert prompt == tokenizer.apply_chat_template(messages, add_generation_prompt=False)
    model: Any = tiny_model
    with pytest.warns(DeprecationWarning, match=r"Model\.logits: ids is now prompt"):
        assert (model.logits(ids=[1, 2]) == model.logits([1, 2])).all()
    with pytest.raises(TypeError):
        tokenizer.encode("a", False, True)
    with (
        pytest.raises(TypeError, match="two values for add_special"),
        pytest.warns(DeprecationWarning, match="by name"),
    ):
        tokenizer.encode("a", False, add_special=True)


def test_special_tokens_are_options_of_both_encoders(tiny_model: Model) -> None:
    text = "<|im_start|>a"
    assert tiny_model.tokenize(text) == tiny_model.tokenizer.encode(text)
    plain = tiny_model.tokenize(text, parse_special=False)
    assert plain == tiny_model.tokenizer.encode(text, parse_special=False)
    assert len(plain) == len(text)
