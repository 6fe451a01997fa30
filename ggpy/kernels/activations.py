"""Activations quantized to int8 for the integer matrix products.

A token's n values x become, in this order:

- q: n int8, round(x / d);
- d: float32 a block of 32 (q8_32) or 256 (q8_256) values, max |x| / 127;
- sums: float32 a group of 32 values, the sum of their q, in q8_32 times d (for weights with a minimum or a bias);
- negated sums, in q8_256 alone: int32 of the groups of 16 values (for weights with a bias).
"""

from ..simd.vector import (
    LANES,
    fold_add_i32,
    fold_magnitude,
    load_f32,
    load_tile_f32,
    magnitude,
    max_magnitude,
    round_even,
    splat_f32,
    st_f32,
    st_i32,
    stack,
    store,
    store_i8,
    sum_i32,
    to_i32,
)
from .common import f32, i32, ld_state, share
from .rows import rms_scale, silu
from .source import function, kernel

PER_32 = 32 // LANES
PER_16 = 16 // LANES
_V = 4 * LANES
_PART = 4 * 256


@function
def _scale(amax):
    """d and 1/d; both 0 for a block of zeros, and d NaN where a value is."""
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
def _blocks_32(x, out, n, first, stop):
    """Columns first … stop - 1 (multiples of 32) of a row of n; x is where column `first` is."""
    d, sums = out + n, out + n + n // 8
    for b in range(first // 32, stop // 32):
        q = out + 32 * b
        scale, inverse = _scale(magnitude(fold_magnitude(load_tile_f32(x, _V, PER_32))))
        s = _round_16(x, q, inverse) + _round_16(x + 64, q + 16, inverse)
        st_f32(d + 4 * b, scale)
        st_f32(sums + 4 * b, scale * f32(s))
        x += 128


@function
def _blocks_256(x, out, n, first, stop):
    """The same in blocks of 256."""
    d, sums = out + n, out + n + n // 64
    negated = sums + n // 8
    for b in range(first // 256, stop // 256):
        most = splat_f32(f32(0.0))
        for k in range(8):
            most = max_magnitude(most, fold_magnitude(load_tile_f32(x + 128 * k, _V, PER_32)))
        scale, inverse = _scale(magnitude(most))
        st_f32(d + 4 * b, scale)
        for k in range(8):
            j = 8 * b + k
            q = out + 32 * j
            s0 = _round_16(x, q, inverse)
            s1 = _round_16(x + 64, q + 16, inverse)
            st_f32(sums + 4 * j, f32(s0 + s1))
            st_i32(negated + 8 * j, i32(-s0))
            st_i32(negated + 8 * j + 4, i32(-s1))
            x += 128


def _define(name, blocks):
    """The kernels that write the format. Work is shared out by parts of 256 columns, so that one row takes all threads."""

    @kernel(f"quantize_{name}")
    def quantize(ith, nth, x, out, state, n_cols, n_rows_per_token, x_stride, x_row_stride, out_stride):
        parts = (n_cols + 255) // 256
        start, stop = share(ld_state(state, 0) * n_rows_per_token * parts, ith, nth)
        for item in range(start, stop):
            i, first = item // parts, item % parts * 256
            row = x + i // n_rows_per_token * x_stride + i % n_rows_per_token * x_row_stride
            blocks(row + 4 * first, out + out_stride * i, n_cols, first, min(first + 256, n_cols))

    @kernel(f"rms_norm_{name}")
    def rms_norm(ith, nth, x, w, out, state, n_cols, x_stride, out_stride, eps):
        """RMS norm, by w unless that is 0, quantized at once: the normalized row never goes to memory."""
        parts = (n_cols + 255) // 256
        start, stop = share(ld_state(state, 0) * parts, ith, nth)
        room = stack(_PART)
        last, factor = -1, splat_f32(f32(0.0))
        for item in range(start, stop):
            t, first = item // parts, item % parts * 256
            row, end = x + t * x_stride, min(first + 256, n_cols)
            if t != last:
                last, factor = t, rms_scale(row, n_cols, eps)
            for i in range(4 * first, 4 * end, _V):
                v = load_f32(row + i) * factor
                store(room + i - 4 * first, v * load_f32(w + i) if w else v)
            blocks(room, out + out_stride * t, n_cols, first, end)

    @kernel(f"swiglu_{name}")
    def swiglu(ith, nth, x, y, out, state, n_cols, n_rows_per_token, out_stride):
        """SwiGLU, quantized at once."""
        parts = (n_cols + 255) // 256
        start, stop = share(ld_state(state, 0) * n_rows_per_token * parts, ith, nth)
        room = stack(_PART)
        for item in range(start, stop):
            i, first = item // parts, item % parts * 256
            end = min(first + 256, n_cols)
            at = 4 * n_cols * i
            for k in range(4 * first, 4 * end, _V):
                store(room + k - 4 * first, silu(load_f32(x + at + k)) * load_f32(y + at + k))
            blocks(room, out + out_stride * i, n_cols, first, end)


_define("q8_32", _blocks_32)
_define("q8_256", _blocks_256)
