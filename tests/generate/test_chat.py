"""Chat templates against transformers' own rendering, and what a stranger's template must not do."""

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from ggpy.errors import TokenizerError
from ggpy.generate import chat
from ggpy.generate.chat import ChatTemplate
from ggpy.generate.tokenizer import Tokenizer

from .test_tokenizer import smollm2_metadata

MESSAGES = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Grüße, <b>\"you\"</b> & 'me'\n\n{{ no.template }}"},
    {
        "role": "assistant",
        "content": "  Hi 🙂 ",
        "tool_calls": [{"name": "add", "arguments": {"a": 1, "é": [None, True, 1.5]}}],
    },
    {"role": "user", "content": ""},
]
TOOLS = [
    {
        "type": "function",
        "function": {"name": "add", "parameters": {"type": "object", "properties": {"a": {"type": "int"}}}},
    }
]

TEMPLATES = {
    "turns": """{{ bos_token }}{% for message in messages %}
    {%- if message['role'] == 'assistant' %}
        {{- '<|assistant|>\\n' + message.content|trim + eos_token }}
    {%- else %}
{{ '<|' ~ message.role ~ '|>' }}
{{ message['content'] }}
    {%- endif %}
{% if loop.last and add_generation_prompt %}<|assistant|>{% endif %}
{% endfor %}
""",
    "tools": """{%- if tools %}
    {{- '<tools>' }}
    {%- for tool in tools %}
        {{- '\\n' }}{{- tool | tojson }}{{ tool.function | tojson(indent=2) }}
    {%- endfor %}
    {{- '</tools>' }}
{%- endif %}
{%- for message in messages %}
    {%- if message.tool_calls is defined %}
        {%- for call in message.tool_calls %}
            {{- call.name + '(' }}
            {%- for name, value in call.arguments.items() %}{{ name }}={{ value|tojson }}
                {{- ', ' if not loop.last }}{% endfor %})
        {%- endfor %}
    {%- endif %}
{%- endfor %}""",
    "namespace": """{%- set ns = namespace(system='', index=0, found=false) %}
{%- for message in messages %}
    {%- if message.role == 'system' %}{% set ns.system = ns.system ~ message.content %}{% continue %}{% endif %}
    {%- set ns.index = ns.index + 1 %}
    {%- if not ns.found and loop.index0 > 2 %}{% set ns.found = true %}{% break %}{% endif %}
[{{ ns.index }}/{{ loop.length }}/{{ loop.revindex }} {{ loop.previtem.role }}>{{ loop.cycle('a', 'b') }}]
{%- else %}none
{%- endfor %}
{{- ns.system ~ 1 ~ 2.5 ~ none }} {{ '%s-%d' % (ns.system, ns.index) }} {{ ns.system * 2 }} {{ 7 % 4 + 2 ** 3 * 2 }}""",
    "macros": """{%- macro turn(role, text) %}<{{ role }}>{{ text }}{{ caller() if caller }}</{{ role }}>{% endmacro %}
{%- for message in messages recursive %}{{ turn(message.role, message.content|replace('\\n', ' ')) }}{% endfor %}
{%- call turn('x', 'y') %}inner{% endcall %}
{% set block %}  a {{ messages|length }}  {% endset %}{{ block.strip().upper() }}
{{ messages | selectattr('role', 'equalto', 'user') | map(attribute='content') | join('|') }}
{{ messages[1:] | map(attribute='role') | list }} {{ messages[0].content.split(' ')[-1].replace('f', 'F') }}
{{ dict(a=1, b=[2]).items() | list }} {{ range(3) | list }} {{ (messages|last).missing is defined }}
{% filter upper %}abc{% endfilter %}{% generation %}said {{ eos_token }}{% endgeneration %}""",
    "smollm2": None,
}


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("prompt", [True, False])
@pytest.mark.parametrize("tools", [None, TOOLS])
def test_text_equals_transformers(name, prompt, tools):
    source = TEMPLATES[name] or smollm2_metadata()["tokenizer.chat_template"]
    expected, _ = render_jinja_template(
        [MESSAGES], tools=tools, chat_template=source, add_generation_prompt=prompt, bos_token="<s>", eos_token="</s>"
    )
    assert ChatTemplate(source, "<s>", "</s>").render(MESSAGES, prompt, tools) == expected[0]


def test_further_names_reach_the_template():
    assert ChatTemplate("{{ enable_thinking }}{{ strftime_now('%%') }}").render([], enable_thinking=False) == "False%"


def test_a_template_renders_again_with_a_fresh_budget(monkeypatch):
    monkeypatch.setattr(chat, "MAX_TEXT", 10)
    template = ChatTemplate("{{ messages[0].content }}")
    for _ in range(3):
        assert template.render([{"role": "user", "content": "12345678"}]) == "12345678"


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("a\n{{ raise_exception('roles must\nalternate') }}", r"line 2\): roles must alternate"),
        ("a\n\n{{ messages[0].role.missing.deeper }}", r"line 3\): .*has no attribute 'missing'"),
        ("{{ 1 // 0 }}", "division"),
        ("{{ messages | nothing }}", "can't be read.*nothing"),
        ("a\n{% if %}", r"can't be read \(line 2\)"),
        ("{% include 'file' %}", "no loader"),
    ],
)
def test_failures_are_one_line_that_says_where(source, message):
    with pytest.raises(TokenizerError, match=message) as caught:
        ChatTemplate(source).render(MESSAGES)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.append(1) }}",
        "{{ messages[0].update(role='x') }}",
        "{{ raise_exception.__globals__.x }}",
        "{{ messages[0]['role'].__class__.x }}",
        "{{ cycler.__init__.__globals__ }}",
        "{{ (messages | map(attribute='__class__') | first).__mro__ }}",
    ],
)
def test_a_template_stays_in_the_sandbox(source):
    with pytest.raises(TokenizerError, match="unsafe"):
        ChatTemplate(source).render(MESSAGES)
    assert MESSAGES[0] == {"role": "system", "content": "Be brief."}


def test_what_the_sandbox_hides_is_empty():
    assert ChatTemplate("{{ ''.__class__ }}{{ '{0.__class__}'.format('') }}").render([]) == ""


@pytest.mark.parametrize(
    "source",
    [
        "{{ 'a' * 10000000000 }}",
        "{{ 10000000000 * 'a' }}",
        "{{ [1] * 10000000000 }}",
        "{{ 10 ** 10000000 }}",
        "{{ 'a' | center(10000000000) }}",
        "{{ 'a'.center(10000000000) }}",
        "{{ 'a'.ljust(width=10000000000) }}",
        "{{ '%10000000000d' % 1 }}",
        "{{ '%*d' % (10000000000, 1) }}",
        "{{ '{:10000000000}'.format(1) }}",
        "{{ '{:{}}'.format('a', 10000000000) }}",
        "{{ '%10000000000d' | format(1) }}",
        "{% set a = 'a' * 1000000 %}{{ a.replace('a', a) }}",
        "{% set a = 'a' * 1000000 %}{{ a | replace('a', a) | length }}",
        "{% set a = 'a' * 1000000 %}{{ a.join(a) }}",
        "{% set a = 'a' * 1000000 %}{% set b %}{% for i in range(1000) %}{{ a }}{% endfor %}{% endset %}",
        "{% for i in range(100000) %}" + "0123456789" * 20 + "{% endfor %}",
        "{% for i in range(100000) %}{% for j in range(100000) %}{% endfor %}{% endfor %}",
        "{% set r = range(100000) | list %}{% for i in r %}{% for j in r if j %}{% endfor %}{% endfor %}",
        "{% set n = namespace(a='ab') %}{% for i in range(60) %}{% set n.a = n.a ~ n.a %}{% endfor %}",
        "{% set n = namespace(a='ab') %}{% for i in range(60) %}{% set n.a = n.a + n.a %}{% endfor %}",
        "{% set n = namespace(a=[1]) %}{% for i in range(60) %}{% set n.a = [n.a, n.a] %}{% endfor %}{{ n.a }}",
        "{% set n = namespace(a=1) %}{% for i in range(60) %}{% set n.a = {1: n.a, 2: n.a} %}{% endfor %}{{ n.a|tojson }}",
        "{% set n = namespace(a=[1]) %}{% for i in range(60) %}{% set n.a = [n.a, n.a] %}{% endfor %}{{ n.a|string }}",
        "{% macro f(n) %}{{ f(n) }}{{ f(n) }}{% endmacro %}{{ f(0) }}",
        "{{ range(1000000000) | list }}",
        "{{ lipsum(n=100000) }}",
    ],
)
def test_a_template_that_grows_without_end_is_refused(source, monkeypatch):
    # Smaller limits than usual: the same checks, sooner.
    monkeypatch.setattr(chat, "MAX_TEXT", 2_000_000)
    monkeypatch.setattr(chat, "MAX_TURNS", 100_000)
    reasons = r"makes more than|take more than|too large|Range too big|recursion|lipsum"
    with pytest.raises(TokenizerError, match=reasons):
        ChatTemplate(source).render(MESSAGES)


def test_a_template_that_takes_too_long_is_refused(monkeypatch):
    monkeypatch.setattr(chat, "MAX_SECONDS", 0.0)
    with pytest.raises(TokenizerError, match="more than 0 s"):
        ChatTemplate("{% for message in messages %}{% endfor %}").render(MESSAGES)


def test_long_conversations_are_no_attack():
    messages = [{"role": "user", "content": "word " * 20_000}] * 20
    source = smollm2_metadata()["tokenizer.chat_template"]
    assert len(ChatTemplate(source).render(messages)) > 2_000_000
    cut = ChatTemplate(
        "{% for m in messages %}{{ m.content.replace('word', '').split('</think>')[-1] | trim }}{% endfor %}"
    )
    assert cut.render(messages) == ""


@pytest.mark.parametrize("add_eos", [False, True])
@pytest.mark.parametrize("add_bos", [False, True])
@pytest.mark.parametrize("template_has_bos", [False, True])
def test_a_conversation_has_one_bos_token_and_no_eos_token_behind_it(template_has_bos, add_bos, add_eos):
    flags = {"tokenizer.ggml.add_bos_token": add_bos, "tokenizer.ggml.add_eos_token": add_eos}
    tokenizer = Tokenizer.from_metadata({**smollm2_metadata(), **flags})
    bos, eos = (tokenizer.token_bytes(i).decode() for i in (tokenizer.bos, tokenizer.eos))
    source = ("{{ bos_token }}" if template_has_bos else "") + "{% for m in messages %}{{ m.content }}{% endfor %}"
    ids = ChatTemplate(source, bos, eos).encode(tokenizer, [{"role": "user", "content": "hello"}])
    hello = tokenizer.encode("hello", bos=False)
    assert ids == ([tokenizer.bos] if add_bos or template_has_bos else []) + hello
