"""Tokenizers of Hugging Face folders, made here by the package that makes the real ones."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import vocabularies
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors

from nybble import ModelError, Tokenizer
from nybble.tokenizer import StreamDecoder

TEMPLATE = "{{ bos_token }}{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}"


def byte_level() -> tokenizers.Tokenizer:
    """A byte-level tokenizer as Llama 3's: its post-processor writes the start token."""
    known = vocabularies.byte_level()
    ids = {token: i for i, token in enumerate(known["tokenizer.ggml.tokens"][:-3])}
    merges = [tuple(merge.split(" ")) for merge in known["tokenizer.ggml.merges"]]
    package = tokenizers.Tokenizer(models.BPE(ids, merges))
    package.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    package.decoder = decoders.ByteLevel()
    package.add_special_tokens(["<|start|>", "<|end|>", "<|im_end|>"])
    package.add_tokens([AddedToken("<think>", normalized=False), AddedToken("naïve", normalized=False)])
    start = package.token_to_id("<|start|>")
    package.post_processor = processors.TemplateProcessing(
        single="<|start|> $A", pair="$A $B", special_tokens=[("<|start|>", start)]
    )
    return package


def pieces() -> tokenizers.Tokenizer:
    """A tokenizer as Llama 2's: spaces as U+2581, one before the text, bytes for what has no token."""
    singles = sorted({letter for letter in vocabularies.TEXT if letter.isascii() and letter > " "})
    texts = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "\u2581", *singles, "\u2581t", "th"]
    package = tokenizers.Tokenizer(
        models.BPE(
            {text: i for i, text in enumerate(texts)},
            [("\u2581", "t"), ("t", "h")],
            unk_token="<unk>",
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    package.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    package.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    package.add_special_tokens(["<unk>", "<s>", "</s>"])
    return package


def write(folder: Path, package: tokenizers.Tokenizer, **files: Any) -> Path:
    package.save(str(folder / "tokenizer.json"))
    for name, content in files.items():
        text = content if isinstance(content, str) else json.dumps(content)
        (folder / f"{name}.{'jinja' if isinstance(content, str) else 'json'}").write_text(text, encoding="utf-8")
    return folder


@pytest.fixture
def config() -> dict[str, Any]:
    return {"bos_token": "<|start|>", "eos_token": {"content": "<|end|>", "lstrip": False}, "chat_template": TEMPLATE}


def test_a_folder_gives_the_ids_of_its_tokenizer(tmp_path: Path, config: dict[str, Any]) -> None:
    package = byte_level()
    tokenizer = Tokenizer.load(write(tmp_path, package, tokenizer_config=config))
    assert tokenizer.encode(vocabularies.TEXT) == package.encode(vocabularies.TEXT).ids
    assert tokenizer.encode(vocabularies.TEXT, add_special=False) == package.encode(vocabularies.TEXT).ids[1:]
    assert tokenizer.bos_id == package.token_to_id("<|start|>")
    assert tokenizer.eos_id == package.token_to_id("<|end|>")
    assert tokenizer.eos_ids == {tokenizer.eos_id, package.token_to_id("<|im_end|>")}
    assert tokenizer.vocab_size == package.get_vocab_size()
    assert tokenizer.apply_chat_template([{"content": "Hi"}]) == "<|start|>Hi<|end|>"


def test_marks_of_a_folder_are_tokens_only_where_they_are_parsed(tmp_path: Path) -> None:
    tokenizer = Tokenizer.load(write(tmp_path, byte_level()))
    assert tokenizer.id_of("<|end|>") in tokenizer.encode("a<|end|>")
    literal = tokenizer.encode("a<|end|><think>", add_special=False, parse_special=False)
    assert not tokenizer.special_ids.intersection(literal)
    assert tokenizer.id_of("<think>") in literal, "no mark, but text that is always one token"
    assert tokenizer.decode(literal) == "a<|end|><think>"


def test_added_tokens_whose_ids_leave_gaps_are_refused_by_name(tmp_path: Path) -> None:
    folder = write(tmp_path, byte_level())
    description = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    description["added_tokens"] = [token for token in description["added_tokens"] if token["content"] != "<|im_end|>"]
    (folder / "tokenizer.json").write_text(json.dumps(description), encoding="utf-8")
    with pytest.raises(ModelError, match="added token '<think>': found the id 438, expected 437"):
        Tokenizer.load(folder)


@pytest.mark.parametrize(("asked", "starts"), [(None, True), (True, True), (False, False)])
def test_the_configuration_says_whether_texts_begin_with_the_start_token(
    tmp_path: Path, config: dict[str, Any], asked: bool | None, starts: bool
) -> None:
    if asked is not None:
        config["add_bos_token"] = asked
    tokenizer = Tokenizer.load(write(tmp_path, byte_level(), tokenizer_config=config))
    assert (tokenizer.encode("a")[0] == tokenizer.bos_id) is starts
    assert tokenizer.encode("<|start|>a").count(int(tokenizer.bos_id or 0)) == 1


def test_the_end_token_is_written_where_the_configuration_asks(tmp_path: Path, config: dict[str, Any]) -> None:
    config["add_eos_token"] = True
    tokenizer = Tokenizer.load(write(tmp_path, byte_level(), tokenizer_config=config))
    assert tokenizer.encode("a")[-1] == tokenizer.eos_id


def test_ends_of_generation_come_from_every_file_that_names_some(tmp_path: Path) -> None:
    folder = write(tmp_path, byte_level(), generation_config={"eos_token_id": [5, 7]}, config={"bos_token_id": 3})
    tokenizer = Tokenizer.load(folder)
    assert tokenizer.eos_ids >= {5, 7}
    assert (tokenizer.bos_id, tokenizer.eos_id) == (3, 5)


@pytest.mark.parametrize("make", [byte_level, pieces])
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_decoding_agrees_with_the_package(make: Any, tmp_path: Path, data: st.DataObject) -> None:
    package = make()
    tokenizer = Tokenizer.load(write(tmp_path, package))
    ids = data.draw(st.lists(st.integers(0, package.get_vocab_size() - 1), max_size=12))
    added = package.get_added_tokens_decoder()
    text = data.draw(st.text(max_size=20))
    assert tokenizer.decode(tokenizer.encode(text)) == package.decode(package.encode(text).ids)
    decoder = StreamDecoder(tokenizer)
    assert "".join(map(decoder.push, ids)) + decoder.finish() == tokenizer.decode(ids)
    plain = [i for i in ids if i not in added and i >= 300]  # Lone bytes are replaced by other rules there.
    assert tokenizer.decode(plain) == package.decode(plain)


def test_added_tokens_are_written_as_they_are(tmp_path: Path) -> None:
    tokenizer = Tokenizer.load(write(tmp_path, byte_level()))
    added = tokenizer.id_of("naïve")
    assert added is not None
    assert tokenizer.encode("naïve", add_special=False) == [added]
    assert tokenizer.decode([added]) == "naïve", "with no letter taken for the byte that it stands for elsewhere"


def test_truncation_and_padding_of_the_file_are_not_for_prompts(tmp_path: Path) -> None:
    package = byte_level()
    package.enable_truncation(4)
    package.enable_padding(length=64)
    tokenizer = Tokenizer.load(write(tmp_path, package))
    assert tokenizer.decode(tokenizer.encode(vocabularies.TEXT)) == vocabularies.TEXT


def test_templates_are_found_wherever_a_folder_keeps_them(tmp_path: Path, config: dict[str, Any]) -> None:
    config["chat_template"] = [{"name": "default", "template": "old"}, {"name": "tool_use", "template": "tools"}]
    folder = write(tmp_path, byte_level(), tokenizer_config=config, chat_template="new")
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "rag.jinja").write_text("rag", encoding="utf-8")
    tokenizer = Tokenizer.load(folder)
    assert tokenizer.chat_templates == {"default": "new", "tool_use": "tools", "rag": "rag"}
    assert tokenizer.apply_chat_template([]) == "new"
    assert tokenizer.apply_chat_template([], tools=[{}]) == "tools"
    assert tokenizer.apply_chat_template([], template="rag") == "rag"
    with pytest.raises(ModelError, match=r"no chat template 'other' \(there are: default, rag, tool_use\)"):
        tokenizer.apply_chat_template([], template="other")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "found no JSON"),
        ("[" * 100_000, "found no JSON"),
        ("[]", "found a JSON list, expected an object"),
        ("{}", "found no tokenizer that can be loaded"),
        ('{"model": {"type": "BPE", "vocab": {"a": 0, "b": 1}, "merges": ["a b"]}}', "found no tokenizer"),
    ],
)
def test_a_damaged_tokenizer_file_is_refused_by_name(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "tokenizer.json").write_text(text, encoding="utf-8")
    with pytest.raises(ModelError, match=message) as caught:
        Tokenizer.load(tmp_path)
    assert "tokenizer.json" in str(caught.value)


def test_a_file_that_is_no_text_is_refused_by_name(tmp_path: Path) -> None:
    folder = write(tmp_path, byte_level())
    (folder / "tokenizer_config.json").write_bytes(b'{"a": "\xff"}')
    with pytest.raises(ModelError, match=r"tokenizer_config\.json: found bytes that are no UTF-8 at byte 7"):
        Tokenizer.load(folder)
    (folder / "tokenizer_config.json").write_text('{"eos_token": "\\ud83d\\ude00", "bos_token": "a\\ud800"}')
    with pytest.raises(ModelError, match=r"tokenizer_config\.json: found half of a surrogate pair"):
        Tokenizer.load(folder)


def test_a_decoder_that_nobody_here_knows_is_refused_by_name(tmp_path: Path) -> None:
    package = byte_level()
    package.decoder = decoders.CTC()
    with pytest.raises(ModelError, match="decoder: found CTC, expected ByteLevel"):
        Tokenizer.load(write(tmp_path, package))


def test_a_gguf_file_may_hold_a_whole_tokenizer_file() -> None:
    metadata = {"tokenizer.huggingface.json": byte_level().to_str()}
    tokenizer = Tokenizer.from_gguf_metadata(metadata)
    assert tokenizer.decode(tokenizer.encode("as ever")) == "as ever"
    with pytest.raises(ModelError, match=r"key 'tokenizer\.huggingface\.json'.*found no JSON"):
        Tokenizer.from_gguf_metadata({"tokenizer.huggingface.json": "{"})
