"""Conversations reach a chat template as `transformers` passes them."""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from vocabularies import byte_level

from nybble import Model, ModelError
from nybble.chat.template import ChatTemplate
from nybble.tokenizer import Tokenizer

KEYS = "{% for m in messages %}{% for key, value in m.items() %}{{ key }}={{ value }};{% endfor %}{% endfor %}"
TURNS = (
    "{% for m in messages %}<|{{ m.role }}|>{% if m.reasoning_content %}<think>{{ m.reasoning_content }}</think>"
    "{% endif %}{% if m.content is string %}CONTENT{% else %}{% for part in m.content %}{{ part.text }}{% endfor %}"
    "{% endif %}<|end|>{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
PLAIN, TRIMMED = TURNS.replace("CONTENT", "{{ m.content }}"), TURNS.replace("CONTENT", "{{ m.content | trim }}")
USER = {"role": "user", "content": "Hi"}


def render(source: str, *messages: Any, **variables: Any) -> str:
    return ChatTemplate(source).render(messages, **variables)


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        ({"role": "assistant", "content": None, "tool_calls": None}, "role=assistant;"),
        ({"role": "assistant", "content": "", "name": None}, "role=assistant;content=;"),
        ({"role": "user", "content": [{"text": None}]}, "role=user;content=[{'text': None}];"),
        # The standard name comes last if it was missing, and the name that gpt-oss reads first.
        (
            {"role": "assistant", "content": "a", "reasoning": "r"},
            "thinking=r;role=assistant;content=a;reasoning=r;reasoning_content=r;",
        ),
        (
            {"role": "assistant", "thinking": "t", "reasoning": "r", "content": "a"},
            "thinking=t;role=assistant;reasoning=r;content=a;reasoning_content=t;",
        ),
        (
            {"role": "assistant", "reasoning_content": "c", "thinking": "t", "content": "a"},
            "thinking=t;role=assistant;reasoning_content=c;content=a;",
        ),
        ({"role": "assistant", "reasoning_content": ""}, "thinking=;role=assistant;reasoning_content=;"),
        ({"role": "tool", "tool_responses": [1]}, "role=tool;tool_responses=[1];"),
    ],
)
def test_a_message_has_no_empty_keys_and_all_names_of_its_reasoning(message: dict[str, Any], expected: str) -> None:
    before = dict(message)
    assert render(KEYS, message) == expected
    assert message == before, "the caller's message is not changed"


class Color(str, enum.Enum):
    RED = "red"


@dataclass
class Part:
    type: str
    text: str


class Picture:
    saved = False

    def save(self) -> str:
        Picture.saved = True
        return "saved"


class Modelled:
    def model_dump(self) -> dict[str, Any]:
        return {"text": "dumped", "image": Picture()}


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (Color.RED, "red"),
        (np.float32(0.5), "0.5"),
        (np.bool_(False), "False"),
        (np.int64(7), "7"),
        (Part("text", "a"), "{'type': 'text', 'text': 'a'}"),
        (Modelled(), "{'text': 'dumped', 'image': '<Picture>'}"),
        ((1, [Color.RED]), "(1, ['red'])"),
        ({Color.RED: np.arange(2)}, "{'red': '<ndarray>'}"),
        (Picture(), "<Picture>"),
    ],
)
def test_a_template_sees_plain_data(value: Any, expected: str) -> None:
    assert render("{{ messages[0].extra }}", {**USER, "extra": value}) == expected
    assert render("{{ extra }}", USER, extra=value) == expected


def test_a_template_cannot_call_methods_of_objects() -> None:
    with pytest.raises(ModelError, match="has no attribute 'save'"):
        render("{{ messages[0].content[0].image.save() }}", {"role": "user", "content": [{"image": Picture()}]})
    assert not Picture.saved


def test_a_value_that_contains_itself_is_refused() -> None:
    endless: list[Any] = []
    endless.append(endless)
    with pytest.raises(ValueError, match=r"messages\[0\]: found a value that contains itself"):
        render("x", {**USER, "content": endless})
    with pytest.raises(ValueError, match="extra: found a value that contains itself"):
        render("x", USER, extra=endless)


@pytest.mark.parametrize(
    ("source", "content", "field", "expected"),
    [
        (PLAIN, "The sky is ", True, "<|user|>Hi<|end|><|assistant|>The sky is "),
        (PLAIN, "\n", True, "<|user|>Hi<|end|><|assistant|>\n"),
        (TRIMMED, "The sky is ", True, "<|user|>Hi<|end|><|assistant|>The sky is"),
        (PLAIN, [{"text": "One"}, {"text": "Two"}, {"image": 1}], True, "<|user|>Hi<|end|><|assistant|>OneTwo"),
        (PLAIN, "", True, "<|user|>Hi<|end|><|assistant|>"),
        (PLAIN, "Blue", "content", "<|user|>Hi<|end|><|assistant|>Blue"),
    ],
)
def test_the_last_message_is_continued(source: str, content: Any, field: bool | str, expected: str) -> None:
    messages = (USER, {"role": "assistant", "content": content})
    assert render(source, *messages, continue_final_message=field) == expected


@pytest.mark.parametrize("name", ["reasoning_content", "thinking", "reasoning"])
def test_the_reasoning_of_the_last_message_is_continued(name: str) -> None:
    message = {"role": "assistant", name: "Well, ", "content": ""}
    assert render(PLAIN, USER, message, continue_final_message=name).endswith("<|assistant|><think>Well, ")


@pytest.mark.parametrize(
    ("source", "message", "field", "error"),
    [
        (PLAIN, {"role": "assistant", "tool_calls": []}, True, "content: found nothing"),
        (PLAIN, {"role": "assistant", "content": [{"image": 1}]}, True, "content: found no text"),
        (PLAIN, {"role": "assistant", "content": "a"}, "reasoning", "reasoning: found nothing"),
        (PLAIN, {"role": "assistant", "content": "a", "note": "b"}, "note", "found 'note', expected a field"),
        ("{# content #}Hello", {"role": "assistant", "content": "a"}, True, "does not write the content"),
        (PLAIN, None, True, "found no messages"),
    ],
)
def test_a_message_that_cannot_be_continued_is_refused(source: str, message: Any, field: Any, error: str) -> None:
    with pytest.raises(ValueError, match=error):
        ChatTemplate(source).render([message] if message else [], continue_final_message=field)


def test_a_continued_prompt_has_no_generation_prompt() -> None:
    tokenizer = Tokenizer.from_gguf_metadata(byte_level(tokenizer__chat_template=PLAIN))
    messages = [USER, {"role": "assistant", "content": "Hello "}]
    assert tokenizer.apply_chat_template(messages, continue_final_message=True).endswith("<|assistant|>Hello ")
    assert tokenizer.apply_chat_template(messages).endswith("Hello <|end|><|assistant|>")
    with pytest.raises(ValueError, match="add_generation_prompt: found True, expected False"):
        tokenizer.apply_chat_template(messages, add_generation_prompt=True, continue_final_message=True)


@pytest.mark.parametrize("kind", ["image", "image_url", "input_image", "input_audio", "video", "file"])
def test_chat_refuses_parts_that_are_not_text(tiny_model: Model, kind: str) -> None:
    messages = [{"role": "user", "content": [{"type": "text", "text": "What is it?"}, {"type": kind}]}]
    for chat in (tiny_model.chat, tiny_model.session().chat):
        with pytest.raises(ValueError, match=rf"messages\[0\]: content\[1\]: found a part of type '{kind}'"):
            chat(messages, max_tokens=1)
