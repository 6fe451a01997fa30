"""Float weights × float32 activations. Drivers and plan: see `matmul`.

2-byte weights are read as dwords, two columns each.
"""

from ..simd.vector import (
    LANES,
    TOKENS,
    as_f32,
    broadcast_f32,
    dot_f32,
    f16_to_f32,
    fma,
    get,
    load_f32,
    load_transposed,
    prefetch,
    prefetch_once,
    splat_f32,
    splat_i32,
    store,
)
from .common import f32, i32
from .matmul import ask_for, define_products
from .source import function

_V = 4 * LANES


def _define(name, size, convert):
    """`convert(t)` gives the float32 tiles of the even and the odd columns of a tile of dwords (size 2)."""

    share = LANES * 16 * size  # bytes of the next LANES rows that stand for 16 columns of these

    @function
    def one_token(w, stride, n_cols, x, following):
        even, odd = splat_f32(f32(0.0)), splat_f32(f32(0.0))
        for c in range(0, n_cols, 16):
            ask_for(prefetch_once, following, c // 16, share)
            if size == 4:
                even = dot_f32(even, as_f32(load_transposed(w + 4 * c, stride, 8)), x + 4 * c, 4)
                odd = dot_f32(odd, as_f32(load_transposed(w + 4 * c + 32, stride, 8)), x + 4 * c + 32, 4)
            else:
                t0, t1 = convert(load_transposed(w + 2 * c, stride, 8))
                even, odd = dot_f32(even, t0, x + 4 * c, 8), dot_f32(odd, t1, x + 4 * c + 4, 8)
        return even + odd

    @function
    def unpack(w, stride, first, stop, scratch, ahead):
        for c in range(first, stop, 16):
            ask_for(prefetch, w + ahead, c // 16, share)
            to = scratch + (c - first) * _V
            if size == 4:
                store(to, as_f32(load_transposed(w + 4 * c, stride, 16)))
            else:
                t0, t1 = convert(load_transposed(w + 2 * c, stride, 8))
                store_alternating(to, t0)
                store_alternating(to + _V, t1)

    @function
    def tokens(f, weights, n_cols, first, stop, x, stride):
        for k in range(first, stop):
            f = fma(broadcast_f32(x + 4 * k, stride, TOKENS), load_f32(weights + (k - first) * _V), f)
        return f

    define_products(name, 32, 32 * size, one_token, unpack, tokens, 32 * _V)


@function
def store_alternating(to, tile):
    store(to, get(tile, 0))
    store(to + 2 * _V, get(tile, 1))
    store(to + 4 * _V, get(tile, 2))
    store(to + 6 * _V, get(tile, 3))
    store(to + 8 * _V, get(tile, 4))
    store(to + 10 * _V, get(tile, 5))
    store(to + 12 * _V, get(tile, 6))
    store(to + 14 * _V, get(tile, 7))


@function
def _same(t):
    return as_f32(t), as_f32(t)


@function
def _f16(t):
    return f16_to_f32(t), f16_to_f32(t >> splat_i32(i32(16)))


@function
def _bf16(t):
    return as_f32(t << splat_i32(i32(16))), as_f32(t & splat_i32(i32(-65536)))


_define("F32", 4, _same)
_define("F16", 2, _f16)
_define("BF16", 2, _bf16)
