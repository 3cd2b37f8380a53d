"""Real vocabularies give the ids of llama.cpp's test files.

The files (`NAME.gguf` with `NAME.gguf.inp` and `.out`) are those of llama.cpp's folder `models`. NYBBLE_TEST_TOKENIZERS
names the folder that holds them.
"""

from __future__ import annotations

import os
import warnings
from functools import cache
from pathlib import Path

import pytest

from nybble import ModelError, Tokenizer

FOLDER = Path(os.environ.get("NYBBLE_TEST_TOKENIZERS") or Path(__file__).resolve().parents[4] / "shared" / "tokenizers")
FILES = sorted(FOLDER.glob("*.gguf.out"))

pytestmark = pytest.mark.skipif(not FILES, reason=f"no vocabularies in {FOLDER}: set NYBBLE_TEST_TOKENIZERS")


@cache
def load(file: Path) -> Tokenizer:
    return Tokenizer.load(file)


def cases(expected: Path) -> tuple[Tokenizer, list[tuple[str, list[int]]]]:
    file = expected.with_suffix("")
    try:
        tokenizer = load(file)
    except ModelError as error:
        pytest.skip(f"{error}")
    with Path(f"{file}.inp").open(encoding="utf-8", newline="") as stream:
        documents = stream.read().split("\n__ggml_vocab_test__\n")
    ids = [[int(i) for i in line.split()] for line in expected.read_text(encoding="utf-8").splitlines()]
    assert len(documents) - 1 == len(ids) > 40, "a separator follows each text"
    return tokenizer, list(zip(documents, ids, strict=False))


@pytest.mark.parametrize("expected", FILES, ids=lambda file: file.name.removesuffix(".gguf.out"))
def test_ids_equal_those_of_llama_cpp(expected: Path) -> None:
    tokenizer, documents = cases(expected)
    for text, ids in documents:
        assert tokenizer.encode(text, add_special=False) == ids, f"{text!r} became other ids"


@pytest.mark.parametrize("expected", FILES, ids=lambda file: file.name.removesuffix(".gguf.out"))
def test_ids_decode_to_the_original_text(expected: Path) -> None:
    tokenizer, documents = cases(expected)
    for text, ids in documents:
        assert tokenizer.decode(ids) == text


def test_a_file_without_a_pre_tokenizer_loads_with_a_warning() -> None:
    file = FOLDER / "ggml-vocab-gpt-neox.gguf"
    if not file.is_file():
        pytest.skip(f"{file} is not there")
    with pytest.warns(UserWarning, match="does not name its pre-tokenizer"):
        tokenizer = Tokenizer.load(file)
    assert tokenizer.decode(tokenizer.encode("Hello  world")) == "Hello  world"


def test_no_other_file_warns() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for expected in FILES:
            try:
                Tokenizer.load(expected.with_suffix(""))
            except ModelError:
                continue
