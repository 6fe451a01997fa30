"""Text that keeps to a JSON schema, a regular expression or a grammar, by the `llguidance` package.

A grammar leaves out the tokens that can't come next. Which these are is computed by a thread of its own, from the moment a
token is chosen, while the model computes the logits of the next one.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from ..cpus import usable_cpus
from ..errors import Error
from .options import HasJSONSchema, JSONSchema, Logits
from .tokenizer import Tokenizer

if TYPE_CHECKING:
    from llguidance import LLMatcher


# Space between JSON's parts: one, or a new line and its indentation. Without bound, models go on with space for ever.
_SPACE = r" |\n[ \t]{0,20}"
# What a byte of eight bits, the lowest first, adds to eight logits: nothing where a bit is set.
_ADDED = np.where(np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1, bitorder="little"), 0, -np.inf).astype(
    "f4"
)


class _Next(NamedTuple):
    """What may come next: `forced` tokens, which will be chosen in turn, or what is added to the logits, 0 or -inf."""

    forced: list[int]
    added: Logits | None


class Constraint:
    """What the next token of one generation may be.

    Its text keeps to the grammar because every token is one that the grammar allows; `mask`, then `accept`, for each.
    """

    def __init__(self, matcher: LLMatcher, n_vocab: int, pool: ThreadPoolExecutor, tokenizer: Tokenizer):
        self._matcher, self._n_vocab, self._pool, self._tokenizer = matcher, n_vocab, pool, tokenizer
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
        """Takes the token that was chosen; True if that ends the text: it is whole, and nothing or nothing else may follow.

        Raises
        ------
        Error
            The grammar doesn't allow it.
        """
        forced, added = self._next.result()
        allowed = token == forced[0] if added is None else bool(added[token] == 0)
        if not allowed or not self._matcher.consume_token(token):
            text = self._tokenizer.decode([token], special=True) if token < self._tokenizer.n_vocab else ""
            raise Error(f"the sampler chose token {token}, {text!r}, which the grammar doesn't allow there")
        if self._matcher.is_stopped():
            return True
        self._next = self._pool.submit(self._compute)
        return False

    def _compute(self) -> _Next:
        matcher = self._matcher
        forced = matcher.compute_ff_tokens()
        if forced:
            return _Next(forced, None)
        bits = np.frombuffer(matcher.compute_bitmask(), np.uint8)
        if matcher.is_error():
            raise Error(f"the grammar can't go on: {_one_line(matcher.get_error())}")
        added = _ADDED[bits].ravel()[: self._n_vocab]
        n_allowed = np.count_nonzero(added == 0)
        if not n_allowed:
            raise Error("the grammar can't go on: none of the model's tokens may come next")
        if n_allowed == 1:
            return _Next([int(np.argmax(added))], None)
        return _Next([], added)


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
        self._vocabulary = _Vocabulary(tokenizer, n_vocab).trie
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
            return self._made("json_schema", _from_json_schema(json_schema))
        if regex is not None:
            return self._made("regex", _from_regex(regex))
        if grammar is not None:
            return self._made("grammar", *_from_grammar(grammar))
        return None

    def _made(self, name: str, grammar: str, in_lark: bool = False) -> Constraint:
        from llguidance import LLMatcher

        matcher = LLMatcher(self._vocabulary, grammar, log_level=0)
        if matcher.is_error():
            raise Error(f"{name}: {_one_line(matcher.get_error(), in_lark)}")
        return Constraint(matcher, self._n_vocab, self._pool, self._tokenizer)


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
        return ids if kept else self.trie.greedy_tokenize(text)  # tokenizers may change what they are given


def _from_json_schema(schema: JSONSchema) -> str:
    from llguidance import LLMatcher

    if isinstance(schema, HasJSONSchema):
        schema = schema.model_json_schema()
    if isinstance(schema, str):
        try:
            schema = json.loads(schema)
        except (ValueError, RecursionError) as error:
            raise Error(f"json_schema: {schema!r:.60} is not JSON: {error}") from None
    if schema is True:
        schema = {"type": "object"}
    if not isinstance(schema, Mapping):
        raise Error(f"json_schema: a schema is an object, not {schema!r:.60}")
    try:
        text = json.dumps(dict(schema), allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise Error(f"json_schema: {error}") from None
    return LLMatcher.grammar_from_json_schema(text, defaults={"whitespace_pattern": _SPACE})


def _from_regex(regex: str) -> str:
    from llguidance import LLMatcher

    if not isinstance(regex, str):
        raise Error(f"regex: a regular expression is a text, not {type(regex).__name__}")
    return LLMatcher.grammar_from_regex(regex)


def _from_grammar(grammar: str) -> tuple[str, bool]:
    """The grammar in Lark's syntax, and whether it was."""
    from llguidance.gbnf_to_lark import gbnf_to_lark, is_lark_syntax

    if not isinstance(grammar, str):
        raise Error(f"grammar: a grammar is a text, not {type(grammar).__name__}")
    if is_lark_syntax(grammar):
        return grammar, True
    try:
        return gbnf_to_lark(grammar), False
    except Exception as error:  # the converter raises bare Exceptions
        raise Error(f"grammar: {error}") from None


def _one_line(message: str, in_lark: bool = False) -> str:
    """What llguidance says, without the text around the place and the parser's state; places are those of Lark's text."""
    first, *more = [line.strip() for line in message.strip().splitlines()]
    found = re.fullmatch(r"(?:at )?(\d+)\((\d+)\): (.*)", first)
    if found:
        first = f"line {found[1]}, column {found[2]}: {found[3]}" if in_lark else found[3]
    why = [line.removeprefix("error: ") for line in more if line.startswith("error: ")]
    return " ".join([first, *why])
