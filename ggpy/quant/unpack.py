"""Taking fields of packed blocks apart."""

import numpy as np


def float32(field: np.ndarray) -> np.ndarray:
    """A scalar of each block, (n_blocks,) float16 -> (n_blocks, 1) float32."""
    return field.astype(np.float32)[:, None]


def bits(field: np.ndarray, width: int, run: int) -> np.ndarray:
    """Unpacks numbers of `width` bits: of every `run` bytes first all lowest numbers, then all second lowest, ...

    uint8 (n_blocks, n) -> uint8 (n_blocks, n * 8 / width)
    """
    shifts = np.arange(0, 8, width, dtype=np.uint8)[:, None]
    runs = field.reshape(len(field), -1, 1, run)
    return ((runs >> shifts) & np.uint8((1 << width) - 1)).reshape(len(field), -1)


def fields(words: np.ndarray, shifts: tuple[int, ...], mask: int) -> np.ndarray:
    """The bits `mask` of each word, shifted by each of `shifts`: (n_blocks, n) -> (n_blocks, n * len(shifts))"""
    apart = words[:, :, None] >> np.array(shifts, words.dtype)
    return (apart & words.dtype.type(mask)).reshape(len(words), -1)
