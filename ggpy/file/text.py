"""Text files."""

from __future__ import annotations

import os
import stat
import sys
from pathlib import Path

from ..errors import Error


def read_text(path: str | os.PathLike[str]) -> str:
    """A text file's content, its line ends as they are; "-" is standard input.

    Raises
    ------
    Error
        It isn't UTF-8, says where; or it is a device, which may have no end.
    """
    if os.fspath(path) == "-":
        return read_input()
    mode = Path(path).stat().st_mode
    if stat.S_ISCHR(mode) or stat.S_ISBLK(mode):
        raise Error(f"{path}: a device, not a text file")
    return _decoded(Path(path).read_bytes(), os.fspath(path), "utf-8")


def read_input() -> str:
    """The text on standard input, its line ends as they are: UTF-8, unless PYTHONIOENCODING says otherwise.

    Raises
    ------
    Error
        It is closed, or isn't such text.
    """
    if sys.stdin is None or sys.stdin.closed:
        raise Error("standard input is closed, and no text is given otherwise")
    if not hasattr(sys.stdin, "buffer"):  # replaced by other programs
        return sys.stdin.read()
    encoding = sys.stdin.encoding if os.environ.get("PYTHONIOENCODING") else "utf-8"
    return _decoded(sys.stdin.buffer.read(), "standard input", encoding)


def _decoded(content: bytes, name: str, encoding: str) -> str:
    try:
        return content.decode(encoding)
    except UnicodeDecodeError as error:
        raise Error(f"{name}: isn't text in {encoding.upper()}: {error.reason} at byte {error.start}") from None
