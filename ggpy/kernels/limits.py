"""What no kernel can beat: reading memory and nothing else, and dot products and nothing else."""

from ..simd.vector import (
    LANES,
    TOKENS,
    dotter,
    keep_order,
    load_i32,
    prefetch_once,
    splat_i32,
    stack,
    store,
    tile_i32,
)
from .common import i32, share
from .source import kernel

_V = 4 * LANES
_AHEAD = 8192
# Weights of four bits are fastest with AVX2. One vector a token, or LANES tokens.
_, _by_rows, _by_tokens = dotter(False, 15)
_dots, _stride = (_by_tokens, 8 * _V) if _by_tokens else (_by_rows, 32)
_ROOM = 8 * _V + TOKENS * _stride


@kernel("read_memory")
def read_memory(ith, nth, address, n_bytes, out):
    """Reads n_bytes once, a part a thread, and leaves a sum of each part at `out`, 64 bytes apart."""
    start, stop = share(n_bytes // 256, ith, nth)
    total = splat_i32(i32(0))
    for at in range(address + 256 * start, address + 256 * stop, 256):
        for line in range(0, 256, 64):
            prefetch_once(at + _AHEAD + line)
        keep_order()
        for k in range(0, 256, _V):
            total = total + load_i32(at + k)
    store(out + 64 * ith, total)


@kernel("multiply_int8")
def multiply_int8(ith, nth, n, out):
    """Multiplies 32 columns of LANES rows with TOKENS tokens n times, or of one row with TOKENS vectors of tokens, out of
    the first-level cache, as products of many tokens do between scales; leaves the sums at `out`, 512 bytes apart."""
    room = stack(_ROOM)
    for k in range(0, _ROOM, _V):
        store(room + k, splat_i32(i32(0)))
    # Two chains of sums for each token: one alone would wait for its own results.
    sums, others = tile_i32(TOKENS), tile_i32(TOKENS)
    for _ in range(n):
        keep_order()
        sums = _dots(sums, room, 4, room + 8 * _V, _stride)
        others = _dots(others, room + 4 * _V, 4, room + 8 * _V + _stride // 2, _stride)
    store(out + 512 * ith, sums + others)
