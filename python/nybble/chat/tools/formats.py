"""Tool-call formats by model family, recognized from the chat template."""

from __future__ import annotations

import functools
from dataclasses import replace

from nybble.chat.tools.syntaxes.gemma_calls import GemmaCalls
from nybble.chat.tools.syntaxes.json_calls import JsonCalls, KeyedJsonCalls
from nybble.chat.tools.syntaxes.named_calls import NamedCalls
from nybble.chat.tools.syntaxes.python_calls import PythonCalls
from nybble.chat.tools.syntaxes.tagged_calls import TaggedCalls
from nybble.chat.tools.tool_format import ToolFormat

HERMES = ToolFormat(
    "hermes",
    "Hermes, Qwen 2.5 and 3, SmolLM2 and 3, Granite 4, MiMo, Bielik, Reka Edge",
    ("<tool_call>",),
    JsonCalls(),
    unless=("]<]minimax[>[",),
    opening="<tool_call>\n",
    closing=("\n</tool_call>",),
    separator="\n",
)
"""The format that the server describes to models whose chat template does not know tools."""

_DSML = TaggedCalls(
    '<｜DSML｜invoke name="',
    '">\n',
    '<｜DSML｜parameter name="',
    '" string="',
    "</｜DSML｜parameter>\n",
    "</｜DSML｜invoke>",
    typed=True,
    after_type='">',
    tokens=("｜DSML｜",),
)

_MISTRAL = NamedCalls(
    "[ARGS]",
    r"(?P<name>[\w.-]+)\s*(?:\[CALL_ID\][^\[]*)?(?:\[ARGS\])?",
    or_objects=JsonCalls(as_list=True),
    tokens=("[ARGS]", "[CALL_ID]"),
)

_LLAMA_PROMPT = '{"name": function name, "parameters": dictionary'
_LLAMA = ToolFormat(
    "llama",
    "Llama 3.1 to 3.3",
    ("<|python_tag|>",),
    JsonCalls(arguments_key="parameters"),
    other_needles=(("<|start_header_id|>", _LLAMA_PROMPT),),
    opening="<|python_tag|>",
    bare=True,
)

_LLAMA4 = replace(
    _LLAMA,
    name="llama4",
    families="Llama 4",
    needles=("<|header_start|>", "<|python_start|>"),
    other_needles=(("<|header_start|>", _LLAMA_PROMPT),),
    opening="<|python_start|>",
    closing=("<|python_end|>",),
)

FORMATS = (
    ToolFormat(
        "harmony",
        "gpt-oss",
        ("<|channel|>", "<|message|>", "functions."),
        NamedCalls(
            " <|constrain|>json<|message|>",
            r"(?P<name>[\w.-]+)\s*(?:<\|channel\|>.*?)?(?:<\|constrain\|>\w*|\b\w+)?\s*<\|message\|>",
        ),
        opening="<|start|>assistant<|channel|>commentary to=functions.",
        closing=("<|call|>",),
        other_openings=(
            "<|start|>assistant to=functions.",
            "<|start|>assistant<|channel|>analysis to=functions.",
            "<|channel|>commentary to=functions.",
            "<|channel|>analysis to=functions.",
        ),
        text_markers=(
            "<|start|>assistant<|channel|>final<|message|>",
            "<|start|>assistant<|channel|>commentary<|message|>",
            "<|start|>assistant<|channel|>analysis<|message|>",
            "<|channel|>final<|message|>",
            "<|channel|>commentary<|message|>",
            "<|channel|>analysis<|message|>",
            "<|start|>assistant",
            "<|end|>",
            "<|return|>",
        ),
        text_opening="<|start|>assistant<|channel|>final<|message|>",
        prompted="<|start|>assistant",
        tokens=("<|start|>", "<|channel|>", "<|message|>", "<|constrain|>", "<|call|>", "<|end|>", "<|return|>"),
        ends_turn=True,
    ),
    ToolFormat(
        "gemma4",
        "Gemma 4",
        ("<|tool_call>", "<tool_call|>"),
        GemmaCalls('<|"|>'),
        opening="<|tool_call>",
        closing=("<tool_call|>",),
    ),
    ToolFormat(
        "functiongemma",
        "Gemma 3 (FunctionGemma)",
        ("<start_function_call>",),
        GemmaCalls("<escape>"),
        opening="<start_function_call>",
        closing=("<end_function_call>",),
    ),
    ToolFormat(
        "kimi",
        "Kimi K2",
        ("<|tool_calls_section_begin|>", "<|tool_call_argument_begin|>"),
        NamedCalls(
            "<|tool_call_argument_begin|>",
            r"(?P<id>(?:functions\.)?(?P<name>[\w.-]+?)(?::\d+)?)\s*<\|tool_call_argument_begin\|>",
            before="functions.",
            numbered=True,
            tokens=("<|tool_call_argument_begin|>",),
        ),
        opening="<|tool_call_begin|>",
        closing=("<|tool_call_end|>",),
        section=("<|tool_calls_section_begin|>", "<|tool_calls_section_end|>"),
    ),
    ToolFormat(
        "deepseek-v3.2",
        "DeepSeek V3.2",
        ("｜DSML｜", "function_calls"),
        _DSML,
        section=("<｜DSML｜function_calls>\n", "\n</｜DSML｜function_calls>"),
        separator="\n",
    ),
    ToolFormat(
        "deepseek-v4",
        "DeepSeek V4",
        ("｜DSML｜", "tool_calls"),
        _DSML,
        section=("<｜DSML｜tool_calls>\n", "\n</｜DSML｜tool_calls>"),
        separator="\n",
    ),
    ToolFormat(
        "deepseek-v3",
        "DeepSeek V3 and R1, and distilled models",
        ("<｜tool▁calls▁begin｜>", "<｜tool▁sep｜>", "```json"),
        NamedCalls(
            "\n```json\n",
            r"(?:\w*<｜tool▁sep｜>)?\s*(?P<name>[\w.-]+)\s*(?:```(?:json)?)?",
            before="function<｜tool▁sep｜>",
            tokens=("<｜tool▁sep｜>",),
        ),
        opening="<｜tool▁call▁begin｜>",
        closing=("\n```", "<｜tool▁call▁end｜>"),
        section=("<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"),
        separator="\n",
    ),
    ToolFormat(
        "deepseek-v3.1",
        "DeepSeek V3.1",
        ("<｜tool▁calls▁begin｜>", "<｜tool▁sep｜>"),
        NamedCalls("<｜tool▁sep｜>", r"(?P<name>[\w.-]+)\s*<｜tool▁sep｜>", tokens=("<｜tool▁sep｜>",)),
        opening="<｜tool▁call▁begin｜>",
        closing=("<｜tool▁call▁end｜>",),
        section=("<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"),
    ),
    ToolFormat(
        "glm",
        "GLM 4.5 and later, Laguna, Ling 3, Spark 2.5",
        ("<tool_call>", "<arg_key>"),
        TaggedCalls(
            "",
            "\n",
            "<arg_key>",
            "</arg_key>\n<arg_value>",
            "</arg_value>\n",
            "</tool_call>",
            tokens=("<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>", "</tool_call>"),
        ),
        opening="<tool_call>",
        separator="\n",
    ),
    ToolFormat(
        "hunyuan3",
        "Hunyuan 3",
        ("<arg_key{}>", ":opensource"),
        TaggedCalls(
            "",
            "<tool_sep:opensource>\n",
            "<arg_key:opensource>",
            "</arg_key:opensource>\n<arg_value:opensource>",
            "</arg_value:opensource>\n",
            "</tool_call:opensource>",
            tokens=(
                "<tool_sep:opensource>",
                "<arg_key:opensource>",
                "</arg_key:opensource>",
                "<arg_value:opensource>",
                "</arg_value:opensource>",
                "</tool_call:opensource>",
            ),
        ),
        opening="<tool_call:opensource>",
        section=("<tool_calls:opensource>\n", "\n</tool_calls:opensource>"),
        separator="\n",
    ),
    ToolFormat(
        "minimax-m2",
        "MiniMax M2",
        ("minimax:tool_call", '<invoke name="'),
        TaggedCalls('<invoke name="', '">\n', '<parameter name="', '">', "</parameter>\n", "</invoke>"),
        section=("<minimax:tool_call>\n", "\n</minimax:tool_call>"),
        separator="\n",
    ),
    ToolFormat(
        "seed-oss",
        "Seed-OSS",
        ("seed:tool_call", "<function=", "<parameter="),
        TaggedCalls("<function=", ">\n", "<parameter=", ">", "</parameter>\n", "</function>"),
        opening="<seed:tool_call>\n",
        closing=("\n</seed:tool_call>",),
        separator="\n",
    ),
    ToolFormat(
        "qwen3-coder",
        "Qwen3-Coder, Qwen 3.5, Nemotron 3, Step 3.5",
        ("<tool_call>", "<function=", "<parameter="),
        TaggedCalls("<function=", ">\n", "<parameter=", ">\n", "\n</parameter>\n", "</function>"),
        opening="<tool_call>\n",
        closing=("\n</tool_call>",),
        separator="\n",
    ),
    ToolFormat(
        "functionary",
        "Functionary on Llama 3.1",
        ("<function=",),
        NamedCalls(">", r"(?P<name>[\w.-]+)\s*>"),
        opening="<function=",
        closing=("</function>",),
    ),
    ToolFormat(
        "functionary-v3.2",
        "Functionary v3.2",
        (">>>", "recipient"),
        NamedCalls("\n", r"(?P<name>[\w.-]+)"),
        opening=">>>",
        text_markers=(">>>all\n",),
        text_opening=">>>all\n",
        prompted=">>>",
        tokens=(">>>",),
    ),
    ToolFormat(
        "mistral-args",
        "Mistral since mid-2025: Devstral, Magistral, Ministral 3",
        ("[TOOL_CALLS]", "[ARGS]"),
        _MISTRAL,
        opening="[TOOL_CALLS]",
    ),
    ToolFormat(
        "mistral",
        "Mistral",
        ("[TOOL_CALLS]",),
        replace(_MISTRAL, writes_objects=True),
        opening="[TOOL_CALLS]",
    ),
    ToolFormat(
        "granite",
        "Granite 3",
        ("<|tool_call|>",),
        JsonCalls(as_list=True),
        opening="<|tool_call|>",
    ),
    ToolFormat(
        "llama4-python",
        "Llama 4, prompted for calls as Python",
        ("<|header_start|>", "func_name1("),
        PythonCalls(),
        opening="<|python_start|>",
        closing=("<|python_end|>",),
        bare=True,
    ),
    ToolFormat(
        "gemma3-python",
        "Gemma 3, prompted for calls as Python",
        ("<start_of_turn>", "func_name1("),
        PythonCalls(),
        opening="```tool_code\n",
        closing=("\n```",),
        bare=True,
    ),
    _LLAMA4,
    _LLAMA,
    ToolFormat(
        "lfm2",
        "LFM2",
        ("<|tool_list_start|>",),
        PythonCalls(),
        other_needles=(("<|tool_call_start|>",), ("List of tools: [",)),
        opening="<|tool_call_start|>",
        closing=("<|tool_call_end|>",),
    ),
    ToolFormat(
        "cohere",
        "Command R7B, Command A",
        ("<|START_ACTION|>",),
        JsonCalls(
            name_key="tool_name",
            arguments_key="parameters",
            as_list=True,
            extra={"tool_call_id": {"pattern": "^[0-9]$"}},
        ),
        opening="<|START_ACTION|>",
        closing=("<|END_ACTION|>",),
        text_markers=("<|START_RESPONSE|>", "<|END_RESPONSE|>", "<|START_TEXT|>", "<|END_TEXT|>"),
        tokens=("<|START_ACTION|>", "<|END_ACTION|>"),
    ),
    ToolFormat(
        "command-r",
        "Command R and R+",
        ("Action:", "tool_name"),
        JsonCalls(name_key="tool_name", arguments_key="parameters", as_list=True),
        opening="Action:\n```json\n",
        closing=("```",),
        other_openings=("Action: ```json", "Action:```json", "Action:"),
    ),
    ToolFormat(
        "apertus",
        "Apertus",
        ("<|tools_prefix|>",),
        KeyedJsonCalls(),
        opening="<|tools_prefix|>",
        closing=("<|tools_suffix|>",),
    ),
    ToolFormat(
        "nemotron",
        "Nemotron Nano 2",
        ("<TOOLCALL>",),
        JsonCalls(as_list=True),
        opening="<TOOLCALL>",
        closing=("</TOOLCALL>",),
    ),
    ToolFormat(
        "functools",
        "Phi-4-mini, FireFunction v2",
        ("functools[",),
        JsonCalls(as_list=True),
        opening="functools",
    ),
    ToolFormat(
        "olmo3",
        "OLMo 3",
        ("<function_calls>", "<functions>"),
        PythonCalls(listed=False),
        section=("<function_calls>\n", "\n</function_calls>"),
        separator="\n",
    ),
    ToolFormat(
        "ernie",
        "ERNIE 4.5 Thinking",
        ("<tool_call>", "<response>", "</response>", "<tool_output>"),
        JsonCalls(),
        opening="<tool_call>\n",
        closing=("\n</tool_call>",),
        separator="\n",
        text_markers=("<response>", "</response>"),
    ),
    ToolFormat(
        "tool-calls",
        "Hunyuan, Apriel, MiniMax M1",
        ("<tool_calls>",),
        JsonCalls(as_list=True),
        section=("<tool_calls>", "</tool_calls>"),
    ),
    HERMES,
)


@functools.lru_cache(maxsize=64)
def detect_format(template: str) -> ToolFormat | None:
    """The tool-call format that a chat template uses, or None if it uses none of those above."""
    return next((known for known in FORMATS if known.is_in(template)), None)
