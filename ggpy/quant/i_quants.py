"""IQ types: super-blocks of 256 values whose magnitudes are points of a grid, 4 or 8 values a point, and whose signs are
kept apart. value = d * scale of the sub-block * coordinate, with its sign; IQ1's coordinates -1, 0, 1 are shifted by ±1/8
instead.

The layouts are those of ggml's ggml-common.h. Where seven of eight signs are kept, the last makes their sum even.
"""

import numpy as np

from .blocks import BlockType
from .grids import grid
from .unpack import fields, float32

_IQ2_XXS = np.dtype([("d", "<f2"), ("qs", [("points", "u1", 4), ("signs", "<u4")], 8)])
_IQ2_XS = np.dtype([("d", "<f2"), ("qs", "<u2", 32), ("scales", "u1", 8)])
_IQ2_S = np.dtype([("d", "<f2"), ("qs", "u1", 32), ("signs", "u1", 32), ("qh", "u1", 8), ("scales", "u1", 8)])
_IQ3_XXS = np.dtype([("d", "<f2"), ("qs", "u1", 64), ("signs", "<u4", 8)])
_IQ3_S = np.dtype([("d", "<f2"), ("qs", "u1", 64), ("qh", "u1", 8), ("signs", "u1", 32), ("scales", "u1", 4)])
_IQ1_S = np.dtype([("d", "<f2"), ("qs", "u1", 32), ("qh", "<u2", 8)])
_IQ1_M = np.dtype([("qs", "u1", 32), ("qh", "u1", 16), ("scales", "<u2", 4)])

#: seven kept signs -> all eight: the last one makes their number even
_EIGHT_SIGNS = np.array([signs | signs.bit_count() % 2 << 7 for signs in range(128)], np.uint8)
#: shift of IQ1's coordinates
_DELTA = np.float32(0.125)
_HALVES = (0, 4)
_SEVENS = (0, 7, 14, 21)


def _signed(scale: np.ndarray, points: np.ndarray, signs: np.ndarray) -> np.ndarray:
    """(n_blocks, n_scales) float32, 256 coordinates a block, (n_blocks, 32) bytes of eight signs -> values."""
    n_blocks, n_scales = scale.shape
    negative = np.unpackbits(signs, axis=1, bitorder="little").reshape(n_blocks, n_scales, -1)
    magnitudes = scale[:, :, None] * points.reshape(n_blocks, n_scales, -1)
    return magnitudes * np.where(negative, np.float32(-1), np.float32(1))


def _decode_iq2_xxs(blocks: np.ndarray) -> np.ndarray:
    packed = blocks["qs"]["signs"]
    scale = float32(blocks["d"]) * (np.float32(0.5) + (packed >> 28).astype(np.float32)) * np.float32(0.25)
    return _signed(scale, grid("IQ2_XXS")[blocks["qs"]["points"]], _EIGHT_SIGNS[fields(packed, _SEVENS, 127)])


def _decode_iq2_xs(blocks: np.ndarray) -> np.ndarray:
    scales = fields(blocks["scales"], _HALVES, 15).astype(np.float32)
    scale = float32(blocks["d"]) * (np.float32(0.5) + scales) * np.float32(0.25)
    return _signed(scale, grid("IQ2_XS")[blocks["qs"] & 511], _EIGHT_SIGNS[blocks["qs"] >> 9])


def _decode_iq2_s(blocks: np.ndarray) -> np.ndarray:
    scales = fields(blocks["scales"], _HALVES, 15).astype(np.float32)
    scale = float32(blocks["d"]) * (np.float32(0.5) + scales) * np.float32(0.25)
    places = blocks["qs"] | fields(blocks["qh"], (0, 2, 4, 6), 3).astype(np.uint16) << 8
    return _signed(scale, grid("IQ2_S")[places], blocks["signs"])


def _decode_iq3_xxs(blocks: np.ndarray) -> np.ndarray:
    packed = blocks["signs"]
    scale = float32(blocks["d"]) * (np.float32(0.5) + (packed >> 28).astype(np.float32)) * np.float32(0.5)
    return _signed(scale, grid("IQ3_XXS")[blocks["qs"]], _EIGHT_SIGNS[fields(packed, _SEVENS, 127)])


def _decode_iq3_s(blocks: np.ndarray) -> np.ndarray:
    scale = float32(blocks["d"]) * (1 + 2 * fields(blocks["scales"], _HALVES, 15).astype(np.float32))
    places = blocks["qs"] | fields(blocks["qh"], tuple(range(8)), 1).astype(np.uint16) << 8
    return _signed(scale, grid("IQ3_S")[places], blocks["signs"])


def _shifted(scale: np.ndarray, places: np.ndarray, negative: np.ndarray) -> np.ndarray:
    """Scales and signs of the shift, each for some points in a row -> values."""
    n_blocks = len(places)
    points = grid("IQ1")[places]  # (n_blocks, 32, 8)
    shift = np.where(negative, -_DELTA, _DELTA).reshape(n_blocks, -1, 1, 1)
    points = points.reshape(n_blocks, shift.shape[1], -1, 8) + shift
    return scale[:, :, None] * points.reshape(n_blocks, scale.shape[1], -1)


def _decode_iq1_s(blocks: np.ndarray) -> np.ndarray:
    qh = blocks["qh"]
    scale = float32(blocks["d"]) * (2 * (qh >> 12 & 7) + 1).astype(np.float32)  # (n_blocks, 8)
    return _shifted(scale, blocks["qs"] | fields(qh, (0, 3, 6, 9), 7) << 8, qh & 0x8000)


def _decode_iq1_m(blocks: np.ndarray) -> np.ndarray:
    # Of four words the top bits are d, four each, and the rest four scales of 16 values
    words = blocks["scales"]
    d = np.bitwise_or.reduce((words & 0xF000) >> np.array([12, 8, 4, 0], np.uint16), axis=1).view(np.float16)
    scale = float32(d) * (2 * fields(words, (0, 3, 6, 9), 7) + 1).astype(np.float32)  # (n_blocks, 16)
    high = fields(blocks["qh"], _HALVES, 15)
    return _shifted(scale, blocks["qs"] | (high & 7).astype(np.uint16) << 8, high & 8)


TYPES = (
    BlockType("IQ2_XXS", 16, 256, _IQ2_XXS, _decode_iq2_xxs),
    BlockType("IQ2_XS", 17, 256, _IQ2_XS, _decode_iq2_xs),
    BlockType("IQ3_XXS", 18, 256, _IQ3_XXS, _decode_iq3_xxs),
    BlockType("IQ1_S", 19, 256, _IQ1_S, _decode_iq1_s),
    BlockType("IQ3_S", 21, 256, _IQ3_S, _decode_iq3_s),
    BlockType("IQ2_S", 22, 256, _IQ2_S, _decode_iq2_s),
    BlockType("IQ1_M", 29, 256, _IQ1_M, _decode_iq1_m),
)
