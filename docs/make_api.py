"""Writes docs/api.md from the docstrings: python docs/make_api.py"""

import inspect
import re
from pathlib import Path

import ggpy

OUT = Path(__file__).parent / "api.md"

#: What is listed, in the order in which a reader meets it; classes with their public methods and properties.
PARTS = {
    "Opening a model": ("load", "Model"),
    "What a model generates": ("Generation", "Piece", "Score"),
    "Files of prompts": ("batch",),
    "Conversations": ("Session", "Reply"),
    "Choosing tokens": ("Sampler", "StandardSampler"),
    "Step by step": ("TokenSequence", "Tokenizer"),
    "Files": ("GGUFFile", "convert", "quantize"),
    "Errors": (
        "Error",
        "GGUFError",
        "UnsupportedError",
        "ConversionError",
        "TokenizerError",
        "GraphError",
        "ContextFullError",
    ),
}
HEAD = "Everything here is an attribute of `ggpy`. This page is made from the docstrings by `docs/make_api.py`."


def page() -> str:
    """The text of docs/api.md."""
    lines = ["# API", "", HEAD]
    for title, names in PARTS.items():
        lines += ["", f"## {title}"]
        for name in names:
            thing = getattr(ggpy, name)
            lines += ["", f"### {_call(name, thing)}", "", *_text(thing)]
            if inspect.isclass(thing) and not issubclass(thing, Exception):
                for member, value in _members(thing):
                    lines += ["", f"#### {_call(f'{name}.{member}', value)}", "", *_text(value)]
    return "\n".join(lines) + "\n"


def _members(thing: type) -> list[tuple[str, object]]:
    """Public methods and properties, as they stand in the class."""
    found = []
    for name, value in vars(thing).items():
        value = value.__func__ if isinstance(value, (classmethod, staticmethod)) else value
        value = getattr(value, "func", value)  # a cached property's function
        if not name.startswith("_") and (inspect.isfunction(value) or isinstance(value, property)) and value.__doc__:
            found.append((name, value))
    return found


def _call(name: str, thing: object) -> str:
    """A heading: a function with its parameters' names."""
    if isinstance(thing, property) or (inspect.isclass(thing) and issubclass(thing, Exception)) or not callable(thing):
        return f"`{name}`"
    try:
        parameters = list(inspect.signature(thing).parameters.values())
    except ValueError:
        return f"`{name}`"
    shown, keywords = [], False
    for parameter in parameters:
        if parameter.name in ("self", "cls", "_"):
            continue
        if parameter.kind is parameter.KEYWORD_ONLY and not keywords:
            keywords = True
            shown.append("*")
        shown.append(parameter.name)
    # Of long lists the first few: the rest stands below.
    if len(shown) > 12:
        shown = [*shown[:10], "…"]
    return f"`{name}({', '.join(shown)})`"


def _text(thing: object) -> list[str]:
    """A docstring as Markdown: sections as bold words, parameters as items."""
    doc = thing.fget.__doc__ if isinstance(thing, property) else getattr(thing, "__doc__", None)
    lines = inspect.cleandoc(doc or "").splitlines()
    out: list[str] = []
    section = False
    for i, line in enumerate(lines):
        if i + 1 < len(lines) and re.fullmatch(r"-{3,}", lines[i + 1]):
            out += [f"**{line}**", ""]
            section = True
        elif re.fullmatch(r"-{3,}", line):
            continue
        elif section and line and not line.startswith(" "):
            name, colon, kind = line.partition(" : ")
            out.append(f"- `{name}` ({kind}):" if colon else f"- `{name}`:")
        elif section and line:
            out.append(f"  {line.strip()}")
        else:
            out.append(line)
    return out


if __name__ == "__main__":
    OUT.write_text(page(), encoding="utf-8")
