"""Unpackers, as in `unpack`, of the types whose quants are no numbers: places in a table of 16 values (IQ4, MXFP4), trits
(TQ), points of a grid with signs apart (IQ2, IQ3) or shifted by 1/8 (IQ1).

Readable versions: `ggpy.quant.codebooks`, `ternary`, `i_quants`. Their values are whole numbers, IQ1's in eighths, and get
a bias that makes them unsigned.
"""

import numpy as np

from ..quant.codebooks import FP4_VALUES, IQ4_VALUES
from ..quant.grids import grid
from ..simd.points import eight_signs, every_other_byte, fields, point_lookup
from ..simd.vector import (
    BIAS_8BIT,
    LANES,
    MOST_8BIT,
    as_f32,
    f16_to_f32,
    get,
    join,
    load_halves,
    load_i32,
    load_transposed,
    lookup_16,
    splat_f32,
    stack,
    store,
    to_f32,
)
from .common import f32
from .layout import Layout, c, high, low, zero
from .source import function

_V = 4 * LANES  # bytes of a vector


@function
def _dword(a, stride):
    return get(load_transposed(a, stride, 1), 0)


# --- a table of 16 values -------------------------------------------------------------------------------------------

_FP4_BIAS = 16
_iq4 = lookup_16([int(v) + BIAS_8BIT for v in IQ4_VALUES])
_fp4 = lookup_16([int(v) + _FP4_BIAS for v in FP4_VALUES])


def _iq4_nl(emit):
    @function
    def walk(g, a, stride, places):
        t = load_transposed(a + 2, stride, 4)
        d = load_halves(a, stride)
        return emit(g, 0, _iq4(join(low(t), high(t))), d, d, zero(), zero(), places)

    return walk


def _iq4_xs(emit):
    @function
    def walk(g, a, stride, places):
        head = load_transposed(a, stride, 2)
        x, scales = get(head, 0), get(head, 1)
        d, top = f16_to_f32(x), x >> c(16)
        for j in range(8):
            s = ((scales >> c(4 * j)) & c(15)) | (((top >> c(2 * j)) & c(3)) << c(4))
            s0 = d * to_f32(s - c(32))
            t = load_transposed(a + 8 + 16 * j, stride, 4)
            g = emit(g, j, _iq4(join(low(t), high(t))), s0, s0, zero(), zero(), places)
        return g

    return walk


def _mxfp4(emit):
    @function
    def walk(g, a, stride, places):
        e = _dword(a, stride) & c(255)
        t = load_transposed(a + 1, stride, 4)
        # 2^(e - 128), as the table is doubled: of two factors, for e = 0 and 1 give a subnormal and 255 no infinity.
        half = e >> c(1)
        d = as_f32((half + c(63)) << c(23)) * as_f32((e - half + c(63)) << c(23))
        return emit(g, 0, _fp4(join(low(t), high(t))), d, d, zero(), zero(), places)

    return walk


# --- trits ----------------------------------------------------------------------------------------------------------


@function
def _next_trits(even, odd):
    """Takes the first trit off fractions of 256 that stand in the even and odd bytes: trits, and what is left."""
    mask = c(0x00FF00FF)
    even, odd = even + even + even, odd + odd + odd
    trits = ((even >> c(8)) & mask) | (odd & c(-0x00FF0100))  # 0xFF00FF00
    return trits, even & mask, odd & mask


@function
def _halves(t):
    mask = c(0x00FF00FF)
    return t & mask, (t >> c(8)) & mask


def _tq1_0(emit):
    @function
    def walk(g, a, stride, places):
        d, z = load_halves(a + 52, stride), zero()
        even, odd = _halves(load_transposed(a, stride, 8))
        for j in range(5):
            w, even, odd = _next_trits(even, odd)
            g = emit(g, j, w, d, d, z, z, places)
        even, odd = _halves(load_transposed(a + 32, stride, 4))
        for j in range(5, 7):
            first, even, odd = _next_trits(even, odd)
            second, even, odd = _next_trits(even, odd)
            g = emit(g, j, join(first, second), d, d, z, z, places)
        last, even, odd = _next_trits(even, odd)
        even, odd = _halves(load_transposed(a + 48, stride, 1))
        t0, even, odd = _next_trits(even, odd)
        t1, even, odd = _next_trits(even, odd)
        t2, even, odd = _next_trits(even, odd)
        t3, even, odd = _next_trits(even, odd)
        return emit(g, 7, join(last, join(join(t0, t1), join(t2, t3))), d, d, z, z, places)

    return walk


def _tq2_0(emit):
    @function
    def walk(g, a, stride, places):
        d, z = load_halves(a + 64, stride), zero()
        for half in range(2):
            t = load_transposed(a + 32 * half, stride, 8)
            for p in range(4):
                g = emit(g, 4 * half + p, (t >> c(2 * p)) & c(0x03030303), d, d, z, z, places)
        return g

    return walk


# --- points of a grid -----------------------------------------------------------------------------------------------


_SIGN_BIAS = 64
_SHIFT_BIAS = 16


def _signed_points(name):
    """A lookup of points whose values have a sign each."""
    return point_lookup(_biased(grid(name), _SIGN_BIAS), _biased(-grid(name), _SIGN_BIAS), True)


def _biased(points, bias):
    return (points + bias).astype(np.uint8)


_iq2_xxs_points, _iq2_xs_points, _iq2_s_points, _iq3_xxs_points, _iq3_s_points = (
    _signed_points(name) for name in ("IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S")
)
# In eighths, shifted by 1 or, for points with a flag, by -1.
_iq1_points = point_lookup(*(_biased(8 * grid("IQ1") + shift, _SHIFT_BIAS) for shift in (1, -1)), False)


@function
def _odd(d, s):
    """d * (2 s + 1)"""
    return d * to_f32(s + s + c(1))


# Whole blocks are transposed to the stack first, 8 dwords at a time: that takes half the instructions of one by one.
_ROOM = 24 * _V


@function
def _transpose(a, stride, room):
    """Eight dwords of each row."""
    store(room, load_transposed(a, stride, 8))


@function
def _transpose_16(a, stride, room):
    _transpose(a, stride, room)
    _transpose(a + 32, stride, room + 8 * _V)


@function
def _pair(room, j):
    """Vectors 2 j and 2 j + 1."""
    return load_i32(room + 2 * _V * j), load_i32(room + 2 * _V * j + _V)


def _iq2_xxs(emit):
    @function
    def walk(g, a, stride, places):
        d, z = load_halves(a, stride) * splat_f32(f32(0.125)), zero()
        room = stack(_ROOM)
        _transpose_16(a + 2, stride, room)
        for j in range(8):
            x, y = _pair(room, j)
            s = _odd(d, y >> c(28))
            g = emit(g, j, _iq2_xxs_points(x, c(0), eight_signs(fields(y, 0, 7))), s, s, z, z, places)
        return g

    return walk


def _iq2_xs(emit):
    @function
    def walk(g, a, stride, places):
        d, z = load_halves(a, stride) * splat_f32(f32(0.125)), zero()
        room = stack(_ROOM)
        _transpose_16(a + 2, stride, room)
        for half in range(2):
            scales = _dword(a + 66 + 4 * half, stride)
            for p in range(4):
                j = 4 * half + p
                t0, t1 = _pair(room, j)  # four words of nine bits and seven signs
                x, y = every_other_byte(t0, t1, 0), every_other_byte(t0, t1, 1)
                w = _iq2_xs_points(x, y & c(0x01010101), eight_signs((y >> c(1)) & c(0x7F7F7F7F)))
                g = emit(g, j, w, _odd(d, scales & c(15)), _odd(d, (scales >> c(4)) & c(15)), z, z, places)
                scales = scales >> c(8)
        return g

    return walk


def _iq2_s(emit):
    @function
    def walk(g, a, stride, places):
        d, z = load_halves(a, stride) * splat_f32(f32(0.125)), zero()
        room = stack(_ROOM)
        _transpose_16(a + 2, stride, room)
        for half in range(2):
            tops, scales = _dword(a + 66 + 4 * half, stride), _dword(a + 74 + 4 * half, stride)
            for p in range(4):
                j = 4 * half + p
                w = _iq2_s_points(load_i32(room + _V * j), fields(tops, 0, 2), load_i32(room + _V * (8 + j)))
                g = emit(g, j, w, _odd(d, scales & c(15)), _odd(d, (scales >> c(4)) & c(15)), z, z, places)
                tops, scales = tops >> c(8), scales >> c(8)
        return g

    return walk


def _iq3_xxs(emit):
    @function
    def walk(g, a, stride, places):
        d, z = load_halves(a, stride) * splat_f32(f32(0.25)), zero()
        room = stack(_ROOM)
        _transpose_16(a + 2, stride, room)
        _transpose(a + 66, stride, room + 16 * _V)
        for j in range(8):
            x0, x1 = _pair(room, j)
            x, y = join(x0, x1), load_i32(room + _V * (16 + j))
            s = _odd(d, y >> c(28))
            g = emit(g, j, _iq3_xxs_points(x, x, eight_signs(fields(y, 0, 7))), s, s, z, z, places)
        return g

    return walk


def _iq3_s(emit):
    @function
    def walk(g, a, stride, places):
        d, z = load_halves(a, stride), zero()
        room = stack(_ROOM)
        _transpose_16(a + 2, stride, room)
        _transpose(a + 74, stride, room + 16 * _V)
        scales = _dword(a + 106, stride)
        for half in range(2):
            tops = _dword(a + 66 + 4 * half, stride)
            for p in range(4):
                j = 4 * half + p
                x0, x1 = _pair(room, j)
                high = join(fields(tops, 0, 1), fields(tops, 4, 1))
                w = _iq3_s_points(join(x0, x1), high, load_i32(room + _V * (16 + j)))
                s = _odd(d, scales & c(15))
                g = emit(g, j, w, s, s, z, z, places)
                tops, scales = tops >> c(8), scales >> c(4)
        return g

    return walk


def _iq1_s(emit):
    @function
    def walk(g, a, stride, places):
        d, z = load_halves(a, stride) * splat_f32(f32(0.125)), zero()
        room = stack(_ROOM)
        _transpose(a + 2, stride, room)
        store(room + 8 * _V, load_transposed(a + 34, stride, 4))
        for pair in range(4):
            top = load_i32(room + _V * (8 + pair))
            for p in range(2):
                j = 2 * pair + p
                shift = (top >> c(15)) & c(1)  # of all four points
                high = fields(top, 0, 3) | (shift * c(0x08080808))
                s = _odd(d, (top >> c(12)) & c(7))
                g = emit(g, j, _iq1_points(load_i32(room + _V * j), high, high), s, s, z, z, places)
                top = top >> c(16)
        return g

    return walk


def _iq1_m(emit):
    @function
    def walk(g, a, stride, places):
        scales = load_transposed(a + 48, stride, 2)
        s, s_next = get(scales, 0), get(scales, 1)
        four = c(15)
        bits = (
            ((s >> c(12)) & four) | ((s >> c(24)) & c(0xF0)) | ((s_next >> c(4)) & c(0xF00)) | ((s_next >> c(28)) << c(12))
        )
        d, z = f16_to_f32(bits) * splat_f32(f32(0.125)), zero()
        room = stack(_ROOM)
        _transpose(a, stride, room)
        store(room + 8 * _V, load_transposed(a + 32, stride, 4))
        for half in range(2):
            for word in range(2):
                top = load_i32(room + _V * (8 + 2 * half + word))
                for p in range(2):
                    j = 4 * half + 2 * word + p
                    high = fields(top, 0, 4)
                    w = _iq1_points(load_i32(room + _V * j), high, high)
                    g = emit(g, j, w, _odd(d, s & c(7)), _odd(d, (s >> c(3)) & c(7)), z, z, places)
                    top, s = top >> c(16), s >> c(6)
                s = s >> c(4)
            s = s_next
        return g

    return walk


LAYOUTS = {
    "IQ4_NL": Layout(_iq4_nl, 18, 32, 32, BIAS_8BIT, False, MOST_8BIT, not BIAS_8BIT),
    "IQ4_XS": Layout(_iq4_xs, 136, 256, 32, BIAS_8BIT, False, MOST_8BIT, not BIAS_8BIT),
    "MXFP4": Layout(_mxfp4, 17, 32, 32, _FP4_BIAS, False, _FP4_BIAS + 12),
    "TQ1_0": Layout(_tq1_0, 54, 256, 32, 1, False, 2),
    "TQ2_0": Layout(_tq2_0, 66, 256, 32, 1, False, 3),
    "IQ1_S": Layout(_iq1_s, 50, 256, 32, _SHIFT_BIAS, False, _SHIFT_BIAS + 9),
    "IQ1_M": Layout(_iq1_m, 56, 256, 16, _SHIFT_BIAS, False, _SHIFT_BIAS + 9),
    "IQ2_XXS": Layout(_iq2_xxs, 66, 256, 32, _SIGN_BIAS, False, 127),
    "IQ2_XS": Layout(_iq2_xs, 74, 256, 16, _SIGN_BIAS, False, 127),
    "IQ2_S": Layout(_iq2_s, 82, 256, 16, _SIGN_BIAS, False, 127),
    "IQ3_XXS": Layout(_iq3_xxs, 98, 256, 32, _SIGN_BIAS, False, 127),
    "IQ3_S": Layout(_iq3_s, 110, 256, 32, _SIGN_BIAS, False, 127),
}
