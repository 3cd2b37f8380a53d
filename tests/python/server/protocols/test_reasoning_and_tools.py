"""Reasoning and tool calls together, in the templates of families whose calls have markers of reasoning around them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tiny
from serving import scripted, served, serving

from nybble import Model

FOLDER = Path(__file__).parents[3] / "data" / "templates"
WEATHER: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    },
}
ANSWERS = {
    "openai-gpt-oss-120b": (
        "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant<|channel|>commentary<|message|>I call.<|end|>"
        "<|start|>assistant<|channel|>commentary to=functions.weather <|constrain|>json<|message|>"
        '{"city": "Rome"}<|call|>'
    ),
    "Qwen3.5-4B": (
        "Hm.\n</think>\n\nI call.\n\n<tool_call>\n<function=weather>\n<parameter=city>\nRome\n</parameter>\n"
        "</function>\n</tool_call>"
    ),
    "Kimi-K2-Thinking": (
        "<think>Hm.</think>I call.<|tool_calls_section_begin|><|tool_call_begin|>functions.weather:0"
        '<|tool_call_argument_begin|>{"city": "Rome"}<|tool_call_end|><|tool_calls_section_end|>'
    ),
    "google-gemma-4-31B-it": (
        '<|channel>thought\nHm.<channel|>I call.<|tool_call>call:weather{city:<|"|>Rome<|"|>}<tool_call|>'
    ),
    "ByteDance-Seed-OSS": (
        "<seed:think>Hm.</seed:think>I call.\n<seed:tool_call>\n<function=weather>\n<parameter=city>Rome</parameter>\n"
        "</function>\n</seed:tool_call>"
    ),
}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("name", ANSWERS)
def test_reasoning_text_and_calls_come_apart(name: str, stream: bool, tmp_path: Path) -> None:
    template = (FOLDER / f"{name}.jinja").read_text(encoding="utf-8")
    changes: dict[str, Any] = {"llama__context_length": 8192, "tokenizer__chat_template": template}
    with Model.load(tiny.write_model(tmp_path / "tiny.gguf", layers=1, **changes), threads=1) as model:
        engine, _ = scripted(model, ANSWERS[name])
        with serving(engine) as running:
            reply = running.chat(tools=[WEATHER], stream=stream)
    found = {"reasoning_content": "", "content": "", "arguments": ""}
    deltas = [each["choices"][0]["delta"] for each in reply.events] if stream else [reply.choice["message"]]
    for delta in deltas:
        for key in ("reasoning_content", "content"):
            found[key] += delta.get(key) or ""
        for call in delta.get("tool_calls", ()):
            found["arguments"] += call["function"]["arguments"]
    assert (found["reasoning_content"], found["content"]) == ("Hm.", "I call.")
    assert json.loads(found["arguments"]) == {"city": "Rome"}


def test_calls_in_special_tokens_are_read_without_a_format_of_reasoning(tmp_path: Path) -> None:
    template = (
        "{% for m in messages %}{{ m.content }}{% for c in m.tool_calls or [] %}[TOOL_CALLS]{{ c.function.name }}[ARGS]"
        "{{ c.function.arguments|tojson }}{% endfor %}{% endfor %}{% if tools %}{{ tools|tojson }}{% endif %}"
    )
    special = tiny.with_special_tokens(["[TOOL_CALLS]", "[ARGS]"])
    changes = {"llama__context_length": 4096, "tokenizer__chat_template": template, **special}
    with Model.load(tiny.write_model(tmp_path / "tiny.gguf", **changes)) as model, served(model) as running:
        marker, arguments = (model.tokenizer.id_of(name) for name in ("[TOOL_CALLS]", "[ARGS]"))
        grammar = f'start: "Hi " <[{marker}]> "weather" <[{arguments}]> "{{\\"city\\": \\"Rome\\"}}"'
        message = running.chat(tools=[WEATHER], max_tokens=60, grammar=grammar).json["choices"][0]["message"]
        assert message["content"].strip() == "Hi"
        assert [call["function"]["name"] for call in message["tool_calls"]] == ["weather"]
        assert json.loads(message["tool_calls"][0]["function"]["arguments"]) == {"city": "Rome"}
