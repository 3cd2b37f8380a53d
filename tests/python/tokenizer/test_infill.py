"""Prompts for filling in the middle, by the tokens that each family has for it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny
from serving import served

from nybble import Model
from nybble.tokenizer import Tokenizer

FAMILIES = {
    # The tokens, and the prompt for "ab" before and "cd" after the gap.
    "Qwen": (["<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>"], "<|fim_prefix|>ab<|fim_suffix|>cd<|fim_middle|>"),
    "StarCoder": (["<fim_prefix>", "<fim_middle>", "<fim_suffix>"], "<fim_prefix>ab<fim_suffix>cd<fim_middle>"),
    "DeepSeek-Coder": (
        ["<｜fim▁hole｜>", "<｜fim▁begin｜>", "<｜fim▁end｜>"], "<｜fim▁begin｜>ab<｜fim▁hole｜>cd<｜fim▁end｜>",
    ),
    "Codestral": (["[MIDDLE]", "[PREFIX]", "[SUFFIX]"], "[SUFFIX]cd[PREFIX]ab"),
    "Seed-Coder": (
        ["<[fim-prefix]>", "<[fim-suffix]>", "<[fim-middle]>"], "<[fim-suffix]>cd<[fim-prefix]>ab<[fim-middle]>",
    ),
}  # fmt: skip


def changes(tokens: list[str], **more: Any) -> dict[str, Any]:
    base = tiny.metadata()
    return {
        "tokenizer__ggml__tokens": [*base["tokenizer.ggml.tokens"], *tokens],
        "tokenizer__ggml__token_type": [*base["tokenizer.ggml.token_type"], *[3] * len(tokens)],
        **more,
    }


def spelled(tokenizer: Tokenizer, ids: list[int]) -> str:
    return "".join(tokenizer.token_text(token) for token in ids)


@pytest.mark.parametrize("family", FAMILIES)
def test_each_family_has_its_tokens_and_its_order(family: str) -> None:
    tokens, prompt = FAMILIES[family]
    tokenizer = Tokenizer.from_gguf_metadata(tiny.metadata(**changes(tokens)))
    ids = tokenizer.encode_infill("ab", "cd")
    assert spelled(tokenizer, ids) == prompt
    # Special tokens in the strings are plain characters.
    assert len(tokenizer.encode_infill(tokens[0], "cd")) == len(ids) - 2 + len(tokens[0].encode())


def test_a_file_may_declare_tokens_of_any_spelling(tmp_path: Path) -> None:
    for names in (("fim_pre", "fim_suf", "fim_mid"), ("prefix", "suffix", "middle")):
        keys = {f"tokenizer__ggml__{name}_token_id": 259 + number for number, name in enumerate(names)}
        values = tiny.metadata(**changes(["<A>", "<B>", "<C>"], **keys))
        file = tmp_path / f"{names[0]}.gguf"
        tiny.write_gguf(file, values)
        for tokenizer in (Tokenizer.from_gguf(file), Tokenizer.from_gguf_metadata(values)):
            assert spelled(tokenizer, tokenizer.encode_infill("ab", "cd")) == "<A>ab<B>cd<C>"


def test_a_start_token_comes_first() -> None:
    tokens, prompt = FAMILIES["Qwen"]
    tokenizer = Tokenizer.from_gguf_metadata(tiny.metadata(**changes(tokens, tokenizer__ggml__add_bos_token=True)))
    assert spelled(tokenizer, tokenizer.encode_infill("ab", "cd")) == f"<|im_start|>{prompt}"


def test_a_model_without_such_tokens_is_refused(tiny_model: Model) -> None:
    with pytest.raises(ValueError, match="suffix: the model's vocabulary has no tokens for filling in the middle"):
        tiny_model.tokenizer.encode_infill("a", "b")
    with served(tiny_model) as running:
        reply = running.complete(suffix="b")
        assert (reply.status, reply.json["error"]["param"]) == (400, "suffix")
        assert running.complete(suffix="").status == 200


def test_a_completion_fills_the_gap_before_a_suffix(tmp_path: Path) -> None:
    tokens, _ = FAMILIES["Qwen"]
    file = tiny.write_model(tmp_path / "fim.gguf", **changes(tokens, llama__vocab_size=262))
    with Model.load(file, threads=1) as model, served(model) as running:
        expected = model.generate(model.tokenizer.encode_infill("he", "lo"), temperature=0, max_tokens=3)
        assert running.complete(suffix="lo").choice["text"] == expected.text
        body = {"prompt": "he", "suffix": "lo", "stream": False, "options": {"temperature": 0, "num_predict": 3}}
        assert running.request("POST", "/api/generate", body).json["response"] == expected.text
        for wrong, param in (({"prompt": [1, 2], "suffix": "a"}, "suffix"), ({"suffix": "a", "echo": True}, "suffix")):
            reply = running.complete(**wrong)
            assert reply.status == 400
            assert param in reply.error
