"""Plain numbers: a block is one value."""

import numpy as np

from .blocks import BlockType


def _to_float32(values: np.ndarray) -> np.ndarray:
    return values.astype(np.float32)


def _decode_bf16(halves: np.ndarray) -> np.ndarray:
    """The upper halves of float32 values."""
    return (halves.astype(np.uint32) << 16).view(np.float32)


def _encode_bf16(values: np.ndarray) -> np.ndarray:
    """Rounds to the nearest, ties to even; NaN stays NaN and is made quiet."""
    bits = values[:, 0].view(np.uint32)
    is_nan = (bits & 0x7FFFFFFF) > 0x7F800000
    quiet = (bits >> 16) | 0x40
    rounded = (bits + (0x7FFF + ((bits >> 16) & 1))) >> 16
    return np.where(is_nan, quiet, rounded).astype("<u2")


TYPES = (
    BlockType("F32", 0, 1, np.dtype("<f4"), _to_float32, lambda values: values[:, 0]),
    BlockType("F16", 1, 1, np.dtype("<f2"), _to_float32, lambda values: values[:, 0].astype("<f2")),
    BlockType("I8", 24, 1, np.dtype("i1"), _to_float32),
    BlockType("I16", 25, 1, np.dtype("<i2"), _to_float32),
    BlockType("I32", 26, 1, np.dtype("<i4"), _to_float32),
    BlockType("I64", 27, 1, np.dtype("<i8"), _to_float32),
    BlockType("F64", 28, 1, np.dtype("<f8"), _to_float32),
    BlockType("BF16", 30, 1, np.dtype("<u2"), _decode_bf16, _encode_bf16),
)
