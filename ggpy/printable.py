"""Text from files, made fit for messages and terminals."""

import re


def printable(text: str, most: int | None = None) -> str:
    r"""The text on one line, where a terminal can do nothing but show it.

    Control characters, marks of the direction of writing and lone surrogates are written as escapes (`\x1b`); of a text
    of more than `most` characters the middle is left out.
    """
    text = _cut(text, most)
    return _cut("".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text), most)


def _cut(text: str, most: int | None) -> str:
    if most is None or len(text) <= most:
        return text
    end = (most - 1) // 4
    return f"{text[: most - 1 - end]}…{text[len(text) - end :]}"


def one_line(text: str, most: int) -> str:
    """The same, where lines that follow each other are joined by spaces."""
    return printable(re.sub(r"\s*[\r\n]\s*", " ", text[: 10 * most]).strip(), most)


def visible(text: str) -> str:
    """The text with its lines and tabs, where a terminal can do nothing but show it."""
    if text.isprintable():
        return text
    return "".join(c if c in "\n\t" else printable(c) for c in text)
