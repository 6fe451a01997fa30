"""Writing a file so that it is whole or not there."""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ..errors import Error

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]


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

    After any exception, KeyboardInterrupt included, what was written is removed and an older file at `path` stays. What a
    process left that was killed is removed by the next one that writes to `path`.

    Parameters
    ----------
    path : str or path-like
        Where the file shall be. A symbolic link is followed.

    Yields
    ------
    Path
        Where to write it, in the same folder: an empty file.

    Raises
    ------
    Error
        The folder doesn't exist, `path` is there and isn't a regular file, or nothing or not all could be written.
    """
    target = Path(os.path.realpath(path))
    folder_of(path)
    if target.exists() and not target.is_file():
        raise Error(f"{path}: not a regular file, won't be overwritten")
    _remove_leftovers(target)
    aside, lock = _new(target)
    try:
        yield aside
        if not aside.stat().st_size:
            raise Error(f"{path}: nothing was written")
        _sync(aside, os.O_RDWR)
        os.replace(aside, target)
    except BaseException as error:
        aside.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.filename in (None, str(aside)):  # else it is about another file
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise Error(f"{path}: no space left, nothing was kept") from error
            raise Error(f"{path}: can't be written: {error.strerror or error}") from error
        raise
    finally:
        if lock is not None:
            os.close(lock)
    if os.name == "posix":  # makes the new name last, too; other systems can't open folders
        _sync(target.parent, os.O_RDONLY)


def _new(target: Path) -> tuple[Path, int | None]:
    """A new file beside `target`, and what keeps it locked while this process lives, where there are such locks."""
    while True:
        aside = target.with_name(f".{target.name}.{os.urandom(4).hex()}.part")
        lock = os.open(aside, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o666)
        if fcntl is None:
            os.close(lock)
            return aside, None
        with suppress(OSError):  # a file system without locks
            fcntl.flock(lock, fcntl.LOCK_EX)
        if aside.exists():  # else another process took it for a leftover, before it was locked
            return aside, lock
        os.close(lock)


def _remove_leftovers(target: Path) -> None:
    """Removes what processes that were killed have left of `target`. What is being written is locked."""
    if fcntl is None:
        return
    part = re.compile(rf"\.{re.escape(target.name)}\.[0-9a-f]{{8}}\.part")
    for entry in [entry for entry in os.scandir(target.parent) if part.fullmatch(entry.name)]:
        with suppress(OSError):
            descriptor = os.open(entry.path, os.O_RDWR | os.O_NOFOLLOW)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                os.unlink(entry.path)
            finally:
                os.close(descriptor)


def _sync(path: Path, flags: int) -> None:
    descriptor = os.open(path, flags)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
