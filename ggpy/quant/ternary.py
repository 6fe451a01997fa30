"""Blocks of 256 values -d, 0 or d.

A byte of TQ1_0 holds five trits as the fraction 0.t0t1t2t3t4 (base 3) of 256, rounded up: multiplied by 3 it has the
first trit above its eight bits, and the others below. TQ2_0 spends two bits a trit.
"""

import numpy as np

from .blocks import BlockType
from .unpack import bits, float32

_TQ1_0 = np.dtype([("qs", "u1", 48), ("qh", "u1", 4), ("d", "<f2")])
_TQ2_0 = np.dtype([("qs", "u1", 64), ("d", "<f2")])


def _trits(field: np.ndarray, count: int) -> np.ndarray:
    """uint8 (n_blocks, n) -> float32 (n_blocks, n * count) of -1, 0, 1: first all first trits, then all second ones, ..."""
    fractions = field[:, None, :] * np.array([1, 3, 9, 27, 81][:count], np.uint8)[:, None]  # modulo 256
    return ((fractions.astype(np.uint16) * 3 >> 8).astype(np.float32) - 1).reshape(len(field), -1)


def _decode_tq1_0(blocks: np.ndarray) -> np.ndarray:
    qs = blocks["qs"]
    trits = np.concatenate([_trits(qs[:, :32], 5), _trits(qs[:, 32:], 5), _trits(blocks["qh"], 4)], axis=1)
    return float32(blocks["d"]) * trits


def _decode_tq2_0(blocks: np.ndarray) -> np.ndarray:
    return float32(blocks["d"]) * (bits(blocks["qs"], 2, 32).astype(np.float32) - 1)


TYPES = (
    BlockType("TQ1_0", 34, 256, _TQ1_0, _decode_tq1_0),
    BlockType("TQ2_0", 35, 256, _TQ2_0, _decode_tq2_0),
)
