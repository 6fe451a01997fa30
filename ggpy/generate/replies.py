"""What a model's text says: its thoughts, its answer and the tools that it calls, told apart as the text comes.

Each family of models has its own marks, which its chat template shows. `FAMILIES` lists them; one parser reads all.
"""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, NamedTuple

from ..errors import Error
from .calls import (
    BEGUN,
    IncompleteError,
    MalformedError,
    Read,
    dumps,
    gemma_call,
    growing_json,
    headed_call,
    json_call,
    json_end,
    loads,
    python_call,
    skip,
    tagged_call,
)
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
        "content", "reasoning" or "call"; where calls are given as they grow, also "arguments", with which the last one
        goes on.
    text : str
        The text; of a call, its arguments as JSON.
    name : str
        Of a call, the function's name.
    """

    kind: str
    text: str
    name: str = ""


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
    are_objects : bool
        Whether a call is, behind its mark, an object with `name` and `arguments`.
    """

    known_by: tuple[str, ...] = ()
    calls: tuple[tuple[str, Read], ...] = ()
    sections: tuple[tuple[str, str], ...] = ()
    bare: tuple[Read, ...] = ()
    thoughts: tuple[tuple[str, str], ...] = MARKERS
    dropped: tuple[str, ...] = ()
    tight: bool = True
    in_thoughts: bool = False
    channels: bool = False
    are_objects: bool = False

    @property
    def marks(self) -> list[str]:
        """All its marks, as texts."""
        pairs = [mark for pair in (*self.sections, *self.thoughts) for mark in pair]
        return [*self.known_by, *(mark for mark, _ in self.calls), *pairs, *self.dropped]

    @property
    def tokens(self) -> set[str]:
        """Texts in its marks that may be control tokens."""
        return set(re.findall(r"<[^<>\s]+>|\[/?[A-Z_]+\]", " ".join(self.marks)))


_XML = tagged_call(
    r"\s*<function=(?P<name>[^>\n]+)>", r"<parameter=(?P<key>[^>\n]+)>", "</parameter>", r"</function>\s*</tool_call>", True
)
_XML_ALONE = tagged_call(r"(?P<name>[^>\n]+)>", r"<parameter=(?P<key>[^>\n]+)>", "</parameter>", r"</function>", True)
_GLM = tagged_call(
    r"\s*(?P<name>[^<\s{]+)\s*(?=<arg_key>|</tool_call>)",
    r"<arg_key>(?P<key>.*?)</arg_key>\s*<arg_value>",
    "</arg_value>",
    "</tool_call>",
)
_DSML = tagged_call(
    r'(?P<name>[^"]+)"(?P<empty>/)?>',
    r'<｜DSML｜ ?parameter name="(?P<key>[^"]+)"(?: string="(?P<string>true|false)")?>',
    "</｜DSML｜ ?parameter>",
    "</｜DSML｜ ?invoke>",
)
_MINIMAX = tagged_call(
    r'(?P<name>[^"]+)"(?P<empty>/)?>', r'<parameter name="(?P<key>[^"]+)">', "</parameter>", "</invoke>", True
)
_K3 = tagged_call(
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
        (("<|tool_call>call:", gemma_call),),
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
                headed_call(
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
                headed_call(r"function<｜tool▁sep｜>(?P<name>[^\n<]+)\n```json\n\s*", "```<｜tool▁call▁end｜>"),
            ),
            ("<｜tool▁call▁begin｜>", headed_call(r"\s*(?P<name>[^\n<]+)<｜tool▁sep｜>\s*", "<｜tool▁call▁end｜>")),
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
            ("[TOOL_CALLS]", json_call()),
            ("[TOOL_CALLS]", headed_call(r"\s*(?P<name>[\w.-]+)(?:\[CALL_ID\]\w+)?(?:\[ARGS\])?\s*(?=\{)")),
        ),
        tight=False,
    ),
    "lfm2": Family(
        ("<|tool_call_start|>", "<|tool_call_end|>"), (("<|tool_call_start|>", python_call("<|tool_call_end|>")),)
    ),
    "glm": Family(("<arg_key>",), (("<tool_call>", _GLM),)),
    "qwen_xml": Family(
        ("<function=",),
        (("<tool_call>", _XML), ("<tool_call>", json_call("</tool_call>")), ("<function=", _XML_ALONE)),
        dropped=("</tool_call>",),
        in_thoughts=True,
    ),
    "hunyuan": Family(("<tool_calls>",), (("<tool_calls>", json_call("</tool_calls>")),)),
    "hermes": Family(("<tool_call>",), (("<tool_call>", json_call("</tool_call>")),), are_objects=True),
    "llama": Family(
        ("<|python_tag|>", '"parameters": ', "<|python_start|>", "<|python_end|>"),
        (("<|python_tag|>", json_call(bare=True)), ("<|python_start|>", python_call("<|python_end|>"))),
        bare=(json_call(bare=True), python_call(bare=True)),
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


def calls_schema(tools: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """The schema of a call of one of some functions, as an object, from tools as OpenAI's API has them.

    The schema of each function's parameters is a definition, so that what they define stays their own.

    Raises
    ------
    Error
        A schema isn't JSON.
    """
    calls, definitions = [], {}
    for i, (name, schema) in enumerate(schemas_of(tools).items()):
        try:
            text = json.dumps({key: value for key, value in schema.items() if key not in ("$id", "$schema")})
        except (TypeError, ValueError, RecursionError) as error:
            raise Error(f"the parameters of {name!r}: {error}") from None
        definitions[f"{i}"] = {"type": "object", **json.loads(text.replace('"$ref": "#', f'"$ref": "#/$defs/{i}'))}
        properties = {"name": {"const": name}, "arguments": {"$ref": f"#/$defs/{i}"}}
        required = list(properties)
        calls.append({"type": "object", "properties": properties, "required": required, "additionalProperties": False})
    return {"anyOf": calls, "$defs": definitions}


# The parsers


class _Giver:
    """Gives calls: when they are whole, or as they grow."""

    def __init__(self, growing: bool):
        self._growing = growing
        self._given: Event | None = None  # of a call that isn't whole

    def grow(self, events: list[Event], call: IncompleteError) -> None:
        """Gives what is new of a call that isn't whole."""
        if not self._growing:
            return
        with suppress(MalformedError):  # what follows will tell
            arguments = call.arguments()
            if self._given is None:
                events.append(Event("call", arguments, call.name))
            elif arguments.startswith(self._given.text):
                events.append(Event("arguments", arguments[len(self._given.text) :]))
            else:  # a key that comes twice
                return
            self._given = Event("call", arguments, call.name)

    def whole(self, events: list[Event], calls: list[Event]) -> None:
        """Gives whole calls; of the first one, what hasn't been given."""
        given, self._given = self._given, None
        if given is not None and calls[0].name == given.name and calls[0].text.startswith(given.text):
            events.append(Event("arguments", calls[0].text[len(given.text) :]))
            calls = calls[1:]
        events += calls

    def forget(self) -> None:
        """What was given is no call after all."""
        self._given = None


def _next_look(n: int, n_held: int) -> int:
    """How long a text of n characters must be, to be looked at again, where its last ones may be a call: a long one is read
    again only when it has grown, else its time would be quadratic."""
    return n + n_held // 64 if n_held > 4096 else 0


class ReplyParser:
    """Tells thoughts, answer and calls apart in a text that arrives in pieces.

    How the text is cut into pieces changes nothing. A call is given when it is whole. What isn't one after all is text;
    only behind whole calls, one that the end cuts off is dropped. White space around thoughts belongs to neither part.

    Calls that are given as they grow have the same arguments in the end. One of a known function that begins well but
    isn't a call after all has been given then: its arguments stay a beginning, which is no JSON, and its text is text.

    Parameters
    ----------
    family : Family
    tools : iterable of mappings
        The tools on offer, whose schemas say what arguments are. None: nothing is a call.
    prompt : str
        What comes before. Many templates begin the model's thoughts themselves.
    growing : bool
        Whether calls are given as they grow: an event "call" with a beginning of the arguments, then "arguments".
    """

    def __init__(
        self, family: Family, tools: Iterable[Mapping[str, Any]] | None = (), prompt: str = "", growing: bool = False
    ):
        self._family = family
        self._giver = _Giver(growing)
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

    @property
    def begun(self) -> str | None:
        """What stands behind the mark of a call that isn't whole; None where there is none."""
        held = self._held.lstrip()
        return next((held[len(mark) :] for mark, _ in self._calls if held.startswith(mark)), None)

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
        self._look_at = _next_look(len(self._held), len(self._held))
        return [event for event in events if event.text or event.kind == "call"]

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
        if text:
            self._giver.forget()  # a call without a mark, which is none
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
        self, events: list[Event], at: int, mark: str, final: bool, readers: Sequence[Read] | None = None
    ) -> str:
        """Takes a call whose mark is at a place in the held text.

        Returns
        -------
        str
            "taken"; "wait": its end hasn't come; "text": it is none.
        """
        waits = False
        grown = None
        for read in readers or [read for begin, read in self._calls if begin == mark]:
            try:
                calls, end = read(self._held, at + len(mark), self._schemas, final)
                made = [Event("call", dumps(arguments), name) for name, arguments in calls]
            except IncompleteError as error:
                waits = True
                grown = grown or (error if error.name in self._schemas else None)
                continue
            except MalformedError:
                continue
            self._giver.whole(events, made)
            self._held = self._held[end:]
            self._called = self._called_in_section = True
            self._at_start = False
            return "taken"
        if waits and not final:
            if grown is not None:
                self._giver.grow(events, grown)
            return "wait"
        if mark:
            self._giver.forget()
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
            name = recipient.group(1)
            function = name.removeprefix("functions.")
            if not whole and not final:
                call = growing_json(self._held, function, skip(self._held, 0))
                if ended is None and call.name in self._schemas:
                    self._giver.grow(events, call)
                return False
            body = self._held[: ended.start()] if ended else self._held
            if self._offered is None:
                events.append(Event("content", body))
            elif name.startswith("functions.") or name in self._schemas:
                try:
                    arguments = loads(body)
                    if not isinstance(arguments, dict):
                        raise MalformedError
                    self._giver.whole(events, [Event("call", dumps(arguments), function)])
                    self._called = True
                except MalformedError:
                    self._giver.forget()
                    if not (self._called and ended is None):
                        events.append(Event("content", body))
        self._held = self._held[ended.end() :] if ended else ""
        self._in_header = True
        return True


class ForcedCalls:
    """Reads a list of calls that a reply has to be; see `ReplyParser`."""

    def __init__(self, growing: bool = False) -> None:
        self._giver = _Giver(growing)
        self._text = ""
        self._at = self._look_at = 0
        self._called = False

    def push(self, text: str) -> list[Event]:
        """Takes the next piece; what is certain now."""
        self._text += text
        return self._all() if len(self._text) >= self._look_at else []

    def flush(self) -> list[Event]:
        """What was cut off before it was a call is text, if nothing was called."""
        events = self._all()
        return events if self._called or not self._text else [*events, Event("content", self._text)]

    def _all(self) -> list[Event]:
        events: list[Event] = []
        while begun := BEGUN.search(self._text, self._at):
            name = loads(begun["name"])
            try:
                stop = json_end(self._text, begun.end())
            except IncompleteError:
                self._giver.grow(events, growing_json(self._text, name, begun.end()))
                break
            self._giver.whole(events, [Event("call", dumps(loads(self._text[begun.end() : stop])), name)])
            self._at, self._called = stop, True
        self._look_at = _next_look(len(self._text), len(self._text) - self._at)
        return events


def parse_reply(text: str, family: Family, tools: Iterable[Mapping[str, Any]] | None = (), prompt: str = "") -> list[Event]:
    """What a whole text says; see `ReplyParser`."""
    parser = ReplyParser(family, tools, prompt)
    return [*parser.push(text), *parser.flush()]
