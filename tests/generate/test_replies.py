import json
import re
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ggpy.generate.calls import dumps, growing_json
from ggpy.generate.replies import FAMILIES, Event, ReplyParser, family_of, parse_reply

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "add",
            "parameters": {
                "type": "object",
                "properties": {
                    "a": {"type": "integer"},
                    "b": {"$ref": "#/$defs/amount"},
                    "note": {"type": "string"},
                    "exact": {"type": ["boolean", "null"]},
                },
                "$defs": {"amount": {"anyOf": [{"type": "number"}, {"type": "null"}]}},
            },
        },
    }
]


def parts(events):
    texts = ["".join(e.text for e in events if e.kind == kind) for kind in ("content", "reasoning")]
    return (*texts, [(e.name, json.loads(e.text)) for e in events if e.kind == "call"])


def streamed(chunks, family, tools=TOOLS, prompt="", growing=False):
    parser = ReplyParser(FAMILIES[family], tools, prompt, growing)
    return [event for chunk in chunks for event in parser.push(chunk)] + parser.flush()


def grown(events):
    """Events in which each call is one, and the arguments of calls that never became whole."""
    made, broken = [], []
    for event in events:
        if event.kind == "arguments":
            at = max(i for i, e in enumerate(made) if e.kind == "call")
            made[at] = made[at]._replace(text=made[at].text + event.text)
        else:
            made.append(event)
    for event in [e for e in made if e.kind == "call"]:
        try:
            json.loads(event.text)
        except ValueError:
            broken.append(event.text)
            made.remove(event)
    return made, broken


@pytest.mark.parametrize(
    ("family", "call"),
    [
        ("hermes", '<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>'),
        ("qwen_xml", "<tool_call>\n<function=add>\n<parameter=a>\n1\n</parameter>\n</function>\n</tool_call>"),
        ("glm", "<tool_call>add\n<arg_key>a</arg_key>\n<arg_value>1</arg_value>\n</tool_call>"),
        ("lfm2", "<|tool_call_start|>[add(a=1)]<|tool_call_end|>"),
        ("hunyuan", '<tool_calls>[{"name": "add", "arguments": {"a": 1}}]</tool_calls>'),
        (
            "minimax",
            '<minimax:tool_call>\n<invoke name="add">\n<parameter name="a">1</parameter>\n</invoke>\n</minimax:tool_call>',
        ),
        ("gemma4", "<|tool_call>call:add{a:1}<tool_call|>"),
        ("mistral", '[TOOL_CALLS]add[ARGS]{"a": 1}'),
        ("mistral", '[TOOL_CALLS] [{"name": "add", "arguments": {"a": 1}}]'),
        ("llama", '{"name": "add", "parameters": {"a": 1}}'),
        ("llama", "[add(a=1)]"),
        (
            "deepseek",
            '<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>add<｜tool▁sep｜>{"a": 1}<｜tool▁call▁end｜><｜tool▁calls▁end｜>',
        ),
    ],
)
def test_a_call_is_read_and_one_that_is_cut_off_is_text(family, call):
    assert parts(streamed(call, family)) == ("", "", [("add", {"a": 1})])
    # Without tools on offer, nothing is a call.
    assert parts(parse_reply(call, FAMILIES[family], None))[2] == []
    cut = call[: call.index("1")]
    content, _, calls = parts(parse_reply(cut, FAMILIES[family], TOOLS))
    assert calls == [] and ("add" in content)


def test_a_broken_call_is_text_and_the_next_one_counts():
    good = '<tool_call>{"name": "add", "arguments": {}}</tool_call>'
    text = "<tool_call>{add}</tool_call> or " + good
    assert parts(streamed(text, "hermes")) == ("<tool_call>{add}</tool_call> or", "", [("add", {})])
    # Its end is missing: only the end of the text tells.
    text = '<tool_call>{"name": "add", "arguments": {"a": 1}</tool_call>' + good
    content, _, calls = parts(streamed(text, "hermes"))
    assert content == text[: -len(good)] and calls == [("add", {})]


def test_numbers_that_json_lacks_make_no_call():
    for value in ("NaN", "1e999", "-Infinity"):
        text = f'<tool_call>{{"name": "add", "arguments": {{"b": {value}}}}}</tool_call>'
        assert parts(streamed([text], "hermes")) == (text, "", [])


@pytest.mark.parametrize(
    ("key", "written", "value"),
    [
        ("a", "3", 3),
        ("a", "3.0", 3),
        ("a", "three", "three"),
        ("b", "2.5", 2.5),
        ("b", "null", None),
        ("note", "3", "3"),
        ("note", " {x} ", " {x} "),
        ("exact", "True", True),
        ("exact", "None", "None"),
        ("other", "[1, 2]", [1, 2]),
        ("other", "007", "007"),
    ],
)
def test_bare_arguments_are_what_the_schema_says(key, written, value):
    call = f"<tool_call>add<arg_key>{key}</arg_key><arg_value>{written}</arg_value></tool_call>"
    ((_, arguments),) = parts(streamed([call], "glm"))[2]
    assert arguments == {key: value} and type(arguments[key]) is type(value)


@pytest.mark.parametrize("text", ['{"name": "subtract", "parameters": {}}', "[1, 2]", '{"a": 1} is a dict', "[add(1)]"])
def test_what_only_looks_like_a_bare_call_is_text(text):
    assert parts(streamed(text, "llama")) == (text, "", [])


@pytest.mark.parametrize(
    ("template", "family"),
    [
        ("{{'<tool_call>'}}<arg_key>", "glm"),
        ("<tool_call><function=", "qwen_xml"),
        ("<tool_calls>[", "hunyuan"),
        ('<minimax:tool_call><invoke name="f"><parameter name="x">', "minimax"),
        ("<think><tool_call>", "hermes"),
        ("<|tool_call_start|>x<|tool_call_end|>", "lfm2"),
        ("<|start|>assistant<|channel|>final", "harmony"),
        ("<|im_start|>", "plain"),
    ],
)
def test_the_template_shows_the_family(template, family):
    assert family_of(template) is FAMILIES[family]


_MARKS = sorted({mark for family in FAMILIES.values() for mark in family.marks})
_BITS = ["{", "}", '"', "name", "add", ":", "<|message|>", "\n", " ", "[", "]", "(", ")", "</function>", "call:"]


@given(st.sampled_from(sorted(FAMILIES)), st.lists(st.sampled_from(_MARKS + _BITS), max_size=8), st.data())
def test_any_text_is_parsed_the_same_however_it_is_cut(family, bits, data):
    text = "".join(bits)
    cuts = sorted(data.draw(st.sets(st.integers(0, len(text)))))
    chunks = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    assert parts(streamed(chunks, family)) == parts(streamed([text], family))
    assert parts(grown(streamed(chunks, family, growing=True))[0]) == parts(streamed([text], family))


_SCALARS = (
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=6)
)
_VALUES = st.recursive(_SCALARS, lambda x: st.lists(x, max_size=3) | st.dictionaries(st.text(max_size=2), x, max_size=2))


@settings(deadline=None, max_examples=60)
@given(st.dictionaries(st.text(max_size=4), _VALUES, max_size=3), st.booleans(), st.sampled_from([None, 1]))
def test_arguments_grow_to_what_they_are_in_the_end(value, escaped, indent):
    text = json.dumps(value, ensure_ascii=escaped, indent=indent)
    whole, before = dumps(value), ""
    for n in range(1, len(text)):
        now = growing_json(text[:n], "f", 0).arguments()
        assert now.startswith(before) and whole.startswith(now) and now != whole
        before = now


@pytest.mark.parametrize(
    ("family", "call"),
    [
        ("hermes", '<tool_call>\n{"name": "add", "arguments": {"a": 1, "note": "say \\"}\\" here"}}\n</tool_call>'),
        ("mistral", '[TOOL_CALLS]add[ARGS]{"a": 1, "note": "say \\"}\\" here"}'),
        ("llama", '{"name": "add", "parameters": {"a": 1, "note": "say \\"}\\" here"}}'),
        ("harmony", '<|channel|>commentary to=functions.add<|message|>{"a": 1, "note": "say \\"}\\" here"}<|call|>'),
        (
            "qwen_xml",
            "<tool_call><function=add><parameter=a>1</parameter>"
            '<parameter=note>say "}" here</parameter></function></tool_call>',
        ),
        ("gemma4", '<|tool_call>call:add{a:1,note:<|"|>say "}" here<|"|>}<tool_call|>'),
    ],
)
def test_a_call_is_given_as_it_grows(family, call):
    events = streamed(call, family, growing=True)
    assert events[0].kind == "call" and events[0].name == "add" and len(events) > 1
    assert (
        parts(grown(events)[0]) == parts(streamed([call], family)) == ("", "", [("add", {"a": 1, "note": 'say "}" here'})])
    )
    # An unknown function's may be no call.
    assert [e.kind for e in streamed(call.replace("add", "sub"), family, growing=True)] in (["call"], ["content"])


def test_a_call_that_breaks_off_stays_a_beginning_and_its_text_is_text():
    bad = '<tool_call>{"name": "add", "arguments": {"note": "say "hi" to', "</tool_call>"
    good = '<tool_call>{"name": "add", "arguments": {"a": 1}}</tool_call>'
    for text in (bad[0], "".join(bad), "".join(bad) + good):
        events, broken = grown(streamed(text, "hermes", growing=True))
        assert broken == ['{"note": "say "']
        assert parts(events) == parts(streamed(text, "hermes"))
    assert events[-1] == Event("call", '{"a": 1}', "add")
    twice = '<tool_call>{"name": "add", "arguments": {"a": 1, "a": 2}}</tool_call>'
    events, broken = grown(streamed(twice, "hermes", growing=True))
    assert (events, broken) == ([Event("call", '{"a": 2}', "add")], ['{"a": 1'])


# The corpus of canitoolcall

#: Cases that pass, by family; all but two: in one, the corpus has white space before a call otherwise than in another of
#: the same family, and in one a model answers whose prompt has begun its thoughts.
REACHED = {
    "deepseek": 85,
    "gemma4": 47,
    "glm": 51,
    "gpt-oss": 51,
    "kimi": 48,
    "llama": 34,
    "mistral": 47,
    "qwen3-hermes": 50,
    "qwen3-xml": 54,
}
_OURS = {"gpt-oss": "harmony", "qwen3-hermes": "hermes", "qwen3-xml": "qwen_xml"}


def _family(fixture):
    if fixture.family == "deepseek":
        return "deepseek" if {"x-deepseek-v3", "x-deepseek-v31"} & set(fixture.tags) else "deepseek_dsml"
    if fixture.family == "kimi":
        return "kimi_k3" if "/k3" in fixture.id else "kimi_k2"
    return _OURS.get(fixture.family, fixture.family)


def _prompt(fixture):
    """The end of the prompt; where the corpus leaves it out, what these models' templates write."""
    if fixture.generation_prompt is not None or fixture.thinking is False:
        return fixture.generation_prompt or ""
    if "Kimi-K3" in fixture.models[0]:
        return "<|open|>think<|sep|>"
    return "<think>" if re.search(r"GLM-4\.7|GLM-5|Kimi-K2\.6", fixture.models[0]) else ""


def test_the_corpus_of_canitoolcall():
    pytest.importorskip("canitoolcall")
    from canitoolcall.checks import case_status, run_checks
    from canitoolcall.chunking import ChunkStrategy, split_text
    from canitoolcall.fixtures import load_families, load_fixtures
    from canitoolcall.results import Observation, ParsedToolCall, ParseResult, Status

    def parsed(fixture, chunks):
        events = streamed(chunks, _family(fixture), fixture.tools, _prompt(fixture))
        content, reasoning, _ = parts(events)
        calls = tuple(ParsedToolCall(e.name, e.text) for e in events if e.kind == "call")
        return ParseResult(content or None, reasoning or None, calls)

    families, passed, n_broken = load_families(), Counter(), 0
    for fixture in load_fixtures():
        raw = fixture.raw_output
        # Named as streams that count: pieces of a character, of a few, and marks by themselves.
        streams = {f"rand:{i}": parsed(fixture, split_text(raw, ChunkStrategy.parse(f"char:{i}"))) for i in range(3)}
        marks = "|".join(map(re.escape, families[fixture.family].markers))
        streams["special"] = parsed(fixture, re.split(f"({marks})", raw))
        rows = run_checks(fixture, families[fixture.family], Observation(parsed(fixture, [raw]), streams))
        leaks = [row for row in rows if row.check == "no_leakage" and row.status is Status.FAIL]
        assert fixture.id == "kimi/k3-bug-response-only-completion" or not leaks
        passed[fixture.family] += case_status(rows) is Status.PASS
        # Calls that grow are the same in the end; those that the end cuts off stay beginnings.
        tools, prompt = fixture.tools, _prompt(fixture)
        events, broken = grown(streamed(raw, _family(fixture), tools, prompt, growing=True))
        assert parts(events) == parts(streamed([raw], _family(fixture), tools, prompt)), fixture.id
        n_broken += len(broken)
        assert not broken or {"truncated", "malformed"} & set(fixture.tags)
    assert passed == REACHED and n_broken == 17
