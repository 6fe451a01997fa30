"""Blocks whose quants are four-bit places in a table of 16 values: value = scale * table[quant].

IQ4's table is denser around 0, as weights are. MXFP4's holds the 4-bit floats (e2m1), doubled, and its scale is a power
of two: https://www.opencompute.org/documents/ocp-microscaling-formats-mx-v1-0-spec-final-pdf
"""

import numpy as np

from .blocks import BlockType
from .unpack import bits, fields, float32

IQ4_VALUES = np.array((-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113), np.float32)
FP4_VALUES = np.array((0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12), np.float32)

_IQ4_NL = np.dtype([("d", "<f2"), ("qs", "u1", 16)])
_IQ4_XS = np.dtype([("d", "<f2"), ("scales_h", "<u2"), ("scales_l", "u1", 4), ("qs", "u1", 128)])
_MXFP4 = np.dtype([("e", "u1"), ("qs", "u1", 16)])


def _decode_iq4_nl(blocks: np.ndarray) -> np.ndarray:
    return float32(blocks["d"]) * IQ4_VALUES[bits(blocks["qs"], 4, 16)]


def _decode_iq4_xs(blocks: np.ndarray) -> np.ndarray:
    low = fields(blocks["scales_l"], (0, 4), 15)
    high = fields(blocks["scales_h"][:, None], tuple(range(0, 16, 2)), 3)
    scale = float32(blocks["d"]) * ((low | high << 4).astype(np.float32) - 32)  # (n_blocks, 8)
    return scale[:, :, None] * IQ4_VALUES[bits(blocks["qs"], 4, 16)].reshape(-1, 8, 32)


def _decode_mxfp4(blocks: np.ndarray) -> np.ndarray:
    # 2^(e - 128): half the scale, as the table is doubled; the two smallest are subnormal
    e = blocks["e"].astype(np.uint32)
    d = np.where(e < 2, np.uint32(0x00200000) << e, (e - 1) << 23).astype(np.uint32).view(np.float32)
    return d[:, None] * FP4_VALUES[bits(blocks["qs"], 4, 16)]


TYPES = (
    BlockType("IQ4_NL", 20, 32, _IQ4_NL, _decode_iq4_nl),
    BlockType("IQ4_XS", 23, 256, _IQ4_XS, _decode_iq4_xs),
    BlockType("MXFP4", 39, 32, _MXFP4, _decode_mxfp4),
)
