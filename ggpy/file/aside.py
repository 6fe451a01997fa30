"""Writing a file so that it is whole or not there."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..errors import Error


def folder_of(path: str | os.PathLike[str]) -> Path:
    """The folder that a file is to be written into; a symbolic link is followed.

    Raises
    ------
    Error
        It doesn't exist. Worth asking before long work.
    """
    folder = Path(os.path.realpath(path)).parent
    if not folder.is_dir():
        raise Error(f"{path}: there is no folder {folder}")
    return folder


@contextmanager
def writing_aside(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Gives a path beside `path` to write to; the file is moved to `path` once the block is left without an error.

    After any exception, KeyboardInterrupt included, what was written is removed and an older file at `path` stays.

    Parameters
    ----------
    path : str or path-like
        Where the file shall be. A symbolic link is followed.

    Yields
    ------
    Path
        Where to write it, in the same folder. There is no file yet.

    Raises
    ------
    Error
        The folder doesn't exist, or `path` is there and isn't a regular file.
    """
    target = Path(os.path.realpath(path))
    folder_of(path)
    if target.exists() and not target.is_file():
        raise Error(f"{path}: not a regular file, won't be overwritten")
    aside = target.with_name(f".{target.name}.{os.urandom(4).hex()}.part")
    try:
        yield aside
        _sync(aside, os.O_RDWR)
        os.replace(aside, target)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise
    if os.name == "posix":  # makes the new name last, too; other systems can't open folders
        _sync(target.parent, os.O_RDONLY)


def _sync(path: Path, flags: int) -> None:
    descriptor = os.open(path, flags)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
