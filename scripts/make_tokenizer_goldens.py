"""Writes `tests/data/tokenizers.json`: token ids and strings that Rust and Python must both give.

The ids are those of the packages `tokenizers` (byte-level vocabularies, `tokenizer.json`) and of nybble (SentencePiece).
Usage: `.venv/bin/python scripts/make_tokenizer_goldens.py`
"""

# ruff: noqa: E501  Templates are long lines.

from __future__ import annotations

import json
import sys
import warnings
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "tests" / "python" / "support"), str(ROOT / "tests"), str(ROOT / "tests/python/tokenizer")]

import vocabularies  # noqa: E402
from test_tokenizer_folders import byte_level, pieces  # noqa: E402

from nybble import Tokenizer, _native  # noqa: E402

STRINGS = [
    "",
    " ",
    "Hello  world, it's 2024!",
    "IT'S we'Re they\u2019ll 1234567 3.14 x1y22",
    "for (int i = 0; i < 10; ++i) { sum += i; }\n\n\n\tend\r\n",
    "   leading, trailing   \n \n  ",
    "\u00c9COLE helloWorld \u0939\u093f\u0928\u094d\u0926\u0940 \u4e2d\u6587\u5b57 \uac00\ub098 \u3042\u308a\u304c",
    "\U0001f44d\U0001f3fd\U0001f468\u200d\U0001f469\u200d\U0001f467 e\u0301 \u212a \u017ft \u0661\u0662\u0663\u0664 \u00bd",
    "<|start|>a<|end|> <s>b</s><turn> \n c    d<sentinel:12>",
    "_x=y #tag @name a.b,c;d `e` $5+6^7|8~9 (z)\u2026\u3002\u060c",
    "a" * 70 + " " * 70 + "\n" * 5 + "0" * 17,
]

TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The <weather> & more",
        "parameters": {"type": "object", "properties": {"town": {"type": "string"}, "days": {"type": "integer"}}},
    },
}
CALL = {"id": "c1", "function": {"name": "weather", "arguments": {"town": "Sète", "days": 2, "now": True}}}
TALK: list[dict[str, Any]] = [
    {"role": "system", "content": " Be brief. "},
    {"role": "user", "content": "How warm is <it> in 'Paris'?"},
    {"role": "assistant", "content": "<think>hm</think>\n", "tool_calls": [CALL]},
    {"role": "tool", "tool_call_id": "c1", "content": '{"degrees": 21}'},
    {"role": "assistant", "content": " 21 degrees. "},
    {"role": "user", "content": "Thanks"},
]
# What programs send: keys without a value, and reasoning under several names.
LONG_TALK: list[dict[str, Any]] = [
    {"role": "user", "content": [{"type": "text", "text": "Hi"}, {"type": "text", "text": None}], "name": None},
    {"role": "assistant", "content": None, "reasoning": "Well\n", "tool_calls": [CALL]},
    {"role": "tool", "content": {"degrees": 21.0, "far": 1e20, "small": 1e-07, "tiny": -0.5}},
    {"role": "assistant", "thinking": "So", "content": "Blue "},
]
OTHER_TYPES = (
    "{% for m in messages %}{{ m.content | trim }} {{ m.tool_calls | length }} {{ m.tool_calls is iterable }} "
    "{{ m.content is sequence }} {{ m | upper }} {{ m.content | string | replace(',', ';', 1) }}\n"
    "{{ m | tojson(indent=2) | indent(3, true) }}\n{{ m.values() | join('|') }}{% endfor %}"
)
KEYS = (
    "{% for m in messages %}{% for key, value in m.items() %}{{ key }}={{ value }} {{ value | tojson }};{% endfor %}\n{% endfor %}"
    "{% set x = 1 %}{% generation %}{% set x = 2 %}{{ x }}{% endgeneration %}{{ x }}"
)
CONTINUED = [
    ("content", "{% for m in messages %}[{{ m.role }}]{{ m.reasoning_content }}{{ m.content }}\n{% endfor %}"),
    ("content", "{% for m in messages %}[{{ m.role }}]{{ m.content | trim }}\n{% endfor %}"),
    ("reasoning_content", "{% for m in messages %}[{{ m.role }}]<{{ m.thinking }}>{{ m.content }}\n{% endfor %}"),
    ("thinking", "{% for m in messages %}[{{ m.role }}]<{{ m.reasoning_content | trim }}>\n{% endfor %}"),
]
# In the style of models' templates.
TEMPLATES = [
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
    "{{ bos_token }}\n{%- if messages[0]['role'] == 'system' %}\n    {%- set first = messages[0]['content'] | trim + '\n' %}\n"
    "    {%- set rest = messages[1:] %}\n{%- endif %}\n{%- for message in rest %}\n    {%- if loop.first %}{{ first }}{% endif %}\n"
    "    {%- set role = 'model' if message.role == 'assistant' else message.role %}\n"
    "    {{- '<start_of_turn>' + role + '\n' + message.content | trim }}\n    {% if not loop.last %}+{% endif %}\n{%- endfor %}\n",
    "{%- for tool in tools %}{{ tool | tojson }}\n{{ tool.function.parameters | tojson(indent=2) }}\n{% endfor %}"
    "{%- for message in messages %}{% for call in message.tool_calls or [] %}{{ call.function.arguments | tojson }}"
    "{% for key, value in call.function.arguments.items() %} {{ key }}={{ value }}{% endfor %}{% endfor %}{% endfor %}",
    "{%- set ns = namespace(last=-1, seen=[]) %}{%- for message in messages[::-1] %}\n"
    "{%- if ns.last == -1 and message.role == 'user' %}{% set ns.last = messages | length - 1 - loop.index0 %}{% endif %}\n"
    "{%- endfor %}{{ ns.last }}{% for message in messages %}{% set content = message.content %}\n"
    "{% if '</think>' in content %}{% set content = content.split('</think>')[-1].lstrip('\\n') %}{% endif %}\n"
    "    {% generation %}[{{ content.strip() }}]{% endgeneration %}\n{% endfor %}",
    "{{ true }} {{ false }} {{ none }} {{ missing }} {{ [1, 'a', true, none] }} {{ {'k': 'v'} }} {{ 7 // 2 }} {{ 7 / 2 }} {{ 1.0 }}"
    "{{ 'x' ~ 1 ~ 'y' }} {{ 'ab'.upper() }} {{ 'a,b'.split(',') | join('+') }} {{ enable_thinking is defined }}"
    "{% if enable_thinking is defined and enable_thinking is false %} off{% endif %}{{ '%' }}",
    "{% macro show(text, indent='') %}{{ indent }}- {{ text }}\n{% endmacro %}{% for m in messages %}{{ show(m.role, '  ') }}"
    "{% if loop.index == 3 %}{% break %}{% endif %}{% endfor %}{{ messages | map(attribute='role') | join(',') }}"
    "{{ messages | selectattr('role', 'equalto', 'user') | list | length }}{% for key, value in tools[0].function.parameters.properties | dictsort %}{{ key }}={{ value.type }};{% endfor %}",
]


def cases(tokenizer: Tokenizer, strings: list[str]) -> list[dict[str, Any]]:
    found = []
    for text in strings:
        for special in (True, False):
            ids = tokenizer.encode(text, add_special=special, parse_special=special)
            found.append({"text": text, "special": special, "ids": ids, "decoded": tokenizer.decode(ids)})
    return found


def main() -> None:
    """Writes the file."""
    warnings.simplefilter("ignore")
    vocabulary, rules = vocabularies.byte_level(), list[dict[str, Any]]()
    for name in _native.pre_tokenizer_names():
        tokenizer = Tokenizer.from_gguf_metadata(vocabularies.byte_level(pre=name))
        ids = [case["ids"] for case in cases(tokenizer, STRINGS) if not case["special"]]
        if (same := next((rule for rule in rules if rule["ids"] == ids), None)) is not None:
            same["names"].append(name)
        else:
            rules.append({"names": [name], "ids": ids})
    files = []
    for metadata in (
        vocabulary,
        vocabularies.pieces(),
        vocabularies.pieces(general__name="Phi-3", add_space_prefix=False),
    ):
        tokenizer = Tokenizer.from_gguf_metadata(metadata)
        files.append({"metadata": metadata, "cases": cases(tokenizer, STRINGS), "ends": sorted(tokenizer.eos_ids)})
    folders = []
    for make in (byte_level, pieces):
        with TemporaryDirectory() as folder:
            make().save(f"{folder}/tokenizer.json")
            config = {"bos_token": "<s>", "eos_token": {"content": "</s>"}, "add_eos_token": True}
            Path(folder, "tokenizer_config.json").write_text(json.dumps(config))
            tokenizer = Tokenizer.from_folder(folder)
            content = json.loads(Path(folder, "tokenizer.json").read_text(encoding="utf-8"))
            folders.append(
                {
                    "tokenizer": content,
                    "config": config,
                    "cases": cases(tokenizer, STRINGS),
                    "ends": sorted(tokenizer.eos_ids),
                }
            )
    chats = list[dict[str, Any]]()
    for template in TEMPLATES:
        tokenizer = Tokenizer.from_gguf_metadata(vocabularies.byte_level(tokenizer__chat_template=template))
        for prompt in (True, False):
            variables = {"tools": [TOOL], "enable_thinking": False} if prompt else {"tools": [TOOL, TOOL]}
            text = tokenizer.apply_chat_template(TALK, add_generation_prompt=prompt, **variables)
            messages = [json.dumps(message) for message in TALK]
            rendered = {key: json.dumps(value) for key, value in variables.items()}
            chats.append(
                {"template": template, "messages": messages, "prompt": prompt, "variables": rendered, "text": text}
            )
    for template, field in [(KEYS, None), (OTHER_TYPES, None), *((template, field) for field, template in CONTINUED)]:
        tokenizer = Tokenizer.from_gguf_metadata(vocabularies.byte_level(tokenizer__chat_template=template))
        text = tokenizer.apply_chat_template(
            LONG_TALK, add_generation_prompt=False, continue_final_message=field or False
        )
        chats.append(
            {
                "template": template,
                "messages": [json.dumps(message) for message in LONG_TALK],
                "prompt": False,
                "continued": field,
                "variables": {},
                "text": text,
            }
        )
    golden = {"strings": STRINGS, "rules": rules, "files": files, "folders": folders, "chats": chats}
    path = ROOT / "tests" / "data" / "tokenizers.json"
    path.write_text(json.dumps(golden, ensure_ascii=True, separators=(",", ":")) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
