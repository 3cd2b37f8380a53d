"""Stop strings and stop tokens, including special tokens, which decode to no text."""

from __future__ import annotations

from typing import Any

import pytest
import tiny

from nybble import Engine, Model
from nybble.cli import main

DELIMITER = "<|im_start|>"
ANSWER = f'start: "ab" <[{tiny.IM_START}]> "cd"'
"""A grammar with one completion: "ab", a special token, "cd"."""


@pytest.mark.parametrize(
    ("stop", "text"),
    [
        (DELIMITER, "ab"),
        (["zz", DELIMITER, "\n\n"], "ab"),
        ([f"b{DELIMITER}"], "a"),
        ([f"{DELIMITER}c"], "ab"),
        ([f"b{DELIMITER}c"], "a"),
        (["a", DELIMITER], ""),
    ],
    ids=str,
)
def test_a_special_token_in_a_stop_string_stops(stop: Any, text: str, uniform_model: Model) -> None:
    options: dict[str, Any] = {"stop": stop, "grammar": ANSWER, "max_tokens": 20}
    done = uniform_model.generate("x", **options)
    assert (done.finish_reason, done.text) == ("stop", text)
    given = [stop] if isinstance(stop, str) else stop
    assert done.stop_string == next(each for each in given if each in f"ab{DELIMITER}cd")
    assert "".join(uniform_model.stream("x", **options)) == text
    with Engine(uniform_model, max_batch=2) as engine:
        assert engine.submit("x", **options).result().text == text


@pytest.mark.parametrize("stop", [(), [f"{DELIMITER}x"], ["<|im_end|>"], [f"a{DELIMITER}"]], ids=str)
def test_a_special_token_outside_of_a_stop_string_does_not_stop(stop: Any, uniform_model: Model) -> None:
    done = uniform_model.generate("x", grammar=ANSWER, stop=stop, max_tokens=20)
    assert (done.text, done.stop_string) == ("abcd", None)


def test_a_special_token_that_is_spelled_out_stops_too(uniform_model: Model) -> None:
    done = uniform_model.generate("x", grammar=f'start: "a{DELIMITER}b"', stop=DELIMITER, max_tokens=40)
    assert (done.finish_reason, done.text) == ("stop", "a")


def test_stop_tokens_end_a_completion_without_being_part_of_it(uniform_model: Model) -> None:
    for stop, text, tokens in (([tiny.IM_START], "ab", (97, 98)), ([ord("b"), 5], "a", (97,))):
        done = uniform_model.generate("x", grammar=ANSWER, stop_token_ids=stop, max_tokens=20)
        assert (done.finish_reason, done.text, done.tokens) == ("stop", text, tokens)


@pytest.mark.parametrize("ids", [[-1], ["a"], "12", [1.5], 7, [2**32]])
def test_invalid_stop_tokens_are_refused(ids: Any, uniform_model: Model) -> None:
    with pytest.raises(ValueError, match="stop_token_ids: found"):
        uniform_model.generate("x", stop_token_ids=ids)


def test_the_command_line_takes_stop_tokens(tiny_file: Any, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["run", str(tiny_file), "x", "--grammar", 'start: "abc"', "--stop-token-ids", str(ord("c"))]
    assert main(arguments) in (0, None)
    assert capsys.readouterr().out.strip() == "ab"


def test_no_completion_stops_before_the_least_number_of_tokens(uniform_model: Model) -> None:
    letters = [chr(letter) for letter in range(256) if letter < 128]
    hold: dict[str, Any] = {"min_tokens": 40, "max_tokens": 60, "stop_token_ids": range(250), "stop": letters}
    for seed in range(5):
        done = uniform_model.generate("x", **hold, seed=seed)
        assert len(done.tokens) >= 40
        assert not {*done.tokens[:40]}.intersection([*range(250), tiny.IM_END])
        assert done.finish_reason == "stop", "almost every token ends it afterwards"
        assert "".join(uniform_model.stream("x", **hold, seed=seed)) == done.text
        with Engine(uniform_model, max_batch=2, speculation="on") as engine:
            assert engine.submit("x", **hold, seed=seed).result().tokens == done.tokens
    free = uniform_model.generate("x", **{**hold, "min_tokens": 0}, seed=0)
    assert len(free.tokens) < 40


def test_stop_strings_are_found_behind_the_least_number_of_tokens(uniform_model: Model) -> None:
    options: dict[str, Any] = {"regex": "abcabcabc", "stop": ["c"], "max_tokens": 20}
    for least, text in ((0, "ab"), (2, "ab"), (3, "abcab"), (5, "abcab"), (9, "abcabcabc")):
        assert uniform_model.generate("x", **options, min_tokens=least).text == text
    # One that begins among the first tokens does not count.
    assert uniform_model.generate("x", **{**options, "stop": ["bc"]}, min_tokens=2).text == "abca"
    special: dict[str, Any] = {"grammar": ANSWER, "stop": [DELIMITER], "max_tokens": 20}
    assert uniform_model.generate("x", **special, min_tokens=3).text == "abcd"


def test_a_constraint_that_allows_only_the_end_ends_earlier(uniform_model: Model) -> None:
    done = uniform_model.generate("x", regex="ab?", min_tokens=20, max_tokens=30)
    assert (done.text, done.finish_reason) == ("ab", "stop"), "it continues while it may"
    assert uniform_model.generate("x", regex="a{2,}", min_tokens=20, max_tokens=30).text[:20] == "a" * 20


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"min_tokens": -1}, "min_tokens: found -1, expected 0 or more"),
        ({"min_tokens": 1.5}, "min_tokens: found 1.5"),
        ({"min_tokens": 6, "max_tokens": 5}, "min_tokens: found 6, expected at most 5, the value of max_tokens"),
        ({"min_tokens": 300}, "expected at most 256, the value of max_tokens"),
    ],
    ids=str,
)
def test_an_invalid_least_number_of_tokens_is_refused(options: Any, message: str, uniform_model: Model) -> None:
    with pytest.raises(ValueError, match=message):
        uniform_model.generate("x", **options)


def test_the_command_line_takes_the_least_number_of_tokens(tiny_file: Any, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["run", str(tiny_file), "x", "--regex", "a{1,8}", "--stop", "a", "--min-tokens", "4"]
    assert main(arguments) in (0, None)
    assert capsys.readouterr().out.strip() == "aaaa"
