"""Types that ggpy can size but not decode: files that hold them can still be checked and listed."""

import numpy as np

from .blocks import BlockType

TYPES = tuple(
    BlockType(name, id, block_size, np.dtype([("bytes", "u1", n_bytes)]))
    for name, id, block_size, n_bytes in (
        ("Q8_1", 9, 32, 36),
        ("Q8_K", 15, 256, 292),
        ("NVFP4", 40, 64, 36),
        ("Q1_0", 41, 128, 18),
    )
)
