"""Float weights × float32 activations; the plan is that of `matmul_int8`, with `fma` for the dot products.

Rows of 2-byte weights are read as dwords, two columns in each.
"""

from ..simd.vector import (
    LANES,
    TOKENS,
    as_f32,
    broadcast_f32,
    dot_f32,
    f16_to_f32,
    fma,
    load_f32,
    load_transposed,
    splat_f32,
    splat_i32,
    store,
    store_tile,
    tile_f32,
)
from .common import f32, i32, ld_state
from .matmul_int8 import next_tiles, rows_at, write_one, write_tile
from .source import function, kernel

_V = 4 * LANES
