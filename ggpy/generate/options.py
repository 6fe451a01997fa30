"""The options of sampling: one table of names, defaults, ranges and words, for the API, the command line and servers.

The table is `SamplingOptions` itself: each field's type stands in its annotation, the rest in the `Option` beside it. The
order is that in which `sampling.StandardSampler` takes its steps, which is llama.cpp's.
"""

import reprlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from inspect import Parameter, signature
from math import inf, isfinite
from numbers import Integral, Real
from textwrap import TextWrapper
from typing import (
    TYPE_CHECKING,
    Annotated,
    Any,
    Literal,
    Protocol,
    TypeAlias,
    TypedDict,
    TypeVar,
    get_args,
    get_type_hints,
    runtime_checkable,
)

import numpy as np
from numpy.typing import NDArray

from ..errors import Error

if TYPE_CHECKING:
    from .model import Model

F = TypeVar("F", bound=Callable[..., Any])


@dataclass(frozen=True)
class Option:
    """What is to know of an option.

    Attributes
    ----------
    default, off
        Its value if not given, and the one that switches its step off. None: nothing to switch off.
    allowed : callable
        Whether a value of the right kind is in range.
    words : str
        What it may be; goes on after "must be".
    help : str
        What it does, a sentence.
    """

    default: Any
    off: Any
    allowed: Callable[[Any], bool]
    words: str
    help: str


@dataclass(frozen=True)
class Other:
    """What is to know of an option that isn't the standard sampler's: its default, and what it does."""

    default: Any
    help: str


Logits: TypeAlias = NDArray[np.float32]

#: Called with the ids so far, the prompt's among them, and a copy of the logits (n_vocab,); gives float32 logits of the
#: same shape.
Processor: TypeAlias = Callable[[Sequence[int], Logits], Logits]


class Sampler(Protocol):
    """What chooses tokens. A generation asks its own sampler for one after the other, so that it may keep a state."""

    def sample(self, logits: Logits, ids: Sequence[int], /) -> int:
        """Choose a token.

        Parameters
        ----------
        logits : float32 array (n_vocab,)
            -inf rules a token out.
        ids : sequence of int
            The ids so far, the prompt's among them.
        """


@runtime_checkable
class HasJSONSchema(Protocol):
    """What has a JSON schema: pydantic's models."""

    def model_json_schema(self) -> dict[str, Any]:
        """The schema."""


#: A mapping, its JSON text, a class with `model_json_schema()`, or True: any JSON object.
JSONSchema: TypeAlias = Mapping[str, Any] | str | bool | HasJSONSchema


class Drafter(Protocol):
    """What guesses the next tokens of one generation, for the model to check in one run."""

    def propose(self, ids: Sequence[int], most: int, /) -> Sequence[int]:
        """Guess how a sequence goes on.

        Parameters
        ----------
        ids : sequence of int
            The ids so far, the prompt's among them. They begin with those of the call before.
        most : int
            How many guesses can be used, 1 or more.

        Returns
        -------
        sequence of int
            Token ids; none where nothing likely is known.
        """


_SHARE = (lambda x: 0 <= x <= 1, "a number from 0 to 1")
_NOT_NEGATIVE = (lambda x: x >= 0, "a number, 0 or more")
_ANY = (lambda x: True, "a number")
_COUNT = (lambda x: x >= 0, "a whole number, 0 or more")
_WINDOW = (lambda x: x >= -1, "a whole number, 0 or more, or -1 for all")


class SamplingOptions(TypedDict, total=False):
    """How the next token is chosen; all of it may be left out."""

    logit_bias: Annotated[
        Mapping[int, float],
        Option(
            {},
            {},
            lambda x: all(i >= 0 and (isfinite(v) or v == -inf) for i, v in x.items()),
            "token ids with what is added to their logits: numbers, or -inf",
            "Adds to logits, by token id; -inf rules a token out.",
        ),
    ]
    repetition_penalty: Annotated[
        float,
        Option(
            1.0,
            1.0,
            lambda x: x > 0,
            "a number above 0",
            "Divides positive logits of recent tokens and multiplies negative ones.",
        ),
    ]
    frequency_penalty: Annotated[
        float, Option(0.0, 0.0, *_ANY, "Taken from a recent token's logit, for each time that it stands there.")
    ]
    presence_penalty: Annotated[float, Option(0.0, 0.0, *_ANY, "Taken from a recent token's logit, once.")]
    penalty_window: Annotated[int, Option(64, 0, *_WINDOW, "How many tokens are recent; -1: all.")]
    dry_multiplier: Annotated[
        float,
        Option(0.0, 0.0, *_NOT_NEGATIVE, "DRY: what a token loses that would make a repeated sequence too long."),
    ]
    dry_base: Annotated[
        float,
        Option(1.75, None, lambda x: x >= 1, "a number, 1 or more", "DRY: times this for each token more than allowed."),
    ]
    dry_allowed_length: Annotated[int, Option(2, None, *_COUNT, "DRY: how long a sequence may be repeated.")]
    dry_window: Annotated[int, Option(-1, 0, *_WINDOW, "DRY: tokens in which repetitions are looked for; -1: all.")]
    dry_sequence_breakers: Annotated[
        Sequence[str],
        Option(("\n", ":", '"', "*"), None, all, "a list of texts, none empty", "DRY: texts that end a sequence."),
    ]
    top_n_sigma: Annotated[
        float,
        Option(0.0, 0.0, *_NOT_NEGATIVE, "Leaves logits up to this many standard deviations below the highest; 0: all."),
    ]
    top_k: Annotated[int, Option(40, 0, *_COUNT, "Leaves this many of the likeliest tokens; 0: all.")]
    typical_p: Annotated[
        float,
        Option(1.0, 1.0, *_SHARE, "Leaves the most typical tokens that hold this share of the probability; 1: all."),
    ]
    top_p: Annotated[
        float, Option(0.95, 1.0, *_SHARE, "Leaves the likeliest tokens that hold this share of the probability; 1: all.")
    ]
    min_p: Annotated[
        float, Option(0.05, 0.0, *_NOT_NEGATIVE, "Leaves tokens at least this times as likely as the likeliest; 0: all.")
    ]
    xtc_probability: Annotated[
        float, Option(0.0, 0.0, *_SHARE, "XTC: how often all but the least likely of the likely tokens are left out.")
    ]
    xtc_threshold: Annotated[
        float, Option(0.1, None, *_SHARE, "XTC: the probability from which a token is likely; above 0.5: never.")
    ]
    temperature: Annotated[
        float, Option(0.8, 1.0, *_NOT_NEGATIVE, "Divides the logits of the tokens left; 0 takes the likeliest.")
    ]
    dynatemp_range: Annotated[
        float, Option(0.0, 0.0, *_NOT_NEGATIVE, "How far the temperature goes down and up with the tokens' entropy.")
    ]
    dynatemp_exponent: Annotated[
        float, Option(1.0, None, *_NOT_NEGATIVE, "Power of the entropy's share in the temperature's range.")
    ]
    mirostat: Annotated[
        int,
        Option(0, 0, lambda x: x in (0, 2), "0 (off) or 2", "2: Mirostat 2.0 in place of all from top-n-sigma to XTC."),
    ]
    mirostat_tau: Annotated[float, Option(5.0, None, *_NOT_NEGATIVE, "Mirostat: the surprise aimed at, in bits.")]
    mirostat_eta: Annotated[float, Option(0.1, None, *_SHARE, "Mirostat: how fast it adapts.")]
    seed: Annotated[
        int | None,
        Option(None, None, lambda x: x >= 0, "a whole number, 0 or more, or None", "The same seed gives the same text."),
    ]


class GenerationOptions(SamplingOptions, total=False):
    """What a generation takes beside its prompt; all of it may be left out."""

    max_tokens: Annotated[
        int | None, Other(None, "Tokens at most; None or -1: until the model ends or the context is full.")
    ]
    stop: Annotated[str | Sequence[str] | None, Other((), "Texts that end the generation; they are not part of it.")]
    logprobs: Annotated[
        int | None,
        Other(None, "Pieces carry the log-probability of their token and of this many of the likeliest ones."),
    ]
    sampler: Annotated[
        Sampler | None,
        Other(
            None,
            "Chooses the tokens, by its `sample(logits, ids)`, instead of the sampling options. One that keeps a state is "
            "for one generation.",
        ),
    ]
    processors: Annotated[
        Sequence[Processor],
        Other(
            (),
            "Called before the sampler, in turn, as f(ids, logits) with the ids so far, the prompt's among them, and "
            "float32 logits (n_vocab,), a copy; each returns logits of the same shape. -inf rules a token out.",
        ),
    ]
    json_schema: Annotated[
        JSONSchema | None,
        Other(
            None,
            "The text is JSON that this schema allows: a mapping, its JSON text, or a class with `model_json_schema()`, "
            "as pydantic's models are; True: any JSON object. Keywords that can't be kept to are refused.",
        ),
    ]
    regex: Annotated[
        str | None,
        Other(
            None,
            "The whole text matches this regular expression, in the syntax of Rust's: Python's without lookaround and "
            "backreferences.",
        ),
    ]
    grammar: Annotated[
        str | None,
        Other(
            None,
            "The text keeps to this grammar: in Lark's syntax as llguidance has it, where terminals are cut off as long as "
            "they can be, or in llama.cpp's (GBNF).",
        ),
    ]
    lookup: Annotated[
        bool | int,
        Other(
            False,
            "Guesses several tokens at once where the text repeats what came before, as copies and edits do, and checks "
            "them in one run. Changes speed, never text. A number: how many at most.",
        ),
    ]
    draft: Annotated[
        "Model | Drafter | Literal['mtp'] | None",
        Other(
            None,
            "A smaller model with the same vocabulary, or a `Drafter`, that guesses the next tokens instead; one that "
            "keeps a state is for one generation. 'mtp': the layer that some files carry for that.",
        ),
    ]


class ChatOptions(GenerationOptions, total=False):
    """What a reply takes beside its messages; all of it may be left out."""

    tools: Annotated[
        Sequence[Mapping[str, Any]] | None, Other(None, "JSON schemas of functions that the model may ask for.")
    ]
    chat_template_kwargs: Annotated[
        Mapping[str, Any] | None,
        Other(None, "Whatever else the model's chat template knows, such as {'enable_thinking': False}."),
    ]


@cache
def option_table() -> dict[str, tuple[Any, Option]]:
    """Each option's type and what else is to know of it, by name and in order."""
    hints = get_type_hints(SamplingOptions, include_extras=True)
    return {name: (get_args(hint)[0], get_args(hint)[1]) for name, hint in hints.items()}


def checked_option(name: str, value: object) -> Any:
    """The value of an option, as its type.

    Raises
    ------
    Error
        The value is of another kind, or out of range.
    """
    kind, option = option_table()[name]
    try:
        value = _KINDS[kind](value)
        if value is None or option.allowed(value):
            return value
    except (TypeError, ValueError, OverflowError):
        pass
    raise Error(f"{name} must be {option.words}; got {reprlib.repr(value)}")


def checked_options(options: Mapping[str, object]) -> dict[str, Any]:
    """All options, those left out by their defaults.

    Raises
    ------
    Error
        A value is of another kind, or out of range.
    TypeError
        There is no such option.
    """
    table = option_table()
    unknown = [name for name in options if name not in table]
    if unknown:
        raise TypeError(f"no option {unknown[0]!r}; there are {', '.join(table)}")
    return {name: checked_option(name, options.get(name, option.default)) for name, (_, option) in table.items()}


def _whole(value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError
    return int(value)


def _number(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, Real) or not isfinite(value):
        raise TypeError
    return float(value)


def _bias(value: object) -> dict[int, float]:
    if not isinstance(value, Mapping):
        raise TypeError
    return {_whole(i): -inf if v == -inf else _number(v) for i, v in value.items()}


def _texts(value: object) -> tuple[str, ...]:
    if isinstance(value, str) or not isinstance(value, Iterable):
        raise TypeError
    texts = tuple(value)
    if not all(isinstance(t, str) for t in texts):
        raise TypeError
    return texts


# What makes a value of an option's type of what was given.
_KINDS: dict[Any, Callable[[object], Any]] = {
    int: _whole,
    float: _number,
    int | None: lambda x: None if x is None else _whole(x),
    Mapping[int, float]: _bias,
    Sequence[str]: _texts,
}


def with_options(options: type) -> Callable[[F], F]:
    """Writes options into the docstring and signature of a function or class that takes them as its last parameter, a
    `**` of one of the classes above.

    The docstring has a line "**options" where they go.
    """

    def written(function: F) -> F:
        kept = [p for p in signature(function).parameters.values() if p.kind is not Parameter.VAR_KEYWORD]
        added, lines = [], []
        hints = get_type_hints(options, localns={"Model": _Model}, include_extras=True)
        for name, hint in hints.items():
            kind, option = get_args(hint)[0], get_args(hint)[1]
            added.append(Parameter(name, Parameter.KEYWORD_ONLY, default=option.default, annotation=kind))
            lines.append((f"{name} : {_KIND_NAMES.get(name) or _kind_name(kind)}, default {option.default!r}", option.help))
        # Those of the generation first, then how tokens are chosen.
        own = [name for name in hints if name not in option_table()]
        order = sorted(range(len(added)), key=lambda i: added[i].name not in own)
        function.__signature__ = signature(function).replace(parameters=[*kept, *(added[i] for i in order)])  # type: ignore[attr-defined]
        before, mark, after = (function.__doc__ or "").partition("**options\n")
        if mark:
            indent = before[before.rfind("\n") + 1 :]
            text = TextWrapper(len(indent) + 112, initial_indent=f"{indent}    ", subsequent_indent=f"{indent}    ")
            all_lines = [line for i in order for line in (indent + lines[i][0], *text.wrap(lines[i][1]))]
            function.__doc__ = before + "\n".join(all_lines).lstrip() + "\n" + after
        return function

    return written


#: where the type would be hard to read
_KIND_NAMES = {
    "sampler": "Sampler",
    "processors": "sequence of callable",
    "json_schema": "mapping, str, class or True",
    "draft": "Model | Drafter | 'mtp' | None",
}


class _Model:
    """Stands for `Model` in annotations, which is made of this module's parts."""


def _kind_name(kind: Any) -> str:
    name = kind.__name__ if kind in (int, float) else str(kind)
    return name.replace("collections.abc.", "").replace("typing.", "")
