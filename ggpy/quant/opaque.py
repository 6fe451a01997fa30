"""Types that ggpy can size but not decode: files that hold them can still be checked and listed."""

import numpy as np

from .blocks import BlockType

TYPES = tuple(
    BlockType(name, id, block_size, np.dtype([("bytes", "u1", n_bytes)]))
    for name, id, block_size, n_bytes in (
        ("Q8_1", 9, 32, 36),
        ("Q8_K", 15, 256, 292),
        ("IQ2_XXS", 16, 256, 66),
        ("IQ2_XS", 17, 256, 74),
        ("IQ3_XXS", 18, 256, 98),
        ("IQ1_S", 19, 256, 50),
        ("IQ4_NL", 20, 32, 18),
        ("IQ3_S", 21, 256, 110),
        ("IQ2_S", 22, 256, 82),
        ("IQ4_XS", 23, 256, 136),
        ("IQ1_M", 29, 256, 56),
        ("TQ1_0", 34, 256, 54),
        ("TQ2_0", 35, 256, 66),
        ("MXFP4", 39, 32, 17),
        ("NVFP4", 40, 64, 36),
        ("Q1_0", 41, 128, 18),
    )
)
