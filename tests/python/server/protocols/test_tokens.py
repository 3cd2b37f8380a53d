"""Text to token ids and back, as vLLM, llama-server and evaluation harnesses ask for them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import tiny
from serving import Running

from nybble import Model

HI = [{"role": "user", "content": "Hi"}]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Model]:
    file = tmp_path_factory.mktemp("tokens") / "tiny.gguf"
    tiny.write_model(file, tokenizer__ggml__add_bos_token=True, tokenizer__ggml__add_eos_token=True)
    with Model.load(file, threads=1) as loaded:
        yield loaded


def tokens(server: Running, **body: Any) -> list[int]:
    reply = server.request("POST", "/tokenize", body)
    assert reply.status == 200, reply.text
    found: list[int] = reply.json["tokens"]
    assert reply.json["count"] == len(found)
    assert reply.json["max_model_len"] == tiny.CONTEXT
    return found


def test_a_text_becomes_the_tokens_of_a_prompt(server: Running, model: Model) -> None:
    text = "é <|im_end|>"
    start, ids = tiny.IM_START, model.tokenizer.encode(text, add_special=False)
    assert tokens(server, prompt=text) == [start, *ids]
    assert tokens(server, model="tiny", prompt=text, add_special_tokens=False) == ids
    assert tokens(server, content=text) == ids
    assert tokens(server, content=text, add_special=True) == [start, *ids]
    assert tokens(server, prompt="") == [start]


def test_a_conversation_becomes_the_tokens_of_its_prompt(server: Running, model: Model) -> None:
    for generates in (True, False):
        prompt = model.tokenizer.apply_chat_template(HI, add_generation_prompt=generates)
        ids = model.tokenizer.encode(prompt, add_special=False)
        assert tokens(server, messages=HI, add_generation_prompt=generates) == ids


def test_tokens_become_a_text_with_special_tokens(server: Running) -> None:
    for text in ("hello é <|im_end|><|im_start|>x", "", "<|im_end|>"):
        body = {"tokens": tokens(server, content=text)}
        assert server.request("POST", "/detokenize", body).json == {"prompt": text, "content": text}
    reply = server.request("POST", "/tokenize", {"content": "a<|im_end|>", "return_token_strs": True})
    assert reply.json["token_strs"] == ["a", "<|im_end|>"]


def test_the_tokenizer_is_described(server: Running) -> None:
    found = server.request("GET", "/tokenizer_info").json
    assert (found["bos_token"], found["eos_token"]) == ("<|im_start|>", "<|im_end|>")
    assert (found["vocab_size"], found["chat_template"]) == (tiny.VOCABULARY, tiny.CHATML)


def test_prompts_of_completions_have_no_end_token(server: Running) -> None:
    reply = server.complete(prompt="ab", max_tokens=1)
    assert reply.json["usage"]["prompt_tokens"] == 3


@pytest.mark.parametrize(
    ("path", "body", "message"),
    [
        ("tokenize", {}, "prompt: found neither of them, expected one of prompt, content and messages"),
        ("tokenize", {"prompt": "a", "content": "b"}, "prompt: found prompt and content, expected one of"),
        ("tokenize", {"prompt": "a", "with_pieces": True}, "with_pieces: Input should be False"),
        ("tokenize", {"prompt": "a", "model": "other"}, "the model 'other' does not exist"),
        ("detokenize", {"tokens": [9999]}, "token: found 9999, expected an id below"),
        ("detokenize", {"tokens": ["a"]}, "tokens.0: Input should be a valid integer"),
    ],
    ids=str,
)
def test_errors_name_what_is_wrong(path: str, body: Any, message: str, server: Running) -> None:
    reply = server.request("POST", f"/{path}", body)
    assert reply.status in (400, 404)
    assert message in reply.error
