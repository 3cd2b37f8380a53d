"""Vocabularies whose merges apply to characters, as Gemma 4's: the ids are those of the library."""

from __future__ import annotations

import json
import random
from typing import Any

import pytest
import tokenizers

from nybble import Tokenizer

TEXT = [
    "The quick brown fox jumps over the lazy dog.\n\nIt does so  twice,   and then\nrests.",
    "def add(a, b):\n    return a + b\n\n\n\nprint(add(1, 2))\n",
    "Zwölf Boxkämpfer jagen Viktor quer über den großen Sylter Deich.",
    "the then there these those this that",
]
SPECIAL = ["<pad>", "<eos>", "<bos>", "<unk>", "<|turn>", "<turn|>"]


def _trained() -> dict[str, Any]:
    """A `tokenizer.json` with the parts of Gemma's."""
    trained = tokenizers.Tokenizer(tokenizers.models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    trained.normalizer = tokenizers.normalizers.Replace(" ", "\u2581")
    bytes_of = [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=700, special_tokens=[*SPECIAL, *bytes_of], show_progress=False, max_token_length=8
    )
    trained.train_from_iterator(TEXT, trainer)
    trained.pre_tokenizer = tokenizers.pre_tokenizers.Split(" ", "merged_with_previous")
    found: dict[str, Any] = json.loads(trained.to_str())
    # Byte tokens are ordinary entries, as in Gemma's file.
    found["added_tokens"] = [token for token in found["added_tokens"] if token["content"] in SPECIAL]
    return found


LIBRARY = _trained()


def _metadata(**changes: object) -> dict[str, Any]:
    """The keys of a GGUF file with that vocabulary."""
    vocabulary: dict[str, int] = LIBRARY["model"]["vocab"]
    tokens = sorted(vocabulary, key=lambda text: vocabulary[text])
    kinds = [6 if text.startswith("<0x") else 3 if text in SPECIAL else 1 for text in tokens]
    found = {
        "model": "gemma4",
        "tokens": tokens,
        "scores": [-1000.0] * len(tokens),
        "token_type": kinds,
        "merges": [" ".join(merge) for merge in LIBRARY["model"]["merges"]],
        "bos_token_id": vocabulary["<bos>"],
        "eos_token_id": vocabulary["<eos>"],
        "unknown_token_id": vocabulary["<unk>"],
        "padding_token_id": vocabulary["<pad>"],
        "add_space_prefix": False,
        **changes,
    }
    return {f"tokenizer.ggml.{key}": value for key, value in found.items() if value is not None}


def _prompts() -> list[str]:
    generator = random.Random(5)
    alphabet = "abehtsT .,\n\n  ()ü🙂\t\u00e9\u4e2d"
    return [*TEXT, "", " ", "\n", "a🙂b", *("".join(generator.choices(alphabet, k=30)) for _ in range(200))]


@pytest.mark.parametrize(
    "changes", [{}, {"model": "gpt2", "pre": "gemma4"}, {"model": "gpt2", "pre": "sarvam-moe"}], ids=str
)
def test_ids_and_text_are_those_of_the_library(changes: dict[str, object]) -> None:
    library = tokenizers.Tokenizer.from_str(json.dumps(LIBRARY))
    tokenizer = Tokenizer.from_gguf_metadata(_metadata(**changes))
    for text in _prompts():
        expected = library.encode(text, add_special_tokens=False).ids
        assert tokenizer.encode(text, add_special=False) == expected, repr(text)
        assert tokenizer.decode(expected) == text


def test_a_text_begins_with_the_start_token_whatever_the_file_says() -> None:
    for adds in (None, True, False):
        tokenizer = Tokenizer.from_gguf_metadata(_metadata(add_bos_token=adds))
        assert tokenizer.encode("the")[0] == tokenizer.bos_id
    sarvam = Tokenizer.from_gguf_metadata(_metadata(model="gpt2", pre="sarvam-moe"))
    assert sarvam.encode("the") == sarvam.encode("the", add_special=False)


def test_special_tokens_are_recognized_and_end_a_turn() -> None:
    tokenizer = Tokenizer.from_gguf_metadata(_metadata(eot_token_id=LIBRARY["model"]["vocab"]["<turn|>"]))
    turn = tokenizer.encode("<|turn>the<turn|>\n", add_special=False)
    assert [turn[0], turn[-2]] == [LIBRARY["model"]["vocab"][text] for text in ("<|turn>", "<turn|>")]
    assert LIBRARY["model"]["vocab"]["<turn|>"] in tokenizer.eos_ids
