"""Calls are read in the spellings that models write, which are looser than those of templates."""

from __future__ import annotations

from typing import Any

import pytest
from tool_conversations import parsed

from nybble.chat.tools.formats import FORMATS
from nybble.chat.tools.parser import ToolCallParser

FUNCTIONS: dict[str, Any] = {
    "f": None,
    "get": {"properties": {"s": {"type": "string"}, "n": {"type": "integer"}, "any": {}}},
    "get_all": None,
}
GET = ("get", {"s": "a b", "n": 4})
JSON = '{"s": "a b", "n": 4}'
BY_NAME = {known.name: known for known in FORMATS}
START, CHANNEL, MESSAGE = "<|start|>assistant", "<|channel|>", "<|message|>"


@pytest.mark.parametrize(
    ("name", "answer", "content", "calls"),
    [
        ("harmony", f"{CHANNEL}commentary to=functions.get <|constrain|>json{MESSAGE}{JSON}<|call|>", "", [GET]),
        ("harmony", f" to=functions.get{CHANNEL}commentary json{MESSAGE}{JSON}<|call|>", "", [GET]),
        ("harmony", f"{START} to=functions.get{CHANNEL}commentary <|constrain|>json{MESSAGE}{JSON}", "", [GET]),
        ("harmony", f"{CHANNEL}commentary to=functions.get{MESSAGE}{JSON}<|call|>", "", [GET]),
        ("harmony", f"{CHANNEL}analysis to=functions.get_all code{MESSAGE}{{}}<|call|>", "", [("get_all", {})]),
        (
            "harmony",
            f"{CHANNEL}commentary{MESSAGE}First.<|end|>{START}{CHANNEL}commentary to=functions.get json{MESSAGE}{JSON}",
            "First.",
            [GET],
        ),
        ("harmony", f"{CHANNEL}final{MESSAGE}Hello <|<|return|>", "Hello <|", []),
        ("harmony", "Hello", "Hello", []),
        (
            "deepseek-v3",
            f"<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>get\n```json\n{JSON}\n```<｜tool▁call▁end｜>",
            "",
            [GET],
        ),
        ("deepseek-v3", f"So<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>get\n{JSON}", "So", [GET]),
        ("deepseek-v3.1", f"<｜tool▁calls▁begin｜>\n<｜tool▁call▁begin｜>get<｜tool▁sep｜>\n{JSON}", "", [GET]),
        ("kimi", f"<|tool_calls_section_begin|><|tool_call_begin|>get<|tool_call_argument_begin|>{JSON}", "", [GET]),
        (
            "kimi",
            f"<|tool_calls_section_begin|>\n<|tool_call_begin|>functions.get:12 <|tool_call_argument_begin|> {JSON}"
            "<|tool_call_end|>\n<|tool_calls_section_end|> Done.",
            "Done.",
            [GET],
        ),
        (
            "glm",
            "A<tool_call>get<arg_key>s</arg_key><arg_value>a b</arg_value><arg_key>n</arg_key><arg_value>4</arg_value>"
            "</tool_call><tool_call>get_all</tool_call>B",
            "AB",
            [GET, ("get_all", {})],
        ),
        ("glm", "<tool_call>get_all\n\n</tool_call>", "", [("get_all", {})]),
        (
            "minimax-m2",
            '<minimax:tool_call><invoke name="get"><parameter name="s">a b</parameter><parameter name="n"> 4 '
            '</parameter></invoke><invoke name="f"></invoke></minimax:tool_call>',
            "",
            [GET, ("f", {})],
        ),
        ("lfm2", "<|tool_call_start|>[get(s='a b', n=4)]<|tool_call_end|>Ok", "Ok", [GET]),
        ("lfm2", '<|tool_call_start|>[ get( s = "a b" , n = 4 ) , f() ]<|tool_call_end|>', "", [GET, ("f", {})]),
        ("llama4-python", '[get(s="a b", n=4)]', "", [GET]),
        ("llama4-python", '<|python_start|>[get(s="a b", n=4)]<|python_end|>', "", [GET]),
        ("llama4-python", "[1, 2] is a list", "[1, 2] is a list", []),
        ("llama4", f'<|python_start|>{{"name": "get", "parameters": {JSON}}}<|python_end|>', "", [GET]),
        ("gemma3-python", "```tool_code\n[get(s='a b', n=4)]\n```", "", [GET]),
        ("gemma3-python", "```python\nprint()\n```", "```python\nprint()\n```", []),
        ("gemma4", '<|tool_call>call:get{s:<|"|>a b<|"|>,n:4}<tool_call|>', "", [GET]),
        ("gemma4", '<|tool_call>call:get{"s": "a b", n: 4}<tool_call|>', "", [GET]),
        ("functiongemma", "<start_function_call>call:get{s:a b,n:4}<end_function_call>", "", [GET]),
        ("command-r", f'Plan.\nAction: ```json\n[{{"tool_name": "get", "parameters": {JSON}}}]\n```', "Plan.", [GET]),
        ("cohere", f'<|START_ACTION|>[{{"tool_name": "get", "parameters": {JSON}}}]<|END_ACTION|>', "", [GET]),
        ("cohere", "<|START_RESPONSE|>Hello<|END_RESPONSE|>", "Hello", []),
        (
            "ernie",
            f'<response>\nHi\n</response>\n<tool_call>{{"name": "get", "arguments": {JSON}}}</tool_call>',
            "Hi",
            [GET],
        ),
        ("functionary-v3.2", f"all\nHi\n>>>get\n{JSON}", "Hi", [GET]),
        ("functionary-v3.2", f"get\n{JSON}>>>get_all\n{{}}", "", [GET, ("get_all", {})]),
        ("functionary-v3.2", "all\n3 >> 2 >>> 1", "3 >> 2 >>> 1", []),
        ("nemotron", f'<TOOLCALL>[{{"name": "get", "arguments": {JSON}}}]</TOOLCALL>!', "!", [GET]),
        ("apertus", f'<|tools_prefix|>[{{"get": {JSON}}}, {{"f": {{}}}}]<|tools_suffix|>', "", [GET, ("f", {})]),
        ("tool-calls", f'<tool_calls>\n{{"name": "get", "arguments": {JSON}}}\n</tool_calls>', "", [GET]),
        ("olmo3", "<function_calls>\nget(s='a b', n=4)\nf()\n</function_calls>", "", [GET, ("f", {})]),
        ("seed-oss", "<seed:tool_call><function=f></function></seed:tool_call>", "", [("f", {})]),
        # Broken calls are text.
        ("harmony", f"{CHANNEL}commentary to=functions.other{MESSAGE}{{}}", "other", []),
        ("gemma4", "<|tool_call>call:get{s:", "<|tool_call>call:get{s:", []),
        ("kimi", "<|tool_calls_section_begin|>Hm.", "<|tool_calls_section_begin|>Hm.", []),
        ("lfm2", "<|tool_call_start|>[get(s=a b)]", "<|tool_call_start|>[get(s=a b)]", []),
        ("glm", "<tool_call>get<arg_key>s</arg_key>", "<tool_call>get<arg_key>s</arg_key>", []),
        (
            "minimax-m2",
            "<minimax:tool_call>none</minimax:tool_call>",
            "<minimax:tool_call>none</minimax:tool_call>",
            [],
        ),
    ],
)
def test_calls_are_read_in_the_spellings_of_models(name: str, answer: str, content: str, calls: list[Any]) -> None:
    for pieces in ([answer], [*answer]):
        for stream in (False, True) if calls else (False,):
            found, made = parsed(ToolCallParser(BY_NAME[name], FUNCTIONS, stream=stream), pieces)
            assert made == calls
            if content == "other":
                assert content in found
            else:
                assert found.strip() == content
