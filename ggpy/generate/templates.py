"""Running the Jinja programs of strangers, in two ways that give the same text.

*Counted*, in this process: every loop, call, operator and value is counted, and only filters and methods are there whose
time and memory their arguments bound. No value has more than MOST_SIZE characters and parts, so no single step in C takes
long, and all of them together end after a moment. That is enough for nearly every template; what it isn't enough for
raises `BeyondError`, which says nothing against a template.

*Plain*, for a process of its own under the system's limits (`serve`), whose end harms nobody.

Both keep to Jinja's sandbox. This module needs Jinja alone, so that such a process starts quickly.
"""

from __future__ import annotations

import json
import pickle
import re
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from contextvars import ContextVar
from datetime import datetime
from functools import wraps
from typing import IO, TYPE_CHECKING, Any

if TYPE_CHECKING:
    import jinja2

#: what a process for templates may use up for one text: characters, seconds of its processor, bytes of memory
MOST_TEXT = 10_000_000
MOST_SECONDS = 5
MOST_MEMORY = 1 << 30

# What the counted way may use up before it gives in.
_SOURCE = 256_000  # characters of a template
_MOST_SIZE = 2_000_000  # characters and parts of a value
_MOST_MADE = 8_000_000  # characters of all values that are made, a part of a list counting as _PART of them
_MOST_TURNS = 200_000
_MOST_MOMENT = 0.5  # seconds
_PART = 16
_MOST_BITS = 10_000  # of an integer
_MOST_INDENT = 8


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


_FILTERS = _names("""abs capitalize count d default dictsort first float int items join last length list lower map max min
    reject rejectattr replace reverse safe select selectattr sort string title tojson trim unique upper""")
_METHODS = {
    str: _names("""capitalize casefold count endswith find format index isalnum isalpha isascii isdecimal isdigit
        isidentifier islower isnumeric isspace istitle isupper join lower lstrip partition removeprefix removesuffix
        replace rfind rindex rpartition rsplit rstrip split splitlines startswith strip swapcase title upper"""),
    dict: _names("copy get items keys values"),
    list: _names("copy count index"),
    tuple: _names("count index"),
}
_PLAIN_FIELD = re.compile(r"\{\w*\}")
_VIEWS: tuple[type, ...] = (type({}.keys()), type({}.values()), type({}.items()))
_WITH_PARTS: Any = (list, tuple, set, frozenset, *_VIEWS)
_COMPARE: dict[str, Callable[[Any, Any], Any]] = {
    "eq": lambda a, b: a == b,
    "ne": lambda a, b: a != b,
    "lt": lambda a, b: a < b,
    "lteq": lambda a, b: a <= b,
    "gt": lambda a, b: a > b,
    "gteq": lambda a, b: a >= b,
    "in": lambda a, b: a in b,
    "notin": lambda a, b: a not in b,
}


class BeyondError(Exception):
    """The counted way doesn't go further."""


# Counting


class _Meter:
    """What a rendering has used so far."""

    def __init__(self) -> None:
        self.deadline = time.monotonic() + _MOST_MOMENT
        self.turns = self.made = 0

    def turn(self) -> None:
        self.turns += 1
        if self.turns > _MOST_TURNS or time.monotonic() > self.deadline:
            raise BeyondError

    def make(self, n: int) -> None:
        self.made += n
        if self.made > _MOST_MADE:
            raise BeyondError


_meter: ContextVar[_Meter] = ContextVar("meter")


def _size(*values: Any) -> int:
    """Characters and parts of the values when they are written out, bounded. What a list shares counts each time."""
    from jinja2.utils import Namespace

    total, stack = 0, list(values)
    while stack:
        value = stack.pop()
        kind = type(value)
        if kind is str:
            total += len(value)
        elif isinstance(value, Namespace):  # may hold anything, itself too, and be written
            raise BeyondError
        elif isinstance(value, Mapping):
            stack += value.keys()
            stack += value.values()
            total += len(value)
        elif isinstance(value, _WITH_PARTS):
            stack += value
            total += len(value)
        else:
            total += len(value) if isinstance(value, (str, bytes)) else 1
        if total > _MOST_SIZE:
            raise BeyondError
    return total


def _depth(value: Any) -> int:
    """How deep lists and mappings lie in each other."""
    n, level = 0, [value]
    while level:
        n += 1
        inner = [v for v in level if isinstance(v, (Mapping, list, tuple))]
        level = [part for v in inner for part in (v.values() if isinstance(v, Mapping) else v)]
    return n


def _made(value: Any) -> Any:
    """Counts a value that a step has made."""
    if isinstance(value, (str, bytes)):
        _meter.get().make(_size(value))
    elif isinstance(value, (list, tuple, dict)):
        _size(value)
        new = sum(len(part) for part in value if type(part) is str)
        _meter.get().make(_PART * len(value) + new)
    return value


def _bound(n: int) -> None:
    if n > _MOST_SIZE:
        raise BeyondError


def _check_replace(text: Any, old: Any = None, new: Any = None, *count: Any, **more: Any) -> None:
    if more or not (isinstance(text, str) and isinstance(old, str) and isinstance(new, str)):
        raise BeyondError
    n = text.count(old)
    _bound(len(text) + n * max(0, len(new) - len(old)))


def _check_join(between: Any, items: Any) -> None:
    _bound(_size(items) + len(items) * _size(between))


def _guarded_filter(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """A filter of the counted way."""
    first = 1 if hasattr(function, "jinja_pass_arg") else 0  # where its value stands: Jinja's context may come before

    @wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        _meter.get().turn()
        if name not in _FILTERS:
            raise BeyondError
        _size(*args[first:], *kwargs.values())
        value, *rest = args[first:]
        if name == "replace":
            _check_replace(value, *rest, **kwargs)
        elif name == "join":
            if not isinstance(value, (str, *_VIEWS)):
                value = list(value)
            _check_join(rest[0] if rest else kwargs.get("d", ""), value)
        return _made(function(*args[:first], value, *rest, **kwargs))

    return call


def _guarded_test(name: str, function: Any) -> Callable[..., Any]:
    @wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        _meter.get().turn()
        if name in ("odd", "even", "divisibleby") and not all(isinstance(a, (int, float)) for a in args):
            raise BeyondError  # they are done with %, which formats strings
        if name == "in":
            _check_members(args[-1])
        return function(*args, **kwargs)

    return call


def _check_members(container: Any) -> None:
    from jinja2 import Undefined

    if not isinstance(container, (str, Mapping, list, tuple, range, Undefined, *_VIEWS)):
        raise BeyondError


# What nodes of a template's syntax become


def _turns(items: Iterable[Any]) -> Iterator[Any]:
    for item in items:
        _meter.get().turn()
        yield item


def _joined(items: Sequence[Any]) -> str:
    """The operator `~`."""
    _meter.get().turn()
    _size(*items)
    return _made("".join(map(str, items)))


def _literal(value: Any) -> Any:
    """A list, tuple or dict that is written out in the template."""
    _meter.get().turn()
    return _made(value)


def _compared(left: Any, *rest: Any) -> Any:
    """a < b, and longer chains: the operators' names and what stands right of them, by turns."""
    _meter.get().turn()
    result = True
    for name, right in zip(rest[::2], rest[1::2], strict=True):
        if name in ("in", "notin"):
            _check_members(right)
        result = _COMPARE[name](left, right)
        if not result:
            break
        left = right
    return result


def _sliced(value: Any, start: Any, stop: Any, step: Any) -> Any:
    _meter.get().turn()
    return _made(value[start:stop:step])


def _operated(operator: str, function: Callable[[Any, Any], Any], left: Any, right: Any) -> Any:
    _meter.get().turn()
    numbers = isinstance(left, (int, float)), isinstance(right, (int, float))
    if all(numbers):
        if operator in ("*", "**") and isinstance(left, int) and isinstance(right, int):
            bits = left.bit_length() * abs(right) if operator == "**" else left.bit_length() + right.bit_length()
            if bits > _MOST_BITS:
                raise BeyondError
        return function(left, right)
    if operator == "*" and any(numbers):
        value, times = (right, left) if numbers[0] else (left, right)
        _bound(_size(value) * max(1, int(times)))
    elif operator == "+":
        _size(left, right)
    elif operator == "%" or isinstance(left, _VIEWS):
        raise BeyondError
    return _made(function(left, right))


# The environments


def _tojson(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    """JSON as models were trained on: not escaped for HTML, as Jinja's own filter would."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _counted_tojson(value: Any, *args: Any, **kwargs: Any) -> str:
    indent = kwargs.get("indent", args[1] if len(args) > 1 else None)
    separators = kwargs.get("separators", args[2] if len(args) > 2 else None)
    if separators is not None and (not isinstance(separators, (list, tuple)) or _size(*separators) > _PART):
        raise BeyondError
    if indent is not None:
        if not isinstance(indent, int) or indent > _MOST_INDENT:
            raise BeyondError
        _bound(_size(value) * max(1, indent) * _depth(value))
    return _tojson(value, *args, **kwargs)


def compile_template(source: str, counted: bool) -> jinja2.Template:
    """The template; the names that it finds are those that transformers offers.

    Raises
    ------
    BeyondError
        It is too long for the counted way.
    jinja2.TemplateError
        It isn't valid.
    """
    from jinja2 import TemplateError, Undefined, ext, nodes, pass_context
    from jinja2.runtime import LoopContext, Macro
    from jinja2.sandbox import ImmutableSandboxedEnvironment
    from jinja2.utils import Cycler, Joiner, Namespace

    if counted and len(source) > _SOURCE:
        raise BeyondError

    class Generation(ext.Extension):
        """`{% generation %}` marks the model's words for training; here it does nothing."""

        tags = {"generation"}  # noqa: RUF012 (Jinja declares it so)

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)

    class CountedEnvironment(ImmutableSandboxedEnvironment):
        intercepted_binops = frozenset({"+", "-", "*", "/", "//", "**", "%"})

        def call(self, context: Any, function: Any, *args: Any, **kwargs: Any) -> Any:  # type: ignore[override]
            _meter.get().turn()
            # Jinja passes variables of the block and the loop along, which aren't arguments.
            given = [*args, *(value for name, value in kwargs.items() if name not in ("_loop_vars", "_block_vars"))]
            _size(*(value for value in given if not isinstance(value, Namespace)))
            method = getattr(function, "__wrapped__", function)  # the sandbox wraps str.format
            subject: Any = getattr(method, "__self__", None)
            name = getattr(method, "__name__", "")
            methods = next((names for kind, names in _METHODS.items() if isinstance(subject, kind)), None)
            if methods is not None:
                if name not in methods:
                    raise BeyondError
                if name == "replace":
                    _check_replace(subject, *given)
                elif name == "format":
                    fields = subject.count("{")
                    if fields != len(_PLAIN_FIELD.findall(subject)):
                        raise BeyondError
                    _bound(len(subject) + fields * _size(*given))
                elif name == "join" and given:
                    items = given[0] if isinstance(given[0], (str, Mapping, *_VIEWS)) else list(given[0])
                    _check_join(subject, items)
                    args = (items,)
            elif not (
                isinstance(function, (Macro, LoopContext, Undefined, Joiner))
                or isinstance(subject, (LoopContext, Cycler))
                or any(function is value for value in self.globals.values())
            ):
                raise BeyondError
            return _made(super().call(context, function, *args, **kwargs))

        def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
            return _operated(operator, self.binop_table[operator], left, right)

    def raise_exception(message: str) -> None:
        raise TemplateError(message)

    def strftime_now(format: str) -> str:
        return datetime.now().strftime(format)

    # Jinja doesn't work such a function out while it compiles.
    @pass_context
    def finalize(context: Any, value: Any) -> Any:
        meter = _meter.get()
        meter.turn()
        meter.make(_size(value))
        return value

    options: dict[str, Any] = {"trim_blocks": True, "lstrip_blocks": True, "extensions": [Generation, ext.loopcontrols]}
    environment = (
        CountedEnvironment(finalize=finalize, optimized=False, **options)
        if counted
        else ImmutableSandboxedEnvironment(optimized=False, **options)
    )
    environment.filters["tojson"] = _counted_tojson if counted else _tojson
    del environment.globals["lipsum"]
    environment.globals |= {"raise_exception": raise_exception, "strftime_now": strftime_now}
    if not counted:
        return environment.from_string(source)
    environment.filters = {name: _guarded_filter(name, function) for name, function in environment.filters.items()}
    environment.tests = {name: _guarded_test(name, function) for name, function in environment.tests.items()}
    ours = (_turns, _joined, _literal, _compared, _sliced)
    environment.filters |= {function.__name__: function for function in ours}
    return environment.from_string(_counted_nodes(environment.parse(source), nodes))


def _counted_nodes(node: Any, nodes: Any) -> Any:
    """The node, where what is below it and itself are counted; see the functions named here."""

    def through(function: Callable[..., Any], value: Any, *args: Any) -> Any:
        return nodes.Filter(value, function.__name__, list(args), [], None, None, lineno=node.lineno)

    for name, value in node.iter_fields():
        parts = value if isinstance(value, list) else [value]
        parts = [_counted_nodes(part, nodes) if isinstance(part, nodes.Node) else part for part in parts]
        setattr(node, name, parts if isinstance(value, list) else parts[0])
    none = nodes.Const(None, lineno=node.lineno)
    if isinstance(node, nodes.For):
        node.iter = through(_turns, node.iter)
    elif isinstance(node, nodes.Output):  # text between the braces is counted as values are
        texts = [isinstance(part, nodes.TemplateData) for part in node.nodes]
        pairs = zip(node.nodes, texts, strict=True)
        node.nodes = [nodes.Const(part.data, lineno=part.lineno) if text else part for part, text in pairs]
    elif isinstance(node, nodes.Concat):
        return through(_joined, nodes.Tuple(node.nodes, "load", lineno=node.lineno))
    elif isinstance(node, (nodes.List, nodes.Dict)) or (isinstance(node, nodes.Tuple) and node.ctx == "load"):
        return through(_literal, node)
    elif isinstance(node, nodes.Compare):
        names = [(nodes.Const(operand.op, lineno=node.lineno), operand.expr) for operand in node.ops]
        return through(_compared, node.expr, *(part for pair in names for part in pair))
    elif isinstance(node, nodes.Getitem) and isinstance(node.arg, nodes.Slice):
        bounds = (node.arg.start, node.arg.stop, node.arg.step)
        return through(_sliced, node.node, *(none if bound is None else bound for bound in bounds))
    return node


def render(template: jinja2.Template, context: dict[str, Any]) -> str:
    """A compiled template's text. Raises whatever it raises."""
    return "".join(template.root_render_func(template.new_context(context)))


def render_counted(template: jinja2.Template, context: dict[str, Any]) -> str:
    """The text of a template that was compiled to be counted.

    Raises
    ------
    BeyondError
        It would take more than is allowed here.
    Exception
        Whatever it raises.
    """
    used = _meter.set(_Meter())
    try:
        _size(context)
        return render(template, context)
    finally:
        _meter.reset(used)


def failure(what: str, error: BaseException, template: Any = None) -> str:
    """One line about an error, with the template's line that it comes from."""
    line: int | None = getattr(error, "lineno", None)
    trace: Any = error.__traceback__
    while trace is not None:
        if template is not None and trace.tb_frame.f_globals.get("__jinja_template__") is template:
            line = template.get_corresponding_lineno(trace.tb_lineno)
        trace = trace.tb_next
    words = "it takes too much memory" if isinstance(error, MemoryError) else " ".join(str(error)[:1000].split())
    return f"{what}{f' (line {line})' if line else ''}: {words or type(error).__name__}"


# The process

#: what a process writes first; before that may stand whatever Python is set to print
READY = b"ggpy renders templates\n"
TEXT, FAILED = b"T", b"F"


def read_message(stream: IO[bytes], most: int | None = None) -> tuple[bytes, bytes]:
    """A message's kind and content.

    Raises
    ------
    EOFError
        The stream ends, or the content is longer than `most` bytes.
    """
    head = stream.read(9)
    n = int.from_bytes(head[1:], "little")
    if len(head) < 9 or (most is not None and n > most):
        raise EOFError
    content = stream.read(n)
    if len(content) < n:
        raise EOFError
    return head[:1], content


def write_message(stream: IO[bytes], kind: bytes, content: bytes) -> None:
    """The inverse of `read_message`."""
    stream.write(kind + len(content).to_bytes(8, "little"))
    stream.write(content)
    stream.flush()


def serve(most_seconds: int, most_memory: int, most_text: int) -> None:
    """What the process does: takes the template's source, then contexts, and answers each with a text or a failure."""
    import signal

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that waits for this one
    source, answers = sys.stdin.buffer, sys.stdout.buffer
    answers.write(b"\n" + READY)
    answers.flush()
    template, what = None, "the chat template can't be read"
    with suppress(EOFError):
        text = read_message(source)[1].decode("utf-8", "surrogatepass")
        import jinja2.sandbox  # noqa: F401 (before the limits)

        while True:
            context = pickle.loads(read_message(source)[1])
            _limit(most_seconds, most_memory)
            try:
                if template is None:
                    template = compile_template(text, counted=False)
                what = "the chat template failed"
                rendered = render(template, context)
                if len(rendered) > most_text:
                    raise MemoryError
                answer = TEXT, rendered.encode("utf-8", "surrogatepass")
            except Exception as error:
                answer = FAILED, failure(what, error, template).encode("utf-8", "replace")
            write_message(answers, *answer)


def _limit(most_seconds: int, most_memory: int) -> None:
    """Sets what this process may take for one text; a system without such limits has the caller's clock alone."""
    try:
        import resource
    except ImportError:
        return
    used = resource.getrusage(resource.RUSAGE_SELF)
    seconds = int(used.ru_utime + used.ru_stime) + most_seconds + 1
    limits = {"AS": most_memory, "CPU": seconds, "CORE": 0, "FSIZE": 0, "NOFILE": 16, "NPROC": 0}
    for name, limit in limits.items():
        with suppress(ValueError, OSError, AttributeError):
            kind = getattr(resource, f"RLIMIT_{name}")
            resource.setrlimit(kind, (limit, resource.getrlimit(kind)[1]))
