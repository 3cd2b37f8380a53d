"""Streamed decoding gives whole characters, and stop strings are found across pieces."""

from __future__ import annotations

import pytest
import vocabularies
from hypothesis import given
from hypothesis import strategies as st

from nybble import Tokenizer
from nybble.tokenizer.tokenizer import StopMatcher, StreamDecoder

BYTE_LEVEL = Tokenizer.from_gguf_metadata(vocabularies.byte_level())
PIECES = Tokenizer.from_gguf_metadata(vocabularies.pieces())
BOTH = pytest.mark.parametrize("tokenizer", [BYTE_LEVEL, PIECES], ids=["byte-level", "pieces"])
IDS = st.integers(0, BYTE_LEVEL.vocab_size - 1)


def streamed(tokenizer: Tokenizer, ids: list[int], after: list[int] | None = None) -> list[str]:
    decoder = StreamDecoder(tokenizer, after or ())
    return [*map(decoder.push, ids), decoder.finish()]


@BOTH
@given(data=st.data())
def test_joined_pieces_equal_decode(tokenizer: Tokenizer, data: st.DataObject) -> None:
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size - 1)))
    assert "".join(streamed(tokenizer, ids)) == tokenizer.decode(ids)


@BOTH
@given(text=st.text())
def test_pieces_hold_whole_characters(tokenizer: Tokenizer, text: str) -> None:
    text = text.replace(vocabularies.SPACE, "")
    *pieces, rest = streamed(tokenizer, tokenizer.encode(text, parse_special=False))
    assert "".join(pieces) == text
    assert rest == ""
    assert "\ufffd" not in "".join(pieces) or "\ufffd" in text


def bytes_of(tokenizer: Tokenizer, character: str) -> list[int]:
    """The tokens of a character without a token of its own, after an ASCII character."""
    ids = tokenizer.encode(f"z{character}", add_special=False)
    ids = ids[ids.index(tokenizer.encode("z", add_special=False)[-1]) + 1 :]
    assert len(ids) > 2
    return ids


@BOTH
def test_a_character_comes_with_its_last_byte(tokenizer: Tokenizer) -> None:
    ids = bytes_of(tokenizer, "\u0f3c")
    *waiting, last, rest = streamed(tokenizer, ids)
    assert not any(waiting)
    assert (last, rest) == ("\u0f3c", "")


@BOTH
def test_an_incomplete_character_becomes_a_replacement_character(tokenizer: Tokenizer) -> None:
    ids = bytes_of(tokenizer, "\u0f3c")[:-1]
    *waiting, rest = streamed(tokenizer, ids)
    assert not any(waiting)
    assert rest == "\ufffd"
    (z,) = tokenizer.encode("z", add_special=False)[-1:]
    assert "".join(streamed(tokenizer, [*ids, z])) == "\ufffdz"


def test_a_continued_text_keeps_the_space_of_its_first_word() -> None:
    prompt, more = PIECES.encode("Once upon a"), PIECES.encode("time", add_special=False)
    assert PIECES.token_text(more[0]).startswith(vocabularies.SPACE)
    assert "".join(streamed(PIECES, more)) == "time", "a text of its own"
    assert "".join(streamed(PIECES, more, prompt)) == " time", "the next word"
    assert "".join(streamed(PIECES, more, PIECES.encode("Hi<turn>"))) == "time", "an answer after a special token"


def test_special_tokens_give_no_text_and_do_not_split_characters() -> None:
    first, *others = bytes_of(BYTE_LEVEL, "\u0f3c")
    assert BYTE_LEVEL.eos_id is not None
    assert "".join(streamed(BYTE_LEVEL, [first, BYTE_LEVEL.eos_id, *others])) == "\u0f3c"


# --- Stop strings -----------------------------------------------------------------------------------------------------


def matched(stops: list[str], pieces: list[str]) -> tuple[str, bool]:
    """The text that a matcher returns for these pieces, and whether it found a stop string."""
    matcher, out = StopMatcher(stops), []
    for piece in pieces:
        text, hit = matcher.push(piece)
        out.append(text)
        if hit:
            return "".join(out), True
    return "".join(out) + matcher.finish(), False


def stopped_naively(stops: list[str], text: str) -> tuple[str, bool]:
    """Looks for stop strings after every character."""
    for end in range(1, len(text) + 1):
        complete = [stop for stop in stops if text[:end].endswith(stop)]
        if complete:
            return text[: end - max(map(len, complete))], True
    return text, False


STOPS = st.lists(st.text(alphabet="ab\n", min_size=1, max_size=4), max_size=3)


@given(stops=STOPS, pieces=st.lists(st.text(alphabet="abc\n", max_size=5), max_size=8))
def test_stop_strings_are_found_across_pieces(stops: list[str], pieces: list[str]) -> None:
    assert matched(stops, pieces) == stopped_naively(stops, "".join(pieces))


@given(stops=STOPS, pieces=st.lists(st.text(alphabet="abc\n", max_size=5), max_size=8))
def test_only_possible_starts_of_stop_strings_are_held_back(stops: list[str], pieces: list[str]) -> None:
    matcher, text, out = StopMatcher(stops), "", ""
    for piece in pieces:
        text += piece
        given_out, hit = matcher.push(piece)
        out += given_out
        if hit:
            return
        held = text[len(out) :]
        assert text == out + held
        starts = [text[i:] for i in range(len(text)) if any(stop.startswith(text[i:]) for stop in stops)]
        assert held == max(starts, key=len, default="")


def test_nothing_is_returned_after_a_stop_string() -> None:
    matcher = StopMatcher(["END"])
    assert matcher.push("the EN") == ("the ", False)
    assert matcher.push("D and more") == ("", True)
    assert matcher.push("END more") == ("", True)
    assert matcher.finish() == ""


def test_without_stop_strings_nothing_is_held_back() -> None:
    assert StopMatcher([]).push("anything") == ("anything", False)


def test_invalid_stop_strings_are_refused() -> None:
    with pytest.raises(ValueError, match="found an empty string"):
        StopMatcher(["a", ""])
    with pytest.raises(TypeError, match="expected a list of strings"):
        StopMatcher("stop")
