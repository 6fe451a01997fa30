"""Float weights × float32 activations. Drivers and plan: see `matmul`.

2-byte weights are read as dwords, two columns each.
"""

from ..simd.vector import (
    LANES,
    TOKENS,
    alternating,
    as_f32,
    broadcast_f32,
    dot_f32,
    every_second,
    f16_to_f32,
    fma,
    load_f32,
    load_transposed,
    prefetch,
    prefetch_once,
    splat_f32,
    splat_i32,
    store,
    tile_f32,
)
from .common import f32, i32
from .matmul import ask_for, define_products
from .source import function
from .table import PANEL

_V = 4 * LANES


def _define(name, size, convert):
    """`convert(t)` gives the float32 tiles of the even and the odd columns of a tile of dwords.

    Both kernels add up even and odd columns apart, two chains that meet at the end of each panel: acc + (even + odd).
    """

    dwords = 2 if size == 4 else 1  # tiles of 8 dwords for 16 columns
    share = LANES * 16 * size  # bytes of the next LANES rows that stand for 16 columns of these

    @function
    def one_token(w, stride, n_cols, x, following):
        acc = splat_f32(f32(0.0))
        for first in range(0, n_cols, PANEL):
            even, odd = splat_f32(f32(0.0)), splat_f32(f32(0.0))
            for c in range(first, min(first + PANEL, n_cols), 16):
                ask_for(prefetch_once, following, c // 16, share)
                for part in range(dwords):
                    t0, t1 = convert(load_transposed(w + size * c + 32 * part, stride, 8))
                    at = x + 4 * c + 32 * part
                    even, odd = dot_f32(even, t0, at, 8), dot_f32(odd, t1, at + 4, 8)
            acc = acc + (even + odd)
        return acc

    @function
    def few_tokens(w, stride, n_cols, x, x_stride, n, room, following):
        odds = room + _V * n
        accs = odds + _V * n
        for t in range(n):
            store(accs + _V * t, splat_f32(f32(0.0)))
        for first in range(0, n_cols, PANEL):
            for t in range(2 * n):
                store(room + _V * t, splat_f32(f32(0.0)))
            for c in range(first, min(first + PANEL, n_cols), 16):
                ask_for(prefetch_once, following, c // 16, share)
                for part in range(dwords):
                    t0, t1 = convert(load_transposed(w + size * c + 32 * part, stride, 8))
                    for t in range(n):
                        at, even, odd = x + 4 * c + 32 * part + t * x_stride, room + _V * t, odds + _V * t
                        store(even, dot_f32(load_f32(even), t0, at, 8))
                        store(odd, dot_f32(load_f32(odd), t1, at + 4, 8))
            for t in range(n):
                both = load_f32(room + _V * t) + load_f32(odds + _V * t)
                store(accs + _V * t, load_f32(accs + _V * t) + both)
        for t in range(n):
            store(room + _V * t, load_f32(accs + _V * t))

    @function
    def unpack(w, stride, first, stop, scratch, following):
        for c in range(first, stop, 16):
            ask_for(prefetch, following, c // 16, share)
            for part in range(dwords):
                to = scratch + (c - first + 8 * part) * _V
                store(to, alternating(*convert(load_transposed(w + size * c + 32 * part, stride, 8))))

    def for_tokens(n):
        """The product of a panel with n tokens."""

        @function
        def tokens(f, weights, n_cols, first, stop, x, stride, room):
            even, odd = tile_f32(n), tile_f32(n)
            for k in range(first, stop, 2):
                w = weights + (k - first) * _V
                even = fma(broadcast_f32(x + 4 * k, stride, n), load_f32(w), even)
                odd = fma(broadcast_f32(x + 4 * k + 4, stride, n), load_f32(w + _V), odd)
            return f + (even + odd)

        return tokens

    # Fewer than half a tile would wait for sums: an addition begins when the one before it in its chain has ended.
    products = (one_token, few_tokens, unpack, for_tokens(TOKENS), for_tokens(TOKENS // 2))
    define_products(name, 32, 32 * size, 32 * _V, (TOKENS, TOKENS // 2), products)


@function
def _same(t):
    t = as_f32(t)
    return every_second(t, 0), every_second(t, 1)


@function
def _f16(t):
    return f16_to_f32(t), f16_to_f32(t >> splat_i32(i32(16)))


@function
def _bf16(t):
    return as_f32(t << splat_i32(i32(16))), as_f32(t & splat_i32(i32(-65536)))


_define("F32", 4, _same)
_define("F16", 2, _f16)
_define("BF16", 2, _bf16)
