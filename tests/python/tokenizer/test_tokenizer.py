"""Text to token ids and back."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import tiny
import vocabularies
from hypothesis import given
from hypothesis import strategies as st

from nybble import ModelError, Tokenizer
from nybble.tokenizer import pretokenizers

BYTE_LEVEL = Tokenizer.from_gguf_metadata(vocabularies.byte_level())
PIECES = Tokenizer.from_gguf_metadata(vocabularies.pieces())
BOTH = pytest.mark.parametrize("tokenizer", [BYTE_LEVEL, PIECES], ids=["byte-level", "pieces"])
START, END, SPACES = BYTE_LEVEL.vocab_size - 3, BYTE_LEVEL.vocab_size - 2, BYTE_LEVEL.vocab_size - 1
TURN, EMPTY_LINE = PIECES.vocab_size - 2, PIECES.vocab_size - 1


def texts(tokenizer: Tokenizer, ids: list[int]) -> list[str]:
    return [tokenizer.token_text(i) for i in ids]


@BOTH
@given(text=st.text())
def test_decoding_gives_back_what_was_encoded(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text, parse_special=False)
    # The mark that stands for a space cannot be told from one: the format has no way to escape it.
    expected = text.replace(vocabularies.SPACE, " ") if tokenizer is PIECES else text
    assert tokenizer.decode(ids) == expected


@BOTH
def test_lone_surrogates_become_replacement_characters(tokenizer: Tokenizer) -> None:
    assert tokenizer.decode(tokenizer.encode("a\ud800b\udfffc")) == "a\ufffdb\ufffdc"
    assert tokenizer.decode(tokenizer.encode("\ud83d\ude00")) == "😀", "two that belong together are one character"


@BOTH
def test_what_is_no_text_is_refused(tokenizer: Tokenizer) -> None:
    with pytest.raises(TypeError, match="found bytes, expected str"):
        tokenizer.encode(b"abc")  # type: ignore[arg-type]


@pytest.mark.parametrize("token", [-1, 10**6])
@BOTH
def test_an_id_beyond_the_vocabulary_is_refused(tokenizer: Tokenizer, token: int) -> None:
    with pytest.raises(ValueError, match=f"found {token}, expected an id below {tokenizer.vocab_size}"):
        tokenizer.decode([token])


def test_tokens_are_found_by_text_and_id() -> None:
    assert PIECES.id_of("<turn>") == TURN
    assert PIECES.token_text(TURN) == "<turn>"
    assert PIECES.id_of("no such token") is None
    assert (PIECES.bos_id, PIECES.eos_id) == (1, 2)
    assert PIECES.eos_ids == {2}
    assert PIECES.special_ids == {0, 1, 2, TURN}
    assert PIECES.token_bytes(3 + 0xC3) == b"\xc3"
    assert not PIECES.has_chat_template


# --- Marks and the tokens that begin and end a text -------------------------------------------------------------------


def test_marks_are_tokens_only_where_they_are_parsed() -> None:
    ids = BYTE_LEVEL.encode("a<|end|>b")
    assert ids == [*BYTE_LEVEL.encode("a"), END, *BYTE_LEVEL.encode("b")]
    literal = BYTE_LEVEL.encode("a<|end|>b", parse_special=False)
    assert END not in literal
    assert BYTE_LEVEL.decode(literal) == "a<|end|>b"
    assert BYTE_LEVEL.decode(ids) == "ab"


def test_marks_of_pieces_are_tokens_only_where_they_are_parsed() -> None:
    assert TURN in PIECES.encode("a<turn>b")
    literal = PIECES.encode("a<turn>b<s>", parse_special=False)
    assert not PIECES.special_ids.intersection(literal[1:])
    assert PIECES.decode(literal) == "a<turn>b<s>"


def test_user_defined_tokens_are_found_wherever_they_occur() -> None:
    for parse_special in (False, True):
        assert SPACES in BYTE_LEVEL.encode("a    b", parse_special=parse_special)
        assert PIECES.encode("\n\n", add_special=False, parse_special=parse_special)[-1] == EMPTY_LINE
    assert BYTE_LEVEL.decode([SPACES, SPACES]) == " " * 8


def test_the_start_token_comes_when_the_file_says_so() -> None:
    said = Tokenizer.from_gguf_metadata(vocabularies.byte_level(add_bos_token=True, add_eos_token=True))
    assert said.encode("a") == [START, *BYTE_LEVEL.encode("a"), END]
    assert said.encode("") == [START, END]
    assert said.encode("a", add_special=False) == BYTE_LEVEL.encode("a")
    unsaid = Tokenizer.from_gguf_metadata(vocabularies.byte_level(add_bos_token=None))
    assert unsaid.encode("a") == BYTE_LEVEL.encode("a")
    assert PIECES.encode("a")[0] == 1, "SentencePiece vocabularies want it unless the file says otherwise"


def test_llama_3_files_want_a_start_token_even_if_they_do_not_say_so() -> None:
    tokenizer = Tokenizer.from_gguf_metadata(vocabularies.byte_level(pre="llama-bpe", add_bos_token=None))
    assert tokenizer.encode("a")[0] == START


@BOTH
def test_a_start_token_never_doubles(tokenizer: Tokenizer) -> None:
    if tokenizer is BYTE_LEVEL:
        tokenizer = Tokenizer.from_gguf_metadata(vocabularies.byte_level(add_bos_token=True))
    assert tokenizer.bos_id is not None
    start = tokenizer.token_text(tokenizer.bos_id)
    assert tokenizer.encode(f"{start}a") == tokenizer.encode("a")
    assert tokenizer.encode(f"{start}a").count(tokenizer.bos_id) == 1
    literal = tokenizer.encode(f"{start}a", parse_special=False)
    assert literal.count(tokenizer.bos_id) == 1
    assert tokenizer.decode(literal) == f"{start}a", "spelled out and not parsed, it is text that needs its own start"


def test_an_end_token_never_doubles() -> None:
    tokenizer = Tokenizer.from_gguf_metadata(vocabularies.byte_level(add_eos_token=True))
    assert tokenizer.encode("a<|end|>") == tokenizer.encode("a")


def test_every_token_that_ends_a_turn_ends_a_generation() -> None:
    marks = ["<|im_end|>", "<|eom_id|>", "<|endoftext|>", "</s>", "<|im_start|>"]
    base = vocabularies.byte_level()
    tokens, kinds = base["tokenizer.ggml.tokens"], base["tokenizer.ggml.token_type"]
    ids = {mark: len(tokens) + i for i, mark in enumerate(marks)}
    tokenizer = Tokenizer.from_gguf_metadata(
        vocabularies.byte_level(tokens=[*tokens, *marks], token_type=[*kinds, 1, 3, 3, 1, 3], eot_token_id=SPACES)
    )
    assert tokenizer.eos_ids == {END, SPACES, ids["<|im_end|>"], ids["<|eom_id|>"], ids["<|endoftext|>"]}
    assert ids["<|im_end|>"] in tokenizer.encode("a<|im_end|>"), "a mark, though the file calls it text"
    assert tokenizer.decode([ids["<|im_end|>"]]) == ""
    assert tokenizer.decode([ids["</s>"]]) == "</s>", "struck-through text ends so in HTML"


# --- SentencePiece ----------------------------------------------------------------------------------------------------


def joined_naively(text: str, scores: dict[str, float]) -> list[str]:
    """Joins the best pair of all, again and again: highest score first, leftmost of equals."""
    parts = list(text)
    while True:
        pairs = [(scores[a + b], -i) for i, (a, b) in enumerate(pairwise(parts)) if a + b in scores]
        if not pairs:
            return parts
        left = -max(pairs)[1]
        parts[left : left + 2] = [parts[left] + parts[left + 1]]


@given(st.text(alphabet=sorted(set(vocabularies.TEXT) - set("\n")), max_size=60))
def test_pieces_are_joined_by_score_and_the_rest_becomes_bytes(text: str) -> None:
    metadata = vocabularies.pieces()
    columns = (metadata[f"tokenizer.ggml.{key}"] for key in ("tokens", "scores", "token_type"))
    scores = {token: score for token, score, kind in zip(*columns, strict=True) if kind in (1, 4)}
    expected: list[str] = []
    for part in joined_naively((" " + text).replace(" ", vocabularies.SPACE) if text else "", scores):
        expected += [part] if part in scores else [f"<0x{byte:02X}>" for byte in part.encode()]
    assert texts(PIECES, PIECES.encode(text, add_special=False)) == expected


def test_the_space_before_a_text_comes_and_goes() -> None:
    without = Tokenizer.from_gguf_metadata(vocabularies.pieces(add_space_prefix=False))
    ids, bare = PIECES.encode("time", add_special=False), without.encode("time", add_special=False)
    assert PIECES.token_text(ids[0]).startswith(vocabularies.SPACE)
    assert not without.token_text(bare[0]).startswith(vocabularies.SPACE)
    assert PIECES.decode(ids) == without.decode(bare) == "time"
    assert without.decode(ids) == " time"
    assert PIECES.decode(PIECES.encode(" two ")) == " two "


def test_phi_3_drops_white_space_after_its_marks() -> None:
    named = Tokenizer.from_gguf_metadata(vocabularies.pieces(general__name="Phi-3 mini"))
    assert named.encode("<turn> \n a") == named.encode("<turn>a")
    assert PIECES.encode("<turn> \n a") != PIECES.encode("<turn>a")
    assert named.encode("<s> a") != named.encode("<s>a"), "but not after this one"


def test_what_has_neither_piece_nor_bytes_is_unknown() -> None:
    tokens = ["<unk>", "<s>", "</s>", vocabularies.SPACE, "a"]
    metadata = vocabularies.pieces(tokens=tokens, scores=[0.0] * 5, token_type=[2, 3, 3, 1, 1])
    tokenizer = Tokenizer.from_gguf_metadata(metadata)
    assert tokenizer.encode("aéa") == [1, 3, 4, 0, 4]
    assert tokenizer.decode([1, 3, 4, 0, 4]) == "aa"


# --- Pre-tokenizers ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("gpt-2", "It's 1234  times\n\nmore", ["It", "'s", " 1234", " ", " times", "\n", "\n", "more"]),
        ("gpt-2", "IT'S", ["IT", "'", "S"]),
        ("smollm", "a 123", ["a", " ", "1", "2", "3"]),
        ("llama-bpe", "IT'S 12345", ["IT", "'S", " ", "123", "45"]),
        ("llama-bpe", "x =\n\n\n y (z)", ["x", " =\n\n\n", " y", " (", "z", ")"]),
        ("qwen2", "Don't 123", ["Don", "'t", " ", "1", "2", "3"]),
        ("qwen35", "हिन्दी", ["हिन्दी"]),
        ("qwen2", "हिन्दी", ["ह", "िन", "्द", "ी"]),
        ("falcon", "a...b 1234", ["a", "...", "b", " ", "123", "4"]),
        ("default", "a+b 1234", ["a", "+", "b", " ", "123", "4"]),
        ("deepseek-coder", "x1 中文!\n", ["x", "1", " ", "中文", "!", "\n"]),
        ("deepseek-llm", "the 12中文", ["the", " ", "12", "中文"]),
        ("deepseek-v3", "1234 _x=y 中文", ["123", "4", " _", "x", "=y", " ", "中文"]),
        ("tekken", "helloWorld it's", ["hello", "World", " it", "'s"]),
        ("gpt-4o", "helloWorld it's 1234", ["hello", "World", " it's", " ", "123", "4"]),
        ("gpt-4o", "ÉCOLEécole", ["ÉCOLEécole"]),
        ("bloom", "(a b.c", ["(", "a", " b", ".", "c"]),
        ("viking", "ab12", ["ab", "1", "2"]),
        ("superbpe", "a1234567", ["a", "1", "234", "567"]),
        ("afmoe", "a12345", ["a", "12", "345"]),
        ("exaone-moe", "two words 1", ["two words", " ", "1"]),
        ("minicpm5", "a1234", ["a", "123", "4"]),
        ("kimi-k2", "中文abc it's", ["中文", "abc", " it's"]),
        ("chameleon", "a  b1\n", ["a", "  ", "b", "1", "\n"]),
    ],
)
def test_a_pre_tokenizer_cuts_as_its_model_was_trained(name: str, text: str, words: list[str]) -> None:
    letters = {letter: bytes([byte]) for byte, letter in enumerate(tiny.byte_pieces())}
    cut = [piece for piece, _ in pretokenizers.find(name).build().pre_tokenize_str(text)]
    assert [b"".join(letters[letter] for letter in piece).decode() for piece in cut] == words


@pytest.mark.parametrize("name", pretokenizers.names())
@given(text=st.text())
def test_no_pre_tokenizer_loses_text(name: str, text: str) -> None:
    cut = pretokenizers.find(name).build().pre_tokenize_str(text)
    letters = {letter: byte for byte, letter in enumerate(tiny.byte_pieces())}
    assert bytes(letters[letter] for piece, _ in cut for letter in piece).decode() == text


def test_an_unknown_pre_tokenizer_warns_and_says_what_is_assumed() -> None:
    with pytest.warns(UserWarning, match="unknown pre-tokenizer 'no-such'.*using 'default'") as caught:
        tokenizer = Tokenizer.from_gguf_metadata(vocabularies.byte_level(pre="no-such"))
    assert len(caught) == 1
    default = Tokenizer.from_gguf_metadata(vocabularies.byte_level(pre="default"))
    assert tokenizer.encode(vocabularies.TEXT) == default.encode(vocabularies.TEXT)


def test_a_missing_pre_tokenizer_warns_and_says_what_is_assumed() -> None:
    with pytest.warns(UserWarning, match="does not name its pre-tokenizer.*using 'default'"):
        Tokenizer.from_gguf_metadata(vocabularies.byte_level(pre=None))


def test_some_rules_take_whole_words_before_merges() -> None:
    base = vocabularies.byte_level()
    changes: dict[str, Any] = {
        "tokens": [*base["tokenizer.ggml.tokens"], "zzzz"],
        "token_type": [*base["tokenizer.ggml.token_type"], 1],
    }
    whole = Tokenizer.from_gguf_metadata(vocabularies.byte_level(pre="llama-bpe", **changes))
    merged = Tokenizer.from_gguf_metadata(vocabularies.byte_level(pre="qwen2", **changes))
    assert whole.encode("zzzz") == [whole.id_of("zzzz")]
    assert merged.encode("zzzz") == [merged.id_of("z")] * 4


# --- Conversations ----------------------------------------------------------------------------------------------------

CHAT = "{{ bos_token }}{% for m in messages %}{{ m.role }}:{{ m.content }}{{ eos_token }}{% endfor %}"


def test_a_conversation_becomes_the_text_of_its_template() -> None:
    metadata = vocabularies.byte_level(
        tokenizer__chat_template=CHAT + "{{ '>' if add_generation_prompt }}{{ mood }}",
        tokenizer__chat_template__tool_use="{{ tools | length }} tools",
        tokenizer__chat_template__rag="{{ documents[0] }}",
        add_bos_token=True,
    )
    tokenizer = Tokenizer.from_gguf_metadata(metadata, where="model.gguf")
    messages = [{"role": "user", "content": "Hi"}]
    assert tokenizer.has_chat_template
    assert tokenizer.apply_chat_template(messages) == "<|start|>user:Hi<|end|>>"
    assert tokenizer.apply_chat_template(messages, False, mood="!") == "<|start|>user:Hi<|end|>!"
    assert tokenizer.apply_chat_template(messages, tools=[1, 2]) == "2 tools"
    assert tokenizer.apply_chat_template(messages, template="rag", documents=["a text"]) == "a text"
    assert tokenizer.apply_chat_template(messages, bos_token="<b>").startswith("<b>user")
    ids = tokenizer.encode(tokenizer.apply_chat_template(messages))
    assert ids.count(START) == 1, "the template has written it already"
    assert END in ids


def test_a_model_without_a_template_says_so() -> None:
    with pytest.raises(ModelError, match=r"GGUF metadata: found no chat template 'default' \(chat templates: none\)"):
        PIECES.apply_chat_template([{"role": "user", "content": "Hi"}])


def test_a_template_that_misbehaves_is_an_error_that_names_the_file() -> None:
    metadata = vocabularies.byte_level(tokenizer__chat_template="{% for i in range(10**9) %}{% endfor %}")
    tokenizer = Tokenizer.from_gguf_metadata(metadata, where="model.gguf")
    with pytest.raises(ModelError, match=r"^model\.gguf: chat template 'default' fails: .*Range too big"):
        tokenizer.apply_chat_template([])


# --- Loading ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [vocabularies.byte_level, vocabularies.pieces])
def test_a_gguf_file_without_weights_will_do(kind: Any, tmp_path: Path) -> None:
    file = tmp_path / "vocabulary.gguf"
    tiny.write_gguf(file, kind())
    tokenizer = Tokenizer.load(file)
    expected = Tokenizer.from_gguf_metadata(kind())
    assert tokenizer.encode(vocabularies.TEXT) == expected.encode(vocabularies.TEXT)
    assert str(file) in repr(tokenizer)
    assert Tokenizer.load(tmp_path).vocab_size == expected.vocab_size, "its folder will do too"


def test_the_default_model_has_a_tokenizer(default_file: Path) -> None:
    tokenizer = Tokenizer.load()
    assert tokenizer.encode("Hello world") == [19556, 905]
    assert tokenizer.eos_ids == {0, 2, 4}
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}])
    assert chat.endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")
    assert tokenizer.encode(chat).count(tokenizer.bos_id or 0) == 3, "as many as the template writes, none added"
    assert Tokenizer.load(default_file).vocab_size == tokenizer.vocab_size == 49152
