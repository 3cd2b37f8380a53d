"""Tokenizers of Hugging Face folders, made by the `tokenizers` package."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import vocabularies
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors

from nybble import ModelError, Tokenizer
from nybble.tokenizer.tokenizer import StreamDecoder

TEMPLATE = "{{ bos_token }}{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}"


def byte_level() -> tokenizers.Tokenizer:
    """A byte-level tokenizer like Llama 3's, whose post-processor adds the start token."""
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
    """A tokenizer like Llama 2's: U+2581 for spaces, a space before the text, and byte tokens."""
    singles = sorted({char for char in vocabularies.TEXT if char.isascii() and char > " "})
    spellings = [
        "<unk>",
        "<s>",
        "</s>",
        *(f"<0x{byte:02X}>" for byte in range(256)),
        "\u2581",
        *singles,
        "\u2581t",
        "th",
    ]
    package = tokenizers.Tokenizer(
        models.BPE(
            {text: i for i, text in enumerate(spellings)},
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
    assert tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}]) == "<|start|>Hi<|end|>"


def test_special_tokens_of_a_folder_are_encoded_only_if_parsed(tmp_path: Path) -> None:
    tokenizer = Tokenizer.load(write(tmp_path, byte_level()))
    assert tokenizer.id_of("<|end|>") in tokenizer.encode("a<|end|>")
    literal = tokenizer.encode("a<|end|><think>", add_special=False, parse_special=False)
    assert not tokenizer.special_ids.intersection(literal)
    assert tokenizer.id_of("<think>") in literal, "an added token that is not special"
    assert tokenizer.decode(literal) == "a<|end|><think>"


def test_added_tokens_with_gaps_between_ids_are_refused(tmp_path: Path) -> None:
    folder = write(tmp_path, byte_level())
    description = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    description["added_tokens"] = [token for token in description["added_tokens"] if token["content"] != "<|im_end|>"]
    (folder / "tokenizer.json").write_text(json.dumps(description), encoding="utf-8")
    with pytest.raises(ModelError, match="added token '<think>': found the id 438, expected 437"):
        Tokenizer.load(folder)


@pytest.mark.parametrize(("asked", "starts"), [(None, True), (True, True), (False, False)])
def test_the_configuration_controls_the_start_token(
    tmp_path: Path, config: dict[str, Any], asked: bool | None, starts: bool
) -> None:
    if asked is not None:
        config["add_bos_token"] = asked
    tokenizer = Tokenizer.load(write(tmp_path, byte_level(), tokenizer_config=config))
    assert (tokenizer.encode("a")[0] == tokenizer.bos_id) is starts
    assert tokenizer.encode("<|start|>a").count(int(tokenizer.bos_id or 0)) == 1


def test_the_configuration_controls_the_end_token(tmp_path: Path, config: dict[str, Any]) -> None:
    config["add_eos_token"] = True
    tokenizer = Tokenizer.load(write(tmp_path, byte_level(), tokenizer_config=config))
    assert tokenizer.encode("a")[-1] == tokenizer.eos_id


def test_end_tokens_come_from_all_files_of_a_folder(tmp_path: Path) -> None:
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
    plain = [i for i in ids if i not in added and i >= 300]  # The package replaces incomplete bytes differently.
    assert tokenizer.decode(plain) == package.decode(plain)


def test_added_tokens_decode_literally(tmp_path: Path) -> None:
    tokenizer = Tokenizer.load(write(tmp_path, byte_level()))
    added = tokenizer.id_of("naïve")
    assert added is not None
    assert tokenizer.encode("naïve", add_special=False) == [added]
    assert tokenizer.decode([added]) == "naïve", "characters of added tokens do not stand for bytes"


def test_truncation_and_padding_of_the_file_are_ignored(tmp_path: Path) -> None:
    package = byte_level()
    package.enable_truncation(4)
    package.enable_padding(length=64)
    tokenizer = Tokenizer.load(write(tmp_path, package))
    assert tokenizer.decode(tokenizer.encode(vocabularies.TEXT)) == vocabularies.TEXT


def test_templates_are_found_in_all_files_of_a_folder(tmp_path: Path, config: dict[str, Any]) -> None:
    config["chat_template"] = [{"name": "default", "template": "old"}, {"name": "tool_use", "template": "tools"}]
    folder = write(tmp_path, byte_level(), tokenizer_config=config, chat_template="new")
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "rag.jinja").write_text("rag", encoding="utf-8")
    tokenizer = Tokenizer.load(folder)
    assert tokenizer.chat_templates == {"default": "new", "tool_use": "tools", "rag": "rag"}
    assert tokenizer.apply_chat_template([]) == "new"
    assert tokenizer.apply_chat_template([], tools=[{}]) == "tools"
    assert tokenizer.apply_chat_template([], template="rag") == "rag"
    with pytest.raises(ModelError, match=r"no chat template 'other' \(chat templates: default, rag, tool_use\)"):
        tokenizer.apply_chat_template([], template="other")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "invalid JSON"),
        ("[" * 100_000, "invalid JSON"),
        ("[]", "found a JSON list, expected an object"),
        ("{}", "found an invalid tokenizer"),
        ('{"model": {"type": "BPE", "vocab": {"a": 0, "b": 1}, "merges": ["a b"]}}', "found an invalid tokenizer"),
    ],
)
def test_a_damaged_tokenizer_file_is_refused_by_name(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "tokenizer.json").write_text(text, encoding="utf-8")
    with pytest.raises(ModelError, match=message) as caught:
        Tokenizer.load(tmp_path)
    assert "tokenizer.json" in str(caught.value)


def changed(folder: Path, *keys: str | int, value: Any, make: Any = byte_level) -> Path:
    """A folder whose tokenizer.json has `value` at the path `keys`."""
    write(folder, make())
    description = part = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    for key in keys[:-1]:
        part = part[key]
    part[keys[-1]] = value
    (folder / "tokenizer.json").write_text(json.dumps(description), encoding="utf-8")
    return folder


def refused(folder: Path, message: str) -> None:
    with pytest.raises(ModelError, match=message) as caught:
        Tokenizer.load(folder)
    assert str(caught.value).startswith(str(folder / "tokenizer.json"))


@pytest.mark.parametrize("wrong", [440, 2**32 - 1, 2**40, -1, 1.5, "5", None, [], True])
def test_a_token_with_an_invalid_id_is_refused(tmp_path: Path, wrong: Any) -> None:
    is_id = wrong in (440, 2**32 - 1)
    message = f"token 'Z': found the id {wrong}, expected one below 440" if is_id else "found an invalid tokenizer"
    refused(changed(tmp_path, "model", "vocab", "Z", value=wrong), message)


def test_two_tokens_with_one_id_are_refused(tmp_path: Path) -> None:
    refused(changed(tmp_path, "model", "vocab", "Z", value=0), "token 'Z': found the id 0 of '.', expected its own")


@pytest.mark.parametrize("wrong", [2**40, 2**32 - 1, 0, -1, 1.5, "5", None, [], True])
def test_an_added_token_without_the_next_id_is_refused(tmp_path: Path, wrong: Any) -> None:
    refused(changed(tmp_path, "added_tokens", -1, "id", value=wrong), "found the id|found an invalid tokenizer")


@pytest.mark.parametrize(
    "merges",
    [[["a"]], [["a", "b", "c"]], ["ab"], ["a b c"], [1], [None], "a b", {}, [["no-such", "a"]], [["", ""]], [" "]],
)
def test_merges_other_than_pairs_of_tokens_are_refused(tmp_path: Path, merges: Any) -> None:
    refused(changed(tmp_path, "model", "merges", value=merges), "found an invalid tokenizer")


def test_a_very_long_token_is_refused_early(tmp_path: Path) -> None:
    message = "found a token of 100000000 characters, expected at most 65536"
    refused(changed(tmp_path, "added_tokens", -1, "content", value="a" * 100_000_000), message)
    refused(changed(tmp_path, "model", "vocab", "a" * 65_537, value=440), "found a token of 65537 characters")


@pytest.mark.parametrize(
    "steps",
    [
        {"type": "Prepend", "prepend": "x" * 1025},
        {"type": "Replace", "pattern": {"String": "a"}, "content": "a" * 1025},
        {"type": "Sequence", "normalizers": [{"type": "Replace", "pattern": {"String": "a"}, "content": "aa"}] * 11},
    ],
)
def test_a_normalizer_that_expands_text_too_much_is_refused(tmp_path: Path, steps: Any) -> None:
    refused(
        changed(tmp_path, "normalizer", value=steps),
        "normalizer: found steps that make [0-9]+ characters of one, expected at most 1024",
    )


def test_a_panic_of_the_package_is_an_error_that_names_the_file(tmp_path: Path) -> None:
    step = {"type": "Replace", "pattern": {"Regex": "(?=a)"}, "content": "x"}
    refused(changed(tmp_path, "normalizer", value=step), "cannot encode the text 'a'")
    step["pattern"] = {"Regex": "(?=b)"}
    tokenizer = Tokenizer.load(changed(tmp_path, "normalizer", value=step))
    with pytest.raises(ModelError, match="the vocabulary cannot encode 'b'"):
        tokenizer.encode("b")


def test_a_post_processor_with_unknown_tokens_is_refused(tmp_path: Path) -> None:
    message = "post_processor: found the token 435, expected an id below 435"
    refused(changed(tmp_path, "added_tokens", value=[]), message)


@pytest.mark.parametrize("part", ["model", "added_tokens", "normalizer", "pre_tokenizer", "post_processor", "decoder"])
@pytest.mark.parametrize("value", [0, "x", [1], {"type": 1}, {"type": "x"}, {"type": "Sequence"}, True, 1e300])
def test_a_part_of_the_wrong_type_is_refused(tmp_path: Path, part: str, value: Any) -> None:
    refused(changed(tmp_path, part, value=value), "found")


def test_deep_nesting_in_a_part_is_refused(tmp_path: Path) -> None:
    write(tmp_path, byte_level())
    text = (tmp_path / "tokenizer.json").read_text(encoding="utf-8")
    for deep in ("[" * 100_000 + "]" * 100_000, '{"type":"Sequence","normalizers":[' * 20_000 + "]}" * 20_000):
        (tmp_path / "tokenizer.json").write_text(text.replace('"normalizer": null', f'"normalizer": {deep}'))
        refused(tmp_path, "invalid JSON")


def test_dropout_of_the_file_is_ignored(tmp_path: Path) -> None:
    tokenizer = Tokenizer.load(changed(tmp_path, "model", "dropout", value=0.9))
    whole = byte_level().encode(vocabularies.TEXT).ids
    assert all(tokenizer.encode(vocabularies.TEXT) == whole for _ in range(10))


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="pipes of POSIX")
@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "config.json"])
def test_a_pipe_instead_of_a_file_is_refused_without_waiting(tmp_path: Path, name: str) -> None:
    write(tmp_path, byte_level())
    (tmp_path / "special_tokens_map.json").write_text("{}")
    (tmp_path / name).unlink(missing_ok=True)
    os.mkfifo(tmp_path / name)
    with pytest.raises(ModelError, match=rf"{re.escape(name)}: not a regular file"):
        Tokenizer.load(tmp_path)


def test_a_file_with_invalid_utf8_is_refused(tmp_path: Path) -> None:
    folder = write(tmp_path, byte_level())
    (folder / "tokenizer_config.json").write_bytes(b'{"a": "\xff"}')
    with pytest.raises(ModelError, match=r"tokenizer_config\.json: found invalid UTF-8 at byte 7"):
        Tokenizer.load(folder)
    (folder / "tokenizer_config.json").write_text('{"eos_token": "\\ud83d\\ude00", "bos_token": "a\\ud800"}')
    with pytest.raises(ModelError, match=r"tokenizer_config\.json: found a lone surrogate"):
        Tokenizer.load(folder)


def test_an_unsupported_decoder_is_refused(tmp_path: Path) -> None:
    package = byte_level()
    package.decoder = decoders.CTC()
    with pytest.raises(ModelError, match="decoder: found CTC, expected ByteLevel"):
        Tokenizer.load(write(tmp_path, package))


def test_a_gguf_file_may_contain_a_tokenizer_json() -> None:
    metadata = {"tokenizer.huggingface.json": byte_level().to_str()}
    tokenizer = Tokenizer.from_gguf_metadata(metadata)
    assert tokenizer.decode(tokenizer.encode("as ever")) == "as ever"
    with pytest.raises(ModelError, match=r"key 'tokenizer\.huggingface\.json'.*invalid JSON"):
        Tokenizer.from_gguf_metadata({"tokenizer.huggingface.json": "{"})
