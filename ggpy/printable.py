"""Text from files, made fit for messages and terminals."""

import re
import unicodedata


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


def counted(n: int, noun: str) -> str:
    """A number of things: "1 error", "2 errors"."""
    return f"{n:,} {noun}" if n == 1 else f"{n:,} {noun}s"


def one_line(text: str, most: int) -> str:
    """The same, where lines that follow each other are joined by spaces."""
    return printable(re.sub(r"\s*[\r\n]\s*", " ", text[: 10 * most]).strip(), most)


def visible(text: str) -> str:
    """The text with its lines and tabs, where a terminal can do nothing but show it.

    What joins or spaces characters in a script stays, unlike in `printable`: text is to look as it was written.
    """
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or _is_of_text(c) else printable(c) for c in text)


def _is_of_text(c: str) -> bool:
    """Whether a character, though Python calls it not printable, belongs to texts: spaces of all widths, what emoji and
    scripts join with, characters newer than Python's tables. Not so control characters, lone surrogates, separators of
    lines, and marks that turn the order of what follows."""
    return c in "\n\t" or not (unicodedata.category(c) in ("Cc", "Cs", "Zl", "Zp") or c in _TURNING)


_TURNING = "\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"
