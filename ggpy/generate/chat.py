"""Chat templates: the Jinja programs that come with models, run as what they are, the programs of strangers.

Jinja's sandbox keeps a template away from Python's insides. What it doesn't bound is time and memory; here loops, calls,
operators and output are counted against a budget. That refuses a template that takes too long or grows too large, but it
is no wall against every attack that a Python process could suffer.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from datetime import datetime
from functools import wraps
from typing import TYPE_CHECKING, Any

from ..errors import TokenizerError

if TYPE_CHECKING:
    import jinja2

    from .tokenizer import Tokenizer

#: What one rendering may use up: characters written (or held in one value), turns of all its loops, seconds.
MAX_TEXT = 10_000_000
MAX_TURNS = 1_000_000
MAX_SECONDS = 5.0

# Methods and filters whose result can be as long as the product of the lengths that go in.
_GROWING = frozenset({"replace", "join", "center", "ljust", "rjust", "zfill", "expandtabs", "indent", "wordwrap", "format"})
_MAX_PRODUCT = 25 * MAX_TEXT
_MAX_POWER_BITS = 10_000


class ChatTemplate:
    """A model's chat template.

    Parameters
    ----------
    source : str
        The Jinja template (`tokenizer.chat_template`).
    bos, eos : str
        The texts of the tokens that begin and end a text; templates know them as `bos_token` and `eos_token`.

    Raises
    ------
    TokenizerError
        The template isn't valid Jinja.
    """

    def __init__(self, source: str, bos: str = "", eos: str = ""):
        self.source = source
        self.bos = bos
        self.eos = eos
        self._template = _compile(source)

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        **extra: Any,
    ) -> str:
        """The prompt of a conversation.

        Parameters
        ----------
        messages : sequence of mappings
            Each with `role` and `content`.
        add_generation_prompt : bool
            Whether the prompt ends with the beginning of the model's answer.
        tools : sequence of mappings, optional
            JSON schemas of functions that the model may ask for.
        **extra
            Whatever else this template knows, such as `enable_thinking`.

        Raises
        ------
        TokenizerError
            The template refuses the conversation, fails, or uses up too much time or text.
        """
        context = {"messages": messages, "tools": tools, "documents": None, "add_generation_prompt": add_generation_prompt}
        context |= {"bos_token": self.bos, "eos_token": self.eos} | extra
        template = self._template
        budget = _budget.set(_Budget())
        try:
            return "".join(template.root_render_func(template.new_context(context)))
        except Exception as error:
            raise _failure("the chat template failed", error, _line(error, template)) from None
        finally:
            _budget.reset(budget)

    def encode(self, tokenizer: Tokenizer, messages: Sequence[Mapping[str, Any]], **options: Any) -> list[int]:
        """The tokens of a conversation's prompt.

        Most templates write the beginning-of-sequence token themselves; where one doesn't, it is put in front if the
        tokenizer's file says so. An end-of-sequence token never follows, whatever the file says: the answer does.

        Parameters
        ----------
        tokenizer : Tokenizer
            The model's.
        messages : sequence of mappings
        **options
            See `render`.

        Raises
        ------
        TokenizerError
            See `render`.
        """
        return tokenizer.encode_prompt(self.render(messages, **options))


class _RefusedError(Exception):
    """The template used up what it may use."""


class _Budget:
    """What one rendering has used so far."""

    def __init__(self) -> None:
        self.deadline = time.monotonic() + MAX_SECONDS
        self.turns = 0
        self.written = 0

    def turn(self) -> None:
        self.turns += 1
        if self.turns > MAX_TURNS:
            raise _RefusedError(f"its loops and calls take more than {MAX_TURNS} turns")
        if time.monotonic() > self.deadline:
            raise _RefusedError(f"it takes more than {MAX_SECONDS:g} s")

    def write(self, value: Any) -> None:
        self.written += _size(value)
        if self.written > MAX_TEXT:
            raise _too_large()


# Code outside of `render`, as when Jinja folds constants, gets a budget of its own.
_budget: ContextVar[_Budget | None] = ContextVar("budget", default=None)


def _turn() -> None:
    budget = _budget.get()
    if budget is not None:
        budget.turn()


def _too_large() -> _RefusedError:
    return _RefusedError(f"it makes more than {MAX_TEXT} characters")


def _size(*values: Any) -> int:
    """About how many characters the values take when written; refuses too many."""
    total = 0
    stack = list(values)
    while stack:
        value = stack.pop()
        if isinstance(value, Mapping):
            stack += [*value.keys(), *value.values()]
            total += len(value)
        elif isinstance(value, (list, tuple)):
            total += len(value)
            stack += value
        else:
            total += len(value) if isinstance(value, (str, bytes)) else 1
        # Lists in lists may share their parts: what is small in memory can be endless when written.
        if total > MAX_TEXT:
            raise _too_large()
    return total


def _check_growth(name: str, values: Sequence[Any]) -> None:
    """Refuse what a function of this name could make too much of."""
    numbers = [abs(value) for value in values if isinstance(value, int)]
    if name in ("format", "%"):
        numbers += [int(width) for text in values if isinstance(text, str) for width in re.findall(r"\d{1,20}", text)]
    if max(numbers, default=0) > MAX_TEXT and name in (*_GROWING, "%"):
        raise _too_large()
    if name in _GROWING and len(values) > 1:
        lengths = sorted([*numbers, *(_size(value) for value in values if not isinstance(value, int))])
        if lengths[-1] * lengths[-2] > _MAX_PRODUCT:
            raise _too_large()


def _guarded(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """A function that a template may call, with its arguments and result checked."""

    @wraps(function)  # keeps Jinja's marks on filters that want its context
    def call(*args: Any, **kwargs: Any) -> Any:
        _turn()
        values = [value for value in (*args, *kwargs.values()) if isinstance(value, (str, bytes, int, list, tuple, dict))]
        _size(*values)
        _check_growth(name, values)
        result = function(*args, **kwargs)
        if isinstance(result, (str, bytes, list, tuple, dict)):
            _size(result)
        return result

    return call


def _turns(items: Iterable[Any]) -> Iterator[Any]:
    """A loop's items, each counted."""
    for item in items:
        _turn()
        yield item


def _joined(items: Sequence[Any]) -> str:
    """The operator `~`."""
    _size(*items)
    return "".join(map(str, items))


def _operator(operator: str, function: Callable[[Any, Any], Any], left: Any, right: Any) -> Any:
    _turn()
    if operator == "*":
        for items, times in ((left, right), (right, left)):
            if isinstance(items, (str, bytes, list, tuple)) and isinstance(times, int) and _size(items) * times > MAX_TEXT:
                raise _too_large()
    if operator in ("*", "**") and isinstance(left, int) and isinstance(right, int):
        bits = left.bit_length() * abs(right) if operator == "**" else left.bit_length() + right.bit_length()
        if bits > _MAX_POWER_BITS:
            raise _RefusedError("it makes a number that is too large")
    if operator == "+":
        _size(left, right)
    if operator == "%" and isinstance(left, str):
        _check_growth("%", [left, *(right if isinstance(right, tuple) else (right,))])
    return function(left, right)


def _tojson(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    """JSON as models were trained on: not escaped for HTML, as Jinja's own filter would."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _compile(source: str) -> jinja2.Template:
    """The template, changed so that it is counted; the names it finds are those that transformers offers."""
    from jinja2 import TemplateError, ext, nodes, pass_context
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(ext.Extension):
        """`{% generation %}` marks the model's words for training; here it does nothing."""

        tags = {"generation"}  # noqa: RUF012 (Jinja declares it so)

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)

    class Environment(ImmutableSandboxedEnvironment):
        intercepted_binops = frozenset({"+", "*", "**", "%"})

        def call(self, context: Any, function: Any, *args: Any, **kwargs: Any) -> Any:  # type: ignore[override]
            method = getattr(function, "__wrapped__", function)  # the sandbox wraps str.format
            subject = getattr(method, "__self__", None)
            name = getattr(function, "__name__", "") if isinstance(subject, (str, bytes)) else ""
            _size(*(value for value in (*args, *kwargs.values()) if isinstance(value, (str, bytes, list, tuple, dict))))
            _check_growth(name, [subject, *args, *kwargs.values()] if name else [])
            _turn()
            return super().call(context, function, *args, **kwargs)

        def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
            return _operator(operator, self.binop_table[operator], left, right)

    def raise_exception(message: str) -> None:
        raise TemplateError(message)

    def strftime_now(format: str) -> str:
        return datetime.now().strftime(format)

    @pass_context
    def finalize(context: Any, value: Any) -> Any:
        budget = _budget.get()
        if budget is not None:
            budget.write(value)
        return value

    environment = Environment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, ext.loopcontrols], finalize=finalize, optimized=False
    )
    environment.filters["tojson"] = _tojson
    environment.filters = {name: _guarded(name, function) for name, function in environment.filters.items()}
    environment.filters |= {"_turns": _turns, "_joined": _joined}
    del environment.globals["lipsum"]
    environment.globals |= {"raise_exception": raise_exception, "strftime_now": strftime_now}
    try:
        tree = environment.parse(source)
        for loop in tree.find_all(nodes.For):
            loop.iter = nodes.Filter(loop.iter, "_turns", [], [], None, None, lineno=loop.lineno)
        for output in tree.find_all(nodes.Output):
            # Text between the braces is counted as values are.
            output.nodes = [
                nodes.Const(node.data, lineno=node.lineno) if isinstance(node, nodes.TemplateData) else node
                for node in output.nodes
            ]
        _replace_concat(tree, nodes)
        return environment.from_string(tree)
    except Exception as error:
        raise _failure("the chat template can't be read", error, getattr(error, "lineno", None)) from None


def _replace_concat(node: Any, nodes: Any) -> None:
    """Make every `~` below the node a call of `_joined`."""

    def replaced(child: Any) -> Any:
        if not isinstance(child, nodes.Node):
            return child
        _replace_concat(child, nodes)
        if isinstance(child, nodes.Concat):
            items = nodes.Tuple(child.nodes, "load", lineno=child.lineno)
            return nodes.Filter(items, "_joined", [], [], None, None, lineno=child.lineno)
        return child

    for name, value in node.iter_fields():
        setattr(node, name, list(map(replaced, value)) if isinstance(value, list) else replaced(value))


def _line(error: BaseException, template: jinja2.Template) -> int | None:
    """The template's line that an error comes from."""
    line, trace = None, error.__traceback__
    while trace is not None:
        if trace.tb_frame.f_globals.get("__jinja_template__") is template:
            line = template.get_corresponding_lineno(trace.tb_lineno)
        trace = trace.tb_next
    return line


def _failure(what: str, error: BaseException, line: int | None) -> TokenizerError:
    where = f" (line {line})" if line else ""
    words = " ".join(str(error).split())
    return TokenizerError(f"{what}{where}: {words or type(error).__name__}")
