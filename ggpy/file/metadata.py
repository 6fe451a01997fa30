"""A file's key-values. Their places are noted when the file is opened; the values are read when asked for."""

from __future__ import annotations

import struct
from array import array
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np

from .cursor import Cursor, shorten

#: longest key that the GGUF specification allows, in bytes
LONGEST_KEY = 65535
#: shortest key-value: a key's length, a character, the value's type, a byte
LEAST_BYTES = 14
MOST_ENTRIES = 1 << 16

_BOOL, _STRING, _ARRAY = 7, 8, 9
#: GGUF's number of a value type -> its dtype
_DTYPES: dict[int, np.dtype] = {
    0: np.dtype("u1"),
    1: np.dtype("i1"),
    2: np.dtype("<u2"),
    3: np.dtype("<i2"),
    4: np.dtype("<u4"),
    5: np.dtype("<i4"),
    6: np.dtype("<f4"),
    _BOOL: np.dtype("u1"),
    10: np.dtype("<u8"),
    11: np.dtype("<i8"),
    12: np.dtype("<f8"),
}
UINT32 = 4

_TYPE = struct.Struct("<I")
#: bytes of a string's length
_LENGTH = 8


class StringArray(Sequence[str]):
    """Strings of a mapped file, decoded when asked for. Bytes that aren't UTF-8 become U+FFFD; see `bytes`.

    Parameters
    ----------
    buffer : memoryview
        The mapped file.
    bounds : array of uint64
        See `Cursor.string_bounds`.
    """

    def __init__(self, buffer: memoryview, bounds: array[int]) -> None:
        self._buffer = buffer
        self._bounds = bounds

    def __len__(self) -> int:
        return len(self._bounds) - 1

    def __getitem__(self, index):  # type: ignore[no-untyped-def]
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        return self.bytes(index).decode("utf-8", "replace")

    def __iter__(self) -> Iterator[str]:
        buffer = self._buffer
        for start, stop in pairwise(self._bounds):
            yield str(buffer[start + _LENGTH : stop], "utf-8", "replace")

    def __repr__(self) -> str:
        return f"<StringArray of {len(self)} strings>"

    def bytes(self, index: int) -> bytes:
        """The bytes of string `index`, as they are in the file."""
        index = range(len(self))[index]
        return bytes(self._buffer[self._bounds[index] + _LENGTH : self._bounds[index + 1]])

    def tolist(self) -> list[str]:
        """All strings."""
        return list(self)


class Entry(NamedTuple):
    """Where a value is.

    Attributes
    ----------
    type_id : int
        GGUF's number of the value's, or of an array's items', type.
    offset : int
        Byte offset of the value or of the first item.
    n_items : int or None
        Of an array; None where the value isn't an array.
    bounds : array of uint64, or None
        Of strings, see `Cursor.string_bounds`.
    """

    type_id: int
    offset: int
    n_items: int | None
    bounds: array[int] | None


def read_entries(cursor: Cursor, n_entries: int) -> dict[str, Entry]:
    """Notes where the values of `n_entries` key-values are, and moves the cursor behind them."""
    entries: dict[str, Entry] = {}
    for i in range(n_entries):
        cursor.where = f"key {i} of {n_entries}"
        key = cursor.identifier("key", LONGEST_KEY)
        cursor.where = f"key {shorten(key)}"
        if not key:
            raise cursor.error("a key must not be empty")
        if key in entries:
            raise cursor.error("the key is there twice")
        entries[key] = _read_entry(cursor)
    return entries


def _read_entry(cursor: Cursor) -> Entry:
    (type_id,) = cursor.numbers(_TYPE)
    is_array = type_id == _ARRAY
    if is_array:
        (type_id,) = cursor.numbers(_TYPE)
    if type_id not in _DTYPES and type_id != _STRING:
        cursor.position -= _TYPE.size
        raise cursor.error("arrays of arrays aren't supported" if type_id == _ARRAY else f"unknown value type {type_id}")
    n_bytes = _LENGTH if type_id == _STRING else _DTYPES[type_id].itemsize
    n_items = cursor.count("items", n_bytes) if is_array else None
    n_values = 1 if n_items is None else n_items
    offset = cursor.position
    if type_id == _STRING:
        return Entry(type_id, offset, n_items, cursor.string_bounds(n_values))
    if n_values * n_bytes > cursor.remaining:
        raise cursor.error(f"the file ends after {cursor.remaining} of the value's {n_bytes} bytes")
    cursor.position += n_values * n_bytes
    return Entry(type_id, offset, n_items, None)


def read_value(buffer: memoryview, entry: Entry) -> Any:
    """A value as a bool, int, float or str; an array as a numpy view of the file or a StringArray."""
    if entry.bounds is not None:
        strings = StringArray(buffer, entry.bounds)
        return strings[0] if entry.n_items is None else strings
    values = np.frombuffer(buffer, _DTYPES[entry.type_id], 1 if entry.n_items is None else entry.n_items, entry.offset)
    if entry.type_id == _BOOL:
        values = values != 0  # a copy: numpy's bools have to be 0 or 1
    return values[0].item() if entry.n_items is None else values


class Metadata(Mapping[str, Any]):
    """The key-values of a mapped file, in the file's order; a value is read each time that it is asked for.

    Numbers come as int, float and bool; strings as str, with U+FFFD for what isn't UTF-8; arrays of numbers as
    read-only numpy views of the file, arrays of bools as copies, and arrays of strings as StringArray.

    Parameters
    ----------
    mapped : object with an attribute `buffer`
        The file; `buffer` raises Error once it is closed.
    entries : dict
        Key -> place of its value.
    """

    def __init__(self, mapped: Any, entries: dict[str, Entry]) -> None:
        self._mapped = mapped
        self._entries = entries

    def __getitem__(self, key: str) -> Any:
        return read_value(self._mapped.buffer, self._entries[key])

    def kind(self, key: str) -> tuple[int, bool]:
        """GGUF's number of the type of a value, or of an array's items, and whether it is an array."""
        entry = self._entries[key]
        return entry.type_id, entry.n_items is not None

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, key: object) -> bool:
        return key in self._entries

    def __repr__(self) -> str:
        return f"<Metadata of {len(self)} keys>"
