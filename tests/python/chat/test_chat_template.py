"""Chat templates: features of real templates work, and excessive use of resources is an error."""

from __future__ import annotations

import datetime
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from jinja2.sandbox import ImmutableSandboxedEnvironment

from nybble import ModelError
from nybble.chat.template import ChatTemplate
from nybble.chat.template_limits import Limits

Message = dict[str, Any]
TALK: list[Message] = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "How warm is <it> in 'Paris' & Rome?"},
    {
        "role": "assistant",
        "content": "<think>hm</think>",
        "tool_calls": [{"id": "c1", "function": {"name": "weather", "arguments": {"city": "Paris", "days": 2}}}],
    },
    {"role": "tool", "tool_call_id": "c1", "content": '{"degrees": 21}'},
    {"role": "assistant", "content": " 21 degrees, é. "},
    {"role": "user", "content": [{"type": "text", "text": "Thanks"}, {"type": "image"}]},
]
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "Tells the weather",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}, "days": {"type": "integer"}}},
        },
    }
]


def render(source: str, messages: list[Message] | None = None, **variables: Any) -> str:
    return ChatTemplate(source).render(TALK if messages is None else messages, **variables)


# --- What templates use -----------------------------------------------------------------------------------------------

# Written for this test in the style of models' templates.
WITH_TOOLS = """
{%- macro describe(properties, indent='') %}
    {%- for name, value in properties | dictsort %}
        {{- indent ~ '- ' ~ name ~ ': ' ~ (value.type | default('any') | upper) }}
        {%- if value.properties is defined %}{{ '\\n' ~ describe(value.properties, indent ~ '  ') }}{% endif %}
        {%- if not loop.last %}{{ '\\n' }}{% endif %}
    {%- endfor %}
{%- endmacro %}
{%- set ns = namespace(system='', last_user=-1, seen=[], index=0) %}
{%- if messages[0]['role'] == 'system' %}
    {%- set ns.system = messages[0].content.strip() %}
    {%- set rest = messages[1:] %}
{%- else %}
    {%- set rest = messages %}
{%- endif %}
{%- for message in messages[::-1] %}
    {%- if ns.last_user == -1 and message.role == "user" %}
        {%- set ns.last_user = messages | length - 1 - loop.index0 %}
    {%- endif %}
{%- endfor %}
{{- bos_token }}{{ ns.system }}
{% if tools %}
Tools:
    {%- for tool in tools %}
        {%- set f = tool.function if tool.function is defined else tool %}
{{ tool | tojson }}
{{ f.parameters | tojson(indent=2) }}
{{ describe(f.parameters.properties) }}
        {%- set ns.seen = ns.seen + [f.name, (f.name, loop.index), {'n': f.name}] %}
    {%- endfor %}
{%- endif %}
{%- for message in rest %}
    {%- if message.content is string %}
        {%- set content = message.content %}
    {%- else %}
        {%- set content %}
            {%- for part in message.content if part.type == 'text' %}{{ part.text }}{% endfor %}
        {%- endset %}
    {%- endif %}
    {%- if '</think>' in content %}
        {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
    {%- endif %}
    {%- if loop.first and message.role != 'user' %}{{ raise_exception('begin with the user') }}{% endif %}
<|{{ message['role'] }}|{{ loop.index }}/{{ loop.length }}{{ '' if loop.last else '+' }}>{{ content | trim }}
    {%- for call in message.tool_calls or [] %}
        {%- set ns.index = ns.index + 1 %}
[{{ '%02d' % ns.index }} {{ '{:>3}'.format(ns.index) }} {{ call.function.name }}
        {%- for key, value in call.function.arguments.items() %} {{ key }}={{ value }}{% endfor %}]
        {%- if ns.index > 5 %}{% break %}{% endif %}
    {%- endfor %}
{%- endfor %}
{{- eos_token if not add_generation_prompt else '<|assistant|>' }}
{{ ns.seen | map('string') | join(', ') }} {{ ns.seen | length }} {{ 7 // 2 }} {{ 2 ** 10 }} {{ 'ab' * 3 }}
{{- messages | map(attribute='role') | unique | join(',') }}
{{- messages | selectattr('role', 'equalto', 'user') | list | length }}
"""


def plainly(source: str, **variables: Any) -> str:
    """The output of Jinja without limits, in the environment of `transformers`."""

    def to_json(value: Any, indent: int | None = None) -> str:
        return json.dumps(value, ensure_ascii=False, indent=indent)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = to_json
    return environment.from_string(source).render(**variables)


@pytest.mark.parametrize("tools", [None, TOOLS])
@pytest.mark.parametrize("talk", [TALK, TALK[1:], TALK[1:2]])
@pytest.mark.parametrize("answer", [False, True])
def test_the_limits_do_not_change_the_output_of_real_templates(tools: Any, talk: list[Message], answer: bool) -> None:
    variables = {"tools": tools, "bos_token": "<s>", "eos_token": "</s>", "add_generation_prompt": answer}
    assert render(WITH_TOOLS, talk, **variables) == plainly(WITH_TOOLS, messages=talk, **variables)


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("{{ 'é<' | tojson }}", '"é<"'),
        ("{{ {'b': 1, 'a': [2]} | tojson(separators=(',', ':'), sort_keys=true) }}", '{"a":[2],"b":1}'),
        ("{{ 'é' | tojson(ensure_ascii=true) }}", '"\\u00e9"'),
        (
            "{% for i in range(9) %}{% if i == 2 %}{% continue %}{% endif %}{% if i > 3 %}{% break %}{% endif %}{{ i }}"
            "{% endfor %}",
            "013",
        ),
        ("{% generation %}a{% set x = 1 %}{% endgeneration %}{{ x }}", "a"),
        ("  {% if true %}\nx\n  {% endif %}\ny", "x\ny"),
        ("{% for x in [[1, [2]], [3]] recursive %}{{ loop(x) if x is iterable else x }}{% endfor %}", "123"),
        ("{{ add_generation_prompt }} {{ tools }} {{ documents }}", "False None None"),
        ("{{ undefined_thing }}{{ undefined_thing is defined }}", "False"),
        ("{% call(x) m() %}{{ x }}{% endcall %}", None),
        ("{% macro m() %}({{ caller('y') }}){% endmacro %}{% call(x) m() %}{{ x }}{% endcall %}", "(y)"),
        ("{% filter upper %}abc{% endfilter %}", "ABC"),
        ("{% set x, y = [1, 2] %}{{ y }}{{ x }}{% with z = 3 %}{{ z }}{% endwith %}", "213"),
        ("{% raw %}{{ x }}{% endraw %}{# nothing #}", "{{ x }}"),
        ("{{ ['b', 'a'] | sort | join('-') }} {{ 'a-b'.replace('-', '+') }} {{ ','.join(['x', 'y']) }}", "a-b a+b x,y"),
    ],
)
def test_features_of_real_templates_work(source: str, expected: str | None) -> None:
    if expected is None:
        with pytest.raises(ModelError, match="'m' is undefined"):
            render(source)
    else:
        assert render(source) == expected


def test_a_template_may_write_the_date() -> None:
    before = datetime.datetime.now()
    found = render("{{ strftime_now('%Y-%m-%d') }}")
    assert found in {f"{moment:%Y-%m-%d}" for moment in (before, datetime.datetime.now())}


def test_a_template_may_refuse_the_messages() -> None:
    with pytest.raises(ModelError, match=r"refuses the messages: roles must alternate$"):
        render("{{ raise_exception('roles must alternate') }}")


def test_the_messages_of_the_caller_are_not_changed() -> None:
    messages = [{"role": "user", "content": "a"}]
    for source in ("{{ messages.append(1) }}", "{{ messages[0].update({'a': 1}) }}", "{{ messages.clear() }}"):
        with pytest.raises(ModelError):
            render(source, messages)
    assert messages == [{"role": "user", "content": "a"}]


@pytest.mark.parametrize("messages", ["Hello", b"Hello", None, {"role": "user"}, 3])
def test_messages_other_than_a_list_are_refused(messages: Any) -> None:
    with pytest.raises(TypeError, match="messages: found"):
        ChatTemplate("x").render(messages)


@pytest.mark.parametrize("message", ["Hello", None, ["user", "Hello"]])
def test_a_message_other_than_a_dict_is_refused(message: Any) -> None:
    with pytest.raises(TypeError, match=r"messages\[0\]: found \w+, expected a dict"):
        ChatTemplate("x").render([message])


def test_a_template_renders_repeatedly() -> None:
    template = ChatTemplate("{% for i in range(900) %}{{ i }}{% endfor %}", limits=Limits(steps=5000))
    assert len({template.render([]) for _ in range(20)}) == 1, "the steps of one rendering are not those of the next"


# --- What is refused before it runs -----------------------------------------------------------------------------------


BLOCKS = ("if true", "for a in b", "set a", "filter upper", "generation", "macro a()")


@pytest.mark.parametrize(
    "source",
    [
        "{{ " + "(" * 6000 + "1" + ")" * 6000 + " }}",
        "{{ " + "[" * 6000 + "]" * 6000 + " }}",
        "{{ " + "{'a':" * 6000 + "1" + "}" * 6000 + " }}",
        *(
            f"{{% {opening} %}}" * depth + f"{{% end{opening.split()[0]} %}}" * depth
            for opening, depth in [("if true", 50_000), *((block, 3000) for block in BLOCKS)]
        ),
        *("{{ " + prefix * 6000 + "1 }}" for prefix in ("not ", "-", "- + ", "1 if 1 else ")),
        "{% if 1 %}" + "{% elif 1 %}" * 6000 + "{% endif %}",
        *("{{ a" + suffix * 6000 + " }}" for suffix in (".b", "[0]", "()", "|upper")),
        *("{{ 1" + suffix * 6000 + " }}" for suffix in ("+1", "**1", " and 1", " is odd")),
        "x" * 200_000,
    ],
    ids=lambda source: source[:24],
)
def test_a_template_too_deep_or_too_large_is_an_error(source: str) -> None:
    with pytest.raises(ModelError):
        ChatTemplate(source)


@pytest.mark.parametrize("depth", [1, 8, 30])
def test_the_depth_of_real_templates_is_allowed(depth: int) -> None:
    assert (
        render("{% if true %}" * depth + "{{ " + "(" * depth + "1" + ")" * depth + " }}" + "{% endif %}" * depth) == "1"
    )


def test_inline_set_statements_are_not_open_blocks() -> None:
    assert render("{% set a = 1 %}" * 1000 + "{% set b = f(c=1) if false else 2 %}{{ b }}") == "2"


@pytest.mark.parametrize(
    "source", ["{% if %}", "{% if true %}", "{{ 'a", "{% nothing %}", "{{ 1 | nothing }}", "{# ", "{{ }}", "{{ ( }}"]
)
def test_an_invalid_template_is_an_error(source: str) -> None:
    with pytest.raises(ModelError, match="chat template: "):
        ChatTemplate(source)


@given(st.text(alphabet="{}%#()[]'\"|.~*+- \nabifor01", max_size=40))
def test_any_source_compiles_or_raises_modelerror(source: str) -> None:
    try:
        ChatTemplate(source, limits=Limits(steps=1000)).render(TALK)
    except ModelError:
        return


# --- What is stopped while it runs ------------------------------------------------------------------------------------

DOUBLING = "{% set ns = namespace(x=SEED) %}{% for i in range(90) %}STEP{% endfor %}{{ ns.x | length }}"
RUNAWAYS = [
    "{% for i in range(10**9) %}x{% endfor %}",
    "{{ range(10**9) | list | length }}",
    "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "{% for i in range(99999) %}{% for j in range(99999) if j < 0 %}{% endfor %}{% endfor %}",
    "{% for i in range(99999) %}{{ range(99999) | map('string') | list | length }}{% endfor %}",
    "{% for i in range(99999) %}{{ range(99999) | sum }}{% endfor %}",
    "{% for a in [1] recursive %}{{ loop([1, 1]) }}{% endfor %}",
    "{% for a in range(30) recursive %}{% if loop.depth < 9 %}{{ loop(range(30)) }}{% endif %}{% endfor %}",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    "{% block a %}{{ self.a() }}{% endblock %}",
    "{{ 'a' * 10**9 }}",
    "{{ 10**9 * 'a' }}",
    "{{ [1] * 10**9 }}",
    "{{ (1, 2) * 10**9 }}",
    "{{ ['a' * 1000000] * 1000 }}",
    "{{ 9**9**9**9 }}",
    "{{ 2**100000 }}",
    "{{ 'a' | center(1000000000) }}",
    "{{ 'a'.center(1000000000) }}",
    "{{ 'a'.ljust(1000000000) }}",
    "{{ 'a'.rjust(10**9) }}",
    "{{ 'a'.zfill(10**9) }}",
    "{{ '%1000000000d' % 1 }}",
    "{{ '%*d' % (1000000000, 1) }}",
    "{{ '%.1000000000f' % 1 }}",
    "{{ '%1000000000d' | format(1) }}",
    "{{ '{:1000000000}'.format(1) }}",
    "{{ '{:{}}'.format(1, 1000000000) }}",
    "{{ '\t'.expandtabs(1000000000) }}",
    "{{ 'a' | indent(1000000000, true) }}",
    "{{ ('\n' * 100000) | indent('x' * 10000, true) }}",
    "{{ ('a' * 1000000).replace('a', 'b' * 1000) }}",
    "{{ ('a' * 1000000) | replace('a', 'b' * 1000) }}",
    "{{ ('a' * 1000000).replace('', 'b' * 1000) }}",
    "{{ ('b' * 100000).join(['x'] * 100000) }}",
    "{{ (['x'] * 100000) | join('b' * 100000) }}",
    "{{ range(99999) | join('b' * 100000) }}",
    "{{ ([[1]] * 90000) | sum(start=[]) }}",
    "{{ [1] | batch(1000000000, 0) | list }}",
    "{{ [1] | slice(1000000000) | list }}",
    "{{ 1.5 | round(1000000000) }}",
    "{{ messages | tojson(indent=1000000000) }}",
    "{{ messages | tojson(indent='x' * 1000000) }}",
    "{{ range(9999) | list | tojson(separators=('x' * 100000, ':')) }}",
    "{{ strftime_now('%1000000000Y') }}",
    "{{ lipsum(n=1000000) }}",
    "{{ (5).to_bytes(1000000000, 'big') }}",
    "{{ (5).__mul__(1) }}",
    "{{ 'a'.__mul__(1000000000) }}",
    "{{ 'ab'.translate({97: 'x' * 1000000}) }}",
    DOUBLING.replace("SEED", "'ab'").replace("STEP", "{% set ns.x = ns.x ~ ns.x %}"),
    DOUBLING.replace("SEED", "'ab'").replace("STEP", "{% set ns.x = ns.x + ns.x %}"),
    DOUBLING.replace("SEED", "'ab'").replace("STEP", "{% set ns.x %}{{ ns.x }}{{ ns.x }}{% endset %}"),
    DOUBLING.replace("SEED", "'ab'").replace("STEP", "{% set ns.x = ns.x.replace('a', 'aab') %}"),
    DOUBLING.replace("SEED", "'ab'").replace("STEP", "{% set ns.x = '%s%s' % (ns.x, ns.x) %}"),
    DOUBLING.replace("SEED", "'ab'").replace("STEP", "{% set ns.x = '{0}{0}'.format(ns.x) %}"),
    DOUBLING.replace("SEED", "'ab'").replace("STEP", "{% set ns.x = [ns.x, ns.x] | join %}"),
    DOUBLING.replace("SEED", "'\\\\'").replace("STEP", "{% set ns.x = [ns.x] | string %}"),
    DOUBLING.replace("SEED", "[1]").replace("STEP", "{% set ns.x = ns.x + ns.x %}"),
    DOUBLING.replace("SEED", "[1]").replace("STEP", "{% set ns.x = [ns.x, ns.x] %}"),
    DOUBLING.replace("SEED", "[1]").replace("STEP", "{% set ns.x = (ns.x, ns.x) %}"),
    DOUBLING.replace("SEED", "[1]").replace("STEP", "{% set ns.x = {'a': ns.x, 'b': ns.x} %}"),
    DOUBLING.replace("SEED", "[1]").replace("STEP", "{% set ns.x = dict(a=ns.x, b=ns.x) %}"),
    DOUBLING.replace("SEED", "3").replace("STEP", "{% set ns.x = ns.x * ns.x %}"),
    "{% set a = namespace() %}{% set a.b = [a, a] %}",
    "{% set a = namespace() %}{% set b = namespace(a=a, c=a) %}",
    "{% set x = 'a' * 8000000 %}" + "".join(f"{{% set x{i} = x ~ {i} %}}" for i in range(2000)),
]


@pytest.mark.parametrize("source", RUNAWAYS, ids=lambda source: source[:60])
def test_a_template_that_exceeds_its_limits_is_an_error(source: str) -> None:
    template = ChatTemplate(source, limits=Limits(steps=200_000))  # Fewer than by default, to keep the test fast.
    with pytest.raises(ModelError):
        template.render(TALK)


def test_the_default_limits_stop_endless_loops() -> None:
    with pytest.raises(ModelError, match="it ran for more than 1000000 steps"):
        render("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}")


ESCAPES = [
    "{{ ''.__class__ }}",
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ '' | attr('__class__') }}",
    "{{ ['']|map('attr', '__class__')|list }}",
    "{{ ['']|map(attribute='__class__')|list }}",
    "{{ ''['__class__'] }}",
    "{{ '{0.__class__}'.format('') }}",
    "{{ '{x.__class__}'.format_map({'x': ''}) }}",
    "{{ ('{0.__class__}' | safe).format('') }}",
    "{{ raise_exception.__globals__ }}",
    "{{ strftime_now.__globals__ }}",
    "{{ range.__globals__ }}",
    "{{ cycler.__init__.__globals__ }}",
    "{{ namespace.__init__ }}",
    "{{ self.__init__ }}",
    "{{ self._TemplateReference__context }}",
    "{% macro m() %}{% endmacro %}{{ m._func }}",
    "{{ messages.__class__ }}",
    "{{ messages[0].__class__ }}",
    "{% for m in messages %}{{ loop.__class__ }}{% endfor %}",
    "{{ (messages | map('upper')).gi_frame }}",
    "{% include 'x' %}",
    "{% import 'x' as x %}",
    "{% extends 'x' %}",
]


@pytest.mark.parametrize("source", ESCAPES)
def test_a_template_that_accesses_python_internals_is_an_error(source: str) -> None:
    with pytest.raises(ModelError):
        render(source)


@pytest.mark.parametrize("name", ["guard: output", "guard: made", "guard: loop", "guard: join"])
def test_no_template_can_name_a_guard(name: str) -> None:
    for source in (f"{{{{ 1 | {name} }}}}", f"{{{{ 1 | '{name}' }}}}", f"{{% filter {name} %}}{{% endfilter %}}"):
        with pytest.raises(ModelError):
            render(source)


def test_the_error_names_the_template() -> None:
    with pytest.raises(ModelError, match=r"^model\.gguf: chat template 'default' fails: .*division by zero"):
        ChatTemplate("{{ 1 / 0 }}", "model.gguf: chat template 'default'").render([])
    with pytest.raises(ModelError, match=r"^chat template: line 2: "):
        ChatTemplate("\n{% if %}")


def test_limits_are_counted_in_steps() -> None:
    source = "{% for i in range(1000) %}{% endfor %}"
    assert ChatTemplate(source, limits=Limits(steps=1100)).render([]) == ""
    with pytest.raises(ModelError, match="it ran for more than 900 steps"):
        ChatTemplate(source, limits=Limits(steps=900)).render([])
    with pytest.raises(ModelError, match="it wrote more than 10 characters"):
        ChatTemplate("{% for i in range(6) %}ab{% endfor %}", limits=Limits(text=10)).render([])
    with pytest.raises(ModelError, match="expected at most 5"):
        ChatTemplate("123456", limits=Limits(source=5))
    with pytest.raises(ModelError, match="it ran for more than 0 seconds"):
        ChatTemplate("{% for i in range(5000) %}{{ i }}{% endfor %}", limits=Limits(seconds=0)).render([])
