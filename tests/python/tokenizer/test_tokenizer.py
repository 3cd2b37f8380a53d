"""Tokenizers: encoding, decoding, special tokens, pre-tokenizers, chat templates and loading."""

from __future__ import annotations

from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import tiny
import tokenizers
import vocabularies
from hypothesis import given
from hypothesis import strategies as st
from tokenizers.pre_tokenizers import PreTokenizer

from nybble import ModelError, Tokenizer, _native

BYTE_LEVEL = Tokenizer.from_gguf_metadata(vocabularies.byte_level())
PIECES = Tokenizer.from_gguf_metadata(vocabularies.pieces())
BOTH = pytest.mark.parametrize("tokenizer", [BYTE_LEVEL, PIECES], ids=["byte-level", "pieces"])
START, END, SPACES = BYTE_LEVEL.vocab_size - 3, BYTE_LEVEL.vocab_size - 2, BYTE_LEVEL.vocab_size - 1
TURN, EMPTY_LINE = PIECES.vocab_size - 2, PIECES.vocab_size - 1


def spellings(tokenizer: Tokenizer, ids: list[int]) -> list[str]:
    return [tokenizer.token_text(i) for i in ids]


@BOTH
@given(text=st.text())
def test_decoding_reverses_encoding(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text, parse_special=False)
    # U+2581 stands for a space, and the format cannot escape it.
    expected = text.replace(vocabularies.SPACE, " ") if tokenizer is PIECES else text
    assert tokenizer.decode(ids) == expected


@BOTH
def test_lone_surrogates_become_replacement_characters(tokenizer: Tokenizer) -> None:
    assert tokenizer.decode(tokenizer.encode("a\ud800b\udfffc")) == "a\ufffdb\ufffdc"
    assert tokenizer.decode(tokenizer.encode("\ud83d\ude00")) == "😀", "two that belong together are one character"


@BOTH
def test_bytes_are_refused(tokenizer: Tokenizer) -> None:
    with pytest.raises(TypeError, match="found bytes, expected str"):
        tokenizer.encode(b"abc")  # type: ignore[arg-type]


@pytest.mark.parametrize("token", [-1, 10**6])
@BOTH
def test_an_id_beyond_the_vocabulary_is_refused(tokenizer: Tokenizer, token: int) -> None:
    with pytest.raises(ValueError, match=f"found {token}, expected an id below {tokenizer.vocab_size}"):
        tokenizer.decode([token])


def test_tokens_are_found_by_spelling_and_id() -> None:
    assert PIECES.id_of("<turn>") == TURN
    assert PIECES.token_text(TURN) == "<turn>"
    assert PIECES.id_of("no such token") is None
    assert (PIECES.bos_id, PIECES.eos_id) == (1, 2)
    assert PIECES.eos_ids == {2}
    assert PIECES.special_ids == {0, 1, 2, TURN}
    assert PIECES.token_bytes(3 + 0xC3) == b"\xc3"
    assert not PIECES.has_chat_template


# --- Special, start and end tokens ------------------------------------------------------------------------------------


def test_special_tokens_are_encoded_only_if_parsed() -> None:
    ids = BYTE_LEVEL.encode("a<|end|>b")
    assert ids == [*BYTE_LEVEL.encode("a"), END, *BYTE_LEVEL.encode("b")]
    literal = BYTE_LEVEL.encode("a<|end|>b", parse_special=False)
    assert END not in literal
    assert BYTE_LEVEL.decode(literal) == "a<|end|>b"
    assert BYTE_LEVEL.decode(ids) == "ab"


def test_special_tokens_of_sentencepiece_are_encoded_only_if_parsed() -> None:
    assert TURN in PIECES.encode("a<turn>b")
    literal = PIECES.encode("a<turn>b<s>", parse_special=False)
    assert not PIECES.special_ids.intersection(literal[1:])
    assert PIECES.decode(literal) == "a<turn>b<s>"


def test_user_defined_tokens_are_found_anywhere() -> None:
    for parse_special in (False, True):
        assert SPACES in BYTE_LEVEL.encode("a    b", parse_special=parse_special)
        assert PIECES.encode("\n\n", add_special=False, parse_special=parse_special)[-1] == EMPTY_LINE
    assert BYTE_LEVEL.decode([SPACES, SPACES]) == " " * 8


def test_the_start_token_is_added_if_the_file_says_so() -> None:
    tokenizer = Tokenizer.from_gguf_metadata(vocabularies.byte_level(add_bos_token=True, add_eos_token=True))
    assert tokenizer.encode("a") == [START, *BYTE_LEVEL.encode("a"), END]
    assert tokenizer.encode("") == [START, END]
    assert tokenizer.encode("a", add_special=False) == BYTE_LEVEL.encode("a")
    unsaid = Tokenizer.from_gguf_metadata(vocabularies.byte_level(add_bos_token=None))
    assert unsaid.encode("a") == BYTE_LEVEL.encode("a")
    assert PIECES.encode("a")[0] == 1, "SentencePiece vocabularies want it unless the file says otherwise"


def test_llama_3_files_get_a_start_token_by_default() -> None:
    tokenizer = Tokenizer.from_gguf_metadata(vocabularies.byte_level(pre="llama-bpe", add_bos_token=None))
    assert tokenizer.encode("a")[0] == START


@BOTH
def test_a_start_token_is_never_doubled(tokenizer: Tokenizer) -> None:
    if tokenizer is BYTE_LEVEL:
        tokenizer = Tokenizer.from_gguf_metadata(vocabularies.byte_level(add_bos_token=True))
    assert tokenizer.bos_id is not None
    start = tokenizer.token_text(tokenizer.bos_id)
    assert tokenizer.encode(f"{start}a") == tokenizer.encode("a")
    assert tokenizer.encode(f"{start}a").count(tokenizer.bos_id) == 1
    literal = tokenizer.encode(f"{start}a", parse_special=False)
    assert literal.count(tokenizer.bos_id) == 1
    assert tokenizer.decode(literal) == f"{start}a", "spelled out and not parsed, it is text that needs its own start"


def test_an_end_token_is_never_doubled() -> None:
    tokenizer = Tokenizer.from_gguf_metadata(vocabularies.byte_level(add_eos_token=True))
    assert tokenizer.encode("a<|end|>") == tokenizer.encode("a")


def test_every_token_that_ends_a_turn_ends_a_generation() -> None:
    ends = ["<|im_end|>", "<|eom_id|>", "<|endoftext|>", "</s>", "<|im_start|>"]
    base = vocabularies.byte_level()
    tokens, kinds = base["tokenizer.ggml.tokens"], base["tokenizer.ggml.token_type"]
    ids = {end: len(tokens) + i for i, end in enumerate(ends)}
    tokenizer = Tokenizer.from_gguf_metadata(
        vocabularies.byte_level(tokens=[*tokens, *ends], token_type=[*kinds, 1, 3, 3, 1, 3], eot_token_id=SPACES)
    )
    assert tokenizer.eos_ids == {END, SPACES, ids["<|im_end|>"], ids["<|eom_id|>"], ids["<|endoftext|>"]}
    assert ids["<|im_end|>"] in tokenizer.encode("a<|im_end|>"), "a special token, although the file says otherwise"
    assert tokenizer.decode([ids["<|im_end|>"]]) == ""
    assert tokenizer.decode([ids["</s>"]]) == "</s>", "struck-through text ends so in HTML"


# --- SentencePiece ----------------------------------------------------------------------------------------------------


def joined_naively(text: str, scores: dict[str, float]) -> list[str]:
    """Joins the pair with the highest score, the leftmost of equals, until no pair is a token."""
    parts = list(text)
    while True:
        pairs = [(scores[a + b], -i) for i, (a, b) in enumerate(pairwise(parts)) if a + b in scores]
        if not pairs:
            return parts
        left = -max(pairs)[1]
        parts[left : left + 2] = [parts[left] + parts[left + 1]]


@given(st.text(alphabet=sorted(set(vocabularies.TEXT) - set("\n")), max_size=60))
def test_pieces_are_joined_by_score_and_others_become_bytes(text: str) -> None:
    metadata = vocabularies.pieces()
    columns = (metadata[f"tokenizer.ggml.{key}"] for key in ("tokens", "scores", "token_type"))
    scores = {token: score for token, score, kind in zip(*columns, strict=True) if kind in (1, 4)}
    expected: list[str] = []
    for part in joined_naively((" " + text).replace(" ", vocabularies.SPACE) if text else "", scores):
        expected += [part] if part in scores else [f"<0x{byte:02X}>" for byte in part.encode()]
    assert spellings(PIECES, PIECES.encode(text, add_special=False)) == expected


def test_the_added_space_before_a_text_is_removed_by_decoding() -> None:
    without = Tokenizer.from_gguf_metadata(vocabularies.pieces(add_space_prefix=False))
    ids, bare = PIECES.encode("time", add_special=False), without.encode("time", add_special=False)
    assert PIECES.token_text(ids[0]).startswith(vocabularies.SPACE)
    assert not without.token_text(bare[0]).startswith(vocabularies.SPACE)
    assert PIECES.decode(ids) == without.decode(bare) == "time"
    assert without.decode(ids) == " time"
    assert PIECES.decode(PIECES.encode(" two ")) == " two "


def test_phi_3_drops_white_space_behind_special_tokens() -> None:
    named = Tokenizer.from_gguf_metadata(vocabularies.pieces(general__name="Phi-3 mini"))
    assert named.encode("<turn> \n a") == named.encode("<turn>a")
    assert PIECES.encode("<turn> \n a") != PIECES.encode("<turn>a")
    assert named.encode("<s> a") != named.encode("<s>a"), "but not after this one"


def test_text_without_piece_or_byte_tokens_is_unknown() -> None:
    tokens = ["<unk>", "<s>", "</s>", vocabularies.SPACE, "a"]
    metadata = vocabularies.pieces(tokens=tokens, scores=[0.0] * 5, token_type=[2, 3, 3, 1, 1])
    tokenizer = Tokenizer.from_gguf_metadata(metadata)
    assert tokenizer.encode("aéa") == [1, 3, 4, 0, 4]
    assert tokenizer.decode([1, 3, 4, 0, 4]) == "aa"


# --- Pre-tokenizers ---------------------------------------------------------------------------------------------------


@cache
def rule(name: str) -> PreTokenizer:
    """The rule as the package `tokenizers` runs it."""
    texts: list[str] = []
    metadata = vocabularies.byte_level(pre=name)
    _native.TokenizerDescription.from_metadata(metadata, "model.gguf", texts.append)
    built = tokenizers.Tokenizer.from_str(texts[0]).pre_tokenizer
    assert isinstance(built, PreTokenizer)
    return built


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
def test_a_pre_tokenizer_splits_as_in_training(name: str, text: str, words: list[str]) -> None:
    byte_of = {char: bytes([byte]) for byte, char in enumerate(tiny.byte_pieces())}
    cut = [piece for piece, _ in rule(name).pre_tokenize_str(text)]
    assert [b"".join(byte_of[char] for char in piece).decode() for piece in cut] == words


@pytest.mark.parametrize("name", _native.pre_tokenizer_names())
@given(text=st.text())
def test_no_pre_tokenizer_loses_text(name: str, text: str) -> None:
    cut = rule(name).pre_tokenize_str(text)
    byte_of = {char: byte for byte, char in enumerate(tiny.byte_pieces())}
    assert bytes(byte_of[char] for piece, _ in cut for char in piece).decode() == text


def test_an_unknown_pre_tokenizer_warns_and_names_the_default() -> None:
    with pytest.warns(UserWarning, match="unknown pre-tokenizer 'no-such'.*using 'default'") as caught:
        tokenizer = Tokenizer.from_gguf_metadata(vocabularies.byte_level(pre="no-such"))
    assert len(caught) == 1
    default = Tokenizer.from_gguf_metadata(vocabularies.byte_level(pre="default"))
    assert tokenizer.encode(vocabularies.TEXT) == default.encode(vocabularies.TEXT)


def test_a_missing_pre_tokenizer_warns_and_names_the_default() -> None:
    with pytest.warns(UserWarning, match="does not name its pre-tokenizer.*using 'default'"):
        Tokenizer.from_gguf_metadata(vocabularies.byte_level(pre=None))


def test_some_rules_prefer_whole_words_to_merges() -> None:
    base = vocabularies.byte_level()
    changes: dict[str, Any] = {
        "tokens": [*base["tokenizer.ggml.tokens"], "zzzz"],
        "token_type": [*base["tokenizer.ggml.token_type"], 1],
    }
    whole = Tokenizer.from_gguf_metadata(vocabularies.byte_level(pre="llama-bpe", **changes))
    merged = Tokenizer.from_gguf_metadata(vocabularies.byte_level(pre="qwen2", **changes))
    assert whole.encode("zzzz") == [whole.id_of("zzzz")]
    assert merged.encode("zzzz") == [merged.id_of("z")] * 4


# --- Chat templates ---------------------------------------------------------------------------------------------------

CHAT = "{{ bos_token }}{% for m in messages %}{{ m.role }}:{{ m.content }}{{ eos_token }}{% endfor %}"


def test_a_conversation_is_written_by_its_template() -> None:
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
    assert tokenizer.apply_chat_template(messages, add_generation_prompt=False, mood="!") == "<|start|>user:Hi<|end|>!"
    assert tokenizer.apply_chat_template(messages, tools=[1, 2]) == "2 tools"
    assert tokenizer.apply_chat_template(messages, template="rag", documents=["a text"]) == "a text"
    assert tokenizer.apply_chat_template(messages, bos_token="<b>").startswith("<b>user")
    ids = tokenizer.encode(tokenizer.apply_chat_template(messages))
    assert ids.count(START) == 1, "the template has written it already"
    assert END in ids


def test_a_missing_template_is_an_error() -> None:
    with pytest.raises(ModelError, match=r"GGUF metadata: found no chat template 'default' \(chat templates: none\)"):
        PIECES.apply_chat_template([{"role": "user", "content": "Hi"}])


def test_an_error_of_a_template_names_the_file() -> None:
    metadata = vocabularies.byte_level(tokenizer__chat_template="{% for i in range(10**9) %}{% endfor %}")
    tokenizer = Tokenizer.from_gguf_metadata(metadata, where="model.gguf")
    with pytest.raises(ModelError, match=r"^model\.gguf: chat template 'default' fails: .*Range too big"):
        tokenizer.apply_chat_template([])


# --- Loading ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [vocabularies.byte_level, vocabularies.pieces])
def test_a_gguf_file_without_weights_loads(kind: Any, tmp_path: Path) -> None:
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
    assert tokenizer.encode(chat).count(tokenizer.bos_id or 0) == 3, "those of the template, and no others"
    assert Tokenizer.load(default_file).vocab_size == tokenizer.vocab_size == 49152
