"""Calibration files as people have them: conversations, JSON under any name, Parquet."""

from __future__ import annotations

import json
import sys
import types
from pathlib import Path
from typing import Any

import pytest

from nybble import Model, ModelError
from nybble.quantization import datasets
from nybble.quantization.documents import Conversation

TURNS = [{"role": "user", "content": "Good day."}, {"role": "assistant", "content": "And to you."}]
SHARE_GPT = [{"from": "human", "value": "Good day."}, {"from": "gpt", "value": "And to you."}]


@pytest.mark.parametrize(
    "record",
    [
        {"messages": TURNS},
        {"conversations": SHARE_GPT},
        {"conversations": TURNS, "text": None},
        {"prompt": "Good day.", "completion": "And to you."},
        {"prompt": TURNS[:1], "completion": TURNS[1:]},
        {"instruction": "Good day.", "input": "", "output": "And to you."},
    ],
)
def test_every_form_of_a_conversation_is_read(tmp_path: Path, record: Any) -> None:
    path = tmp_path / "chat.jsonl"
    path.write_text(json.dumps(record) + "\n", encoding="utf-8")
    (from_file,), (from_list,) = datasets.read(path), datasets.as_documents([record])[0]
    for found in (from_file, from_list):
        assert isinstance(found, Conversation)
        assert [dict(message) for message in found.messages] == TURNS


def test_conversations_pass_through_the_chat_template(tiny_model: Model) -> None:
    tokenizer = tiny_model.tokenizer
    assert tokenizer.has_chat_template
    ids = datasets.tokens(tokenizer, datasets.as_documents([{"messages": TURNS}])[0])
    written = tokenizer.apply_chat_template(TURNS, add_generation_prompt=False)
    assert ids == list(tokenizer.encode(written, add_special=False))
    # Prose never becomes special tokens.
    plain = datasets.tokens(tokenizer, datasets.as_documents([written])[0])
    assert plain != ids


@pytest.mark.parametrize("name", ["lines.json", "lines.jsonl.txt", "lines", "lines.ndjson"])
def test_json_lines_are_known_under_any_name(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_text('{"text": "one"}\n\n{"text": "two"}\n', encoding="utf-8")
    assert datasets.read(path) == ["one", "two"]
    path.write_text('[{"text": "one"},\n {"text": "two"}]', encoding="utf-8")
    if not name.endswith("ndjson"):
        assert datasets.read(path) == ["one", "two"]


def test_prose_with_braces_and_brackets_stays_prose(tmp_path: Path) -> None:
    path = tmp_path / "prose.txt"
    for text in ["[1] A footnote.\nMore.", "{braces} are fine", 'One\n{"text": "two"}', '"quoted"']:
        path.write_text(text, encoding="utf-8")
        assert datasets.read(path) == [text]


@pytest.mark.parametrize(
    "text",
    ['{"title": "x"}\n{"title": "y"}', '{"text": "x"}\nprose', '{"messages": []}', '{"messages": [{"text": "x"}]}'],
)
def test_records_without_a_document_are_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "lines.txt"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ModelError, match=r"lines\.txt: (line|item)?"):
        datasets.read(path)


def test_parquet_is_read_by_pyarrow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "rows.parquet"
    path.write_bytes(b"PAR1....PAR1")
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(ModelError, match="pip install pyarrow"):
        datasets.read(path)
    rows = [{"text": "one", "messages": None}, {"text": None, "messages": TURNS}]
    table = types.SimpleNamespace(to_pylist=lambda: rows)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", types.SimpleNamespace(read_table=lambda _: table))
    one, conversation = datasets.read(path)
    assert one == "one"
    assert isinstance(conversation, Conversation)
