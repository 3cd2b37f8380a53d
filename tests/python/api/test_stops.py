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
        ([DELIMITER, "a"], ""),
    ],
    ids=str,
)
def test_a_special_token_in_a_stop_string_stops(stop: Any, text: str, uniform_model: Model) -> None:
    options: dict[str, Any] = {"stop": stop, "grammar": ANSWER, "max_tokens": 20}
    done = uniform_model.generate("x", **options)
    assert (done.finish_reason, done.text) == ("stop", text)
    assert "".join(uniform_model.stream("x", **options)) == text
    with Engine(uniform_model, max_batch=2) as engine:
        assert engine.submit("x", **options).result().text == text


@pytest.mark.parametrize("stop", [(), [f"{DELIMITER}x"], ["<|im_end|>"], [f"a{DELIMITER}"]], ids=str)
def test_a_special_token_outside_of_a_stop_string_does_not_stop(stop: Any, uniform_model: Model) -> None:
    assert uniform_model.generate("x", grammar=ANSWER, stop=stop, max_tokens=20).text == "abcd"


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
