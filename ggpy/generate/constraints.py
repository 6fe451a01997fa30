"""Text that keeps to a JSON schema, a regular expression or a grammar, by the `llguidance` package.

A grammar leaves out the tokens that can't come next. Which these are is computed by a thread of its own, from the moment a
token is chosen, while the model computes the logits of the next one.
"""

from __future__ import annotations

import json
import math
import re
import reprlib
import threading
import weakref
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from decimal import Decimal
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..cpus import usable_cpus
from ..errors import Error
from .gbnf import lark_of_gbnf
from .options import HasJSONSchema, JSONSchema, Logits
from .replies import ReplyParser
from .streaming import StreamDecoder
from .tokenizer import Tokenizer

if TYPE_CHECKING:
    from llguidance import LLMatcher


# Space between JSON's parts: one, or a new line and its indentation. Without bound, models go on with space for ever.
_SPACE = r" |\n[ \t]{0,20}"
# Without bound they go on with digits for ever, too. All integers of 64 bits have no more, nor needs a float64.
_MOST_DIGITS = 20
_DIGITS = re.compile(rb"[0-9]*")
# How long texts of formats that may have digits without end can be: seconds have nine behind the point.
_LONGEST_FORMATS = {"time": 24, "date-time": 35, "duration": 32}
# Keywords of schemas whose values are schemas: one or a list, or an object of them.
_SCHEMAS = ("items", "additionalItems", "prefixItems", "additionalProperties", "anyOf", "oneOf", "allOf")
_NAMED_SCHEMAS = ("properties", "patternProperties", "$defs", "definitions")
# llguidance's numbers are float64, written with 16 digits. Of values that a text must have, those with more are refused;
# bounds move inwards, to the side that stands here.
_MOST_EXACT, _WIDEST = 1 << 53, (1 << 63) - 1024
_EXACT = ("const", "enum", "multipleOf")
_BOUNDS = {"minimum": 1, "exclusiveMinimum": 1, "maximum": -1, "exclusiveMaximum": -1}
# llguidance compiles grammars by recursion, a chain of rules by as deep a one: a stack for the longest chain that a text
# can have, where it takes up to 700 bytes for each character, and a limit to that.
_STACK_PER_CHARACTER, _LEAST_STACK, _LONGEST = 1400, 1 << 22, 1_000_000
# What tells Lark's syntax from GBNF.
_LARK = re.compile(r"^[ \t]*(?:%llguidance\b|start\b[^:\n]*:(?!:=))", re.MULTILINE)
_LONGEST_MESSAGE = 400
_NO_TOKEN = "no token of this model can go on with what the grammar wants next"
_STACK_SIZE = threading.Lock()  # one size for all threads that start
# What a byte of eight bits, the lowest first, adds to eight logits: nothing where a bit is set.
_ADDED = np.where(np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1, bitorder="little"), 0, -np.inf).astype(
    "f4"
)


class _Next(NamedTuple):
    """What may come next: `forced` tokens, one after the other, or all with 0 in `added`, where others have -inf."""

    forced: list[int]
    added: Logits | None


class _Numbers:
    """Where one generation is in the numbers of its JSON: they end after 20 digits in a row, wherever they may.

    Parameters
    ----------
    n_digits : array (n_vocab,) of uint8
        With how many digits each token begins.
    """

    def __init__(self, n_digits: NDArray[np.uint8]):
        self._n_digits, self._longest = n_digits, int(n_digits.max(initial=0))
        self._in_text = self._escaped = False
        self._run = 0  # digits in a row, outside of texts

    def take(self, data: bytes) -> None:
        """Takes what the next token writes."""
        for byte in data:
            self._run = self._run + 1 if not self._in_text and byte in b"0123456789" else 0
            if self._escaped:
                self._escaped = False
            elif byte == ord('"'):
                self._in_text = not self._in_text
            else:
                self._escaped = self._in_text and byte == ord("\\")

    def limit(self, added: Logits) -> None:
        """Leaves out tokens with too many digits, unless no others may come next."""
        if self._in_text or self._run + self._longest <= _MOST_DIGITS:
            return
        others = (added == 0) & (self._run + self._n_digits.astype("i4") <= _MOST_DIGITS)
        if others.any():
            added[~others] = -np.inf


class Constraint:
    """What the next token of one generation may be.

    Its text keeps to the grammar because every token is one that the grammar allows; `mask`, then `accept`, for each.
    """

    def __init__(
        self,
        matcher: LLMatcher,
        n_vocab: int,
        pool: ThreadPoolExecutor,
        tokenizer: Tokenizer,
        numbers: _Numbers | None = None,
    ):
        self._matcher, self._n_vocab, self._pool, self._tokenizer = matcher, n_vocab, pool, tokenizer
        self._numbers = numbers
        self._next: Future[_Next] = pool.submit(self._compute)

    def forced(self) -> list[int]:
        """Tokens that will be chosen next, one after the other, whatever the logits; often none."""
        return self._next.result().forced

    def masked(self, logits: Logits) -> Logits:
        """Logits (n_vocab,) of which those are -inf whose tokens can't come next, as a copy; where none is forced."""
        added = self._next.result().added
        assert added is not None
        return logits + added

    def accept(self, token: int) -> bool:
        """Takes the token that was chosen; True if that ends the text: it is whole, and nothing else may follow.

        Raises
        ------
        Error
            The grammar doesn't allow it.
        """
        forced, added = self._next.result()
        allowed = token == forced[0] if added is None else bool(added[token] == 0)
        if not allowed:
            text = self._tokenizer.decode([token], special=True) if token < self._tokenizer.n_vocab else ""
            raise Error(f"the sampler chose token {token}, {text!r}, which the grammar doesn't allow there")
        if not self._matcher.consume_token(token):
            raise self._error()
        if self._matcher.is_stopped():
            return True
        if self._numbers is not None and token < self._tokenizer.n_vocab:
            self._numbers.take(self._tokenizer.token_bytes(token))
        if len(forced) > 1:
            del forced[0]
        else:
            self._next = self._pool.submit(self._compute)
        return False

    def _compute(self) -> _Next:
        matcher = self._matcher
        forced = matcher.compute_ff_tokens()
        if forced:
            return _Next(forced, None)
        bits = np.frombuffer(matcher.compute_bitmask(), np.uint8)
        if matcher.is_error():  # the bits are those of the end tokens
            raise self._error()
        added = _ADDED.take(bits, axis=0).ravel()[: self._n_vocab]
        if self._numbers is not None:
            self._numbers.limit(added)
        n_allowed = np.count_nonzero(added == 0)
        if not n_allowed:
            raise Error(_NO_TOKEN)
        return _Next([int(np.argmax(added))], None) if n_allowed == 1 else _Next([], added)

    def _error(self) -> Error:
        message = self._matcher.get_error()
        if message.startswith("NoExtension"):
            return Error(_NO_TOKEN)
        return Error(f"the grammar can't be followed further: {_one_line(message)}")


class CallsConstraint:
    """Leaves a reply free, except for calls of tools: once the mark of one stands there, it is bound to the tools' schemas.

    Has what a `Constraint` has.

    Parameters
    ----------
    parser : ReplyParser
        Reads the reply.
    decoder : StreamDecoder
        Makes its text, with all marks.
    ends : collection of int
        Tokens that end it.
    bind : callable
        Makes the constraint of a call of which a text stands there already.
    """

    def __init__(
        self, parser: ReplyParser, decoder: StreamDecoder, ends: Collection[int], bind: Callable[[str], Constraint]
    ):
        self._parser, self._decoder, self._ends, self._bind = parser, decoder, ends, bind
        self._call: Constraint | None = None
        self._in_call = False

    def forced(self) -> list[int]:
        """See `Constraint.forced`."""
        with suppress(Error):  # what can't be followed further is free
            return self._call.forced() if self._call is not None else []
        self._call = None
        return []

    def masked(self, logits: Logits) -> Logits:
        """See `Constraint.masked`."""
        return logits if self._call is None else self._call.masked(logits)

    def accept(self, token: int) -> bool:
        """See `Constraint.accept`; True for a token that ends the reply."""
        if self._call is not None:
            if self._call.accept(token):
                self._call = None
        elif token in self._ends:
            return True
        self._parser.push(self._decoder.push(token))
        begun = self._parser.begun
        if begun is not None and not self._in_call:
            with suppress(Error):  # schemas that can't be kept to
                self._call = self._bind(begun)
        self._in_call = begun is not None
        return False


class Constraints:
    """Makes a model's constraints.

    Parameters
    ----------
    tokenizer : Tokenizer
    n_vocab : int
        How many logits there are: more than the tokenizer's tokens, or fewer. Tokens without a text are never allowed.
    """

    def __init__(self, tokenizer: Tokenizer, n_vocab: int):
        self._tokenizer, self._n_vocab = tokenizer, n_vocab
        vocabulary = _Vocabulary(tokenizer, n_vocab)
        self._vocabulary = vocabulary.trie
        self._n_digits = np.array([min(len(_DIGITS.match(t)[0]), 255) for t in vocabulary.tokens], np.uint8)  # type: ignore[index]
        # The two hold each other where the collector doesn't see it, and with them as much as the file's vocabulary takes.
        weakref.finalize(self, vars(vocabulary).pop, "trie").atexit = False
        self._pool = ThreadPoolExecutor(usable_cpus(), "ggpy masks")

    def constraint(
        self, json_schema: JSONSchema | None = None, regex: str | None = None, grammar: str | None = None
    ) -> Constraint | None:
        """The constraint that is given, for one generation; None if none is.

        Raises
        ------
        Error
            More than one is given, or one isn't understood.
        """
        given = {"json_schema": json_schema, "regex": regex, "grammar": grammar}
        names = [name for name, value in given.items() if value is not None]
        if len(names) > 1:
            raise Error(f"give one of json_schema, regex and grammar, not {' and '.join(names)}")
        if json_schema is not None:
            return self._made("json_schema", _from_json_schema(json_schema), numbers=_Numbers(self._n_digits))
        if regex is not None:
            return self._made("regex", _from_regex(regex))
        if grammar is not None:
            return self._made("grammar", *_from_grammar(grammar))
        return None

    def call(self, schema: Mapping[str, Any], begun: str) -> Constraint:
        """The constraint of an object of a schema, behind white space, of which a text stands there already.

        Raises
        ------
        Error
            The schema can't be kept to, or the text doesn't.
        """
        try:
            bounded = json.dumps(_bounded({**schema, "x-guidance": {"whitespace_pattern": " ?"}}))
        except (RecursionError, ValueError) as error:
            raise Error(f"tools: {error}") from None
        _check_text("tools", "a schema", bounded)
        grammar = f"start: /[ \\t\\n]{{0,20}}/ call\ncall: %json {bounded}"
        return self._made("tools", grammar, numbers=_Numbers(self._n_digits), begun=begun)

    def _made(
        self, name: str, grammar: str, in_lark: bool = False, numbers: _Numbers | None = None, begun: str = ""
    ) -> Constraint:
        from llguidance import LLMatcher

        made: list[LLMatcher | Exception] = []

        def make() -> None:
            try:
                made.append(LLMatcher(self._vocabulary, grammar, log_level=0))
            except Exception as error:  # what isn't JSON or Unicode for it
                made.append(error)

        _on_a_stack(_LEAST_STACK + _STACK_PER_CHARACTER * len(grammar), make)
        matcher = made[0]
        if isinstance(matcher, Exception):
            raise Error(f"{name}: {_one_line(str(matcher))}")
        if matcher.is_error():
            raise Error(f"{name}: {_one_line(matcher.get_error(), in_lark)}")
        ids = self._vocabulary.greedy_tokenize(begun)
        if matcher.try_consume_tokens(ids) < len(ids):
            raise Error(f"{name}: {begun!r} is no beginning")
        if numbers is not None:
            numbers.take(begun.encode())
        constraint = Constraint(matcher, self._n_vocab, self._pool, self._tokenizer, numbers)
        try:
            constraint.forced()
        except Error as error:
            raise Error(f"{name}: {error}") from None
        return constraint


def _on_a_stack(n_bytes: int, function: Callable[[], None]) -> None:
    """Calls a function in a thread with a stack of that size."""
    with _STACK_SIZE:
        before = threading.stack_size(n_bytes & ~0xFFFF)
        try:
            thread = threading.Thread(target=function)
            thread.start()
        finally:
            threading.stack_size(before)
    thread.join()


class _Vocabulary:
    """A tokenizer as llguidance takes it: `trie` is made of it.

    What a token writes is what ggpy writes for it; those that write nothing have names, which grammars may use.
    """

    is_tokenizer_wrapper = True

    def __init__(self, tokenizer: Tokenizer, n_vocab: int):
        from llguidance import LLTokenizer

        self._tokenizer = tokenizer
        used = [i < tokenizer.n_vocab and not tokenizer.is_unused(i) for i in range(n_vocab)]
        self.tokens = [tokenizer.token_bytes(i) if used[i] else b"" for i in range(n_vocab)]
        self.special_token_ids = [i for i in range(n_vocab) if used[i] and tokenizer.is_hidden(i)]
        ends = sorted(i for i in tokenizer.end_tokens if i < n_vocab)
        # One token must end texts: where none does, llguidance adds one behind the last, which is never chosen.
        self.eos_token_id = ends[0] if ends else None
        self.bos_token_id = tokenizer.bos
        self.trie = LLTokenizer(self, eos_token=ends or None)  # type: ignore[arg-type]  # any object with the above will do

    def __call__(self, text: str) -> list[int]:
        """The tokens of a text that a grammar forces."""
        ids = self._tokenizer.encode_inside(text)
        kept = all(i < len(self.tokens) for i in ids) and b"".join(self.tokens[i] for i in ids) == text.encode()
        trie = getattr(self, "trie", None)  # a generation may outlive its model
        return ids if kept or trie is None else trie.greedy_tokenize(text)  # tokenizers may change what they are given


def _from_json_schema(schema: JSONSchema) -> str:
    from llguidance import LLMatcher

    if isinstance(schema, HasJSONSchema):
        schema = schema.model_json_schema()
    if isinstance(schema, str):
        try:
            schema = json.loads(schema)
        except (ValueError, RecursionError) as error:
            raise Error(f"json_schema: {reprlib.repr(schema)} is not JSON: {error}") from None
    if schema is True:
        schema = {"type": "object"}
    if not isinstance(schema, Mapping):
        raise Error(f"json_schema: a schema is an object, not {reprlib.repr(schema)}")
    try:
        text = json.dumps(_bounded(dict(schema)), allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise Error(f"json_schema: {error}") from None
    _check_text("json_schema", "a schema", text)
    try:
        return LLMatcher.grammar_from_json_schema(text, defaults={"whitespace_pattern": _SPACE})
    except ValueError as error:
        raise Error(f"json_schema: {_one_line(str(error))}") from None


def _bounded(schema: object) -> object:
    """A schema, or a list of them, whose texts of formats have an end."""
    if isinstance(schema, list):
        return [_bounded(one) for one in schema]
    if not isinstance(schema, dict):
        return schema
    made = {}
    for key, value in schema.items():
        if key in _NAMED_SCHEMAS and isinstance(value, dict):
            value = {name: _bounded(one) for name, one in value.items()}
        made[key] = _bounded(value) if key in _SCHEMAS else value
        if key in _EXACT:
            _check_numbers(value, key)
        elif key in _BOUNDS and isinstance(value, int) and abs(value) > _MOST_EXACT:
            made[key] = _within(value, _BOUNDS[key], key)
    longest = _LONGEST_FORMATS.get(schema["format"]) if isinstance(schema.get("format"), str) else None
    return made if longest is None or "minLength" in made else {"maxLength": longest, **made}


def _check_numbers(value: object, key: str) -> None:
    """Raises ValueError for a number that would be another one in the text."""
    if isinstance(value, list | dict):
        for one in value if isinstance(value, list) else value.values():
            _check_numbers(one, key)
    elif isinstance(value, int | float) and not isinstance(value, bool):
        try:
            written = Decimal(f"{value:.16g}")
        except OverflowError:
            written = Decimal("NaN")
        if written != Decimal(repr(value)):
            raise ValueError(f"{key!r} has a number of too many digits to be kept to, {value!r:.80}: make it a text")


def _within(bound: int, side: int, key: str) -> int:
    """The nearest number on that side of a bound that float64, and an integer of 64 bits, hold.

    Raises
    ------
    ValueError
        It leaves none.
    """
    if bound * side > _WIDEST:
        raise ValueError(f"{key!r} has too many digits to be kept to, {bound!r:.80}")
    number = float(max(min(bound, _WIDEST), -_WIDEST))
    return int(number if number * side >= bound * side else math.nextafter(number, side * math.inf))


def _from_regex(regex: str) -> str:
    from llguidance import LLMatcher

    _check_text("regex", "a regular expression", regex)
    try:
        return LLMatcher.grammar_from_regex(regex)
    except ValueError as error:
        raise Error(f"regex: {_one_line(str(error))}") from None


def _from_grammar(grammar: str) -> tuple[str, bool]:
    """The grammar in Lark's syntax, and whether it was."""
    _check_text("grammar", "a grammar", grammar)
    if _LARK.search(grammar):
        return grammar, True
    if "::=" not in grammar:
        raise Error("grammar: no rule 'start: …', as Lark has, and no 'root ::= …', as GBNF has")
    return lark_of_gbnf(grammar), False


def _check_text(name: str, what: str, text: object) -> None:
    if not isinstance(text, str):
        raise Error(f"{name}: {what} is a text, not {type(text).__name__}")
    if len(text) > _LONGEST:
        raise Error(f"{name}: longer than {_LONGEST} characters")


def _one_line(message: str, in_lark: bool = False) -> str:
    """What llguidance says, without the text around the place and the parser's state; places are those of Lark's text."""
    first, *more = [line.strip() for line in message.strip().splitlines()]
    found = re.fullmatch(r"(?:at )?(\d+)\((\d+)\): (.*)", first)
    if found:
        first = f"line {found[1]}, column {found[2]}: {found[3]}" if in_lark else found[3]
    why = [line.removeprefix("error: ") for line in more if line.startswith("error: ")]
    line = " ".join([first, *why])
    return line if len(line) <= _LONGEST_MESSAGE else f"{line[: _LONGEST_MESSAGE // 2]} … {line[-_LONGEST_MESSAGE // 2 :]}"
