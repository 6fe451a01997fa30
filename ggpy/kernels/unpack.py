"""Weight blocks of `LANES` rows, unpacked into vectors with one row to a lane.

Every quantized type has a factory that takes a function `emit` and gives `walk(g, address, stride, places)`. That unpacks
one block of each of LANES rows (row i's block is at `address + i * stride`) and calls

    g = emit(g, j, w, scale0, scale1, min0, min1, places)

for each 32 values of the block, j = 0, 1, …: byte b of vector q of the tile `w` is value 32 j + 4 q + b, an unsigned
number (see `Layout.bias`); the first 16 values are worth `scale0 * (w - bias) + min0`, the others use scale1 and min1.
Types with one scale for 32 values pass it twice. `emit` either stores the vectors for a matrix product, or multiplies
them at once: see `matmul_int8`.

The layouts of the blocks are ggml's (ggml-common.h); `ggpy.quant` has them in readable numpy.
"""

from ..simd.vector import (
    BIAS_8BIT,
    MOST_8BIT,
    f16_to_f32,
    get,
    join,
    load_halves,
    load_transposed,
    splat_f32,
    spread_bits,
)
from . import unpack_iq
from .common import f32
from .layout import Layout, bits, byte, c, high, low, signed_byte, zero
from .source import function


def _q4_0(emit):
    @function
    def walk(g, a, stride, places):
        t = load_transposed(a + 2, stride, 4)
        d = load_halves(a, stride)
        return emit(g, 0, join(low(t), high(t)), d, d, zero(), zero(), places)

    return walk


def _q4_1(emit):
    @function
    def walk(g, a, stride, places):
        t = load_transposed(a + 4, stride, 4)
        dm = get(load_transposed(a, stride, 1), 0)
        d, m = f16_to_f32(dm), f16_to_f32(dm >> c(16))
        return emit(g, 0, join(low(t), high(t)), d, d, m, m, places)

    return walk


def _q5_0(emit):
    @function
    def walk(g, a, stride, places):
        t = load_transposed(a + 6, stride, 4)
        fifth = spread_bits(get(load_transposed(a + 2, stride, 1), 0)) << c(4)
        d = load_halves(a, stride)
        return emit(g, 0, join(low(t), high(t)) | fifth, d, d, zero(), zero(), places)

    return walk


def _q5_1(emit):
    @function
    def walk(g, a, stride, places):
        t = load_transposed(a + 8, stride, 4)
        head = load_transposed(a, stride, 2)
        fifth = spread_bits(get(head, 1)) << c(4)
        d, m = f16_to_f32(get(head, 0)), f16_to_f32(get(head, 0) >> c(16))
        return emit(g, 0, join(low(t), high(t)) | fifth, d, d, m, m, places)

    return walk


def _q8_0(emit):
    @function
    def walk(g, a, stride, places):
        t = load_transposed(a + 2, stride, 8)
        if BIAS_8BIT:
            t = t ^ c(-0x7F7F7F80)  # 0x80 in every byte
        d = load_halves(a, stride)
        return emit(g, 0, t, d, d, zero(), zero(), places)

    return walk


@function
def _six_bit_scales(a, stride):
    """d, dmin and the 8 six-bit scales and mins of Q4_K and Q5_K, four to a vector."""
    head = load_transposed(a, stride, 4)
    dm, x, y, z = get(head, 0), get(head, 1), get(head, 2), get(head, 3)
    six, four, two = c(0x3F3F3F3F), c(0x0F0F0F0F), c(0x03030303)
    s_low, m_low = x & six, y & six
    s_high = (z & four) | (((x >> c(6)) & two) << c(4))
    m_high = ((z >> c(4)) & four) | (((y >> c(6)) & two) << c(4))
    return f16_to_f32(dm), zero() - f16_to_f32(dm >> c(16)), s_low, s_high, m_low, m_high


def _q4_k(emit):
    @function
    def walk(g, a, stride, places):
        d, dm, s, s_high, m, m_high = _six_bit_scales(a, stride)
        for half in range(2):
            for p in range(2):
                t = load_transposed(a + 16 + 64 * half + 32 * p, stride, 8)
                s0, m0 = d * byte(s, 2 * p), dm * byte(m, 2 * p)
                s1, m1 = d * byte(s, 2 * p + 1), dm * byte(m, 2 * p + 1)
                g = emit(g, 4 * half + 2 * p, low(t), s0, s0, m0, m0, places)
                g = emit(g, 4 * half + 2 * p + 1, high(t), s1, s1, m1, m1, places)
            s, m = s_high, m_high
        return g

    return walk


def _q5_k(emit):
    b0, b1, b2, b3, b4, b5, b6, b7 = (bits(i, 1, 4) for i in range(8))

    @function
    def pair(g, d, dm, s, m, p, j, t, fifth, fifth_next, places):
        s0, m0 = d * byte(s, 2 * p), dm * byte(m, 2 * p)
        s1, m1 = d * byte(s, 2 * p + 1), dm * byte(m, 2 * p + 1)
        g = emit(g, j, low(t) | fifth, s0, s0, m0, m0, places)
        return emit(g, j + 1, high(t) | fifth_next, s1, s1, m1, m1, places)

    @function
    def walk(g, a, stride, places):
        d, dm, s, s_high, m, m_high = _six_bit_scales(a, stride)
        f = load_transposed(a + 16, stride, 8)
        g = pair(g, d, dm, s, m, 0, 0, load_transposed(a + 48, stride, 8), b0(f), b1(f), places)
        g = pair(g, d, dm, s, m, 1, 2, load_transposed(a + 80, stride, 8), b2(f), b3(f), places)
        g = pair(g, d, dm, s_high, m_high, 0, 4, load_transposed(a + 112, stride, 8), b4(f), b5(f), places)
        return pair(g, d, dm, s_high, m_high, 1, 6, load_transposed(a + 144, stride, 8), b6(f), b7(f), places)

    return walk


def _q6_k(emit):
    b0, b1, b2, b3 = (bits(2 * i, 2, 4) for i in range(4))

    @function
    def walk(g, a, stride, places):
        scales = load_transposed(a + 192, stride, 4)
        d = load_halves(a + 208, stride)
        z = zero()
        s, s_next = get(scales, 0), get(scales, 1)
        for half in range(2):
            t0 = load_transposed(a + 64 * half, stride, 8)
            t1 = load_transposed(a + 64 * half + 32, stride, 8)
            top = load_transposed(a + 128 + 32 * half, stride, 8)
            w = low(t0) | b0(top)
            g = emit(g, 4 * half, w, d * signed_byte(s, 0), d * signed_byte(s, 1), z, z, places)
            w = low(t1) | b1(top)
            g = emit(g, 4 * half + 1, w, d * signed_byte(s, 2), d * signed_byte(s, 3), z, z, places)
            w = high(t0) | b2(top)
            g = emit(g, 4 * half + 2, w, d * signed_byte(s_next, 0), d * signed_byte(s_next, 1), z, z, places)
            w = high(t1) | b3(top)
            g = emit(g, 4 * half + 3, w, d * signed_byte(s_next, 2), d * signed_byte(s_next, 3), z, z, places)
            s, s_next = get(scales, 2), get(scales, 3)
        return g

    return walk


def _q2_k(emit):
    @function
    def walk(g, a, stride, places):
        scales = load_transposed(a, stride, 4)
        dm = get(load_transposed(a + 80, stride, 1), 0)
        d, m = f16_to_f32(dm), zero() - f16_to_f32(dm >> c(16))
        two = c(0x03030303)
        s, s_next = get(scales, 0), get(scales, 1)
        for half in range(2):
            t = load_transposed(a + 16 + 32 * half, stride, 8)
            for pair in range(2):
                for p in range(2):
                    scale, least = low(s), high(s)
                    w = (t >> c(4 * pair + 2 * p)) & two
                    j = 4 * half + 2 * pair + p
                    s0, s1 = d * byte(scale, 2 * p), d * byte(scale, 2 * p + 1)
                    g = emit(g, j, w, s0, s1, m * byte(least, 2 * p), m * byte(least, 2 * p + 1), places)
                s = s_next
            s, s_next = get(scales, 2), get(scales, 3)
        return g

    return walk


def _q3_k(emit):
    @function
    def walk(g, a, stride, places):
        third = load_transposed(a, stride, 8)
        head = load_transposed(a + 96, stride, 2)
        x, y, top = get(head, 0), get(head, 1), get(load_transposed(a + 104, stride, 1), 0)
        d = load_halves(a + 108, stride)
        ones, two = c(0x01010101), c(0x03030303)
        bias = splat_f32(f32(32.0))
        z = zero()
        s = low(x) | ((top & two) << c(4))
        s_next = low(y) | (((top >> c(2)) & two) << c(4))
        for half in range(2):
            t = load_transposed(a + 32 + 32 * half, stride, 8)
            for pair in range(2):
                for p in range(2):
                    j = 4 * half + 2 * pair + p
                    w = ((t >> c(4 * pair + 2 * p)) & two) | (((third >> c(j)) & ones) << c(2))
                    s0, s1 = d * (byte(s, 2 * p) - bias), d * (byte(s, 2 * p + 1) - bias)
                    g = emit(g, j, w, s0, s1, z, z, places)
                s = s_next
            s = high(x) | (((top >> c(4)) & two) << c(4))
            s_next = high(y) | (((top >> c(6)) & two) << c(4))
        return g

    return walk


LAYOUTS = {
    "Q4_0": Layout(_q4_0, 18, 32, 32, 8, False, 15),
    "Q4_1": Layout(_q4_1, 20, 32, 32, 0, True, 15),
    "Q5_0": Layout(_q5_0, 22, 32, 32, 16, False, 31),
    "Q5_1": Layout(_q5_1, 24, 32, 32, 0, True, 31),
    "Q8_0": Layout(_q8_0, 34, 32, 32, BIAS_8BIT, False, MOST_8BIT, not BIAS_8BIT),
    "Q2_K": Layout(_q2_k, 84, 256, 16, 0, True, 3),
    "Q3_K": Layout(_q3_k, 110, 256, 16, 4, False, 7),
    "Q4_K": Layout(_q4_k, 144, 256, 32, 0, True, 15),
    "Q5_K": Layout(_q5_k, 176, 256, 32, 0, True, 31),
    "Q6_K": Layout(_q6_k, 210, 256, 16, 32, False, 63),
    **unpack_iq.LAYOUTS,
}
