"""A memory-mapped file."""

from __future__ import annotations

import mmap
import os
import stat
import weakref
from contextlib import suppress
from pathlib import Path

import numpy as np

from ..errors import Error, GGUFError
from ..kernels import faults


class Mapped:
    """A whole file, mapped for reading.

    The map is given back when the file is closed and the last array that views it is gone. A file that is changed in place
    meanwhile is found by `check`, before and after a use; what couldn't be read in between reads as zeros on Linux, where
    kernels are loaded, and ends this process elsewhere (`kernels.faults`). Replacing a file does no harm, see
    `writing_aside`.

    Parameters
    ----------
    path : Path
        A regular file.

    Raises
    ------
    GGUFError
        There is no such file, it is a folder or a device, it is empty or may not be read.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._buffer: memoryview | None = None
        try:
            status = path.stat()  # before opening, which would wait for the other end of a pipe
            if not stat.S_ISREG(status.st_mode):
                raise GGUFError(f"{path}: not a regular file")
            if status.st_size == 0:
                raise GGUFError(f"{path}: the file is empty")
            with path.open("rb") as file:
                self._stamp = _stamp(os.fstat(file.fileno()))
                mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
                self._buffer = memoryview(mapped)
                start = np.frombuffer(mapped, np.uint8).ctypes.data
                self._watched = faults.watch(start, len(mapped))
                weakref.finalize(mapped, faults.forget, self._watched)
        except OSError as error:
            raise GGUFError(f"{path}: {error.strerror}") from None
        except ValueError as error:  # a path with a null character, a file that was emptied meanwhile
            raise GGUFError(f"{path}: {error}") from None

    @property
    def buffer(self) -> memoryview:
        """The file's bytes.

        Raises
        ------
        Error
            The file was closed.
        """
        if self._buffer is None:
            raise Error(f"{self.path}: the file is closed")
        return self._buffer

    def prefetch(self, offset: int, n_bytes: int) -> None:
        """Tells the system that these bytes will be needed soon: it reads them, and this call doesn't wait."""
        start = offset // mmap.PAGESIZE * mmap.PAGESIZE
        self.buffer.obj.madvise(mmap.MADV_WILLNEED, start, offset + n_bytes - start)  # type: ignore[attr-defined]

    def drop(self, offset: int, n_bytes: int) -> None:
        """Gives back the memory of the whole pages among these bytes; they are read again when they are used again."""
        start = -(-offset // mmap.PAGESIZE) * mmap.PAGESIZE
        n = (offset + n_bytes) // mmap.PAGESIZE * mmap.PAGESIZE - start
        if n <= 0:
            return
        self.buffer.obj.madvise(mmap.MADV_DONTNEED, start, n)  # type: ignore[attr-defined]
        if hasattr(os, "posix_fadvise"):  # from the page cache, too; the file may be gone from its path
            with suppress(OSError), self.path.open("rb") as file:
                os.posix_fadvise(file.fileno(), start, n, os.POSIX_FADV_DONTNEED)

    def close(self) -> None:
        """Lets go of the map."""
        self._buffer = None

    def check(self) -> None:
        """Sees to it that the file is what it was when it was opened; takes microseconds.

        Raises
        ------
        GGUFError
            It was changed in place, or a part of it couldn't be read.
        ValueError
            It was closed.
        """
        changed = self.buffer.obj.size() != len(self.buffer)  # type: ignore[attr-defined]
        with suppress(OSError):  # the file may be gone from its path, or another be there
            now = _stamp(self.path.stat())
            changed = changed or (now[:2] == self._stamp[:2] and now != self._stamp)
        if changed or faults.is_damaged(self._watched):
            raise GGUFError(f"{self.path}: the file was changed after it was opened, or can't be read; open it anew")


def _stamp(status: os.stat_result) -> tuple[int, int, int]:
    return status.st_dev, status.st_ino, status.st_mtime_ns
