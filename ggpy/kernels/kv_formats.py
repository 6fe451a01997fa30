"""How the KV cache holds values: for each type, what writes one position's and what reads them again as float32.

The cache is a row of *slabs*, each of which holds n values of SLAB positions, in one of two orders: (n, SLAB), so that keys
stand in the lanes, or by rows, (SLAB, n). n is a multiple of 16. A slab of Q8_0 has int8 values and behind them a float16
scale for every 32 of a position's n values (the last may be for 16): (ceil(n / 32), SLAB) in both orders. Its rounding is
ggml's, but that values are rounded to steps of the scale as it is stored.
"""

from collections.abc import Callable
from typing import NamedTuple

from ..simd.vector import (
    LANES,
    as_f32,
    f16_to_f32,
    ld_f16,
    ld_f32,
    ld_i8,
    load_f16,
    load_f32,
    load_i8,
    load_tile_f16,
    load_tile_f32,
    load_tile_i8,
    load_transposed,
    magnitude,
    max_magnitude,
    maximum,
    minimum,
    mul_grid,
    round_even,
    shift_right_signed,
    splat_f32,
    splat_i32,
    st_f16,
    st_f32,
    st_i8,
    stack,
    store,
    store_i8,
    store_tile,
    to_f32,
    to_i32,
)
from .common import f32, i32
from .source import function
from .table import SLAB

#: Vectors of a register tile of keys, beside ROWS rows of queries: as many as the registers hold.
VECTORS = 4 if LANES == 16 else 2
_ROW = 4 * SLAB  # from a value of the keys that are unpacked to the next


class KVFormat(NamedTuple):
    """Functions of a cache type. `slab` is the address of a slab, `x` that of n float32.

    Attributes
    ----------
    slab_bytes : (n)
    put_lane : (slab, position, x, n)
        Stores x as one position of a slab (n, SLAB).
    put_row : (slab, position, x, n)
        The same in a slab (SLAB, n).
    unpack_lanes : (slab, n, to)
        A slab (n, SLAB) as float32, without its scales.
    unpack_transposed : (slab, n, to)
        A slab (SLAB, n) as float32 (n, SLAB), without its scales.
    unpack_rows : (slab, n, n_rows, n_first, to)
        The first n_first values of the first n_rows rows of a slab (SLAB, n), one row after the other, without scales.
    size : int
        Bytes of a value.
    scaled : bool
        Whether there are scales.
    load_tile : (address, stride, n)
        A tile of stored values without their scales.
    scaled_scores : (sums, slab, n, d, lane)
        A grid of sums over values d … d + 31 of the keys from `lane` on in a slab, multiplied by their scales.
    scaled_weights : (weights, stride, n_rows, slab, n, d, to, to_stride)
        Rows of weights of the positions of a slab (SLAB, n), multiplied by the scales of the values d … d + 31: their
        address and stride, which are those of `to` if there are scales.
    """

    slab_bytes: Callable
    put_lane: Callable
    put_row: Callable
    unpack_lanes: Callable
    unpack_transposed: Callable
    unpack_rows: Callable
    size: int
    scaled: bool
    load_tile: Callable
    scaled_scores: Callable
    scaled_weights: Callable


def _plain(size, load, load_tile, put, spread):
    """A type without scales. `spread(t, to)` stores the values in each dword of a tile, each value's vector a row."""
    per_dword = 4 // size

    @function
    def slab_bytes(n):
        return SLAB * size * n

    @function
    def put_lane(slab, position, x, n):
        for d in range(n):
            put(slab + size * (SLAB * d + position), ld_f32(x + 4 * d))

    @function
    def put_row(slab, position, x, n):
        for d in range(n):
            put(slab + size * (n * position + d), ld_f32(x + 4 * d))

    @function
    def unpack_lanes(slab, n, to):
        for i in range(0, SLAB * n, LANES):
            store(to + 4 * i, load(slab + size * i))

    @function
    def unpack_transposed(slab, n, to):
        for k in range(0, SLAB, LANES):
            for d in range(0, n, 8 * per_dword):
                spread(load_transposed(slab + size * (n * k + d), size * n, 8), to + _ROW * d + 4 * k)

    @function
    def unpack_rows(slab, n, n_rows, n_first, to):
        for k in range(n_rows):
            for d in range(0, n_first, LANES):
                store(to + 4 * (n_first * k + d), load(slab + size * (n * k + d)))

    @function
    def scaled_scores(sums, slab, n, d, lane):
        return sums

    @function
    def scaled_weights(weights, stride, n_rows, slab, n, d, to, to_stride):
        return weights, stride

    unpack = (unpack_lanes, unpack_transposed, unpack_rows)
    return KVFormat(slab_bytes, put_lane, put_row, *unpack, size, False, load_tile, scaled_scores, scaled_weights)


@function
def _spread_halves(t, to):
    store_tile(to, 2 * _ROW, f16_to_f32(t))
    store_tile(to + _ROW, 2 * _ROW, f16_to_f32(t >> splat_i32(i32(16))))


@function
def _spread_wholes(t, to):
    store_tile(to, _ROW, as_f32(t))


def _q8_0():
    @function
    def slab_bytes(n):
        return SLAB * (n + 2 * ((n + 31) // 32))

    @function
    def scales_at(slab, n, d):
        """The address of the scales of values d … d + 31."""
        return slab + SLAB * (n + d // 32 * 2)

    @function
    def quantize(x, n, to, scale_to):
        """n ≤ 32 values to int8, and their scale, which is NaN where a value is."""
        best = splat_f32(f32(0.0))
        for i in range(0, 4 * n, 4 * LANES):
            best = max_magnitude(best, load_f32(x + i))
        st_f16(scale_to, magnitude(best) / f32(127.0))
        scale = ld_f16(scale_to)
        inverse = f32(1.0) / scale if scale > f32(0.0) else f32(0.0)
        for i in range(0, n, LANES):
            # A scale among float16's subnormal numbers may be rounded far down.
            q = round_even(load_f32(x + 4 * i) * splat_f32(inverse))
            q = maximum(minimum(q, splat_f32(f32(127.0))), splat_f32(f32(-127.0)))
            store_i8(to + i, to_i32(q))

    @function
    def put_lane(slab, position, x, n):
        row = stack(32)
        for d in range(0, n, 32):
            m = min(32, n - d)
            quantize(x + 4 * d, m, row, scales_at(slab, n, d) + 2 * position)
            for i in range(m):
                st_i8(slab + SLAB * (d + i) + position, ld_i8(row + i))

    @function
    def put_row(slab, position, x, n):
        for d in range(0, n, 32):
            quantize(x + 4 * d, min(32, n - d), slab + n * position + d, scales_at(slab, n, d) + 2 * position)

    @function
    def unpack_lanes(slab, n, to):
        for i in range(0, SLAB * n, LANES):
            store(to + 4 * i, load_i8(slab + i))

    @function
    def unpack_transposed(slab, n, to):
        down = splat_i32(i32(24))
        for k in range(0, SLAB, LANES):
            for d in range(0, n, 16):
                t = load_transposed(slab + n * k + d, n, 4)
                for i in range(4):
                    v = to_f32(shift_right_signed(t << splat_i32(i32(24 - 8 * i)), down))
                    store_tile(to + _ROW * (d + i) + 4 * k, 4 * _ROW, v)

    @function
    def unpack_rows(slab, n, n_rows, n_first, to):
        for k in range(n_rows):
            for d in range(0, n_first, LANES):
                store(to + 4 * (n_first * k + d), load_i8(slab + n * k + d))

    @function
    def scaled_scores(sums, slab, n, d, lane):
        return mul_grid(sums, load_tile_f16(scales_at(slab, n, d) + 2 * lane, 2 * LANES, VECTORS))

    @function
    def scaled_weights(weights, stride, n_rows, slab, n, d, to, to_stride):
        for k in range(0, SLAB, LANES):
            scale = load_f16(scales_at(slab, n, d) + 2 * k)
            for r in range(n_rows):
                store(to + to_stride * r + 4 * k, load_f32(weights + stride * r + 4 * k) * scale)
        return to, to_stride

    unpack = (unpack_lanes, unpack_transposed, unpack_rows)
    return KVFormat(slab_bytes, put_lane, put_row, *unpack, 1, True, load_tile_i8, scaled_scores, scaled_weights)


KV_FORMATS = {
    "F16": _plain(2, load_f16, load_tile_f16, st_f16, _spread_halves),
    "Q8_0": _q8_0(),
    "F32": _plain(4, load_f32, load_tile_f32, st_f32, _spread_wholes),
}
