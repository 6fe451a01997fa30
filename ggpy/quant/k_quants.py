"""K-quants: super-blocks of 256 values, cut into 16 or 8 sub-blocks whose small scales (and minima) are integers times
the super-block's float16 `d` (and `dmin`): value = d * scale * q - dmin * minimum.

The layouts are those of ggml's ggml-common.h.
"""

import numpy as np

from .blocks import BlockType
from .unpack import bits, float32

_Q2_K = np.dtype([("scales", "u1", 16), ("qs", "u1", 64), ("d", "<f2"), ("dmin", "<f2")])
_Q3_K = np.dtype([("hmask", "u1", 32), ("qs", "u1", 64), ("scales", "u1", 12), ("d", "<f2")])
_Q4_K = np.dtype([("d", "<f2"), ("dmin", "<f2"), ("scales", "u1", 12), ("qs", "u1", 128)])
_Q5_K = np.dtype([("d", "<f2"), ("dmin", "<f2"), ("scales", "u1", 12), ("qh", "u1", 32), ("qs", "u1", 128)])
_Q6_K = np.dtype([("ql", "u1", 128), ("qh", "u1", 64), ("scales", "i1", 16), ("d", "<f2")])


def _by_sub_block(q: np.ndarray, sub_blocks: int) -> np.ndarray:
    """(n_blocks, 256) integers -> float32 (n_blocks, sub_blocks, 256 / sub_blocks)"""
    return q.astype(np.float32).reshape(len(q), sub_blocks, -1)


def _scales_and_minima(packed: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Six-bit scales and minima of 8 sub-blocks from 12 bytes.

    Bytes 0..3 hold scales 0..3 and bytes 4..7 minima 0..3 in their low six bits. Bytes 8..11 hold the low four bits of
    scales 4..7 (low half) and minima 4..7 (high half), whose upper two bits are the top bits of bytes 0..3 and 4..7.

    uint8 (n_blocks, 12) -> uint8 (n_blocks, 8), uint8 (n_blocks, 8)
    """
    first, second, third = packed[:, :4], packed[:, 4:8], packed[:, 8:]
    scales = np.concatenate([first & 63, (third & 15) | (first >> 6 << 4)], axis=1)
    minima = np.concatenate([second & 63, (third >> 4) | (second >> 6 << 4)], axis=1)
    return scales, minima


def _decode_q2_k(blocks: np.ndarray) -> np.ndarray:
    # low half of a scale's byte: scale; high half: minimum
    scale = float32(blocks["d"]) * (blocks["scales"] & 15).astype(np.float32)  # (n_blocks, 16)
    minimum = float32(blocks["dmin"]) * (blocks["scales"] >> 4).astype(np.float32)
    q = _by_sub_block(bits(blocks["qs"], 2, 32), 16)
    return scale[:, :, None] * q - minimum[:, :, None]


def _decode_q3_k(blocks: np.ndarray) -> np.ndarray:
    # Six-bit scales: low four bits as halves of 8 bytes, upper two as quarters of 4 bytes; 32 stands for 0.
    packed = blocks["scales"]
    scales = bits(packed[:, :8], 4, 8) | bits(packed[:, 8:], 2, 4) << 4  # (n_blocks, 16)
    scale = float32(blocks["d"]) * (scales.astype(np.float32) - 32)
    # The high bit counts 4, and 4 is subtracted: 4 less where it is clear.
    q = bits(blocks["qs"], 2, 32) | bits(blocks["hmask"], 1, 32) << 2
    return scale[:, :, None] * (_by_sub_block(q, 16) - 4)


def _decode_q4_k(blocks: np.ndarray) -> np.ndarray:
    scales, minima = _scales_and_minima(blocks["scales"])
    scale = float32(blocks["d"]) * scales.astype(np.float32)  # (n_blocks, 8)
    minimum = float32(blocks["dmin"]) * minima.astype(np.float32)
    q = _by_sub_block(bits(blocks["qs"], 4, 32), 8)
    return scale[:, :, None] * q - minimum[:, :, None]


def _decode_q5_k(blocks: np.ndarray) -> np.ndarray:
    scales, minima = _scales_and_minima(blocks["scales"])
    scale = float32(blocks["d"]) * scales.astype(np.float32)  # (n_blocks, 8)
    minimum = float32(blocks["dmin"]) * minima.astype(np.float32)
    q = _by_sub_block(bits(blocks["qs"], 4, 32) | bits(blocks["qh"], 1, 32) << 4, 8)
    return scale[:, :, None] * q - minimum[:, :, None]


def _decode_q6_k(blocks: np.ndarray) -> np.ndarray:
    scale = float32(blocks["d"]) * blocks["scales"].astype(np.float32)  # (n_blocks, 16)
    q = bits(blocks["ql"], 4, 64) | bits(blocks["qh"], 2, 32) << 4
    return scale[:, :, None] * (_by_sub_block(q, 16) - 32)


TYPES = (
    BlockType("Q2_K", 10, 256, _Q2_K, _decode_q2_k),
    BlockType("Q3_K", 11, 256, _Q3_K, _decode_q3_k),
    BlockType("Q4_K", 12, 256, _Q4_K, _decode_q4_k),
    BlockType("Q5_K", 13, 256, _Q5_K, _decode_q5_k),
    BlockType("Q6_K", 14, 256, _Q6_K, _decode_q6_k),
)
