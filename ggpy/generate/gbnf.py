"""llama.cpp's grammars (GBNF), rewritten in Lark's syntax for llguidance.

A GBNF grammar is one of characters; Lark's has terminals, which a lexer cuts off as long as they can be: `[a-z]+ "s"` would
never end. So a grammar without recursion becomes a single terminal, which is as fast as a regular expression, and one with
recursion gets terminals of one character. Both allow what GBNF allows. The syntax is that of `grammars/README.md` and
`src/llama-grammar.cpp` in llama.cpp.
"""

import re
from graphlib import CycleError, TopologicalSorter

from ..errors import Error

_NAME = re.compile(r"[a-zA-Z0-9_-]+")
_SPACE = re.compile(r"(?:[ \t]|#[^\r\n]*)*")
_SPACE_AND_LINES = re.compile(r"(?:[ \t\r\n]|#[^\r\n]*)*")
_CHARACTER = re.compile(
    r"\\x([0-9a-fA-F]{2})|\\u([0-9a-fA-F]{4})|\\U([0-9a-fA-F]{8})|\\([trn\\\"\[\]-])|([^\\])", re.DOTALL
)
_REPEATED = re.compile(r"([*+?])|\{[ \t]*([0-9]+)[ \t]*(?:(,)[ \t]*([0-9]*)[ \t]*)?\}")
_TOKEN = re.compile(r"<\[([0-9]+)\]>|<[^>\r\n]+>")
_ESCAPES = {"t": "\t", "r": "\r", "n": "\n"}


def lark_of_gbnf(text: str) -> str:
    """The grammar in Lark's syntax.

    Raises
    ------
    Error
        A line that is no rule, a rule without definition, or with two; the place is named.
    """
    grammar = _Parser(text)
    try:
        bodies, uses = grammar.rules()
    except RecursionError:
        raise Error("grammar: nested too deeply") from None
    lines = [f"{name}: {body}" for name, body in bodies.items()]
    lark = "\n".join([f"start: {grammar.renamed('root')}", *lines])
    try:
        TopologicalSorter(uses).prepare()
    except CycleError:
        return lark
    # In capitals they are terminals, which can't hold tokens.
    return lark if grammar.has_tokens else lark.replace(_RULE, _RULE.upper())


_RULE = "rule_"


class _Parser:
    def __init__(self, text: str):
        self._text, self._at = text, 0
        self._names: dict[str, str] = {}
        self._used: dict[str, int] = {}  # where rules are used first
        self.has_tokens = False

    def renamed(self, name: str) -> str:
        """A rule's name in Lark's syntax."""
        return self._names.setdefault(name, f"{_RULE}{len(self._names)}_")

    def rules(self) -> tuple[dict[str, str], dict[str, set[str]]]:
        """Each rule's definition, and the rules in it."""
        bodies: dict[str, str] = {}
        uses: dict[str, set[str]] = {}
        self._take(_SPACE_AND_LINES)
        while self._at < len(self._text):
            start = self._at
            name = self._expected(_NAME, "a rule's name")[0]
            self._take(_SPACE)
            self._expect("::=")
            self._take(_SPACE_AND_LINES)
            if self.renamed(name) in bodies:
                raise self._error(f"the rule {name!r} has a definition already", start)
            uses[self.renamed(name)] = self._here = set[str]()
            bodies[self.renamed(name)] = self._alternatives(nested=False)
            if self._at < len(self._text) and self._text[self._at] not in "\r\n":
                raise self._error("expected the end of the line")
            self._take(_SPACE_AND_LINES)
        for name, at in self._used.items():
            if self.renamed(name) not in bodies:
                raise self._error(f"there is no rule {name!r}", at)
        if self.renamed("root") not in bodies:
            raise Error("grammar: there is no rule 'root'")
        return bodies, uses

    def _alternatives(self, nested: bool) -> str:
        found = [self._sequence(nested)]
        while self._text[self._at : self._at + 1] == "|":
            self._at += 1
            self._take(_SPACE_AND_LINES)
            found.append(self._sequence(nested))
        return " | ".join(found)

    def _sequence(self, nested: bool) -> str:
        space = _SPACE_AND_LINES if nested else _SPACE
        found = []
        while item := self._item():
            self._take(space)
            while repeated := self._take(_REPEATED):
                sign, least, comma, most = repeated.groups()
                item = f"({item})" + (sign or f"{{{least},{most if comma else least}}}")
                self._take(space)
            found.append(item)
        return " ".join(found) or '""'

    def _item(self) -> str:
        """The next item of a sequence; nothing at its end."""
        at = self._at
        first = self._text[at : at + 1]
        if first == '"':
            self._at += 1
            characters = []
            while self._text[self._at : self._at + 1] != '"':
                characters.append(f"/{_written(self._character())}/")
            self._at += 1
            return f"({' '.join(characters)})" if characters else '""'
        if first == "[":
            return self._class()
        if first == "(":
            self._at += 1
            self._take(_SPACE_AND_LINES)
            inside = self._alternatives(nested=True)
            self._expect(")")
            return f"({inside})"
        if first == ".":
            self._at += 1
            return "/(?s:.)/"
        if first in ("<", "!"):
            self._at += first == "!"
            token = self._expected(_TOKEN, "a token, such as <|name|> or <[5]>")
            if first == "!" and token[1] is None:
                raise self._error("a token that isn't to come is given by its number, as !<[5]>", at)
            self.has_tokens = True
            return f"<[^{token[1]}]>" if first == "!" else token[0]
        if name := self._take(_NAME):
            self._used.setdefault(name[0], at)
            self._here.add(self.renamed(name[0]))
            return self.renamed(name[0])
        return ""

    def _class(self) -> str:
        at = self._at
        self._at += 1
        written = ""
        if self._text[self._at : self._at + 1] == "^":
            self._at += 1
            written = "^"
        start = self._at
        while self._text[self._at : self._at + 1] != "]":
            first = last = self._character()
            if self._text[self._at : self._at + 1] == "-" and self._text[self._at : self._at + 2] != "-]":
                self._at += 1
                last = self._character()
                if last < first:
                    raise self._error(f"{first!r} comes after {last!r}", at)
            written += f"{_written(first)}-{_written(last)}"
        if self._at == start:
            raise self._error("a class without characters", at)
        self._at += 1
        return f"/[{written}]/"

    def _character(self) -> str:
        at = self._at
        found = self._expected(_CHARACTER, "a character or an escape that GBNF has")
        code = found[1] or found[2] or found[3]
        if code is None:
            return _ESCAPES.get(found[4], found[4]) if found[4] else found[5]
        if int(code, 16) > 0x10FFFF or 0xD800 <= int(code, 16) < 0xE000:
            raise self._error(f"{found[0]} is no character", at)
        return chr(int(code, 16))

    def _take(self, pattern: re.Pattern[str]) -> re.Match[str] | None:
        found = pattern.match(self._text, self._at)
        if found:
            self._at = found.end()
        return found

    def _expected(self, pattern: re.Pattern[str], what: str) -> re.Match[str]:
        found = self._take(pattern)
        if found is None:
            raise self._error(f"expected {what}")
        return found

    def _expect(self, text: str) -> None:
        if not self._text.startswith(text, self._at):
            raise self._error(f"expected {text}")
        self._at += len(text)

    def _error(self, what: str, at: int | None = None) -> Error:
        before = self._text[: self._at if at is None else at]
        line = before.count("\n") + 1
        return Error(f"grammar: line {line}, column {len(before) - before.rfind(chr(10))}: {what}")


def _written(character: str) -> str:
    """A character in a regular expression."""
    return f"\\x{{{ord(character):x}}}"
