"""Tool-call formats by model family, recognized from the chat template."""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from nybble.chat.tools.reader import Reader, Steps
from nybble.chat.tools.syntaxes.gemma_calls import GemmaCalls
from nybble.chat.tools.syntaxes.json_calls import JsonCalls, KeyedJsonCalls
from nybble.chat.tools.syntaxes.named_calls import NamedCalls
from nybble.chat.tools.syntaxes.python_calls import PythonCalls
from nybble.chat.tools.syntaxes.rules import Call, CallRules
from nybble.chat.tools.syntaxes.tagged_calls import TaggedCalls


class Function(Protocol):
    """A function that the model may call."""

    @property
    def name(self) -> str:
        """The name that the model writes."""

    @property
    def parameters(self) -> Mapping[str, Any] | None:
        """The JSON Schema of the arguments; None for any object."""


class Syntax(Protocol):
    """How a call is written between its markers."""

    @property
    def starts(self) -> str:
        """The characters with which a call without an opening marker begins."""

    @property
    def as_list(self) -> bool:
        """Whether several calls share their markers."""

    @property
    def tokens(self) -> tuple[str, ...]:
        """Markers within a call, which may be special tokens."""

    def read(self, reader: Reader) -> Steps[None]:
        """Reads what an opening marker begins."""

    def write(self, calls: Sequence[Call], number: int = 0) -> str:
        """The text of calls between the markers, of which the first has this number."""

    def rules(self, rules: CallRules, *, several: bool = False) -> list[str]:
        """Grammar rules. The first one, `named`, is what comes between the markers."""


@dataclass(frozen=True)
class ToolFormat:
    """How a model family writes tool calls: after an opening marker, and in some families before a closing one.

    Markers hold the white space that the model writes around them. When calls are read, it is optional.
    """

    name: str
    families: str
    """The families that write it."""
    needles: tuple[str, ...]
    """The chat templates of the format contain all of these texts."""
    syntax: Syntax
    unless: tuple[str, ...] = ()
    """Chat templates of other formats contain one of these texts."""
    opening: str = ""
    closing: tuple[str, ...] = ()
    """The markers after a call, each of which may be missing."""
    section: tuple[str, str] = ("", "")
    """The markers around all calls of an answer."""
    separator: str = ""
    """What is between two calls."""
    bare: bool = False
    """An answer may begin with a call without the opening marker."""
    other_openings: tuple[str, ...] = ()
    """Other spellings of the opening marker."""
    text_markers: tuple[str, ...] = ()
    """Markers around the text of an answer, which do not belong to it."""
    text_opening: str = ""
    """The marker that the model writes before text."""
    prompted: str = ""
    """The end of the prompt, if the markers of an answer begin there."""
    tokens: tuple[str, ...] = ()
    """The special tokens of which markers consist, where these are not the markers themselves."""
    ends_turn: bool = False
    """The closing marker ends the answer."""
    example: str = field(default="", repr=False)
    """A call, for the documentation."""

    def is_in(self, template: str) -> bool:
        """Whether a chat template writes calls in this format."""
        if any(text in template for text in self.unless):
            return False
        return all(needle in template for needle in self.needles)

    @property
    def openings(self) -> tuple[str, ...]:
        """The spellings of the opening marker."""
        return tuple(filter(None, (self.opening.strip(), *self.other_openings)))

    @property
    def closings(self) -> tuple[str, ...]:
        """The markers after a call."""
        return tuple(marker.strip() for marker in self.closing)

    @property
    def markers(self) -> tuple[str, ...]:
        """All markers. In some vocabularies they are special tokens, which decode to no text."""
        own = self.tokens or (*self.openings, *self.closings, *(marker.strip() for marker in self.section))
        return tuple(dict.fromkeys(filter(None, (*own, *self.syntax.tokens))))

    @functools.cached_property
    def scan(self) -> tuple[str, ...]:
        """The markers that may come in the text of an answer, longest first."""
        found = {*self.openings, self.section[0].strip(), *self.text_markers} - {""}
        return tuple(sorted(found, key=len, reverse=True))

    @functools.cached_property
    def pattern(self) -> re.Pattern[str] | None:
        """Finds the first of these markers."""
        return re.compile("|".join(map(re.escape, self.scan))) if self.scan else None

    def write(self, calls: Sequence[Call]) -> str:
        """Calls as the model writes them."""
        opening, closing = ("", "") if self.bare else (self.opening, "".join(self.closing))
        if self.syntax.as_list:
            written = opening + self.syntax.write(calls) + closing
        else:
            written = self.separator.join(
                opening + self.syntax.write([call], number) + closing for number, call in enumerate(calls)
            )
        return (self.section[0] + written + self.section[1]).removeprefix(self.prompted)


HERMES = ToolFormat(
    "hermes",
    "Hermes, Qwen 2.5 and 3, SmolLM2 and 3, Granite 4, MiMo, Bielik, Reka Edge",
    ("<tool_call>",),
    JsonCalls(),
    unless=("]<]minimax[>[",),
    opening="<tool_call>\n",
    closing=("\n</tool_call>",),
    separator="\n",
    example='<tool_call>{"name": ..., "arguments": {...}}</tool_call>',
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

_LFM2 = ToolFormat(
    "lfm2",
    "LFM2",
    ("<|tool_list_start|>",),
    PythonCalls(),
    opening="<|tool_call_start|>",
    closing=("<|tool_call_end|>",),
    example='<|tool_call_start|>[NAME(key="value")]<|tool_call_end|>',
)

_LLAMA = ToolFormat(
    "llama",
    "Llama 3.1 to 3.3",
    ("<|python_tag|>",),
    JsonCalls(arguments_key="parameters"),
    opening="<|python_tag|>",
    bare=True,
    example='{"name": ..., "parameters": {...}}, alone or after <|python_tag|>',
)

_LLAMA_PROMPT = '{"name": function name, "parameters": dictionary'
_LLAMA4 = replace(
    _LLAMA,
    name="llama4",
    families="Llama 4",
    needles=("<|header_start|>", "<|python_start|>"),
    opening="<|python_start|>",
    closing=("<|python_end|>",),
    example='{"name": ..., "parameters": {...}}, alone or after <|python_start|>',
)

FORMATS = (
    ToolFormat(
        "harmony",
        "gpt-oss",
        ("<|channel|>", "<|message|>", "functions."),
        NamedCalls(
            " <|constrain|>json<|message|>",
            r"(?P<name>[\w.-]+?)\s*(?:<\|channel\|>.*?)?(?:<\|constrain\|>)?\s*(?:json)?\s*<\|message\|>",
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
        example="<|channel|>commentary to=functions.NAME <|constrain|>json<|message|>{...}<|call|>",
    ),
    ToolFormat(
        "gemma4",
        "Gemma 4",
        ("<|tool_call>", "<tool_call|>"),
        GemmaCalls('<|"|>'),
        opening="<|tool_call>",
        closing=("<tool_call|>",),
        example='<|tool_call>call:NAME{key:<|"|>text<|"|>,other:1}<tool_call|>',
    ),
    ToolFormat(
        "functiongemma",
        "Gemma 3 (FunctionGemma)",
        ("<start_function_call>",),
        GemmaCalls("<escape>"),
        opening="<start_function_call>",
        closing=("<end_function_call>",),
        example="<start_function_call>call:NAME{key:<escape>text<escape>,other:1}<end_function_call>",
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
        example="<|tool_calls_section_begin|><|tool_call_begin|>functions.NAME:0<|tool_call_argument_begin|>{...}"
        "<|tool_call_end|><|tool_calls_section_end|>",
    ),
    ToolFormat(
        "deepseek-v3.2",
        "DeepSeek V3.2",
        ("｜DSML｜", "function_calls"),
        _DSML,
        section=("<｜DSML｜function_calls>\n", "\n</｜DSML｜function_calls>"),
        separator="\n",
        example='<｜DSML｜function_calls><｜DSML｜invoke name="NAME"><｜DSML｜parameter name="KEY" string="true">TEXT'
        "</｜DSML｜parameter></｜DSML｜invoke></｜DSML｜function_calls>",
    ),
    ToolFormat(
        "deepseek-v4",
        "DeepSeek V4",
        ("｜DSML｜", "tool_calls"),
        _DSML,
        section=("<｜DSML｜tool_calls>\n", "\n</｜DSML｜tool_calls>"),
        separator="\n",
        example="the same with `<｜DSML｜tool_calls>` around the calls",
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
        example="<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>NAME, a code fence with {...}, "
        "<｜tool▁call▁end｜><｜tool▁calls▁end｜>",
    ),
    ToolFormat(
        "deepseek-v3.1",
        "DeepSeek V3.1",
        ("<｜tool▁calls▁begin｜>", "<｜tool▁sep｜>"),
        NamedCalls("<｜tool▁sep｜>", r"(?P<name>[\w.-]+)\s*<｜tool▁sep｜>", tokens=("<｜tool▁sep｜>",)),
        opening="<｜tool▁call▁begin｜>",
        closing=("<｜tool▁call▁end｜>",),
        section=("<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"),
        example="<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>NAME<｜tool▁sep｜>{...}<｜tool▁call▁end｜><｜tool▁calls▁end｜>",
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
        example="<tool_call>NAME<arg_key>KEY</arg_key><arg_value>VALUE</arg_value></tool_call>",
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
        example="<tool_calls:opensource><tool_call:opensource>NAME<tool_sep:opensource><arg_key:opensource>KEY"
        "</arg_key:opensource><arg_value:opensource>VALUE</arg_value:opensource></tool_call:opensource>"
        "</tool_calls:opensource>",
    ),
    ToolFormat(
        "minimax-m2",
        "MiniMax M2",
        ("minimax:tool_call", '<invoke name="'),
        TaggedCalls('<invoke name="', '">\n', '<parameter name="', '">', "</parameter>\n", "</invoke>"),
        section=("<minimax:tool_call>\n", "\n</minimax:tool_call>"),
        separator="\n",
        example='<minimax:tool_call><invoke name="NAME"><parameter name="KEY">VALUE</parameter></invoke>'
        "</minimax:tool_call>",
    ),
    ToolFormat(
        "seed-oss",
        "Seed-OSS",
        ("seed:tool_call", "<function=", "<parameter="),
        TaggedCalls("<function=", ">\n", "<parameter=", ">", "</parameter>\n", "</function>"),
        opening="<seed:tool_call>\n",
        closing=("\n</seed:tool_call>",),
        separator="\n",
        example="<seed:tool_call><function=NAME><parameter=KEY>VALUE</parameter></function></seed:tool_call>",
    ),
    ToolFormat(
        "qwen3-coder",
        "Qwen3-Coder, Qwen 3.5, Nemotron 3, Step 3.5",
        ("<tool_call>", "<function=", "<parameter="),
        TaggedCalls("<function=", ">\n", "<parameter=", ">\n", "\n</parameter>\n", "</function>"),
        opening="<tool_call>\n",
        closing=("\n</tool_call>",),
        separator="\n",
        example="<tool_call><function=NAME><parameter=KEY>VALUE</parameter></function></tool_call>",
    ),
    ToolFormat(
        "functionary",
        "Functionary on Llama 3.1",
        ("<function=",),
        NamedCalls(">", r"(?P<name>[\w.-]+)\s*>"),
        opening="<function=",
        closing=("</function>",),
        example="<function=NAME>{...}</function>",
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
        example=">>>NAME, and {...} on the next line",
    ),
    ToolFormat(
        "mistral-args",
        "Mistral since mid-2025: Devstral, Magistral, Ministral 3",
        ("[TOOL_CALLS]", "[ARGS]"),
        _MISTRAL,
        opening="[TOOL_CALLS]",
        example="[TOOL_CALLS]NAME[ARGS]{...}",
    ),
    ToolFormat(
        "mistral",
        "Mistral",
        ("[TOOL_CALLS]",),
        replace(_MISTRAL, writes_objects=True),
        opening="[TOOL_CALLS]",
        example='[TOOL_CALLS][{"name": ..., "arguments": {...}}]',
    ),
    ToolFormat(
        "granite",
        "Granite 3",
        ("<|tool_call|>",),
        JsonCalls(as_list=True),
        opening="<|tool_call|>",
        example='<|tool_call|>[{"name": ..., "arguments": {...}}]',
    ),
    ToolFormat(
        "llama4-python",
        "Llama 4, prompted for calls as Python",
        ("<|header_start|>", "func_name1("),
        PythonCalls(),
        opening="<|python_start|>",
        closing=("<|python_end|>",),
        bare=True,
        example='[NAME(key="value")], alone or between <|python_start|> and <|python_end|>',
    ),
    ToolFormat(
        "gemma3-python",
        "Gemma 3, prompted for calls as Python",
        ("<start_of_turn>", "func_name1("),
        PythonCalls(),
        opening="```tool_code\n",
        closing=("\n```",),
        bare=True,
        example='[NAME(key="value")], alone or in a code fence of tool_code',
    ),
    _LLAMA4,
    replace(_LLAMA4, needles=("<|header_start|>", _LLAMA_PROMPT)),
    _LLAMA,
    replace(_LLAMA, needles=("<|start_header_id|>", _LLAMA_PROMPT)),
    _LFM2,
    replace(_LFM2, needles=("<|tool_call_start|>",)),
    replace(_LFM2, needles=("List of tools: [",)),
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
        example='<|START_ACTION|>[{"tool_call_id": "0", "tool_name": ..., "parameters": {...}}]<|END_ACTION|>',
    ),
    ToolFormat(
        "command-r",
        "Command R and R+",
        ("Action:", "tool_name"),
        JsonCalls(name_key="tool_name", arguments_key="parameters", as_list=True),
        opening="Action:\n```json\n",
        closing=("```",),
        other_openings=("Action: ```json", "Action:```json", "Action:"),
        example='Action:, and [{"tool_name": ..., "parameters": {...}}] in a code fence',
    ),
    ToolFormat(
        "apertus",
        "Apertus",
        ("<|tools_prefix|>",),
        KeyedJsonCalls(),
        opening="<|tools_prefix|>",
        closing=("<|tools_suffix|>",),
        example='<|tools_prefix|>[{"NAME": {...}}]<|tools_suffix|>',
    ),
    ToolFormat(
        "nemotron",
        "Nemotron Nano 2",
        ("<TOOLCALL>",),
        JsonCalls(as_list=True),
        opening="<TOOLCALL>",
        closing=("</TOOLCALL>",),
        example='<TOOLCALL>[{"name": ..., "arguments": {...}}]</TOOLCALL>',
    ),
    ToolFormat(
        "functools",
        "Phi-4-mini, FireFunction v2",
        ("functools[",),
        JsonCalls(as_list=True),
        opening="functools",
        example='functools[{"name": ..., "arguments": {...}}]',
    ),
    ToolFormat(
        "olmo3",
        "OLMo 3",
        ("<function_calls>", "<functions>"),
        PythonCalls(listed=False),
        section=("<function_calls>\n", "\n</function_calls>"),
        separator="\n",
        example='<function_calls>NAME(key="value")</function_calls>, each call on a line of its own',
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
        example="the format of Hermes, with `<response>` around text",
    ),
    ToolFormat(
        "tool-calls",
        "Hunyuan, Apriel, MiniMax M1",
        ("<tool_calls>",),
        JsonCalls(as_list=True),
        section=("<tool_calls>", "</tool_calls>"),
        example='<tool_calls>[{"name": ..., "arguments": {...}}]</tool_calls>',
    ),
    HERMES,
)


@functools.lru_cache(maxsize=64)
def detect_format(template: str) -> ToolFormat | None:
    """The tool-call format that a chat template uses, or None if it uses none of those above."""
    return next((known for known in FORMATS if known.is_in(template)), None)
