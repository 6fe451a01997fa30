"""Chat templates against transformers' own rendering, and what a stranger's template must not do."""

import gc
import os
import sys

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from ggpy.errors import TokenizerError
from ggpy.generate import templates
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
        "{% set f = '{0.__class__.__mro__}'.format %}{{ f(messages) }}",  # CVE-2024-56326
    ],
)
def test_a_template_stays_in_the_sandbox(source):
    with pytest.raises(TokenizerError, match="unsafe"):
        ChatTemplate(source).render(MESSAGES)
    assert MESSAGES[0] == {"role": "system", "content": "Be brief."}


@pytest.mark.parametrize(
    "source",
    [
        "{{ ('{0.__class__}' | attr('format'))(messages) }}",  # CVE-2025-27516
        "{{ (['{0.__class__}'.format] | first)(messages) }}",
        "{{ '' | attr('__class__') }}{{ self._TemplateReference__context }}{{ strftime_now.__globals__ }}",
    ],
)
def test_ways_around_the_sandbox_find_nothing(source):
    assert ChatTemplate(source).render(MESSAGES) == ""


def test_what_the_sandbox_hides_is_empty():
    assert ChatTemplate("{{ ''.__class__ }}{{ '{0.__class__}'.format('') }}").render([]) == ""


NEST = "{% set n = namespace(a=[1]) %}{% for i in range(60) %}{% set n.a = [n.a, n.a] %}{% endfor %}"
TUPLES = NEST.replace("[n.a, n.a]", "(n.a, n.a)").replace("[1]", "(1,)")
TWINS = NEST + NEST.replace("n.", "m.").replace("n =", "m =")
LONG = "{% set a = 'a' * 1000000 %}"

#: what would take hours or all memory
BOMBS = [
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
    "{{ '%10000000000d' is odd }}",
    "{{ ['a'] | map('center', 10000000000) | list }}",
    "{{ 'a'.translate({97: 'a' * 1000000}) * 9 }}",
    "{{ 1.5 | round(-10 ** 9) }}",
    "{{ [1] | slice(10 ** 8) | list }}",
    "{{ [1] | batch(10 ** 8, 0) | list }}",
    "{{ [[1]] | tojson(indent=10 ** 9) }}",
    "{{ range(100000) | list | tojson(separators=('a' * 100000, ':')) }}",
    "{{ ('a ' * 100000) | wordwrap(1, wrapstring='a' * 100000) }}",
    "{{ ('a\n' * 100000) | indent('a' * 100000) }}",
    "{{ ('\t' * 100000).expandtabs(100000) }}",
    "{{ 'a'.zfill(10000000000) }}",
    LONG + "{{ a.replace('a', a) }}",
    LONG + "{{ a | replace('a', a) | length }}",
    LONG + "{{ a.join(a) }}",
    LONG + "{{ a | join(a) }}",
    LONG + "{{ a | map('replace', 'a', a) | list }}",
    LONG + "{{ ('{}' * 100000).format(*([a] * 100000)) | length }}",
    LONG + "{% set b %}{% for i in range(1000) %}{{ a }}{% endfor %}{% endset %}",
    LONG + "{% macro f(n) %}{% set b = a ~ n %}{{ f(n + 1) }}{{ b }}{% endmacro %}{{ f(0) }}",
    LONG
    + "{% set n = namespace() %}{% for i in range(99999) %}{% set n = namespace(b=n, a=a[1:] ~ i) %}{{ n }}{% endfor %}",
    "{% for i in range(100000) %}" + "0123456789" * 20 + "{% endfor %}",
    "{% for i in range(100000) %}{% for j in range(100000) %}{% endfor %}{% endfor %}",
    "{% set r = range(100000) | list %}{% for i in r %}{% for j in r if j %}{% endfor %}{% endfor %}",
    "{% for i in [[1] * 1000] * 1000 recursive %}{{ loop(i) if i is iterable else loop([[1] * 1000] * 1000) }}{% endfor %}",
    "{% set n = namespace(a='ab') %}{% for i in range(60) %}{% set n.a = n.a ~ n.a %}{% endfor %}",
    "{% set n = namespace(a='ab') %}{% for i in range(60) %}{% set n.a = n.a + n.a %}{% endfor %}",
    NEST + "{{ n.a }}",
    NEST + "{{ n.a | string }}",
    NEST + "{{ n.a | tojson }}",
    TWINS + "{{ n.a == m.a }}",
    NEST + "{{ [n.a] | unique | list }}{{ n.a | pprint }}{{ n.a | urlize }}",
    TWINS + "{{ n.a in [m.a] }}",
    NEST + "{{ n }}",
    NEST.replace("[n.a, n.a]", "{1: n.a, 2: n.a}") + "{{ n.a | tojson }}",
    NEST.replace("[n.a, n.a]", "dict(a=n.a, b=n.a)") + "{{ n.a ~ 1 }}",
    TUPLES + "{{ {n.a: 1} }}",
    TUPLES + "{{ {}[n.a] }}",
    TUPLES + "{{ n.a < (n.a[0], n.a[1] + (1,)) }}",
    TUPLES + "{{ '%s' % n.a[0] }}",
    "{% macro f(n) %}{{ f(n) }}{{ f(n) }}{% endmacro %}{{ f(0) }}",
    "{% macro f() %}{{ varargs if varargs | length > 1e9 else f(varargs, varargs) }}{% endmacro %}{{ f(1, 2) }}",
    "{{ range(1000000000) | list }}",
    "{{ lipsum(n=100000) }}",
]


@pytest.mark.parametrize("source", BOMBS)
def test_the_counted_way_gives_in_before_a_template_grows(source):
    with pytest.raises(Exception, match=r"^$|recursion|lipsum|too big") as caught:
        templates.render_counted(templates.compile_template(source, counted=True), {"messages": MESSAGES})
    assert not isinstance(caught.value, MemoryError)


@pytest.mark.skipif(sys.platform != "linux", reason="limits as Linux has them")
@pytest.mark.parametrize(
    "source",
    [
        "{{ 'a' * 10000000000 }}",
        "{{ [1] | batch(10 ** 8, 0) | list }}",
        TWINS + "{{ n.a == m.a }}",
        "{{ 'a' * 3000000 }}",
        "{% for i in range(100000) %}{% for j in range(100000) %}{% endfor %}{% endfor %}",
    ],
)
def test_a_process_with_limits_ends_what_grows(source, monkeypatch):
    monkeypatch.setattr(templates, "MOST_SECONDS", 0)
    monkeypatch.setattr(templates, "MOST_MEMORY", 200 << 20)
    monkeypatch.setattr(templates, "MOST_TEXT", 2_000_000)
    template = ChatTemplate(source + "{{ messages | length }}")
    for _ in range(2):
        with pytest.raises(TokenizerError, match=r"takes more than|takes too much"):
            template.render(MESSAGES)


WITH_PROCESS = "{{ '%s' % messages[0].content }}"  # harmless, but formats may grow


def test_a_process_renders_as_we_do_and_stays():
    template = ChatTemplate(WITH_PROCESS + TEMPLATES["macros"], "<s>", "</s>")
    expected, _ = render_jinja_template(
        [MESSAGES], tools=TOOLS, chat_template=template.source, bos_token="<s>", eos_token="</s>"
    )
    assert template.render(MESSAGES, False, TOOLS) == expected[0]
    process = template._process._running
    assert template.render(MESSAGES, False, TOOLS) == expected[0]
    assert template._process._running is process
    del template
    gc.collect()
    assert process.returncode is not None


def test_a_process_says_what_fails_and_goes_on():
    template = ChatTemplate(WITH_PROCESS + "\n{{ messages[0].x.y }}\n{{ raise_exception('no\nmore') }}")
    with pytest.raises(TokenizerError, match=r"^the chat template failed \(line 2\): .*no attribute 'x'$"):
        template.render(MESSAGES)
    with pytest.raises(TokenizerError, match=r"\(line 3\): no more$"):
        template.render([{"content": "", "x": {"y": 1}}])
    with pytest.raises(TokenizerError, match="plain values only"):
        template.render(MESSAGES, tools=[lambda: None])


def test_a_process_is_started_again_after_its_end():
    template = ChatTemplate(WITH_PROCESS)
    assert template.render(MESSAGES) == "Be brief."
    template._process._running.kill()
    template._process._running.wait()
    with pytest.raises(TokenizerError, match="takes more than"):
        template.render(MESSAGES)
    assert template.render(MESSAGES) == "Be brief."


def test_a_python_that_prints_at_its_start_renders(tmp_path, monkeypatch):
    (tmp_path / "sitecustomize.py").write_text("print('hello', end='')")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")]))
    assert ChatTemplate(WITH_PROCESS).render(MESSAGES) == "Be brief."


def test_a_long_template_has_a_process(monkeypatch):
    monkeypatch.setattr(templates, "_SOURCE", 10)
    assert ChatTemplate("{{ messages[0].content }}").render(MESSAGES) == "Be brief."
    with pytest.raises(TokenizerError, match=r"can't be read \(line 2\)"):
        ChatTemplate("{{ messages }}\n{% if %}").render(MESSAGES)


#: what templates of models that think do with contents
PARTS = """{% set ns = namespace(last=0, system='') %}
{% for m in messages[::-1] %}
{% if not (m.content.startswith('<a>') and m.content.endswith('</a>')) %}{% set ns.last = loop.index0 %}{% endif %}
{% endfor %}
{% for m in messages %}
{% set ns.system = ns.system + m.content %}
{% if 'word' in m.content %}{{ m.content.split('wor')[-1].lstrip('\n') }}{{ m.content[3:] | upper | length }}{% endif %}
{{ m.content | tojson }}
{% endfor %}{{ ns.last ~ ns.system }}"""


@pytest.mark.parametrize("copies", [1, 20])
def test_long_conversations_are_no_attack(copies):
    """The last template's replacing took 15,900 characters for too many; of 20 copies, all is done by the process."""
    messages = [{"role": "user", "content": "word " * 20_000}] * copies
    loop = "{% for m in messages %}{% set c = m.content %}{{ c.replace('word', 'more').split('x')[-1] | trim }}{% endfor %}"
    for source in (smollm2_metadata()["tokenizer.chat_template"], loop, PARTS):
        expected, _ = render_jinja_template([messages], chat_template=source, add_generation_prompt=True)
        assert ChatTemplate(source).render(messages) == expected[0]


@pytest.mark.parametrize("given", ["reasoning_content", "thinking", "reasoning"])
@pytest.mark.parametrize("read", ["reasoning_content", "thinking", "reasoning"])
def test_what_a_model_thought_is_found_by_any_name(given, read):
    messages = [
        {"role": "assistant", "content": "Yes.", given: "Why not?"},
        {"role": "assistant", "content": "", given: None},
    ]
    source = f"{{% for m in messages %}}[{{{{ m.{read} or 'none' }}}}]{{% endfor %}}"
    assert ChatTemplate(source).render(messages) == "[Why not?][none]"
    if read != "reasoning":  # to which transformers copies nothing
        assert render_jinja_template([messages], chat_template=source)[0] == ["[Why not?][none]"]


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


def test_a_template_for_tools_is_used_where_there_are_tools():
    template = ChatTemplate("plain", tool_use="{{ tools[0].name }}{{ bos_token }}", bos="<s>")
    assert template.render([]) == "plain"
    assert template.render([], tools=[{"name": "search"}]) == "search<s>"


def test_other_special_tokens_are_known_where_there_are_any():
    source = "{{ pad_token }}|{{ unk_token }}"
    assert ChatTemplate(source, more={"pad_token": "<pad>"}).render([]) == "<pad>|"
