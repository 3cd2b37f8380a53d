"""Settings of tokenizers: kept by conversion, read from older files, without effect on prompts."""

from __future__ import annotations

import json
import struct
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from checkpoints import Change, copy
from gguf_files import File, Kind, array, u32
from goldens import GOLDENS

from nybble import Model, ModelError, Tokenizer, _native

Json = dict[str, Any]
IM_END = 2
HI = [{"role": "user", "content": "Hi"}]
TEXTS = [
    *("hello world", " hello", "hello  world\n\n x", "he's I'LL 2024 12345", "HELLO", "  ", "x=1;y==2!!", "\r\nfoo"),
    *("é café", "e\u0301 cafe\u0301", "naïve…“q”", "日本語 テスト", "\t tab", "a<|im_end|>b", "a <|im_end|> b", "🦊"),
]
GPT2: Json = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def sequence(*steps: Json) -> Json:
    return {"type": "Sequence", "pretokenizers": list(steps)}


def split(pattern: str) -> Json:
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


def model_with(**settings: Any) -> Callable[[Json], object]:
    return lambda description: description["model"].update(settings)


def eos_with(**settings: Any) -> Callable[[Json], object]:
    def change(description: Json) -> None:
        for token in description["added_tokens"]:
            if token["content"] == "<|im_end|>":
                token.update(settings)

    return change


def frame(*parts: str) -> Json:
    single = [{"Sequence": {"id": "A", "type_id": 0}} if part == "A" else part for part in parts]
    special = {part for part in parts if part != "A"}
    return {
        "type": "TemplateProcessing",
        "single": [part if isinstance(part, dict) else {"SpecialToken": {"id": part, "type_id": 0}} for part in single],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {name: {"id": name, "ids": [IM_END], "tokens": [name]} for name in special},
    }


LOSSY: dict[str, Change] = {
    "NFC": {"normalizer": {"type": "NFC"}},
    "lowercase": {"normalizer": {"type": "Sequence", "normalizers": [{"type": "NFKC"}, {"type": "Lowercase"}]}},
    "replacement": {"normalizer": {"type": "Replace", "pattern": {"String": "e"}, "content": "a"}},
    "prefix space": {"pre_tokenizer": {**GPT2, "add_prefix_space": True}},
    "lstrip": eos_with(lstrip=True),
    "rstrip": eos_with(rstrip=True),
    "single word": eos_with(single_word=True),
    "word suffix": model_with(end_of_word_suffix="</w>"),
    "two tokens in front": {"post_processor": frame("<|im_end|>", "<|im_end|>", "A")},
}
KEPT: dict[str, Change] = {
    "plain": None,
    "Llama 3": {"pre_tokenizer": sequence(split(LLAMA3), {**GPT2, "use_regex": False})},
    "empty normalizer": {"normalizer": {"type": "Sequence", "normalizers": []}},
}


@pytest.mark.parametrize("name", [*LOSSY, *KEPT])
def test_a_converted_tokenizer_gives_the_same_ids(name: str, tmp_path: Path) -> None:
    folder = copy("llama", tmp_path / "model", tokenizer={**LOSSY, **KEPT}[name])
    _native.convert(folder, tmp_path / "model.gguf", "f32")
    # The whole file is stored only where GGUF's keys say less.
    assert ("tokenizer.huggingface.json" in _native.GgufFile(tmp_path / "model.gguf").metadata) == (name in LOSSY)
    expected = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    converted, original = Tokenizer.load(tmp_path / "model.gguf"), Tokenizer.load(folder)
    for text in TEXTS:
        assert converted.encode(text, add_special=False) == expected.encode(text, add_special_tokens=False).ids, text
        assert converted.encode(text) == original.encode(text), text
        assert converted.decode(converted.encode(text)) == original.decode(original.encode(text)), text
    assert (converted.eos_ids, converted.bos_id) == (original.eos_ids, original.bos_id)
    assert converted.apply_chat_template(HI) == original.apply_chat_template(HI)


@pytest.mark.parametrize(
    ("step", "word"),
    [
        (sequence(split("[a-z]+|[^a-z]+"), {**GPT2, "use_regex": False}), "[a-z]+|[^a-z]+"),
        (sequence({"type": "WhitespaceSplit"}, GPT2), "WhitespaceSplit"),
    ],
    ids=["pattern", "step"],
)
def test_conversion_refuses_pre_tokenizers_without_a_name(step: Json, word: str, tmp_path: Path) -> None:
    folder = copy("llama", tmp_path / "model", tokenizer={"pre_tokenizer": step})
    with pytest.raises(ModelError, match="pre_tokenizer") as caught:
        _native.convert(folder, tmp_path / "model.gguf", "f32")
    assert word in str(caught.value)


# Ends


def test_no_end_token_follows_a_prompt_that_a_model_continues(tmp_path: Path) -> None:
    folder = copy("llama", tmp_path / "model", tokenizer_config={"add_eos_token": True})
    plain = Tokenizer.load(GOLDENS / "llama")
    with Model.load(folder, quantize=None) as model:
        assert model.tokenizer.encode("he") == [*plain.encode("he"), IM_END]
        expected = plain.encode(model.tokenizer.apply_chat_template(HI))
        options: Any = {"max_tokens": 2, "temperature": 0}
        assert model.chat(HI, **options).usage.prompt_tokens == len(expected)
        assert model.session().chat(HI, **options).usage.prompt_tokens == len(expected)
        assert model.generate("he", **options).usage.prompt_tokens == len(plain.encode("he"))
        # A text that ends with the token keeps it.
        assert model.generate("he<|im_end|>", **options).usage.prompt_tokens == len(plain.encode("he")) + 1


def test_ids_of_end_tokens_beyond_the_vocabulary_are_ignored_with_a_warning(tmp_path: Path) -> None:
    files = {"generation_config.json": '{"eos_token_id": [2, 50000], "temperature": NaN, "cutoff": Infinity}'}
    folder = copy("llama", tmp_path / "model", files=files)
    with pytest.warns(UserWarning, match="50000"):
        model = Model.load(folder)
    with model:
        done = model.generate("he", schema={"enum": ["yes", "no"]}, max_tokens=10, seed=1)
        assert (done.finish_reason, json.loads(done.text) in ("yes", "no")) == ("stop", True)


def test_every_end_token_of_generation_config_ends_a_completion(tmp_path: Path) -> None:
    folder = copy("llama", tmp_path / "model", files={"generation_config.json": {"eos_token_id": [2, 5, 6]}})
    with Model.load(folder, threads=1) as model:
        for end in (2, 5, 6):
            done = model.generate("he", logit_bias={end: 100}, max_tokens=4, temperature=0)
            assert (done.finish_reason, done.text) == ("stop", "")


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> File:
    out = tmp_path_factory.mktemp("gguf") / "llama.gguf"
    _native.convert(GOLDENS / "llama", out, "f32")
    return File.read(out)


@pytest.mark.parametrize("key", ["eos", "bos", "unknown", "padding", "eot"])
@pytest.mark.parametrize("number", [320, 32_000])
def test_special_ids_beyond_the_vocabulary_are_ignored_with_a_warning(
    key: str, number: int, llama: File, tmp_path: Path
) -> None:
    file = llama.copy()
    file.metadata[f"tokenizer.ggml.{key}_token_id"] = u32(number)
    with pytest.warns(UserWarning, match=rf"{key}_token_id.*{number}"):
        tokenizer = Tokenizer.load(file.write(tmp_path / "model.gguf"))
    assert IM_END in tokenizer.eos_ids  # By its spelling.
    file.metadata[f"tokenizer.ggml.{key}_token_id"] = u32(2**32 - 1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Tokenizer.load(file.write(tmp_path / "none.gguf"))


def test_every_id_of_eos_token_ids_ends_a_completion(llama: File, tmp_path: Path) -> None:
    file = llama.copy()
    file.metadata["tokenizer.ggml.eos_token_ids"] = array(Kind.I32, [2, 5])
    with Model.load(file.write(tmp_path / "model.gguf")) as model:
        assert {2, 5} <= model.tokenizer.eos_ids
        for end in (2, 5):
            done = model.generate("he", logit_bias={end: 100}, max_tokens=4, temperature=0)
            assert (done.finish_reason, done.text) == ("stop", "")


# Older vocabularies


def test_vocab_json_and_merges_txt_give_the_ids_of_tokenizer_json(tmp_path: Path) -> None:
    source = copy("gpt2", tmp_path / "source")
    described: Json = json.loads((source / "tokenizer.json").read_text(encoding="utf-8"))
    merges = [one if isinstance(one, str) else " ".join(one) for one in described["model"]["merges"]]
    special = {str(one.pop("id")): one for one in described["added_tokens"]}
    folder = copy(
        "gpt2",
        tmp_path / "model",
        tokenizer_config={"tokenizer_class": "GPT2Tokenizer", "added_tokens_decoder": special},
        files={
            "vocab.json": described["model"]["vocab"],
            "merges.txt": "\n".join(["#version: 0.2", *merges]) + "\n",
        },
    )
    (folder / "tokenizer.json").unlink()
    _native.convert(folder, tmp_path / "model.gguf", "f32")
    expected = Tokenizer.load(source)
    for found in (Tokenizer.load(folder), Tokenizer.load(tmp_path / "model.gguf")):
        assert [found.encode(text) for text in TEXTS] == [expected.encode(text) for text in TEXTS]
        assert IM_END in found.eos_ids
    config = {"tokenizer_class": "CLIPTokenizer"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=r"tokenizer_class.*CLIPTokenizer"):
        Tokenizer.load(folder)


def field(number: int, value: bytes | int | float) -> bytes:
    """A field of a protocol buffer with a number below 16 or a short value."""

    def varint(value: int) -> bytes:
        out = bytearray()
        while value > 0x7F:
            out.append(value & 0x7F | 0x80)
            value >>= 7
        return bytes([*out, value])

    if isinstance(value, bytes):
        return varint(number << 3 | 2) + varint(len(value)) + value
    if isinstance(value, float):
        return varint(number << 3 | 5) + struct.pack("<f", value)
    return varint(number << 3) + varint(value)


def sentencepiece(pieces: list[tuple[str, float, int]], kind: int = 2, **normalizer: Any) -> bytes:
    """A `tokenizer.model` of these pieces: text, score and kind."""
    listed = b"".join(field(1, field(1, t.encode()) + field(2, s) + field(3, k)) for t, s, k in pieces)
    spaces = field(3, int(normalizer.get("prefix", True))) + field(4, int(normalizer.get("collapse", False)))
    return listed + field(2, field(3, kind) + field(41, 1) + field(42, 2)) + field(3, spaces)


PIECES = [
    *(("<unk>", 0.0, 2), ("<s>", 0.0, 3), ("</s>", 0.0, 3)),
    *((f"<0x{byte:02X}>", 0.0, 6) for byte in range(256)),
    *(("\u2581", -3.0, 1), ("a", -4.0, 1), ("b", -5.0, 1), ("ab", -1.0, 1), ("\u2581ab", -2.0, 1)),
]


def test_tokenizer_model_is_read_and_converted(tmp_path: Path) -> None:
    folder = copy("llama", tmp_path / "model", files={"added_tokens.json": {"<tool>": len(PIECES)}})
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()
    (folder / "tokenizer.model").write_bytes(sentencepiece(PIECES))
    _native.convert(folder, tmp_path / "model.gguf", "f32")
    number = {text: id for id, (text, _, _) in enumerate(PIECES)}
    for tokenizer in (Tokenizer.load(folder), Tokenizer.load(tmp_path / "model.gguf")):
        ids = [1, number["\u2581ab"], number["\u2581"], number["a"], number["<0xC3>"], number["<0xA9>"], len(PIECES)]
        assert tokenizer.encode("ab aé<tool>") == ids
        assert tokenizer.decode(ids[:6]) == "ab aé"
        assert 2 in tokenizer.eos_ids


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (sentencepiece(PIECES, kind=1), "model_type"),
        (sentencepiece(PIECES, collapse=True), "remove_extra_whitespaces"),
        (sentencepiece(PIECES)[:-3], "damaged"),
        (b"\x0a\xff", "damaged"),
    ],
)
def test_a_tokenizer_model_that_is_not_supported_is_refused(content: bytes, message: str, tmp_path: Path) -> None:
    folder = copy("llama", tmp_path / "model")
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer.model").write_bytes(content)
    with pytest.raises(ModelError, match=message):
        Tokenizer.load(folder)
