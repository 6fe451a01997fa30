"""Blocks of 32 values with one float16 scale `d`, and in the _1 types one float16 offset `m`: value = d * q + m.

The layouts are those of ggml's ggml-common.h. A byte of `qs` holds the low four bits of value i and of value i + 16;
bit i of `qh` is the fifth bit of value i.
"""

import numpy as np

from .blocks import BlockType
from .unpack import float32

_Q4_0 = np.dtype([("d", "<f2"), ("qs", "u1", 16)])
_Q4_1 = np.dtype([("d", "<f2"), ("m", "<f2"), ("qs", "u1", 16)])
_Q5_0 = np.dtype([("d", "<f2"), ("qh", "u1", 4), ("qs", "u1", 16)])
_Q5_1 = np.dtype([("d", "<f2"), ("m", "<f2"), ("qh", "u1", 4), ("qs", "u1", 16)])
_Q8_0 = np.dtype([("d", "<f2"), ("qs", "i1", 32)])


def _unpack4(blocks: np.ndarray) -> np.ndarray:
    """The values' low four bits, uint8 (n_blocks, 32)."""
    qs = blocks["qs"]
    return np.concatenate([qs & 15, qs >> 4], axis=1)


def _unpack5(blocks: np.ndarray) -> np.ndarray:
    """The values' five bits, uint8 (n_blocks, 32)."""
    return _unpack4(blocks) | np.unpackbits(blocks["qh"], axis=1, bitorder="little") << 4


def _pack4(blocks: np.ndarray, q: np.ndarray) -> None:
    blocks["qs"] = (q[:, :16] & 15) | (q[:, 16:] << 4)


def _pack5(blocks: np.ndarray, q: np.ndarray) -> None:
    _pack4(blocks, q)
    blocks["qh"] = np.packbits(q >> 4, axis=1, bitorder="little")


def _decode_q4_0(blocks: np.ndarray) -> np.ndarray:
    return float32(blocks["d"]) * (_unpack4(blocks).astype(np.float32) - 8)


def _decode_q4_1(blocks: np.ndarray) -> np.ndarray:
    return float32(blocks["d"]) * _unpack4(blocks).astype(np.float32) + float32(blocks["m"])


def _decode_q5_0(blocks: np.ndarray) -> np.ndarray:
    return float32(blocks["d"]) * (_unpack5(blocks).astype(np.float32) - 16)


def _decode_q5_1(blocks: np.ndarray) -> np.ndarray:
    return float32(blocks["d"]) * _unpack5(blocks).astype(np.float32) + float32(blocks["m"])


def _decode_q8_0(blocks: np.ndarray) -> np.ndarray:
    return blocks["qs"].astype(np.float32) * float32(blocks["d"])


def _inverse(d: np.ndarray) -> np.ndarray:
    """1 / d, and 0 where d is 0."""
    return np.where(d == 0, np.float32(0), 1 / d)


def _encode_symmetric(values: np.ndarray, dtype: np.dtype, zero: int) -> tuple[np.ndarray, np.ndarray]:
    """Scales such that the value farthest from 0 becomes q = 0; q = `zero` stands for 0."""
    farthest = np.abs(values).argmax(axis=1)[:, None]
    d = np.take_along_axis(values, farthest, axis=1) / -zero  # (n_blocks, 1)
    q = np.trunc(values * _inverse(d) + np.float32(zero + 0.5)).astype(np.uint8).clip(0, 2 * zero - 1)
    blocks = np.empty(len(values), dtype)
    blocks["d"] = d[:, 0]
    return blocks, q


def _encode_from_minimum(values: np.ndarray, dtype: np.dtype, largest: int) -> tuple[np.ndarray, np.ndarray]:
    """Scales such that the least value becomes q = 0 and the greatest q = `largest`."""
    low = values.min(axis=1, keepdims=True)
    d = (values.max(axis=1, keepdims=True) - low) / largest  # (n_blocks, 1)
    q = np.trunc((values - low) * _inverse(d) + np.float32(0.5)).astype(np.uint8).clip(0, largest)
    blocks = np.empty(len(values), dtype)
    blocks["d"] = d[:, 0]
    blocks["m"] = low[:, 0]
    return blocks, q


def _encode_q4_0(values: np.ndarray) -> np.ndarray:
    blocks, q = _encode_symmetric(values, _Q4_0, 8)
    _pack4(blocks, q)
    return blocks


def _encode_q4_1(values: np.ndarray) -> np.ndarray:
    blocks, q = _encode_from_minimum(values, _Q4_1, 15)
    _pack4(blocks, q)
    return blocks


def _encode_q5_0(values: np.ndarray) -> np.ndarray:
    blocks, q = _encode_symmetric(values, _Q5_0, 16)
    _pack5(blocks, q)
    return blocks


def _encode_q5_1(values: np.ndarray) -> np.ndarray:
    blocks, q = _encode_from_minimum(values, _Q5_1, 31)
    _pack5(blocks, q)
    return blocks


def _encode_q8_0(values: np.ndarray) -> np.ndarray:
    d = np.abs(values).max(axis=1, keepdims=True) / 127  # (n_blocks, 1)
    scaled = values * _inverse(d)
    # C's roundf: halves away from zero. Adding 0.5 before the floor would round 0.49999997 up.
    magnitude = np.abs(scaled)
    whole = np.floor(magnitude)
    whole += np.floor(2 * (magnitude - whole))
    blocks = np.empty(len(values), _Q8_0)
    blocks["d"] = d[:, 0]
    blocks["qs"] = (np.sign(scaled) * whole).astype(np.int8)
    return blocks


TYPES = (
    BlockType("Q4_0", 2, 32, _Q4_0, _decode_q4_0, _encode_q4_0),
    BlockType("Q4_1", 3, 32, _Q4_1, _decode_q4_1, _encode_q4_1),
    BlockType("Q5_0", 6, 32, _Q5_0, _decode_q5_0, _encode_q5_0),
    BlockType("Q5_1", 7, 32, _Q5_1, _decode_q5_1, _encode_q5_1),
    BlockType("Q8_0", 8, 32, _Q8_0, _decode_q8_0, _encode_q8_0),
)
