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

# ggml's numbers of types that no longer are, or that another program added -> what they are and what to do.
FOREIGN: tuple[tuple[range, str], ...] = (
    (range(4, 6), "Q4_2 or Q4_3, which ggml gave up in 2023; get a newer file"),
    (range(31, 34), "Q4_0 in an order for ARM, which ggml gave up in 2024; get a Q4_0 file"),
    (range(36, 39), "IQ4_NL in an order for ARM, which ggml gave up in 2024; get an IQ4_NL file"),
    (range(96, 400), "of ik_llama.cpp, which reads it; get a file for llama.cpp"),
)
