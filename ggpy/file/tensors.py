"""Tensors of a GGUF file: their descriptions, checked, and their data."""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ..errors import UnsupportedError
from ..quant import BlockType, block_type, foreign_type
from .cursor import Cursor, shorten
from .mapped import Mapped

#: longest name that the GGUF specification allows, in bytes
LONGEST_NAME = 64
MOST_DIMS = 4
#: shortest description: a name's length, no name, no dimensions, type and offset
LEAST_BYTES = 24
MOST_TENSORS = 1 << 18
#: tensors have fewer values, so that numpy can hold them as numbers of any type
MOST_VALUES = 1 << 59

_N_DIMS = struct.Struct("<I")
_DIMS = tuple(struct.Struct(f"<{n_dims}Q") for n_dims in range(MOST_DIMS + 1))
_TYPE_AND_OFFSET = struct.Struct("<IQ")


@dataclass(frozen=True, eq=False)
class GGUFTensor:
    """A tensor of a GGUF file.

    Attributes
    ----------
    name : str
    type : str
        Its block type, a key of `ggpy.quant.BLOCK_TYPES`.
    shape : tuple of int
        In numpy's order: the values of a row are last. GGUF's own order is the reverse.
    n_bytes : int
        Size of the data.
    offset : int
        Byte offset of the data in the file `path`.
    """

    name: str
    type: str
    shape: tuple[int, ...]
    n_bytes: int
    offset: int
    _mapped: Mapped = field(repr=False)

    @property
    def path(self) -> Path:
        """The file that holds the data, one of several where a model is split."""
        return self._mapped.path

    @property
    def data(self) -> np.ndarray:
        """The blocks: a read-only view of the memory map, uint8 (*shape[:-1], row_bytes).

        Raises
        ------
        ValueError
            The file was closed. Views taken before stay valid.
        GGUFError
            The file isn't what it was when it was opened.
        """
        self._mapped.check()
        row_bytes = block_type(self.type).row_bytes(self.shape[-1])
        return np.frombuffer(self._mapped.buffer, np.uint8, self.n_bytes, self.offset).reshape(*self.shape[:-1], row_bytes)

    def prefetch(self, first: int, n_bytes: int) -> None:
        """Tells the system that n_bytes of the data, from byte `first` on, will be needed soon. Doesn't wait."""
        self._mapped.prefetch(self.offset + first, n_bytes)

    def drop(self, first: int, n_bytes: int) -> None:
        """Gives back the memory that these bytes of the data take; they are read again when they are used again."""
        self._mapped.drop(self.offset + first, n_bytes)

    def dequantize(self) -> np.ndarray:
        """The values, a new float32 array of `shape`.

        Raises
        ------
        UnsupportedError
            The tensor's type can't be decoded.
        ValueError
            The file was closed.
        GGUFError
            The file isn't what it was when it was opened.
        """
        values = block_type(self.type).dequantize(self.data)
        self._mapped.check()
        return values


class _Info(NamedTuple):
    """A tensor's description as it is in the file: dimensions in GGUF's order, data's offset from the data's start."""

    dims: tuple[int, ...]
    type_id: int
    offset: int
    #: byte offset of this description, for error messages
    position: int


def read_tensors(cursor: Cursor, n_tensors: int, alignment: int, mapped: Mapped) -> list[GGUFTensor]:
    """Reads and checks the descriptions of `n_tensors` tensors."""
    infos: dict[str, _Info] = {}
    for i in range(n_tensors):
        cursor.where = f"tensor {i} of {n_tensors}"
        name = cursor.identifier("tensor's name", LONGEST_NAME)
        cursor.where = f"tensor {shorten(name)}"
        if name in infos:
            raise cursor.error("there are two tensors of this name")
        infos[name] = _read_info(cursor)

    data_start = -(-cursor.position // alignment) * alignment
    tensors = []
    for name, info in infos.items():
        cursor.where = f"tensor {shorten(name)}"
        cursor.position = info.position
        kind, n_bytes = _check_size(cursor, info)
        offset = data_start + info.offset
        if info.offset % alignment:
            raise cursor.error(f"the data's offset {info.offset} isn't a multiple of the alignment {alignment}")
        if offset + n_bytes > len(cursor.buffer):
            raise cursor.error(
                f"the data, {n_bytes} bytes at byte {offset}, reach beyond the end of the file at byte {len(cursor.buffer)}"
            )
        tensors.append(GGUFTensor(name, kind.name, info.dims[::-1], n_bytes, offset, mapped))
    return tensors


def _read_info(cursor: Cursor) -> _Info:
    position = cursor.position
    (n_dims,) = cursor.numbers(_N_DIMS)
    if n_dims > MOST_DIMS:
        cursor.position = position
        raise cursor.error(f"{n_dims} dimensions; at most {MOST_DIMS} are allowed")
    dims = cursor.numbers(_DIMS[n_dims]) or (1,)  # a scalar is a row of one value
    type_id, offset = cursor.numbers(_TYPE_AND_OFFSET)
    return _Info(dims, type_id, offset, position)


def _check_size(cursor: Cursor, info: _Info) -> tuple[BlockType, int]:
    """A tensor's type and its size in bytes."""
    try:
        kind = block_type(info.type_id)
    except UnsupportedError:
        what = foreign_type(info.type_id)
        raise cursor.error(f"unknown tensor type {info.type_id}{f': {what}' if what else ''}") from None
    if info.dims[0] % kind.block_size:
        raise cursor.error(f"rows of {info.dims[0]} values can't be cut into {kind.name} blocks of {kind.block_size}")
    # a dimension of 0 doesn't excuse the others: numpy refuses such shapes too
    if math.prod(max(dim, 1) for dim in info.dims) >= MOST_VALUES:
        raise cursor.error(f"the shape {info.dims[::-1]} is too large")
    return kind, math.prod(info.dims) // kind.block_size * kind.n_bytes
