"""What a model's text says: its thoughts, its answer and the tools that it calls, told apart as the text comes.

Each family of models has its own marks, which its chat template shows. `FAMILIES` lists them; one parser reads all.
"""

import ast
import html
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

from .streaming import overlap

#: How models mark their thoughts: the beginning and the end.
MARKERS = (
    ("<think>", "</think>"),  # DeepSeek-R1, Qwen 3, GLM, SmolLM3, LFM2.5 and most others
    ("[THINK]", "[/THINK]"),  # Magistral, Ministral
    ("<seed:think>", "</seed:think>"),  # Seed-OSS
)


class Event(NamedTuple):
    """Something that has become certain.

    Attributes
    ----------
    kind : str
        "content", "reasoning" or "call".
    text : str
        The text; of a call, its arguments as JSON.
    name : str
        Of a call, the function's name.
    """

    kind: str
    text: str
    name: str = ""


class _IncompleteError(Exception):
    """The text ends before the call does."""


class _MalformedError(Exception):
    """The text isn't a call."""


_Schemas: TypeAlias = Mapping[str, Mapping[str, Any]]  # of functions' parameters, by the functions' names
_Calls: TypeAlias = list[tuple[str, dict[str, Any]]]
#: Reads calls that begin at a place behind their marker; gives them and the place behind them. `final`: no text follows.
_Read: TypeAlias = Callable[[str, int, _Schemas, bool], tuple[_Calls, int]]

# Values

_STRING_OR_BRACKET = re.compile(r'"(?:[^"\\]|\\.)*("|\Z)|[\[\]{}]', re.S)
_SPACE = re.compile(r"\s*")


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON")


def _loads(text: str) -> Any:
    try:
        return json.loads(text, strict=False, parse_constant=_refuse_constant)
    except (ValueError, RecursionError):
        raise _MalformedError from None


def _json_end(text: str, at: int) -> int:
    """The place behind the object or array that begins here."""
    if at >= len(text):
        raise _IncompleteError
    if text[at] not in "[{":
        raise _MalformedError
    depth = 0
    for found in _STRING_OR_BRACKET.finditer(text, at):
        mark = found.group()
        if mark[0] == '"':
            if not found.group(1):
                raise _IncompleteError
        else:
            depth += 1 if mark in "[{" else -1
            if not depth:
                return found.end()
    raise _IncompleteError


def _skip(text: str, at: int) -> int:
    return _SPACE.match(text, at).end()  # type: ignore[union-attr]


def _types(schema: Mapping[str, Any], root: Mapping[str, Any], depth: int = 0) -> set[str]:
    """The JSON types that a schema allows; none if it doesn't say."""
    reference = schema.get("$ref")
    if isinstance(reference, str) and reference.startswith("#/") and depth < 8:
        target: Any = root
        for key in reference[2:].split("/"):
            target = target.get(key) if isinstance(target, Mapping) else None
        return _types(target, root, depth + 1) if isinstance(target, Mapping) else set()
    named = schema.get("type")
    types = {named} if isinstance(named, str) else {t for t in named or () if isinstance(t, str)}
    for kind in ("anyOf", "oneOf"):
        for one in schema.get(kind) or () if depth < 8 else ():
            if isinstance(one, Mapping):
                types |= _types(one, root, depth + 1)
    if not types and isinstance(schema.get("enum"), list):
        types = {_type(value) for value in schema["enum"]}
    return types


def _type(value: object) -> str:
    if value is None or isinstance(value, bool):
        return "null" if value is None else "boolean"
    kinds = {int: "integer", float: "number", str: "string", list: "array", dict: "object"}
    return kinds.get(type(value), "")


def _cast(text: str, key: str, parameters: Mapping[str, Any]) -> Any:
    """An argument that is written as bare text, as its schema wants it; the text itself, if it is nothing of that kind."""
    properties = parameters.get("properties")
    schema = properties.get(key) if isinstance(properties, Mapping) else None
    types = _types(schema, parameters) if isinstance(schema, Mapping) else set()
    if types == {"string"}:
        return text
    said = text.strip()
    readers = [_loads, lambda text: _loads(text.lower())]
    for read in [*readers, ast.literal_eval] if said[:1] in ("[", "{") else readers:
        try:
            value = read(said)
            json.dumps(value, allow_nan=False)
        except (_MalformedError, ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
            continue
        kind = _type(value)
        number = kind in ("integer", "number") and "number" in types
        whole = kind == "number" and "integer" in types and value.is_integer()
        if kind and (not types or kind in types or number or whole):
            return int(value) if whole and not number else value
        if kind == "null" and "string" not in types:
            return None
    return text


# Formats of calls


def _call_of(value: object, schemas: _Schemas) -> tuple[str, dict[str, Any]]:
    if not isinstance(value, dict):
        raise _MalformedError
    function = value.get("function")
    value = function if isinstance(function, dict) else value
    name = value.get("name")
    arguments: Any = next(
        (value[key] for key in ("arguments", "parameters") if key in value), {} if len(value) == 1 else None
    )
    if isinstance(arguments, str):
        arguments = _loads(arguments)
    if not isinstance(name, str) or not isinstance(arguments, dict):
        raise _MalformedError
    return name, arguments


def _json(end: str = "", bare: bool = False) -> _Read:
    """An object with a name and arguments, or an array of such, up to an end mark. `bare`: nothing marks it as a call, so
    that it is one only if there is such a function; further ones may follow behind semicolons."""

    def read(text: str, at: int, schemas: _Schemas, final: bool) -> tuple[_Calls, int]:
        calls: _Calls = []
        while True:
            at = _skip(text, at)
            stop = _json_end(text, at)
            value = _loads(text[at:stop])
            calls += [_call_of(one, schemas) for one in (value if isinstance(value, list) else [value])]
            if bare and schemas and not all(name in schemas for name, _ in calls):
                raise _MalformedError
            if not bare:
                return calls, _closed(text, stop, end)
            at = _skip(text, stop)
            if at == len(text):
                if final:
                    return calls, stop
                raise _IncompleteError
            if text[at] != ";":
                return calls, stop
            at += 1

    return read


def _closed(text: str, at: int, end: str) -> int:
    """The place behind an end mark, which white space may come before."""
    if not end:
        return at
    at = _skip(text, at)
    if text.startswith(end, at):
        return at + len(end)
    raise _IncompleteError if end.startswith(text[at:]) else _MalformedError


def _headed(header: str, end: str = "") -> _Read:
    """A header with the function's name, and the arguments as JSON, up to an end mark."""
    pattern = re.compile(header, re.S)

    def read(text: str, at: int, schemas: _Schemas, final: bool) -> tuple[_Calls, int]:
        found = pattern.match(text, at)
        if found is None:
            raise _IncompleteError
        stop = _json_end(text, found.end())
        arguments = _loads(text[found.end() : stop])
        if not isinstance(arguments, dict):
            raise _MalformedError
        return [(found["name"], arguments)], _closed(text, stop, end)

    return read


def _tagged(header: str, key: str, value_end: str, end: str, trim: bool = False) -> _Read:
    """A header with the function's name, and a pair of tags around each argument.

    An argument ends where the tag that ends it is followed by another argument or by the end: it may hold such tags.

    Parameters
    ----------
    header, key, value_end, end : str
        Patterns. A key may have a `string` ("true": a text) or a `type`.
    trim : bool
        Whether a line break at both ends belongs to the tags.
    """
    head, begin, close = re.compile(header), re.compile(r"\s*" + key), re.compile(r"\s*" + end)
    ended = re.compile(f"(?:{value_end})(?:\\s*(?:{value_end}))*(?=\\s*(?:{key}|{end}))")
    reopened = re.compile(r"\n" + key)

    def read(text: str, at: int, schemas: _Schemas, final: bool) -> tuple[_Calls, int]:
        found = head.match(text, at)
        if found is None:
            raise _IncompleteError
        name = html.unescape(found["name"]).strip()
        arguments: dict[str, Any] = {}
        parameters = schemas.get(name, {})
        known = parameters.get("properties")
        known = known if isinstance(known, Mapping) else {}
        at = found.end()
        if found.groupdict().get("empty"):
            return [(name, arguments)], at
        while True:
            if done := close.match(text, at):
                return [(name, arguments)], done.end()
            opened = begin.match(text, at)
            if opened is None:
                raise _IncompleteError
            stop = ended.search(text, opened.end())
            if stop is None:
                # The last argument's end is missing: only the end of the text tells.
                last = list(close.finditer(text, opened.end())) if final else []
                if not last:
                    raise _IncompleteError
                value, at = text[opened.end() : last[-1].start()], last[-1].start()
            else:
                value, at = text[opened.end() : stop.start()], stop.end()
                again = next((m for m in reopened.finditer(value) if m["key"] in known), None)
                if again is not None:
                    value, at = value[: again.start() + 1], opened.end() + again.start()
            if trim:
                value = value.removeprefix("\n").removesuffix("\n")
            groups = opened.groupdict()
            typed = groups.get("string") or groups.get("type") or ""
            where = html.unescape(opened["key"]) if "type" in groups else opened["key"].strip()
            if typed in ("true", "string"):
                arguments[where] = value
            elif typed:
                try:
                    arguments[where] = _loads(value)
                except _MalformedError:
                    arguments[where] = value
            else:
                arguments[where] = _cast(value, where, parameters)

    return read


def _python(end: str = "", bare: bool = False) -> _Read:
    """A list of calls with literals, as Python writes them."""
    token = re.compile(r"'(?:[^'\\]|\\.)*('|\Z)|\"(?:[^\"\\]|\\.)*(\"|\Z)|[\[\](){}]", re.S)

    def read(text: str, at: int, schemas: _Schemas, final: bool) -> tuple[_Calls, int]:
        at = _skip(text, at)
        if at >= len(text):
            raise _IncompleteError
        if text[at] != "[":
            raise _MalformedError
        depth = stop = 0
        for found in token.finditer(text, at):
            if found.group()[0] in "'\"":
                if not (found.group(1) or found.group(2)):
                    raise _IncompleteError
                continue
            depth += 1 if found.group() in "[({" else -1
            if not depth:
                stop = found.end()
                break
        if not stop:
            raise _IncompleteError
        calls: _Calls = []
        try:
            body = ast.parse(text[at:stop], mode="eval").body
            for call in body.elts if isinstance(body, ast.List) else ():
                if not isinstance(call, ast.Call) or call.args:
                    raise _MalformedError
                arguments = {str(word.arg): ast.literal_eval(word.value) for word in call.keywords}
                json.dumps(arguments, allow_nan=False)
                calls.append((ast.unparse(call.func), arguments))
        except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
            raise _MalformedError from None
        if not calls or (bare and schemas and not all(name in schemas for name, _ in calls)):
            raise _MalformedError
        return calls, _closed(text, stop, end)

    return read


def _gemma(text: str, at: int, schemas: _Schemas, final: bool) -> tuple[_Calls, int]:
    """`call:name{key:value,…}` with bare keys, and texts between marks of their own."""
    name_end = text.find("{", at)
    if name_end < 0:
        raise _MalformedError if "<tool_call|>" in text[at:] else _IncompleteError
    value, stop = _gemma_value(text, name_end, 0)
    if final and not text[stop:].strip():
        return [(text[at:name_end].strip(), value)], len(text)
    return [(text[at:name_end].strip(), value)], _closed(text, stop, "<tool_call|>")


_QUOTE = '<|"|>'


def _gemma_value(text: str, at: int, depth: int) -> tuple[Any, int]:
    at = _skip(text, at)
    if at >= len(text) or (_QUOTE.startswith(text[at:]) and text[at:] != _QUOTE):
        raise _IncompleteError
    if depth > 64:
        raise _MalformedError
    if text.startswith(_QUOTE, at):
        stop = text.find(_QUOTE, at + len(_QUOTE))
        if stop < 0:
            raise _IncompleteError
        return text[at + len(_QUOTE) : stop], stop + len(_QUOTE)
    if text[at] in "{[":
        close = "}" if text[at] == "{" else "]"
        pairs: dict[str, Any] = {}
        items: list[Any] = []
        at = _skip(text, at + 1)
        while True:
            if at >= len(text):
                raise _IncompleteError
            if text[at] == close:
                return (pairs if close == "}" else items), at + 1
            if close == "}":
                if text.startswith(_QUOTE, at):
                    key, at = _gemma_value(text, at, depth)
                    at = _skip(text, at)
                    if at < len(text) and text[at] != ":":
                        raise _MalformedError
                else:
                    colon = text.find(":", at)
                    key, at = text[at:colon].strip().strip('"'), colon
                    if colon < 0:
                        raise _IncompleteError
                pairs[key], at = _gemma_value(text, at + 1, depth + 1)
            else:
                value, at = _gemma_value(text, at, depth + 1)
                items.append(value)
            at = _skip(text, at)
            if at >= len(text):
                raise _IncompleteError
            if text[at] == ",":
                at = _skip(text, at + 1)
            elif text[at] != close:
                raise _MalformedError
    if text[at] == '"':
        found = re.compile(r'"(?:[^"\\]|\\.)*"', re.S).match(text, at)
        if found is None:
            raise _IncompleteError
        return _loads(found.group()), found.end()
    found = re.compile(r"[^,\]}]*(?=[,\]}])").match(text, at)
    if found is None:
        raise _IncompleteError
    word = found.group().strip()
    try:
        return _loads(word), found.end()
    except _MalformedError:
        return word, found.end()


# Families


@dataclass(frozen=True)
class Family:
    """How a family of models writes.

    Attributes
    ----------
    known_by : tuple of str
        Texts of which one is in the chat template, and other marks within calls.
    calls : tuple of (str, callable)
        Marks that begin calls, and what reads what follows.
    sections : mapping of str to str
        Marks around all calls; nothing else between them is text.
    bare : tuple of callable
        Reads calls that begin a reply without a mark.
    thoughts : tuple of (str, str)
        Marks around thoughts.
    dropped : tuple of str
        Marks that say nothing.
    tight : bool
        Whether white space before a call belongs to its mark.
    in_thoughts : bool
        Whether a call may end thoughts.
    channels : bool
        Whether every message has a header that says what it is.
    """

    known_by: tuple[str, ...] = ()
    calls: tuple[tuple[str, _Read], ...] = ()
    sections: tuple[tuple[str, str], ...] = ()
    bare: tuple[_Read, ...] = ()
    thoughts: tuple[tuple[str, str], ...] = MARKERS
    dropped: tuple[str, ...] = ()
    tight: bool = True
    in_thoughts: bool = False
    channels: bool = False

    @property
    def marks(self) -> list[str]:
        """All its marks, as texts."""
        pairs = [mark for pair in (*self.sections, *self.thoughts) for mark in pair]
        return [*self.known_by, *(mark for mark, _ in self.calls), *pairs, *self.dropped]

    @property
    def tokens(self) -> set[str]:
        """Texts in its marks that may be control tokens."""
        return set(re.findall(r"<[^<>\s]+>|\[/?[A-Z_]+\]", " ".join(self.marks)))


_XML = _tagged(
    r"\s*<function=(?P<name>[^>\n]+)>", r"<parameter=(?P<key>[^>\n]+)>", "</parameter>", r"</function>\s*</tool_call>", True
)
_XML_ALONE = _tagged(r"(?P<name>[^>\n]+)>", r"<parameter=(?P<key>[^>\n]+)>", "</parameter>", r"</function>", True)
_GLM = _tagged(
    r"\s*(?P<name>[^<\s{]+)\s*(?=<arg_key>|</tool_call>)",
    r"<arg_key>(?P<key>.*?)</arg_key>\s*<arg_value>",
    "</arg_value>",
    "</tool_call>",
)
_DSML = _tagged(
    r'(?P<name>[^"]+)"(?P<empty>/)?>',
    r'<｜DSML｜ ?parameter name="(?P<key>[^"]+)"(?: string="(?P<string>true|false)")?>',
    "</｜DSML｜ ?parameter>",
    "</｜DSML｜ ?invoke>",
)
_MINIMAX = _tagged(
    r'(?P<name>[^"]+)"(?P<empty>/)?>', r'<parameter name="(?P<key>[^"]+)">', "</parameter>", "</invoke>", True
)
_K3 = _tagged(
    r'(?P<name>[^"]+)"[^<]*<\|sep\|>',
    r'<\|open\|>argument key="(?P<key>[^"]*)"(?: type="(?P<type>\w+)")?<\|sep\|>',
    r"<\|close\|>argument<\|sep\|>",
    r"<\|close\|>call<\|sep\|>",
)

#: The families, those with the most particular marks first; the last is for models whose template shows no marks.
FAMILIES: dict[str, Family] = {
    "harmony": Family(("<|channel|>",), dropped=("<|start|>", "<|message|>", "<|constrain|>", "<|end|>"), channels=True),
    "gemma4": Family(
        ("<|tool_call>", '<|"|>', "<tool_call|>"),
        (("<|tool_call>call:", _gemma),),
        thoughts=(("<|channel>thought\n", "<channel|>"),),
        dropped=("<|tool_response>",),
        tight=False,
    ),
    "kimi_k3": Family(
        ("<|open|>",),
        (('<|open|>call tool="', _K3),),
        (("<|open|>tools<|sep|>", "<|close|>tools<|sep|>"),),
        thoughts=(("<|open|>think<|sep|>", "<|close|>think<|sep|>"),),
        dropped=("<|open|>response<|sep|>", "<|close|>response<|sep|>", "<|close|>message<|sep|>"),
        tight=False,
    ),
    "kimi_k2": Family(
        ("<|tool_calls_section_begin|>",),
        (
            (
                "<|tool_call_begin|>",
                _headed(
                    r"\s*(?:functions\.)?(?P<name>[^\s:<]+)(?::\d+)?\s*<\|tool_call_argument_begin\|>\s*",
                    "<|tool_call_end|>",
                ),
            ),
        ),
        (("<|tool_calls_section_begin|>", "<|tool_calls_section_end|>"),),
        dropped=("<|tool_call_argument_begin|>", "<|tool_call_end|>"),
        tight=False,
    ),
    "deepseek_dsml": Family(
        ("｜DSML｜",),
        tuple((f'<｜DSML｜{space}invoke name="', _DSML) for space in ("", " ")),
        tuple((f"<｜DSML｜{name}>", f"</｜DSML｜{name}>") for name in ("function_calls", "tool_calls", " calls")),
    ),
    "deepseek": Family(
        ("<｜tool▁calls▁begin｜>", "<｜tool▁sep｜>", "<｜tool▁call▁end｜>"),
        (
            (
                "<｜tool▁call▁begin｜>",
                _headed(r"function<｜tool▁sep｜>(?P<name>[^\n<]+)\n```json\n\s*", "```<｜tool▁call▁end｜>"),
            ),
            ("<｜tool▁call▁begin｜>", _headed(r"\s*(?P<name>[^\n<]+)<｜tool▁sep｜>\s*", "<｜tool▁call▁end｜>")),
        ),
        (("<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"),),
    ),
    "minimax": Family(
        ("<minimax:tool_call>",),
        (('<invoke name="', _MINIMAX),),
        (("<minimax:tool_call>", "</minimax:tool_call>"),),
    ),
    "mistral": Family(
        ("[TOOL_CALLS]", "[ARGS]", "[CALL_ID]"),
        (
            ("[TOOL_CALLS]", _json()),
            ("[TOOL_CALLS]", _headed(r"\s*(?P<name>[\w.-]+)(?:\[CALL_ID\]\w+)?(?:\[ARGS\])?\s*(?=\{)")),
        ),
        tight=False,
    ),
    "lfm2": Family(("<|tool_call_start|>", "<|tool_call_end|>"), (("<|tool_call_start|>", _python("<|tool_call_end|>")),)),
    "glm": Family(("<arg_key>",), (("<tool_call>", _GLM),)),
    "qwen_xml": Family(
        ("<function=",),
        (("<tool_call>", _XML), ("<tool_call>", _json("</tool_call>")), ("<function=", _XML_ALONE)),
        dropped=("</tool_call>",),
        in_thoughts=True,
    ),
    "hunyuan": Family(("<tool_calls>",), (("<tool_calls>", _json("</tool_calls>")),)),
    "hermes": Family(("<tool_call>",), (("<tool_call>", _json("</tool_call>")),)),
    "llama": Family(
        ("<|python_tag|>", '"parameters": ', "<|python_start|>", "<|python_end|>"),
        (("<|python_tag|>", _json(bare=True)), ("<|python_start|>", _python("<|python_end|>"))),
        bare=(_json(bare=True), _python(bare=True)),
        tight=False,
    ),
    "plain": Family(tight=False),
}


def family_of(template: str) -> Family:
    """The family whose marks a chat template has."""
    return next((f for f in FAMILIES.values() if any(mark in template for mark in f.known_by)), FAMILIES["plain"])


def schemas_of(tools: Iterable[Mapping[str, Any]]) -> dict[str, Mapping[str, Any]]:
    """The schemas of functions' parameters by the functions' names, from tools as OpenAI's API has them."""
    functions = [tool.get("function", tool) for tool in tools if isinstance(tool, Mapping)]
    named = [f for f in functions if isinstance(f, Mapping) and isinstance(f.get("name"), str)]
    schemas = {f["name"]: f.get("parameters") for f in named}
    return {name: schema if isinstance(schema, Mapping) else {} for name, schema in schemas.items()}


# The parser


class ReplyParser:
    """Tells thoughts, answer and calls apart in a text that arrives in pieces.

    How the text is cut into pieces changes nothing. A call is given when it is whole. What isn't one after all is text;
    only behind whole calls, one that the end cuts off is dropped. White space around thoughts belongs to neither part.

    Parameters
    ----------
    family : Family
    tools : iterable of mappings
        The tools on offer, whose schemas say what arguments are. None: nothing is a call.
    prompt : str
        What comes before. Many templates begin the model's thoughts themselves.
    """

    def __init__(self, family: Family, tools: Iterable[Mapping[str, Any]] | None = (), prompt: str = ""):
        self._family = family
        self._schemas = schemas_of(tools or ())
        self._offered = tools
        self._calls = () if tools is None else family.calls
        self._sections = dict(family.sections) if tools is not None else {}
        self._bare = () if tools is None else family.bare
        self._held = ""
        self._look_at = 0  # how long the held text must be, to be looked at again
        begun = [end for begin, end in family.thoughts if prompt.rstrip().endswith(begin.rstrip())]
        self._thought_end = begun[0] if begun else ""
        self._section_end = ""
        self._at_start = not begun  # only the beginning of an answer can be a thought, or a call without a mark
        self._strip = bool(begun)  # white space comes that belongs to neither part
        self._called = self._called_in_section = False
        self._header = ""
        self._in_header = True

    def push(self, text: str) -> list[Event]:
        """Takes the next piece; what is certain now."""
        self._held += text
        return self._all(False) if len(self._held) >= self._look_at else []

    def flush(self) -> list[Event]:
        """What was held back, at the end."""
        return self._all(True)

    def _all(self, final: bool) -> list[Event]:
        events: list[Event] = []
        while self._step(events, final):
            pass
        # A long call is read again only when it has grown: else its time would be quadratic.
        held = len(self._held)
        self._look_at = held + held // 64 if held > 4096 else 0
        return [event for event in events if event.text]

    def _step(self, events: list[Event], final: bool) -> bool:
        """Takes the next part of the held text; False if nothing more is certain."""
        if self._strip:
            self._held = self._held.lstrip()
            self._strip = not self._held
        if not self._held:
            return False
        if self._family.channels:
            return self._step_channels(events, final)
        if self._thought_end:
            return self._step_thought(events, final)
        if self._section_end:
            return self._step_section(events, final)
        return self._step_content(events, final)

    def _first(self, marks: Sequence[str], start: int = 0) -> tuple[int, str]:
        """The first mark in the held text, the longest of those that begin there; or the place that one may begin at."""
        found = [(at, -len(mark), mark) for mark in marks if (at := self._held.find(mark, start)) >= 0]
        if found:
            at, _, mark = min(found)
            return at, mark
        return len(self._held) - max((overlap(self._held, mark) for mark in marks), default=0), ""

    def _step_thought(self, events: list[Event], final: bool) -> bool:
        marks = [self._thought_end, *({mark for mark, _ in self._calls} if self._family.in_thoughts else ())]
        at, mark = self._first(marks)
        before = self._held[:at]
        if not mark:
            if final:
                events.append(Event("reasoning", self._held))
                self._held = ""
                return False
            certain = before.rstrip()
            events.append(Event("reasoning", certain))
            self._held = self._held[len(certain) :]
            return False
        if mark == self._thought_end:
            events.append(Event("reasoning", before.rstrip()))
            self._held, self._thought_end, self._strip = self._held[at + len(mark) :], "", True
            return True
        events.append(Event("reasoning", before.rstrip()))
        self._held = self._held[len(before.rstrip()) :]
        at = len(self._held) - len(self._held.lstrip())
        state = self._take_call(events, at, mark, final)
        if state == "taken":
            self._thought_end = ""
        elif state == "text":
            events.append(Event("reasoning", self._held[: at + len(mark)]))
            self._held = self._held[at + len(mark) :]
        return state != "wait"

    def _step_section(self, events: list[Event], final: bool) -> bool:
        at, mark = self._first([self._section_end, *(mark for mark, _ in self._calls)])
        if not mark:
            if final:
                self._leave_section(events, self._held)
                self._held = ""
            return False
        if mark == self._section_end:
            self._leave_section(events, self._held[:at])
            self._held = self._held[at + len(mark) :]
            return True
        state = self._take_call(events, at, mark, final)
        if state == "text":
            if not self._called:
                events.append(Event("content", self._held[: at + len(mark)]))
            self._held = self._held[at + len(mark) :]
        return state != "wait"

    def _leave_section(self, events: list[Event], rest: str) -> None:
        if not self._called_in_section and rest.strip():
            events.append(Event("content", rest))
        self._section_end = ""

    def _step_content(self, events: list[Event], final: bool) -> bool:
        if self._at_start:
            start = self._held.lstrip()
            if not start and not final:
                return False
            for read in self._bare:
                state = self._take_call(events, len(self._held) - len(start), "", final, [read])
                if state != "text":
                    return state == "taken"
            begun = [(begin, end) for begin, end in self._family.thoughts if start.startswith(begin)]
            if begun:
                self._held, self._thought_end = start.removeprefix(begun[0][0]), begun[0][1]
                self._at_start, self._strip = False, True
                return True
            if not final and any(begin.startswith(start) for begin, _ in self._family.thoughts):
                return False
        at, mark = self._first([*(m for m, _ in self._calls), *self._sections, *self._family.dropped])
        text = self._held[:at]
        if not mark and final:
            text = self._held
        elif self._family.tight:
            text = text.rstrip()  # what is left out may belong to a call's mark
        if text.strip():
            self._at_start = False
        if not (self._at_start and not mark and not final):
            events.append(Event("content", text))
            self._held = self._held[len(text) :]
        if not mark:
            return False
        at -= len(text)
        if mark in self._family.dropped:
            self._held = self._held[at + len(mark) :]
            return True
        if mark in self._sections:
            self._held, self._section_end = self._held[at + len(mark) :], self._sections[mark]
            self._called_in_section = False
            return True
        state = self._take_call(events, at, mark, final)
        if state == "text":
            self._at_start = False
            events.append(Event("content", self._held[: at + len(mark)]))
            self._held = self._held[at + len(mark) :]
        return state != "wait"

    def _take_call(
        self, events: list[Event], at: int, mark: str, final: bool, readers: Sequence[_Read] | None = None
    ) -> str:
        """Takes a call whose mark is at a place in the held text.

        Returns
        -------
        str
            "taken"; "wait": its end hasn't come; "text": it is none.
        """
        waits = False
        for read in readers or [read for begin, read in self._calls if begin == mark]:
            try:
                calls, end = read(self._held, at + len(mark), self._schemas, final)
            except _IncompleteError:
                waits = True
                continue
            except _MalformedError:
                continue
            try:
                made = [Event("call", json.dumps(a, ensure_ascii=False, allow_nan=False), name) for name, a in calls]
            except (ValueError, RecursionError):
                continue
            events += made
            self._held = self._held[end:]
            self._called = self._called_in_section = True
            self._at_start = False
            return "taken"
        if waits and not final:
            return "wait"
        if mark and waits and (self._called or not self._held[at + len(mark) :].strip()):
            following = self._held.find(mark, at + len(mark))
            self._held = self._held[following:] if following >= 0 else ""
            return "taken"
        return "text"

    # Messages with headers

    def _step_channels(self, events: list[Event], final: bool) -> bool:
        if self._in_header:
            head, found, rest = self._held.partition("<|message|>")
            if not found:
                if final:
                    head = re.sub(r"^<\|start\|>(assistant)?", "", head)
                    # A header is no text; what isn't one is.
                    if not re.match(r"\s*(<\||to=)", head) or (
                        not self._called and not re.search(r"<\|channel\|>\w+|to=", head)
                    ):
                        events.append(Event("content", head))
                    self._held = ""
                return False
            self._header, self._held, self._in_header = head, rest, False
        recipient = re.search(r"to=([^\s<]+)", self._header)
        channel = re.findall(r"<\|channel\|>\s*(\w+)", self._header)
        ended = re.compile(r"<\|(?:end|call|return)\|>(?=(<\|start\|>)|\Z)").search(self._held)
        whole = ended is not None and (final or ended.group(1) is not None)
        kind = "reasoning" if channel[-1:] == ["analysis"] else "content"
        if recipient is None or recipient.group(1) == "assistant":
            if ended is None and not final:
                marks = [f"<|{name}|>" for name in ("end", "call", "return")]
                stop = self._first([mark + "<|start|>" for mark in marks])[0]
                events.append(Event(kind, self._held[:stop]))
                self._held = self._held[stop:]
                return False
            if not whole and not final:
                events.append(Event(kind, self._held[: ended.start()]))  # type: ignore[union-attr]
                self._held = self._held[ended.start() :]  # type: ignore[union-attr]
                return False
            body = self._held[: ended.start()] if ended else self._held
            events.append(Event(kind, body))
        else:
            if not whole and not final:
                return False
            body = self._held[: ended.start()] if ended else self._held
            name = recipient.group(1)
            if self._offered is None:
                events.append(Event("content", body))
            elif name.startswith("functions.") or name in self._schemas:
                try:
                    arguments = _loads(body)
                    if not isinstance(arguments, dict):
                        raise _MalformedError
                    text = json.dumps(arguments, ensure_ascii=False, allow_nan=False)
                    events.append(Event("call", text, name.removeprefix("functions.")))
                    self._called = True
                except (_MalformedError, ValueError, RecursionError):
                    if not (self._called and ended is None):
                        events.append(Event("content", body))
        self._held = self._held[ended.end() :] if ended else ""
        self._in_header = True
        return True


def parse_reply(text: str, family: Family, tools: Iterable[Mapping[str, Any]] | None = (), prompt: str = "") -> list[Event]:
    """What a whole text says; see `ReplyParser`."""
    parser = ReplyParser(family, tools, prompt)
    return [*parser.push(text), *parser.flush()]
