"""The ids and strings of `tests/data/tokenizers.json`, which Rust gives, too."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest

from nybble import Tokenizer

GOLDEN: dict[str, Any] = json.loads(
    (Path(__file__).resolve().parents[2] / "data" / "tokenizers.json").read_text(encoding="utf-8")
)


def same(tokenizer: Tokenizer, file: dict[str, Any]) -> None:
    assert sorted(tokenizer.eos_ids) == file["ends"]
    for case in file["cases"]:
        special = case["special"]
        assert tokenizer.encode(case["text"], add_special=special, parse_special=special) == case["ids"]
        assert tokenizer.decode(case["ids"]) == case["decoded"]


@pytest.mark.parametrize("file", GOLDEN["files"], ids=range(len(GOLDEN["files"])))
def test_metadata_give_the_recorded_ids(file: dict[str, Any]) -> None:
    same(Tokenizer.from_gguf_metadata(file["metadata"]), file)


@pytest.mark.parametrize("file", GOLDEN["folders"], ids=range(len(GOLDEN["folders"])))
def test_a_folder_gives_the_recorded_ids(file: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text(json.dumps(file["tokenizer"]), encoding="utf-8")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(file["config"]), encoding="utf-8")
    same(Tokenizer.from_folder(tmp_path), file)


@pytest.mark.parametrize("rule", GOLDEN["rules"], ids=[rule["names"][0] for rule in GOLDEN["rules"]])
def test_every_pre_tokenizer_gives_the_recorded_ids(rule: dict[str, Any]) -> None:
    for name in rule["names"]:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            tokenizer = Tokenizer.from_gguf_metadata(GOLDEN["files"][0]["metadata"] | {"tokenizer.ggml.pre": name})
        for text, ids in zip(GOLDEN["strings"], rule["ids"], strict=True):
            assert tokenizer.encode(text, add_special=False, parse_special=False) == ids
