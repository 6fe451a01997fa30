"""The options of sampling as flags, from their one table."""

import shlex
from collections.abc import Callable, Mapping, Sequence
from inspect import Parameter, signature
from typing import Annotated, Any, TypeVar

import typer

from ..errors import Error
from ..generate.options import checked_option, option_table

F = TypeVar("F", bound=Callable[..., None])

# What the command line has for types that it can't write: repeated flags.
_WRITTEN = {Mapping[int, float]: list[str] | None, Sequence[str]: list[str] | None}
_MORE_HELP = {Mapping[int, float]: " As ID=NUMBER; may be repeated.", Sequence[str]: ' May be repeated; "none": none.'}


def with_sampling_flags(command: F) -> F:
    """Gives a command that takes `**sampling` a flag for each option; what they say, `sampling_values` reads."""
    parameters = [p for p in signature(command).parameters.values() if p.kind is not Parameter.VAR_KEYWORD]
    annotations = {n: a for n, a in command.__annotations__.items() if n != "sampling"}
    for name, (kind, option) in option_table().items():
        flags = ["--temp", "--temperature"] if name == "temperature" else ["--" + name.replace("_", "-")]
        help = option.help + _MORE_HELP.get(kind, "")
        default = None if kind in _WRITTEN else option.default
        shown = " ".join(map(repr, option.default)) if kind == Sequence[str] else True
        flag = typer.Option(*flags, help=help, callback=_check(name), show_default=shown, rich_help_panel="Sampling")
        annotations[name] = Annotated[_WRITTEN.get(kind, kind), flag]
        parameters.append(Parameter(name, Parameter.KEYWORD_ONLY, default=default, annotation=annotations[name]))
    command.__signature__ = signature(command).replace(parameters=parameters)  # type: ignore[attr-defined]
    command.__annotations__ = annotations
    return command


def sampling_values(flags: Mapping[str, Any]) -> dict[str, Any]:
    """The options that flags stand for.

    Raises
    ------
    Error
        A value is out of its range.
    """
    return {name: _value(name, given) for name, given in flags.items() if given is not None}


def read_value(name: str, text: str) -> Any:
    """An option's value from a text; "none" stands for None, or for an empty list.

    Raises
    ------
    Error
        It is of another kind, or out of its range.
    """
    kind = option_table()[name][0]
    if kind == Sequence[str]:
        return _value(name, read_texts(text))
    if kind == Mapping[int, float]:
        return _value(name, [] if text == "none" else text.split())
    return checked_option(name, read_number(text))


def read_number(text: str) -> int | float | str | None:
    """A number from a text, None from "none"; else the text as it is, for whoever checks the value."""
    if text == "none":
        return None
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            pass
    return text


def read_texts(text: str) -> list[str]:
    r"""Texts, in quotes where they have spaces; \n and \t are line feeds and tabs, "none" is no text.

    Raises
    ------
    Error
        A quote isn't closed.
    """
    try:
        texts = [] if text == "none" else shlex.split(text)
    except ValueError as error:
        raise Error(f"{text}: {str(error).lower()}") from None
    return [t.replace("\\n", "\n").replace("\\t", "\t") for t in texts]


def _value(name: str, given: Any) -> Any:
    kind = option_table()[name][0]
    if kind == Sequence[str] and given == ["none"]:
        given = []
    if kind == Mapping[int, float]:
        try:
            given = {int(i): float(bias) for i, bias in (text.split("=") for text in given)}
        except ValueError:
            raise Error(f"{name} is written as ID=NUMBER, such as 13=-2.5, not {' '.join(given)!r}") from None
    return checked_option(name, given)


def _check(name: str) -> Callable[[Any], Any]:
    def check(given: Any) -> Any:
        if given is not None:
            try:
                _value(name, given)
            except Error as error:
                raise typer.BadParameter(str(error)) from None
        return given

    return check
