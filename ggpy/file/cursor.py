"""Reading numbers and strings from a mapped file, never past its end."""

from __future__ import annotations

import struct
from array import array
from pathlib import Path

from ..errors import GGUFError

#: a vocabulary has up to a million strings, its merges as many; a hole in a file reads as empty strings without end
MOST_STRINGS = 1 << 23

_LENGTH = struct.Struct("<Q")


def shorten(text: str) -> str:
    """`text` in quotes and on one line, cut where it would flood an error message."""
    return repr(text if len(text) <= 80 else text[:77] + "...")


class Cursor:
    """A position in a mapped file that moves on as values are read.

    Attributes
    ----------
    position : int
        Byte offset of what is read next.
    where : str
        What is being read, for error messages.
    """

    def __init__(self, path: Path, buffer: memoryview) -> None:
        self.path = path
        self.buffer = buffer
        self.position = 0
        self.where = "header"
        self._n_strings = 0

    def error(self, problem: str) -> GGUFError:
        """The error to raise: file, place, byte offset and `problem`."""
        return GGUFError(f"{self.path}: {self.where}, byte {self.position}: {problem}")

    @property
    def remaining(self) -> int:
        """Bytes from the position to the end of the file."""
        return len(self.buffer) - self.position

    def numbers(self, layout: struct.Struct) -> tuple[int, ...]:
        """Reads numbers laid out as `layout`."""
        if layout.size > self.remaining:
            raise self.error(f"the file ends after {self.remaining} of {layout.size} bytes")
        values = layout.unpack_from(self.buffer, self.position)
        self.position += layout.size
        return values

    def count(self, what: str, least_bytes: int, most: int | None = None) -> int:
        """Reads a count, up to `most`, of things of at least `least_bytes` bytes each, so that the file bounds it."""
        (count,) = self.numbers(_LENGTH)
        if count * least_bytes > self.remaining:
            self.position -= _LENGTH.size
            raise self.error(f"{count} {what} can't be in the {self.remaining - _LENGTH.size} bytes that follow")
        if most is not None and count > most:
            self.position -= _LENGTH.size
            raise self.error(f"{count} {what}; ggpy reads up to {most}")
        return count

    def identifier(self, what: str, longest: int) -> str:
        """Reads a key or a tensor's name of at most `longest` bytes: UTF-8 without what a terminal would obey."""
        start = self.position
        length = self.count(f"bytes of a {what}", 1)
        if length > longest:
            self.position = start
            raise self.error(f"a {what} of {length} bytes; {longest} are allowed")
        text = bytes(self.buffer[self.position : self.position + length])
        try:
            decoded = text.decode("utf-8")
        except UnicodeDecodeError:
            raise self.error(f"the {what} {text!r} isn't UTF-8") from None
        if not decoded.isprintable():
            raise self.error(f"the {what} {shorten(decoded)} has control characters")
        self.position += length
        return decoded

    def string_bounds(self, n_strings: int) -> array[int]:
        """Walks over `n_strings` strings, of which the file may have MOST_STRINGS in all.

        Returns
        -------
        array of uint64
            n_strings + 1 offsets: string i, with its 8 bytes of length, lies between offsets i and i + 1.
        """
        self._n_strings += n_strings
        if self._n_strings > MOST_STRINGS:
            raise self.error(f"{self._n_strings} strings in the file; ggpy reads up to {MOST_STRINGS}")
        buffer, unpack_from, position = self.buffer, _LENGTH.unpack_from, self.position
        last = len(buffer) - _LENGTH.size
        bounds = array("Q", (position,))
        for _ in range(n_strings):
            if position > last:
                break
            position += _LENGTH.size + unpack_from(buffer, position)[0]
            if position > len(buffer):
                break
            bounds.append(position)
        if len(bounds) <= n_strings:
            self.position = bounds[-1]
            raise self.error(f"string {len(bounds) - 1} of {n_strings} reaches beyond the file's end")
        self.position = position
        return bounds
