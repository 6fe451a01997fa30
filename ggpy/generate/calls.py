"""Calls of tools as models write them: what reads each format, also as far as a call has come."""

import ast
import html
import json
import re
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias


class IncompleteError(Exception):
    """The text ends before the call does. What is certain of it may be known: its name, and what gives the beginning of its
    arguments, as JSON."""

    def __init__(self, name: str = "", arguments: Callable[[], str] = str):
        self.name, self.arguments = name, arguments


class MalformedError(Exception):
    """The text isn't a call."""


Schemas: TypeAlias = Mapping[str, Mapping[str, Any]]  # of functions' parameters, by the functions' names
Calls: TypeAlias = list[tuple[str, dict[str, Any]]]
#: Reads calls that begin at a place behind their marker; gives them and the place behind them. `final`: no text follows.
Read: TypeAlias = Callable[[str, int, Schemas, bool], tuple[Calls, int]]

# Values

_STRING_OR_MARK = re.compile(r'"(?:[^"\\]+|\\.)*("|\\?\Z)|[\[\]{}:,]', re.S)
# As much of a string as is certain: no half of an escape, nor of a character that is written as two.
_WHOLE_CHARACTERS = re.compile(
    r'"(?:[^"\\]+|\\[^u]|\\u[dD][89abAB][\da-fA-F]{2}\\u[\da-fA-F]{4}|\\u(?![dD][89abAB])[\da-fA-F]{4})*', re.S
)
_SPACE = re.compile(r"\s*")


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON")


def loads(text: str) -> Any:
    try:
        return json.loads(text, strict=False, parse_constant=_refuse_constant)
    except (ValueError, RecursionError):
        raise MalformedError from None


def json_end(text: str, at: int) -> int:
    """The place behind the object or array that begins here."""
    if at >= len(text):
        raise IncompleteError
    if text[at] not in "[{":
        raise MalformedError
    depth = 0
    for found in _STRING_OR_MARK.finditer(text, at):
        mark = found.group()
        if mark[0] == '"':
            if found.group(1) != '"':
                raise IncompleteError
        elif mark not in ":,":
            depth += 1 if mark in "[{" else -1
            if not depth:
                return found.end()
    raise IncompleteError


def _json_so_far(text: str, at: int) -> str:
    """As much as is certain of what `dumps` makes of the object that begins here, without its last bracket."""
    ends, before = "", ""  # what closes all that is open, and the mark before
    safe, missing = at, ""  # up to where the text, with what is missing then, is a value
    for found in _STRING_OR_MARK.finditer(text, at):
        mark = found.group()
        if mark[0] == '"':
            if before in ":[" or (before == "," and ends[0] == "]"):
                closed = found.group(1) == '"'
                whole = _WHOLE_CHARACTERS.match(text, found.start())
                assert whole is not None
                safe, missing = (found.end(), ends) if closed else (whole.end(), '"' + ends)
            mark = '"'
        elif mark in "[{":
            ends = ("]" if mark == "[" else "}") + ends
            safe, missing = found.end(), ends
        elif mark in "]}":
            if len(ends) == 1:
                safe, missing = found.start(), ends
                break
            ends = ends[1:]
            safe, missing = found.end(), ends
        elif mark == ",":
            safe, missing = found.start(), ends
        before = mark
    value = dumps(loads(text[at:safe] + missing))
    return value[: len(value) - len(missing)]


def dumps(value: Any) -> str:
    try:
        return json.dumps(value, ensure_ascii=False, allow_nan=False)
    except (ValueError, RecursionError):
        raise MalformedError from None


def growing_json(text: str, name: str, at: int) -> IncompleteError:
    """A call whose arguments are JSON that begins at a place."""
    return IncompleteError(name, lambda: _json_so_far(text, at)) if text.startswith("{", at) else IncompleteError()


def _growing_values(name: str, arguments: Mapping[str, Any]) -> IncompleteError:
    """A call of which some arguments are known, each as a whole."""
    return IncompleteError(name, lambda: dumps(arguments)[:-1]) if arguments else IncompleteError()


def skip(text: str, at: int) -> int:
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
    readers = [loads, lambda text: loads(text.lower())]
    for read in [*readers, ast.literal_eval] if said[:1] in ("[", "{") else readers:
        try:
            value = read(said)
            json.dumps(value, allow_nan=False)
        except (MalformedError, ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
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


def _call_of(value: object, schemas: Schemas) -> tuple[str, dict[str, Any]]:
    if not isinstance(value, dict):
        raise MalformedError
    function = value.get("function")
    value = function if isinstance(function, dict) else value
    name = value.get("name")
    arguments: Any = next(
        (value[key] for key in ("arguments", "parameters") if key in value), {} if len(value) == 1 else None
    )
    if isinstance(arguments, str):
        arguments = loads(arguments)
    if not isinstance(name, str) or not isinstance(arguments, dict):
        raise MalformedError
    return name, arguments


#: how most calls begin that are an object, or an array of such, up to the arguments
BEGUN = re.compile(r'(?:\[\s*)?\{\s*"name"\s*:\s*(?P<name>"(?:[^"\\]|\\.)+")\s*,\s*"(?:arguments|parameters)"\s*:\s*(?=\{)')


def json_call(end: str = "", bare: bool = False) -> Read:
    """An object with a name and arguments, or an array of such, up to an end mark. `bare`: nothing marks it as a call, so
    that it is one only if there is such a function; further ones may follow behind semicolons."""

    def read(text: str, at: int, schemas: Schemas, final: bool) -> tuple[Calls, int]:
        calls: Calls = []
        while True:
            at = skip(text, at)
            try:
                stop = json_end(text, at)
            except IncompleteError:
                begun = None if calls else BEGUN.match(text, at)
                raise growing_json(text, loads(begun["name"]), begun.end()) if begun else IncompleteError from None
            value = loads(text[at:stop])
            calls += [_call_of(one, schemas) for one in (value if isinstance(value, list) else [value])]
            if bare and schemas and not all(name in schemas for name, _ in calls):
                raise MalformedError
            if not bare:
                return calls, _closed(text, stop, end)
            at = skip(text, stop)
            if at == len(text):
                if final:
                    return calls, stop
                raise IncompleteError
            if text[at] != ";":
                return calls, stop
            at += 1

    return read


def _closed(text: str, at: int, end: str) -> int:
    """The place behind an end mark, which white space may come before."""
    if not end:
        return at
    at = skip(text, at)
    if text.startswith(end, at):
        return at + len(end)
    raise IncompleteError if end.startswith(text[at:]) else MalformedError


def headed_call(header: str, end: str = "") -> Read:
    """A header with the function's name, and the arguments as JSON, up to an end mark."""
    pattern = re.compile(header, re.S)

    def read(text: str, at: int, schemas: Schemas, final: bool) -> tuple[Calls, int]:
        found = pattern.match(text, at)
        if found is None:
            raise IncompleteError
        try:
            stop = json_end(text, found.end())
        except IncompleteError:
            raise growing_json(text, found["name"], found.end()) from None
        arguments = loads(text[found.end() : stop])
        if not isinstance(arguments, dict):
            raise MalformedError
        return [(found["name"], arguments)], _closed(text, stop, end)

    return read


def tagged_call(header: str, key: str, value_end: str, end: str, trim: bool = False) -> Read:
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

    def read(text: str, at: int, schemas: Schemas, final: bool) -> tuple[Calls, int]:
        found = head.match(text, at)
        if found is None:
            raise IncompleteError
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
                raise _growing_values(name, arguments)
            stop = ended.search(text, opened.end())
            if stop is None:
                # The last argument's end is missing: only the end of the text tells.
                last = list(close.finditer(text, opened.end())) if final else []
                if not last:
                    raise _growing_values(name, arguments)
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
                    arguments[where] = loads(value)
                except MalformedError:
                    arguments[where] = value
            else:
                arguments[where] = _cast(value, where, parameters)

    return read


def python_call(end: str = "", bare: bool = False) -> Read:
    """A list of calls with literals, as Python writes them."""
    token = re.compile(r"'(?:[^'\\]|\\.)*('|\Z)|\"(?:[^\"\\]|\\.)*(\"|\Z)|[\[\](){}]", re.S)

    def read(text: str, at: int, schemas: Schemas, final: bool) -> tuple[Calls, int]:
        at = skip(text, at)
        if at >= len(text):
            raise IncompleteError
        if text[at] != "[":
            raise MalformedError
        depth = stop = 0
        for found in token.finditer(text, at):
            if found.group()[0] in "'\"":
                if not (found.group(1) or found.group(2)):
                    raise IncompleteError
                continue
            depth += 1 if found.group() in "[({" else -1
            if not depth:
                stop = found.end()
                break
        if not stop:
            raise IncompleteError
        calls: Calls = []
        try:
            body = ast.parse(text[at:stop], mode="eval").body
            for call in body.elts if isinstance(body, ast.List) else ():
                if not isinstance(call, ast.Call) or call.args:
                    raise MalformedError
                arguments = {str(word.arg): ast.literal_eval(word.value) for word in call.keywords}
                json.dumps(arguments, allow_nan=False)
                calls.append((ast.unparse(call.func), arguments))
        except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
            raise MalformedError from None
        if not calls or (bare and schemas and not all(name in schemas for name, _ in calls)):
            raise MalformedError
        return calls, _closed(text, stop, end)

    return read


def gemma_call(text: str, at: int, schemas: Schemas, final: bool) -> tuple[Calls, int]:
    """`call:name{key:value,…}` with bare keys, and texts between marks of their own."""
    name_end = text.find("{", at)
    if name_end < 0:
        raise MalformedError if "<tool_call|>" in text[at:] else IncompleteError
    pairs: dict[str, Any] = {}
    try:
        value, stop = _gemma_value(text, name_end, 0, pairs)
    except IncompleteError:
        raise _growing_values(text[at:name_end].strip(), pairs) from None
    if final and not text[stop:].strip():
        return [(text[at:name_end].strip(), value)], len(text)
    return [(text[at:name_end].strip(), value)], _closed(text, stop, "<tool_call|>")


_QUOTE = '<|"|>'


def _gemma_value(text: str, at: int, depth: int, into: dict[str, Any] | None = None) -> tuple[Any, int]:
    """A value and the place behind it; `into` takes an object's own, as they become whole."""
    at = skip(text, at)
    if at >= len(text) or (_QUOTE.startswith(text[at:]) and text[at:] != _QUOTE):
        raise IncompleteError
    if depth > 64:
        raise MalformedError
    if text.startswith(_QUOTE, at):
        stop = text.find(_QUOTE, at + len(_QUOTE))
        if stop < 0:
            raise IncompleteError
        return text[at + len(_QUOTE) : stop], stop + len(_QUOTE)
    if text[at] in "{[":
        close = "}" if text[at] == "{" else "]"
        pairs = {} if into is None else into
        items: list[Any] = []
        at = skip(text, at + 1)
        while True:
            if at >= len(text):
                raise IncompleteError
            if text[at] == close:
                return (pairs if close == "}" else items), at + 1
            if close == "}":
                if text.startswith(_QUOTE, at):
                    key, at = _gemma_value(text, at, depth)
                    at = skip(text, at)
                    if at < len(text) and text[at] != ":":
                        raise MalformedError
                else:
                    colon = text.find(":", at)
                    key, at = text[at:colon].strip().strip('"'), colon
                    if colon < 0:
                        raise IncompleteError
                pairs[key], at = _gemma_value(text, at + 1, depth + 1)
            else:
                value, at = _gemma_value(text, at, depth + 1)
                items.append(value)
            at = skip(text, at)
            if at >= len(text):
                raise IncompleteError
            if text[at] == ",":
                at = skip(text, at + 1)
            elif text[at] != close:
                raise MalformedError
    if text[at] == '"':
        found = re.compile(r'"(?:[^"\\]|\\.)*"', re.S).match(text, at)
        if found is None:
            raise IncompleteError
        return loads(found.group()), found.end()
    found = re.compile(r"[^,\]}]*(?=[,\]}])").match(text, at)
    if found is None:
        raise IncompleteError
    word = found.group().strip()
    try:
        return loads(word), found.end()
    except MalformedError:
        return word, found.end()
