"""Regular expressions: what is not supported is said before the first token."""

from __future__ import annotations

import re
import warnings

import pytest

from nybble import Model
from nybble.constraints.complexity import states
from nybble.constraints.regex import unsupported

UNSUPPORTED = {
    "(?=a)[ab]": "look-ahead and look-behind are not supported .*at character 1",
    "x(?<!a)b": "look-ahead and look-behind are not supported .*at character 2",
    r"(a|b)\1": "back-references are not supported",
    "(?P<x>a)(?P=x)": "back-references are not supported",
    "a{,3}b": "a repetition needs a minimum",
    "ab\\": "a backslash at the end escapes nothing .*at character 3",
    r"\bab\b": r"word boundaries are not supported .*at character 1",
    r"a\Bb": r"word boundaries are not supported .*at character 2",
    r"ab\Z": r"anchors other than \^ and \$ are not supported .*at character 3",
    "(?>a)b": "atomic groups are not supported",
    "(a)?(?(1)b|c)": "conditional groups are not supported",
    "((a|b|ab|ba){1,100}){1,100}c": "a text can be in more than 2000 states of it at once",
    "(.{1,90}){1,90}c": "a text can be in more than 2000 states of it at once",
}


@pytest.mark.parametrize("expression", UNSUPPORTED)
def test_unsupported_syntax_is_named_with_its_position(expression: str, tiny_model: Model) -> None:
    with pytest.raises(ValueError, match=f"regex: {UNSUPPORTED[expression]}"):
        tiny_model.generate("x", regex=expression)
    with pytest.raises(ValueError, match=f"schema: pattern: .*{UNSUPPORTED[expression]}"):
        tiny_model.generate("x", schema={"type": "string", "pattern": expression})


@pytest.mark.parametrize(
    "expression", [r"[(?=a)\1{,2}]+", r"\\b[a-b]", r"\(?=", r"\\1", "[]a]{1,2}", "[^]a]", "a{2,}", "(?:a)(?i:b)"]
)
def test_supported_syntax_passes(expression: str) -> None:
    assert unsupported(expression) is None


@pytest.mark.parametrize(
    "expression",
    [
        r"(\w{1,20} ){1,200}",
        ".{1,10000}",
        "[a-z]{1,500}@x",
        r"(\d{1,3}\.){3}\d{1,3}",
        '("[^"]{0,50}"(, )?){1,30}',
        "(a|b)*a(a|b){14}c",
        "((a|b|ab|ba){1,20}){1,20}c",
        r"\p{L}{1,30}(?P<x>a|b)??[^\]x-]\x{e9}",
    ],
)
def test_large_counts_are_fine_where_few_states_are_possible(expression: str, uniform_model: Model) -> None:
    assert states(expression, 2000) < 800
    assert uniform_model.generate("x", regex=expression, max_tokens=40, seed=1).text


def test_mistakes_are_explained(tiny_model: Model) -> None:
    with pytest.raises(ValueError, match=r"regex: found '\(a': missing \)"):
        tiny_model.generate("x", regex="(a")
    with pytest.raises(ValueError, match=r"grammar: found /\(\?=a\)b/: look-ahead and look-behind are not supported"):
        tiny_model.generate("x", grammar="start: X\nX: /(?=a)b/")


@pytest.mark.parametrize(
    ("grammar", "lines"),
    [
        ('start: "a" "b', ["1(14): lexer error", '1 | start: "a" "b', "^"]),
        ('start: a\na: "x" b\n', ['unknown name: "b"', "1 | start: a", '2 | a: "x" b', "^"]),
        ('start: x\nx: %json {"type": "wombat"}', ["2(4): failed to compile JSON schema: Invalid type: wombat", "^"]),
        ("start: a\na: a", ["a form that no text has"]),
    ],
    ids=str,
)
def test_errors_of_a_grammar_show_the_place(grammar: str, lines: list[str], tiny_model: Model) -> None:
    with pytest.raises(ValueError, match=r"^grammar: found ") as caught:
        tiny_model.generate("x", grammar=grammar)
    at = 0
    for line in lines:
        at = str(caught.value).index(line, at)


def test_classes_with_brackets_give_no_warning() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for expression in ("[[:alpha:]]{1,9}", "[a[]{1,9}x", "[a&&b]{1,9}", "[a--z]{1,9}"):
            assert states(expression, 2000) < 2000


@pytest.mark.parametrize(("expression", "same"), [("^(yes|no)$", "yes|no"), ("[é日]+x", "[é日]+x")])
def test_completions_match_the_regex(expression: str, same: str, uniform_model: Model) -> None:
    for seed in range(4):
        done = uniform_model.generate("x", regex=expression, max_tokens=60, seed=seed)
        if done.finish_reason == "stop":
            assert re.fullmatch(same, done.text)
