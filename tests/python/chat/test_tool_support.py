"""What a chat template does not write about tools becomes text of the messages."""

from __future__ import annotations

import json
import logging
from typing import Any

import pytest
from tool_conversations import TEMPLATES, USER, parsed
from tool_families import FAMILIES

from nybble.chat.template import ChatTemplate
from nybble.chat.tools.description import with_tools
from nybble.chat.tools.formats import FORMATS, HERMES
from nybble.chat.tools.parser import ToolCallParser
from nybble.chat.tools.support import tool_support
from nybble.chat.tools.tool_format import ToolFormat

TOOL: dict[str, Any] = {
    "type": "function",
    "function": {"name": "weather", "description": "The weather", "parameters": {"type": "object", "properties": {}}},
}
CALL: dict[str, Any] = {
    "id": "call00000",
    "type": "function",
    "function": {"name": "weather", "arguments": {"city": "Rome"}},
}
HISTORY: list[Any] = [
    USER,
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
    {"role": "tool", "tool_call_id": "call00000", "name": "weather", "content": "sunny"},
]


def source(name: str) -> str:
    """A template in `tests/data/templates`."""
    return (TEMPLATES / f"{name}.jinja").read_text(encoding="utf-8")


def prompt(template: str) -> str:
    """A conversation with a call, as the server writes it."""
    messages, tools = tool_support(template).prepare(HISTORY, [TOOL])
    return ChatTemplate(template).render(messages, tools=tools, add_generation_prompt=True, bos_token="", eos_token="")


@pytest.mark.parametrize(
    ("name", "history"),
    [
        ("Qwen-Qwen2.5-7B-Instruct", "values"),
        ("meetkai-functionary-medium-v3.2", "arguments as text"),
        ("written-deepseek-v3", "arguments as text"),
        ("llama-cpp-deepseek-r1", "calls as text"),
        ("LFM2-8B-A1B", "calls as text"),
        ("ibm-granite-granite-3.3-2B-Instruct", "calls as text"),
        ("deepseek-ai-DeepSeek-R1-Distill-Llama-8B", "calls as text"),
    ],
)
def test_earlier_calls_reach_a_template_as_it_needs_them(name: str, history: str) -> None:
    template = source(name)
    assert tool_support(template).history == history
    written = prompt(template)
    assert "weather" in written
    assert "Rome" in written
    assert "sunny" in written


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.template)
def test_tools_are_described_once(family: Any) -> None:
    support = tool_support(family.source)
    messages, tools = support.prepare([USER], [TOOL])
    assert (tools is None) == (len(messages) == 2) == (not support.lists_tools)
    assert "The weather" in family.render([USER], [TOOL], prompt=True)


def test_tools_are_described_in_the_format_of_the_template() -> None:
    written = prompt(source("deepseek-ai-DeepSeek-V3.1"))
    assert json.dumps(TOOL) in written
    assert (
        '<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function-name<｜tool▁sep｜>{"argument": "value"}<｜tool▁call▁end｜>'
        in written
    )


@pytest.mark.parametrize("known", FORMATS, ids=lambda known: known.name)
def test_the_described_form_of_a_call_is_read_as_a_call(known: ToolFormat) -> None:
    (system, *_) = with_tools([USER], [TOOL], known)
    example = known.write([("function-name", {"argument": "value"})])
    assert known is HERMES or system["content"].endswith(example)
    parser = ToolCallParser(known, {"function-name": {"properties": {"argument": {"type": "string"}}}})
    assert parsed(parser, [*example]) == ("", [("function-name", {"argument": "value"})])


def test_a_template_in_an_unknown_format_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    tool_support.cache_clear()
    template = source("upstage-Solar-Open-100B")
    with caplog.at_level(logging.WARNING, logger="nybble.chat"):
        for _ in range(2):
            written = prompt(template)
    assert tool_support(template).tool_format is HERMES
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "no known format" in caplog.text
    assert f"<tools>\n{json.dumps(TOOL)}\n</tools>" in written
    assert '<tool_call>\n{"name": "weather", "arguments": {"city": "Rome"}}\n</tool_call>' in written
    assert "<tool_response>\nsunny\n</tool_response>" in written


def test_a_template_without_tools_gets_a_description_without_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    tool_support.cache_clear()
    template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    with caplog.at_level(logging.WARNING, logger="nybble.chat"):
        assert "# Tools" in prompt(template)
    assert caplog.records == []
