"""Text files."""

from __future__ import annotations

import os
from pathlib import Path

from ..errors import Error


def read_text(path: str | os.PathLike[str]) -> str:
    """A text file's content.

    Raises
    ------
    Error
        It isn't UTF-8; says where.
    """
    try:
        return Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise Error(f"{path}: isn't text in UTF-8: {error.reason} at byte {error.start}") from error
