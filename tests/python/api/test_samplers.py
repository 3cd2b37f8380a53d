"""Samplers beyond filters by probability: logits processors, beams, DRY, Mirostat, ignored end tokens, GBNF."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import tiny

from nybble import Engine, Model, SamplingOptions
from nybble.constraints.gbnf import lark_of_gbnf

END = dict.fromkeys((tiny.END_OF_TEXT, tiny.IM_START, tiny.IM_END), -math.inf)
Tokens = npt.NDArray[np.int64]
Logits = npt.NDArray[np.float32]


def counting(tokens: Tokens, logits: Logits) -> Logits:
    """Forces each byte to follow the one before it in the alphabet."""
    forced = np.full_like(logits, -np.inf)
    forced[tokens[-1] + 1] = 0
    return forced


# --- Logits processors


def test_a_processor_decides_in_every_kind_of_call(tiny_model: Model) -> None:
    options = SamplingOptions(logits_processor=counting, max_tokens=5, seed=1)
    assert tiny_model.generate("xa", options).text == "bcdef"
    assert [done.text for done in tiny_model.generate(["a", "k"], options)] == ["bcdef", "lmnop"]
    assert "".join(tiny_model.stream("a", options)) == "bcdef"
    with Engine(tiny_model, speculation="on") as engine:
        requests = [engine.submit(prompt, options) for prompt in ("a", "h", "p")]
        assert [request.result().text for request in requests] == ["bcdef", "ijklm", "qrstu"]


def test_processors_are_called_in_order_and_may_change_the_array(tiny_model: Model) -> None:
    seen: list[int] = []

    def first(tokens: Tokens, logits: Logits) -> None:
        seen.append(len(tokens))
        assert [str(array.dtype) for array in (tokens, logits)] == ["int64", "float32"]
        logits[:] = -np.inf
        logits[ord("q")] = 3

    def second(_: Tokens, logits: Logits) -> list[float]:
        assert logits[ord("q")] == 3
        return [*logits[: ord("q")], -math.inf, 0.0, *logits[ord("q") + 2 :]]

    assert tiny_model.generate("ab", max_tokens=3, logits_processor=[first, second]).text == "rrr"
    assert seen == [2, 3, 4]


def test_bias_and_constraints_apply_after_a_processor(tiny_model: Model) -> None:
    assert tiny_model.generate("a", max_tokens=3, logits_processor=counting, logit_bias={ord("b"): 5.0}).text == "bcd"

    def wants_x(_: Tokens, logits: Logits) -> None:
        logits[ord("x")] += 1000

    done = tiny_model.generate("a", max_tokens=9, logits_processor=wants_x, regex="[ax]{3}[bc]", logprobs=0)
    assert done.text in ("xxxb", "xxxc")
    assert done.logprobs is not None
    assert done.logprobs[0].logprob < -0.1, "log-probabilities are the model's own"


class BrokenError(Exception):
    """An exception of a caller."""


def test_the_exception_of_a_processor_reaches_its_caller_alone(tiny_model: Model) -> None:
    def fails(tokens: Tokens, _: Logits) -> None:
        if len(tokens) > 3:
            raise BrokenError("no more")

    with pytest.raises(BrokenError, match="no more"):
        tiny_model.generate("ab", logits_processor=fails, logit_bias=END)
    with Engine(tiny_model) as engine:
        bad = engine.submit("ab", logits_processor=fails, logit_bias=END)
        good = engine.submit("a", logits_processor=counting, max_tokens=5)
        with pytest.raises(BrokenError):
            bad.result()
        assert good.result().text == "bcdef"


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        (np.zeros(3), r"<lambda> returned an array of shape \(3,\), expected \(\d+,\)"),
        ("logits", "<lambda> returned str, expected an array of shape"),
        ({"a": 1}, "<lambda> returned dict, expected an array of shape"),
        (math.nan, r"<lambda> returned an array of shape \(\)"),
        (np.zeros(3, complex), "<lambda> returned ndarray, expected an array of shape"),
    ],
)
def test_a_processor_that_returns_something_else_is_named(returned: Any, message: str, tiny_model: Model) -> None:
    with pytest.raises(ValueError, match=f"^logits_processor: {message}"):
        tiny_model.generate("a", logits_processor=lambda _tokens, _logits: returned)


def test_what_ends_the_program_passes_a_processor(tiny_model: Model) -> None:
    def interrupts(_tokens: Tokens, _logits: Logits) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tiny_model.generate("a", logits_processor=interrupts)
    with Engine(tiny_model) as engine:
        with pytest.raises(KeyboardInterrupt):
            engine.submit("a", logits_processor=interrupts).result()
        assert engine.submit("a", logits_processor=counting, max_tokens=2).result().text == "bc"


def test_logits_that_cannot_be_sampled_are_refused(tiny_model: Model) -> None:
    def nan(_: Tokens, logits: Logits) -> None:
        logits[7] = np.nan

    def nothing(_: Tokens, logits: Logits) -> None:
        logits[:] = -np.inf

    with pytest.raises(ValueError, match=r"^logits_processor: found a processor that sets the logit of token 7 to NaN"):
        tiny_model.generate("a", logits_processor=nan)
    with pytest.raises(
        ValueError, match=r"^logits_processor: found a processor that sets all logits to minus infinity"
    ):
        tiny_model.generate("a", logits_processor=nothing)
    left = "found a processor that leaves no token which the constraint and logit_bias allow"
    with pytest.raises(ValueError, match=f"^logits_processor: {left}"):
        tiny_model.generate("a", logits_processor=counting, regex="[xyz]")
    with pytest.raises(ValueError, match=f"^logits_processor: {left}"):
        tiny_model.generate("a", logits_processor=counting, logit_bias={ord("b"): -math.inf})


# --- Beam search


def test_a_beam_search_finds_a_likelier_text_than_greedy_decoding(tiny_model: Model) -> None:
    greedy = tiny_model.generate("abc", temperature=0, max_tokens=12, logprobs=0)
    assert greedy.logprobs is not None
    assert greedy.beam_score is None
    scores = []
    for beams in (2, 4, 8, 32):
        done = tiny_model.generate("abc", num_beams=beams, max_tokens=12, length_penalty=0.0, logprobs=0)
        assert done.beam_score is not None
        assert done.logprobs is not None
        assert done.tokens == tiny_model.generate("abc", num_beams=beams, max_tokens=12, length_penalty=0.0).tokens
        if len(done.tokens) == 12:  # Otherwise the score counts the end token, too.
            assert done.beam_score == pytest.approx(sum(token.logprob for token in done.logprobs), abs=1e-4)
        scores.append(done.beam_score)
    assert scores == sorted(scores)
    assert scores[-1] > sum(token.logprob for token in greedy.logprobs) - 1e-6


def test_beams_work_in_every_kind_of_call(tool_model: Model) -> None:
    options = SamplingOptions(num_beams=3, max_tokens=10, early_stopping="never", length_penalty=1.3)
    expected = tool_model.generate("one two", options)
    assert [done.tokens for done in tool_model.generate(["one two", "three", "one two"], options)][::2] == [
        expected.tokens
    ] * 2
    with tool_model.stream("one two", options) as stream:
        assert list(stream) == ([expected.text] if expected.text else [])
        assert stream.completion.beam_score == expected.beam_score
    with Engine(tool_model, speculation="on") as engine:
        beside = engine.submit("other", seed=1, max_tokens=10, temperature=1.0)
        assert engine.submit("one two", options).result().tokens == expected.tokens
        assert beside.result().tokens == tool_model.generate("other", seed=1, max_tokens=10, temperature=1.0).tokens
    message = [{"role": "user", "content": "Hi"}]
    assert tool_model.chat(message, options).tokens == tool_model.chat(message, options).tokens
    session = tool_model.session()
    first = session.generate("one two", options)
    assert first.tokens == expected.tokens
    rest = session.generate(" more", temperature=0, max_tokens=4)
    whole = tool_model.tokenize("one two") + list(session.tokens[len(tool_model.tokenize("one two")) :])
    assert len(whole) == len(session.tokens)
    assert rest.usage.completion_tokens <= 4


def test_the_score_is_that_of_the_search_and_log_probabilities_are_the_models(tiny_model: Model) -> None:
    whole = tiny_model.generate("abc", num_beams=4, max_tokens=12, logit_bias=END)
    stopped = tiny_model.generate("abc", num_beams=4, max_tokens=12, logit_bias=END, stop=whole.text[2:4])
    assert len(stopped.tokens) < len(whole.tokens)
    assert stopped.beam_score == whole.beam_score
    biased = tiny_model.generate("abc", num_beams=2, max_tokens=3, logit_bias={**END, ord("b"): 8.0}, logprobs=0)
    assert biased.logprobs is not None
    assert all(token.logprob < 0 for token in biased.logprobs)


def test_stops_and_end_tokens_end_a_beam(tiny_model: Model) -> None:
    free = tiny_model.generate("abc", num_beams=4, max_tokens=12, logit_bias=END)
    last = free.tokens[5]
    done = tiny_model.generate(
        "abc", num_beams=4, max_tokens=12, logit_bias=END, stop_token_ids=[last], length_penalty=-1
    )
    assert last not in done.tokens
    biased = {**END, tiny.END_OF_TEXT: 50.0}
    assert tiny_model.generate("abc", num_beams=4, max_tokens=12, logit_bias=biased).finish_reason == "stop"
    ignoring = tiny_model.generate("abc", num_beams=4, max_tokens=12, logit_bias=biased, ignore_eos=True)
    assert len(ignoring.tokens) == 12


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("schema", {}),
        ("regex", "a"),
        ("grammar", 'start: "a"'),
        ("repetition_penalty", 1.2),
        ("presence_penalty", 0.5),
        ("frequency_penalty", 0.5),
        ("dry_multiplier", 0.8),
        ("mirostat", 2),
        ("logprobs", 2),
        ("logits_processor", counting),
    ],
)
def test_options_that_a_beam_search_does_not_use_are_refused(option: str, value: Any) -> None:
    with pytest.raises(ValueError, match=rf"^{option}: found .*num_beams=2"):
        SamplingOptions(num_beams=2, **{option: value})


# --- Other samplers


def test_ignored_end_tokens_do_not_end_a_text(uniform_model: Model) -> None:
    ends = {tiny.END_OF_TEXT: 100.0}
    assert uniform_model.generate("a", max_tokens=6, logit_bias=ends).finish_reason == "stop"
    done = uniform_model.generate("a", max_tokens=6, logit_bias=ends, ignore_eos=True, seed=1)
    assert (done.finish_reason, len(done.tokens)) == ("length", 6)
    stopping = {**ends, ord("z"): 90.0}
    assert uniform_model.generate("a", logit_bias=stopping, ignore_eos=True, stop_token_ids=[ord("z")]).tokens == ()
    assert uniform_model.generate("a", regex="bc", logit_bias=ends, ignore_eos=True).text == "bc", (
        "nothing else follows"
    )


def test_dry_breaks_repetitions_up_to_its_breakers(uniform_model: Model) -> None:
    bias = {ord("c"): 3.0, ord("d"): 2.0}

    def continued(prompt: str, **options: Any) -> str:
        return uniform_model.generate(prompt, temperature=0, max_tokens=1, logit_bias=bias, **options).text

    assert continued("abcab") == "c"
    assert continued("abcab", dry_multiplier=2.0) == "d"
    assert continued("abcab", dry_multiplier=2.0, dry_allowed_length=3) == "c"
    assert continued("abcab", dry_multiplier=2.0, dry_window=3) == "c"
    assert continued("abc:ab", dry_multiplier=2.0) == "d"
    assert continued("xab:cyab:", dry_multiplier=2.0) == "c", "the breaker is the last token"
    assert continued("xab:cyab:", dry_multiplier=2.0, dry_sequence_breakers=["y"]) == "d"
    assert continued("xabcyab", dry_multiplier=2.0, dry_sequence_breakers=["ya"]) == "c", "two tokens"
    assert continued("abcab", dry_multiplier=2.0, dry_sequence_breakers=[]) == "d"


def test_the_tokens_of_breakers_are_found(uniform_model: Model) -> None:
    found = uniform_model.tokenizer.breaker_sequences
    assert found(("\n",)) == [[ord("\n")]]
    assert found(("é",)) == [list("é".encode())] or found(("é",)) == [], "cut within a character"
    assert found(("ab", "b")) == [[ord("a"), ord("b")], [ord("b")]]
    assert [tiny.IM_END] in found(("<|im_end|>",))


@pytest.mark.parametrize(
    "options",
    [
        {"mirostat": 2, "mirostat_tau": 3.0},
        {"xtc_probability": 0.5, "xtc_threshold": 0.01},
        {"dynatemp_range": 0.7, "dynatemp_exponent": 1.5},
        {"top_n_sigma": 1.0},
        {"dry_multiplier": 1.0},
    ],
    ids=str,
)
def test_each_sampler_keeps_its_seed(options: dict[str, Any], tiny_model: Model) -> None:
    plain = SamplingOptions(seed=3, max_tokens=20, temperature=1.5, top_k=0)
    tokens = tiny_model.generate("abcabcab", plain.replace(**options)).tokens
    assert tokens != tiny_model.generate("abcabcab", plain).tokens
    with Engine(tiny_model, speculation="on") as engine:
        assert engine.submit("abcabcab", plain.replace(**options)).result().tokens == tokens


# --- GBNF


def test_a_grammar_may_be_written_in_gbnf(tiny_model: Model) -> None:
    grammar = 'root ::= greeting (", " name){1,2} end?\ngreeting ::= "Hi" | "Yo"\nname ::= [A-C] [x-z]*\nend ::= "!" |'
    done = tiny_model.generate("a", grammar=grammar, max_tokens=60, seed=2)
    assert done.text[:5] in {f"{greeting}, {name}" for greeting in ("Hi", "Yo") for name in "ABC"}


@pytest.mark.parametrize(
    ("gbnf", "message"),
    [
        ('root ::= "a" b', "rule 'root', line 1: found 'b', which no rule defines"),
        ('root ::= "a"\n\nx ::= ("b" | "c"', "rule 'x', line 3: found '', expected '\\)'"),
        ('root ::= "a" )', "rule 'root', line 1: found '\\)', expected the end of the line"),
        ('root ::= "a"\nroot ::= "b"', "rule 'root', line 2: found a second rule 'root'"),
        ("root ::= * x", "rule 'root', line 1: found '\\*' after nothing"),
        ('root ::=\n "a" <think>', "rule 'root', line 2: found '<think>', a single token"),
        ('root ::= !<[42]> "a"', "rule 'root', line 1: found '!<\\[42\\]>', a single token"),
        ('root ::= "\\UFFFFFFFF"', "rule 'root', line 1: found .*, an invalid character code"),
        ('root ::= "\\uD83D"', "rule 'root', line 1: found .*, an invalid character code"),
        ('root ::= "\\x4"', "rule 'root', line 1: found '\\\\x4\"', expected 2 hexadecimal digits"),
        (r"root ::= [\d]+", "rule 'root', line 1: found the escape '\\\\d', expected one of x, u, U"),
        ("root ::= [z-a]", "rule 'root', line 1: found the range 'z' to 'a'"),
        ("root ::= []", r"rule 'root', line 1: found '\[\]', expected characters"),
        ("root ::= [a", "rule 'root', line 1: found the end of the grammar within characters"),
        ('root ::= "a"{2,1}', "rule 'root', line 1: found 2 to 1 repetitions"),
        ('root ::= "a"{}', "rule 'root', line 1: found '}', expected a number of repetitions"),
        ('root ::= "a"{9999}', "rule 'root', line 1: found 9999 repetitions, expected at most"),
        ('root ::= "a" ::= "b"', "rule 'root', line 1: found '::= .*, expected the end of the line"),
        ('root ::= "a"\n"b"', "line 2: found '\"b\"', expected GBNF"),
        ('root ::= "a"\nb', "line 2: found '' after 'b', expected '::='"),
        ("root ::= " + 200 * "(" + '"a"' + 200 * ")", "rule 'root', line 1: found groups nested more than 100 deep"),
        ("root ::= ~", "rule 'root', line 1: found '~', expected the end of the line"),
    ],
)
def test_gbnf_that_cannot_be_translated_is_refused_by_rule(gbnf: str, message: str, tiny_model: Model) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        lark_of_gbnf(gbnf)
    with pytest.raises(ValueError, match=f"^grammar: {message}"):
        tiny_model.generate("a", grammar=gbnf)


@pytest.mark.parametrize(
    ("gbnf", "text"),
    [
        ('root ::= "if" " x" | name\nname ::= [a-z]+ "!"', "ifx!"),
        ('root ::= "ab" "x" | [a-z] "b" "y"', "aby"),
        ('root ::= "null" | [a-z]+ "!"', "nullx!"),
        ('root ::= ("ab" "c"?){2}', "abcab"),
        ('root ::= "a"++ "b"', "aab"),
        ('root ::= "a"{0} "b"{2} "c"{1,2}', "bbc"),
        ('root ::= 1st-rule [\\]\\-x]\n1st-rule ::=\n  "q" |\n  "r"', "q]"),
        ('root ::= ("a"\n  | "b"\n) # comment\n\n# more\n', "b"),
        ('root ::= "é\\u00e9\\U0001F600" [^a-z] .', "éé😀1z"),
        ('root ::= "line\nbreak"', "line\nbreak"),
        ('root ::= | "a" ("b" |) "c"', "ac"),
        ('root ::= root "a" | "b"', "baa"),
    ],
)
def test_a_grammar_allows_what_it_describes(gbnf: str, text: str, uniform_model: Model) -> None:
    wanted = list(text.encode())

    def write(tokens: Tokens, logits: Logits) -> None:
        at = len(tokens) - 1
        logits[:] = -20
        logits[wanted[at] if at < len(wanted) else tiny.END_OF_TEXT] = 20

    done = uniform_model.generate("x", grammar=gbnf, logits_processor=write, max_tokens=40, temperature=0)
    assert (done.text, done.finish_reason) == (text, "stop")
