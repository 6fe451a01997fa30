"""Activations quantized to int8 for the integer matrix products.

A token's n values x become, in this order:

- q: n int8, round(x / d);
- d: float32 a block of 32 (q8_32) or 256 (q8_256) values, max |x| / 127;
- sums: float32 a group of 32 values, the sum of their q (for weights with a minimum);
- negated sums: int32 of the groups of 32 (q8_32) or 16 (q8_256) values (for weights with a bias).
"""

from ..simd.vector import (
    LANES,
    absolute,
    fold_add_i32,
    fold_max,
    load_tile_f32,
    max_f32,
    round_even,
    splat_f32,
    st_f32,
    st_i32,
    store_i8,
    sum_i32,
    to_i32,
)
from .common import f32, i32, ld_state, share
from .source import function, kernel

PER_32 = 32 // LANES
PER_16 = 16 // LANES
_V = 4 * LANES


@function
def _amax(x):
    """max |x| of 32 values."""
    return max_f32(fold_max(absolute(load_tile_f32(x, _V, PER_32))))


@function
def _scale(amax):
    """d and 1/d; both 0 for a block of zeros."""
    d = amax / f32(127.0)
    inverse = f32(0.0)
    if d > f32(0.0):
        inverse = f32(1.0) / d
    return d, inverse


@function
def _round_16(x, q, inverse):
    """Quantizes 16 values; the sum of the results."""
    v = to_i32(round_even(load_tile_f32(x, _V, PER_16) * splat_f32(inverse)))
    store_i8(q, v)
    return sum_i32(fold_add_i32(v))


@function
def quantize_row_32(x, out, n):
    q, d, sums = out, out + n, out + n + n // 8
    negated = sums + n // 8
    for b in range(n // 32):
        scale, inverse = _scale(_amax(x + 128 * b))
        s = _round_16(x + 128 * b, q + 32 * b, inverse) + _round_16(x + 128 * b + 64, q + 32 * b + 16, inverse)
        st_f32(d + 4 * b, scale)
        st_f32(sums + 4 * b, f32(s))
        st_i32(negated + 4 * b, i32(-s))


@function
def quantize_row_256(x, out, n):
    q, d, sums = out, out + n, out + n + n // 64
    negated = sums + n // 8
    for b in range(n // 256):
        amax = f32(0.0)
        for k in range(8):
            amax = max(amax, _amax(x + 1024 * b + 128 * k))
        scale, inverse = _scale(amax)
        st_f32(d + 4 * b, scale)
        for k in range(8):
            j = 8 * b + k
            s0 = _round_16(x + 128 * j, q + 32 * j, inverse)
            s1 = _round_16(x + 128 * j + 64, q + 32 * j + 16, inverse)
            st_f32(sums + 4 * j, f32(s0 + s1))
            st_i32(negated + 8 * j, i32(-s0))
            st_i32(negated + 8 * j + 4, i32(-s1))


def _define(name, quantize_row):
    @kernel(f"quantize_{name}")
    def quantize(ith, nth, x, out, state, n_cols, n_rows_per_token, x_stride, x_row_stride, out_stride):
        start, stop = share(ld_state(state, 0) * n_rows_per_token, ith, nth)
        for i in range(start, stop):
            row = x + i // n_rows_per_token * x_stride + i % n_rows_per_token * x_row_stride
            quantize_row(row, out + out_stride * i, n_cols)


_define("q8_32", quantize_row_32)
_define("q8_256", quantize_row_256)
