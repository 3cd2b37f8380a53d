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
from nybble.chat.tools.support import one_call_a_turn, tool_support
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


BARE: list[dict[str, Any]] = [
    {"type": "function", "function": {"name": "weather"}},
    {"type": "function", "function": {"name": "weather", "parameters": {}}},
    {"type": "function", "function": {"name": "weather", "description": "d", "parameters": {"type": "object"}}},
]


@pytest.mark.parametrize("name", sorted(path.stem for path in TEMPLATES.glob("*.jinja")))
def test_functions_may_lack_a_description_and_parameters(name: str) -> None:
    for tool in BARE:
        messages, tools = tool_support(source(name)).prepare([USER], [tool])
        text = ChatTemplate(source(name)).render(messages, tools=tools, bos_token="", eos_token="")
        assert "weather" in text


def test_functions_stay_as_they_are_if_the_template_does_not_need_more() -> None:
    template = "{% for t in tools or [] %}{{ t|tojson }}{% endfor %}<tool_call>"
    assert tool_support(template).prepare([USER], BARE)[1] == BARE


CALLS = [{**CALL, "id": f"call_{'x' * 24}{number}"} for number in range(3)]
PARALLEL: list[Any] = [
    USER,
    {"role": "assistant", "content": "Both.", "tool_calls": CALLS, "reasoning_content": "Hm."},
    *(
        {"role": "tool", "tool_call_id": call["id"], "name": "weather", "content": f"of {call['id']}"}
        for call in CALLS[::-1]
    ),
]


@pytest.mark.parametrize("name", sorted(path.stem for path in TEMPLATES.glob("*.jinja")))
def test_several_calls_with_ids_of_other_servers_reach_every_template(name: str) -> None:
    messages, tools = tool_support(source(name)).prepare(PARALLEL, [TOOL])
    text = ChatTemplate(source(name)).render(messages, tools=tools, bos_token="", eos_token="")
    assert text.count("Rome") >= 3
    assert all(f"of {call['id']}" in text for call in CALLS)


def test_calls_of_a_turn_become_turns_with_their_own_results() -> None:
    turns = one_call_a_turn(PARALLEL)
    assert [turn["role"] for turn in turns] == ["user", *["assistant", "tool"] * 3]
    assert [turn["content"] for turn in turns[1::2]] == ["Both.", "", ""]
    assert [turn["tool_calls"][0]["id"] for turn in turns[1::2]] == [call["id"] for call in CALLS]
    assert [turn["tool_call_id"] for turn in turns[2::2]] == [call["id"] for call in CALLS]
    assert "reasoning_content" not in turns[3]


def test_calls_and_results_without_matching_ids_keep_their_order() -> None:
    results = [{"role": "tool", "content": content} for content in ("a", "b", "c", "d")]
    turns = one_call_a_turn([{"role": "assistant", "content": "", "tool_calls": CALLS}, *results, USER])
    assert [turn["content"] for turn in turns] == ["", "a", "", "b", "", "c", "d", USER["content"]]


def test_long_ids_become_the_same_short_ones_for_a_call_and_its_result() -> None:
    template = source("mistralai-Mistral-Nemo-Instruct-2407")
    messages, _ = tool_support(template).prepare(PARALLEL, [TOOL])
    ids = [call["id"] for call in messages[1]["tool_calls"]]
    assert len({*ids}) == 3
    assert all(len(id) == 9 and id.isalnum() for id in ids)
    assert [turn["tool_call_id"] for turn in messages[2:]] == ids[::-1]
    assert tool_support(template).prepare(HISTORY, [TOOL])[0] == HISTORY
