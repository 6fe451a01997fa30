"""What a block type is: its size in values and bytes, the layout of a block, and its numpy decoder and encoder."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from ..errors import UnsupportedError

#: values that are decoded or encoded at a time, so that temporary arrays stay small whatever the tensor's size
CHUNK = 1 << 18


@dataclass(frozen=True, eq=False)
class BlockType:
    """A ggml type: every row of a tensor is cut into blocks of `block_size` values, each stored in `n_bytes` bytes.

    Attributes
    ----------
    name : str
        ggml's name, such as "Q4_K".
    id : int
        ggml's number, as it stands in GGUF files.
    block_size : int
        Values in a block; 1 for plain numbers.
    dtype : numpy.dtype
        Layout of a block: a structured dtype, or that of the number.
    decode : callable or None
        (n_blocks,) of `dtype` -> float32 values, n_blocks × block_size in any shape. None: no decoder.
    encode : callable or None
        float32 (n_blocks, block_size) -> (n_blocks,) of `dtype`. None: no encoder.
    """

    name: str
    id: int
    block_size: int
    dtype: np.dtype
    decode: Callable[[np.ndarray], np.ndarray] | None = None
    encode: Callable[[np.ndarray], np.ndarray] | None = None

    @property
    def n_bytes(self) -> int:
        """Bytes of a block."""
        return self.dtype.itemsize

    def row_bytes(self, n: int) -> int:
        """Bytes of a row of `n` values.

        Raises
        ------
        ValueError
            `n` isn't a multiple of `block_size`.
        """
        if n % self.block_size:
            raise ValueError(f"a row of {n} values can't be cut into {self.name} blocks of {self.block_size}")
        return n // self.block_size * self.n_bytes

    def dequantize(self, blocks: np.ndarray) -> np.ndarray:
        """Decodes rows of blocks.

        Parameters
        ----------
        blocks : numpy.ndarray
            uint8 (..., row_bytes).

        Returns
        -------
        numpy.ndarray
            float32 (..., n), always a new array.

        Raises
        ------
        UnsupportedError
            There is no decoder for this type.
        ValueError
            `blocks` isn't uint8, or its rows aren't whole blocks.
        """
        if self.decode is None:
            raise UnsupportedError(f"{self.name} blocks can't be decoded")
        if blocks.dtype != np.uint8 or blocks.ndim == 0 or blocks.shape[-1] % self.n_bytes:
            raise ValueError(
                f"{self.name} rows are uint8 and multiples of {self.n_bytes} bytes, not {blocks.dtype} {blocks.shape}"
            )
        shape = (*blocks.shape[:-1], blocks.shape[-1] // self.n_bytes * self.block_size)
        flat = np.ascontiguousarray(blocks).reshape(-1).view(self.dtype)  # (n_blocks,)
        out = np.empty((flat.size, self.block_size), np.float32)
        step = CHUNK // self.block_size
        with np.errstate(all="ignore"):  # damaged or unusual scales: infinities and NaN come out, as they are stored
            for start in range(0, flat.size, step):
                part = out[start : start + step]
                part[...] = self.decode(flat[start : start + step]).reshape(part.shape)
        return out.reshape(shape)

    def quantize(self, values: np.ndarray) -> np.ndarray:
        """Encodes rows of values.

        Parameters
        ----------
        values : numpy.ndarray
            float32 (..., n), n a multiple of `block_size`.

        Returns
        -------
        numpy.ndarray
            uint8 (..., row_bytes), always a new array.

        Raises
        ------
        UnsupportedError
            There is no encoder for this type.
        ValueError
            `values` isn't float32, or its rows can't be cut into blocks.
        """
        if self.encode is None:
            raise UnsupportedError(f"there is no encoder for {self.name}")
        if values.dtype != np.float32 or values.ndim == 0:
            raise ValueError(f"{self.name} encodes rows of float32, not {values.dtype} {values.shape}")
        shape = (*values.shape[:-1], self.row_bytes(values.shape[-1]))
        flat = np.ascontiguousarray(values).reshape(-1, self.block_size)
        out = np.empty(len(flat), self.dtype)
        step = CHUNK // self.block_size
        with np.errstate(all="ignore"):  # scales that vanish or overflow
            for start in range(0, len(flat), step):
                out[start : start + step] = self.encode(flat[start : start + step])
        return out.view(np.uint8).reshape(shape)
