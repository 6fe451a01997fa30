"""Writing GGUF files tensor by tensor, so that they are whole or not there."""

from __future__ import annotations

import os
import shutil
import struct
from collections.abc import Callable, Generator, Sequence
from contextlib import ExitStack, closing
from typing import TYPE_CHECKING, BinaryIO, NamedTuple

import numpy as np

from ..errors import Error
from .aside import folder_of, writing_aside

if TYPE_CHECKING:
    from pathlib import Path

    import gguf


class NewFile(NamedTuple):
    """A file to write.

    Attributes
    ----------
    path : Path
    writer : gguf.GGUFWriter
        With all metadata and the descriptions of the tensors.
    tensors : sequence of (str, callable)
        In the same order, each one's name and the function that gives its bytes: uint8 arrays, some rows each.
    """

    path: Path
    writer: gguf.GGUFWriter
    tensors: Sequence[tuple[str, Callable[[], Generator[np.ndarray, None, None]]]]


def write_files(
    files: Sequence[NewFile],
    path: str | os.PathLike[str],
    n_bytes: int,
    progress: Callable[[int, int, str], None] | None = None,
) -> None:
    """Writes a model's file, or its files, which appear together once the last is whole; else nothing is left.

    Parameters
    ----------
    files : sequence of NewFile
    path : path-like
        The model's name in messages; its folder is the files' one.
    n_bytes : int
        Of all tensors.
    progress : callable, optional
        Called as progress(done_bytes, total_bytes, tensor) after each piece.

    Raises
    ------
    Error
        The disk is too small or gets full, the file can't be written, a value isn't of its type, or Ctrl-C was pressed.
    """
    done = 0
    try:
        free = shutil.disk_usage(folder_of(path)).free
        if free < n_bytes:
            raise Error(f"{path}: needs {megabytes(n_bytes)}, the disk has {megabytes(free)} left")
        with ExitStack() as asides:
            for new in files:
                aside = asides.enter_context(writing_aside(new.path))
                with closing(new.writer):
                    new.writer.write_header_to_file(aside)
                    try:
                        new.writer.write_kv_data_to_file()
                    except (struct.error, OverflowError, UnicodeEncodeError) as error:
                        raise Error(f"{path}: its metadata would have a value that GGUF can't hold: {error}") from error
                    new.writer.write_ti_data_to_file()
                with aside.open("ab") as out:
                    _pad(out, new.writer.data_alignment)
                    for name, data in new.tensors:
                        with closing(data()) as pieces:
                            for piece in pieces:
                                out.write(piece.data)
                                done += piece.nbytes
                                if progress is not None:
                                    progress(done, n_bytes, name)
                        _pad(out, new.writer.data_alignment)
    except KeyboardInterrupt:
        raise Error(f"{path}: interrupted at {100 * done // max(1, n_bytes)} %, nothing was kept") from None


def _pad(out: BinaryIO, alignment: int) -> None:
    out.write(bytes(-out.tell() % alignment))


def megabytes(n_bytes: int) -> str:
    """A number of bytes in words."""
    return f"{n_bytes / 1e6:,.0f} MB" if n_bytes >= 1e6 else f"{n_bytes / 1e3:,.0f} kB"
