"""Inconsistent vocabularies are refused, with the key in the error, before anything is built from them."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import tiny
import vocabularies
from hypothesis import given
from hypothesis import strategies as st

from nybble import ModelError, Tokenizer

BYTE_LEVEL, PIECES = vocabularies.byte_level(), vocabularies.pieces()
COUNT = {"gpt2": len(BYTE_LEVEL["tokenizer.ggml.tokens"]), "llama": len(PIECES["tokenizer.ggml.tokens"])}
TOKENS = PIECES["tokenizer.ggml.tokens"]


def refused(metadata: dict[str, Any], key: str, found: str, expected: str) -> None:
    with pytest.raises(ModelError) as caught:
        Tokenizer.from_gguf_metadata(metadata, where="model.gguf")
    message = str(caught.value)
    assert message.startswith(f"model.gguf: key 'tokenizer.ggml.{key}': found ")
    assert found in message.partition(", expected ")[0]
    assert expected in message.partition(", expected ")[2]


@pytest.mark.parametrize("kind", [vocabularies.byte_level, vocabularies.pieces], ids=["byte-level", "pieces"])
class TestOfBothKinds:
    @pytest.mark.parametrize(("tokens", "found"), [(None, "nothing"), ([], "an empty array")])
    def test_a_vocabulary_without_tokens_is_refused(self, kind: Any, tokens: Any, found: str) -> None:
        refused(kind(tokens=tokens), "tokens", found, "at least one token")

    @pytest.mark.parametrize("tokens", [[1, 2], ["a", 2], ["a", None]])
    def test_tokens_other_than_strings_are_refused(self, kind: Any, tokens: Any) -> None:
        refused(kind(tokens=tokens), "tokens", "an array that holds", "an array of str")

    def test_tokens_other_than_an_array_are_refused(self, kind: Any) -> None:
        refused(kind(tokens="abc"), "tokens", "'abc'", "an array of str")

    def test_a_very_long_token_is_refused(self, kind: Any) -> None:
        refused(kind(tokens=["a" * 100_000_000]), "tokens", "a token of 100000000 characters", "at most 65536")

    @pytest.mark.parametrize("change", [-1, 1])
    def test_token_types_with_a_wrong_length_are_refused(self, kind: Any, change: int) -> None:
        count = len(kind()["tokenizer.ggml.tokens"])
        refused(
            kind(token_type=[1] * (count + change)), "token_type", f"{count + change} elements", f"{count}, one per"
        )

    @pytest.mark.parametrize("wrong", [1.0, "1", True])
    def test_token_types_other_than_integers_are_refused(self, kind: Any, wrong: Any) -> None:
        count = len(kind()["tokenizer.ggml.tokens"])
        refused(kind(token_type=[wrong] * count), "token_type", type(wrong).__name__, "an array of int")

    @pytest.mark.parametrize("wrong", [-1, 7, 2**31])
    def test_undefined_token_types_are_refused(self, kind: Any, wrong: int) -> None:
        count = len(kind()["tokenizer.ggml.tokens"])
        refused(kind(token_type=[1] * (count - 1) + [wrong]), "token_type", f"the type {wrong}", "1 to 6")

    @pytest.mark.parametrize("name", ["bos", "eos", "eot", "eom", "unknown", "padding", "seperator", "fim_pre"])
    @pytest.mark.parametrize("beyond", [0, 1, 2**31])
    def test_a_special_token_beyond_the_vocabulary_is_ignored_with_a_warning(
        self, kind: Any, name: str, beyond: int
    ) -> None:
        count = len(kind()["tokenizer.ggml.tokens"])
        wanted = f"{name}_token_id: found {count + beyond}, expected a token id below {count}"
        with pytest.warns(UserWarning, match=wanted):
            tokenizer = Tokenizer.from_gguf_metadata(kind(**{f"{name}_token_id": count + beyond}))
        assert max(tokenizer.eos_ids, default=0) < count
        assert tokenizer.decode(tokenizer.encode("as ever")) == "as ever"

    @pytest.mark.parametrize("wrong", [-2, 1.0, "1", True, [1]])
    def test_a_special_token_other_than_an_id_is_refused(self, kind: Any, wrong: Any) -> None:
        refused(kind(bos_token_id=wrong), "bos_token_id", "", "a token id below")

    @pytest.mark.parametrize("nothing", [-1, 0xFFFFFFFF])
    def test_an_unused_special_token_may_be_minus_one(self, kind: Any, nothing: int) -> None:
        tokenizer = Tokenizer.from_gguf_metadata(kind(padding_token_id=nothing, mask_token_id=nothing))
        assert tokenizer.decode(tokenizer.encode("as ever")) == "as ever"

    @pytest.mark.parametrize("wrong", [1, "true", 0.0])
    def test_a_flag_other_than_true_or_false_is_refused(self, kind: Any, wrong: Any) -> None:
        refused(kind(add_bos_token=wrong), "add_bos_token", repr(wrong), "true or false")

    def test_a_malformed_byte_token_is_refused(self, kind: Any) -> None:
        metadata = kind()
        tokens, kinds = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.token_type"]
        broken = kind(tokens=["<0x-1>", *tokens[1:]], token_type=[6, *kinds[1:]])
        refused(broken, "tokens", "'<0x-1>'", "'<0x00>' to '<0xFF>'")

    @pytest.mark.parametrize("model", ["rwkv", "plamo2", "", "none"])
    def test_an_unsupported_kind_of_tokenizer_is_refused(self, kind: Any, model: str) -> None:
        refused(kind(model=model), "model", repr(model), "'gpt2'")

    @pytest.mark.parametrize(("model", "found"), [(None, "nothing"), (3, "3")])
    def test_a_file_without_a_kind_of_tokenizer_is_refused(self, kind: Any, model: Any, found: str) -> None:
        refused(kind(model=model), "model", found, "")


@pytest.mark.parametrize("text", ["<0x-1>", "<0x>", "<0x1>", "<0x123>", "<0xGG>", "<0x 1>"])
@pytest.mark.parametrize("number", [1, 4, 6])
def test_malformed_byte_tokens_of_sentencepiece_are_refused(text: str, number: int) -> None:
    kinds = [*PIECES["tokenizer.ggml.token_type"][:-1], number]
    refused(vocabularies.pieces(tokens=[*TOKENS[:-1], text], token_type=kinds), "tokens", repr(text), "'<0x00>'")


@pytest.mark.parametrize("change", [-1, 1])
def test_scores_with_a_wrong_length_are_refused(change: int) -> None:
    count = COUNT["llama"] + change
    refused(vocabularies.pieces(scores=[0.0] * count), "scores", f"{count} elements", f"{COUNT['llama']}, one per")


@pytest.mark.parametrize("wrong", [1, "1", True])
def test_scores_other_than_floats_are_refused(wrong: Any) -> None:
    refused(vocabularies.pieces(scores=[wrong] * COUNT["llama"]), "scores", type(wrong).__name__, "an array of float")


def test_scores_that_are_nan_are_refused() -> None:
    scores = [0.0] * (COUNT["llama"] - 1) + [float("nan")]
    refused(vocabularies.pieces(scores=scores), "scores", "NaN", "numbers")


def test_sentencepiece_needs_scores() -> None:
    refused(vocabularies.pieces(scores=None), "scores", "nothing", "one per token")


@pytest.mark.parametrize("merge", ["ab", "", " ", "a b c", " ab", "ab ", "a  b"])
def test_a_merge_without_two_parts_is_refused(merge: str) -> None:
    refused(vocabularies.byte_level(merges=["t h", merge]), "merges", repr(merge), "two parts")


@pytest.mark.parametrize(("merges", "found"), [(None, "nothing"), ([1], "int"), ("a b", "'a b'")])
def test_merges_other_than_an_array_of_strings_are_refused(merges: Any, found: str) -> None:
    refused(vocabularies.byte_level(merges=merges), "merges", found, "an array of")


@pytest.mark.parametrize("merge", ["no-such a", "a no-such", "q \u0142"])
def test_a_merge_of_unknown_tokens_is_ignored_with_a_warning(merge: str) -> None:
    whole = vocabularies.byte_level()
    merges = [merge, *whole["tokenizer.ggml.merges"]]
    with pytest.warns(UserWarning, match=f"merges: 1 of {len(merges)} merges are ignored"):
        tokenizer = Tokenizer.from_gguf_metadata(vocabularies.byte_level(merges=merges))
    assert tokenizer.encode(vocabularies.TEXT) == Tokenizer.from_gguf_metadata(whole).encode(vocabularies.TEXT)


def test_a_missing_start_token_is_refused_if_the_file_adds_it() -> None:
    wanted = vocabularies.byte_level(bos_token_id=None, add_bos_token=True)
    refused(wanted, "bos_token_id", "nothing", "add_bos_token is true")
    implied = vocabularies.byte_level(bos_token_id=None, add_bos_token=None, pre="llama-bpe")
    assert Tokenizer.from_gguf_metadata(implied).bos_id is None


@pytest.mark.parametrize("pre", ["whitespace"])
def test_a_pre_tokenizer_for_other_vocabularies_is_refused(pre: str) -> None:
    refused(vocabularies.byte_level(pre=pre), "pre", repr(pre), "a byte-level pre-tokenizer")


def test_tokens_with_invalid_utf8_decode_but_are_never_encoded() -> None:
    tokens = [*TOKENS[:-1], "\udcff\udcfe"]
    tokenizer = Tokenizer.from_gguf_metadata(vocabularies.pieces(tokens=tokens))
    assert tokenizer.token_bytes(len(tokens) - 1) == b"\xff\xfe"
    assert tokenizer.decode([len(tokens) - 1]) == "\ufffd\ufffd"
    base = vocabularies.byte_level()
    tokens = [*base["tokenizer.ggml.tokens"][:-1], "\udcff"]
    tokenizer = Tokenizer.from_gguf_metadata(vocabularies.byte_level(tokens=tokens))
    assert tokenizer.decode([len(tokens) - 1]) == "\ufffd"
    assert tokenizer.decode(tokenizer.encode("a    b")) == "a    b"


def test_of_equal_tokens_all_decode_and_the_first_is_encoded() -> None:
    base = vocabularies.byte_level()
    tokens, kinds = base["tokenizer.ggml.tokens"], base["tokenizer.ggml.token_type"]
    z = tokens.index("z")
    changes = {"tokens": [*tokens, "z", "", ""], "token_type": [*kinds, 1, 1, 3]}
    tokenizer = Tokenizer.from_gguf_metadata(vocabularies.byte_level(**changes))
    assert tokenizer.encode("z") == [z]
    assert tokenizer.decode([z, len(tokens), len(tokens) + 1, len(tokens) + 2]) == "zz"


ODD = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**63), 2**64 - 1),
    st.floats(),
    st.text(max_size=6),
    st.lists(st.text(max_size=6), max_size=4),
    st.lists(st.integers(-(2**31), 2**31), max_size=4),
    st.lists(st.floats(), max_size=4),
)


@pytest.mark.parametrize("kind", [vocabularies.byte_level, vocabularies.pieces], ids=["byte-level", "pieces"])
@given(data=st.data())
def test_odd_values_load_or_raise_modelerror(kind: Any, data: st.DataObject) -> None:
    metadata = kind(tokenizer__chat_template="x")
    for key in data.draw(st.lists(st.sampled_from(sorted(metadata)), min_size=1, max_size=2)):
        value = metadata[key]
        if isinstance(value, list) and value and data.draw(st.booleans()):
            at = data.draw(st.integers(0, len(value) - 1))
            value = [*value[:at], data.draw(ODD), *value[at + data.draw(st.integers(0, 1)) :]]
        else:
            value = data.draw(ODD)
        metadata[key] = value
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            tokenizer = Tokenizer.from_gguf_metadata(metadata)
        except ModelError:
            return
    for parse_special in (False, True):
        ids = tokenizer.encode("It's <|start|> 12\n\n中 <s>\U0001f9ff", parse_special=parse_special)
        assert all(0 <= i < tokenizer.vocab_size for i in ids)
        tokenizer.decode(ids)


def test_an_error_of_a_damaged_file_names_its_path(tmp_path: Path) -> None:
    file = tmp_path / "damaged.gguf"
    tiny.write_gguf(file, vocabularies.byte_level(merges=["oneword"]))
    with pytest.raises(ModelError, match=r"damaged\.gguf: key 'tokenizer\.ggml\.merges'"):
        Tokenizer.load(file)


def test_a_chat_template_other_than_a_string_is_refused() -> None:
    with pytest.raises(ModelError, match=r"key 'tokenizer\.chat_template': found 3, expected a string"):
        Tokenizer.from_gguf_metadata(vocabularies.byte_level(tokenizer__chat_template=3))
