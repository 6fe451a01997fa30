"""Encoders: rows of float32 to ggml's blocks, rows shared out among the threads.

A row is worked on in chunks of 512 values. The chunk's sub-blocks, 16 or 32 values that share a scale, stand in the lanes
of the vectors: value j of sub-block s is at `place(s, n) + j * LANES`. So a search for the best scales of LANES sub-blocks
is one run of plain vector arithmetic without sums across lanes; the searches take most of the time, and arithmetic bounds
them.

The searches minimize a weighted squared error. Given q, the best scale (and minimum) are those of a linear regression, so
the candidates are roundings: x is divided by scales around (greatest value / greatest q), rounded, and the regression's
explained part is compared. The ranges of candidates and the weights are those of llama.cpp's ggml-quants.c
(make_qkx3_quants, make_qx_quants). The scales of a super-block's sub-blocks are then rounded themselves, weighted by what
an error in them costs.

With `importance`, the address of a row's n_cols float32, values that meet large activations get a larger weight. The plain
types' rules without importance are `ggpy.quant`'s, bit by bit.
"""

from itertools import pairwise

from ..simd.vector import (
    LANES,
    absolute,
    fma,
    ld_f16,
    ld_f32,
    ld_i8,
    ld_i32,
    ld_u8,
    load_f32,
    maximum,
    minimum,
    round_even,
    select_less,
    splat_f32,
    sqrt,
    st_f16,
    st_f32,
    st_i8,
    st_i32,
    stack,
    stairs,
    store,
    store_i8,
    to_i32,
)
from .common import f32, i32, next_item
from .source import function, kernel

CHUNK = 512
_V = 4 * LANES

# The chunk's workspace, in bytes. X and W: values and weights, as lanes; Q: quants as lanes, one byte each; L: quants in
# the row's order. Then tables of one float32 a sub-block, and at last of one byte a sub-block.
_X, _W, _Q, _L = 0, 4 * CHUNK, 8 * CHUNK, 9 * CHUNK
_SCALE, _MINIMUM, _SCALE_COST, _MINIMUM_COST, _SIGMA2 = (10 * CHUNK + 128 * k for k in range(5))
_SCALE_Q, _MINIMUM_Q = 10 * CHUNK + 640, 10 * CHUNK + 672
_WORKSPACE = 10 * CHUNK + 704

#: IQ4_NL's values; a value halfway between two goes to the upper one
IQ4_VALUES = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
_IQ4_EDGES = tuple((a + b) / 2 for a, b in pairwise(IQ4_VALUES))
iq4_value = stairs(_IQ4_EDGES, IQ4_VALUES, "f32")
iq4_index = stairs(_IQ4_EDGES, tuple(range(16)), "i32")


# --- between the row and the lanes ----------------------------------------------------------------------------------


@function
def place(s, n):
    """Where sub-block s (of n values) begins among the lanes, in values."""
    return s // LANES * (n * LANES) + s % LANES


@function
def gather(row, first, n_cols, per, n, to):
    """Values first … first + 511 of a row to the lanes. Beyond the row's end its last block (`per` values) is repeated."""
    for s in range(CHUNK // n):
        block = min((first + s * n) // per, n_cols // per - 1)
        source = row + 4 * (block * per + s * n % per)
        at = to + 4 * place(s, n)
        for j in range(n):
            st_f32(at + _V * j, ld_f32(source + 4 * j))


@function
def in_row_order(quants, n, to):
    """The quants, back from the lanes."""
    for s in range(CHUNK // n):
        at = quants + place(s, n)
        for j in range(n):
            st_i8(to + s * n + j, ld_u8(at + LANES * j))


# --- weights --------------------------------------------------------------------------------------------------------


@function
def weigh_by_square(work, n):
    for i in range(CHUNK // LANES):
        x = load_f32(work + _X + _V * i)
        store(work + _W + _V * i, x * x)


@function
def weigh_by_magnitude(work, n):
    for i in range(CHUNK // LANES):
        store(work + _W + _V * i, absolute(load_f32(work + _X + _V * i)))


@function
def weigh_by_magnitude_and_mean(work, n):
    """|x| + the sub-block's root mean square."""
    for g in range(CHUNK // (n * LANES)):
        x, w = work + _X + g * n * _V, work + _W + g * n * _V
        total = splat_f32(f32(0.0))
        for j in range(n):
            v = load_f32(x + _V * j)
            total = fma(v, v, total)
        mean = sqrt(total * splat_f32(f32(1.0 / n)))
        for j in range(n):
            store(w + _V * j, mean + absolute(load_f32(x + _V * j)))


@function
def mean_squares(work, n, per, factor):
    """For each sub-block `factor` times the mean square of the block of `per` values that it is part of."""
    for g in range(CHUNK // (n * LANES)):
        total = splat_f32(f32(0.0))
        for j in range(n):
            v = load_f32(work + _X + _V * (g * n + j))
            total = fma(v, v, total)
        store(work + _SIGMA2 + _V * g, total)
    for first in range(0, CHUNK // n, per // n):
        total = f32(0.0)
        for s in range(first, first + per // n):
            total += ld_f32(work + _SIGMA2 + 4 * s)
        for s in range(first, first + per // n):
            st_f32(work + _SIGMA2 + 4 * s, total * f32(factor / per))


@function
def weigh_by_importance(work, n):
    """importance * sqrt(sigma² + x²); the importance stands where the weights will."""
    for g in range(CHUNK // (n * LANES)):
        sigma2 = load_f32(work + _SIGMA2 + _V * g)
        for j in range(n):
            at = _V * (g * n + j)
            x = load_f32(work + _X + at)
            store(work + _W + at, load_f32(work + _W + at) * sqrt(fma(x, x, sigma2)))


# --- searches for the scales of sub-blocks --------------------------------------------------------------------------


@function
def inverse_scales(work, g):
    """1 / scale of the sub-blocks in the lanes; 0 where the scale is."""
    zero, scale = splat_f32(f32(0.0)), load_f32(work + _SCALE + _V * g)
    return select_less(zero, absolute(scale), splat_f32(f32(1.0)) / scale, zero)


@function
def fit_affine(work, n, largest, first, step, n_steps):
    """Scales and minima ≤ 0 of the sub-blocks for x ≈ scale * q + minimum with q in 0 … largest, least squares.

    Candidates: x is divided by (greatest - least) / (largest + first + i * step), i < n_steps, and rounded; then twice by
    the best scale so far. Writes the tables _SCALE and _MINIMUM (negated), and the costs of errors in them: the weights
    of q² and of 1.
    """
    zero, one, two = splat_f32(f32(0.0)), splat_f32(f32(1.0)), splat_f32(f32(2.0))
    top = splat_f32(f32(largest))
    for g in range(CHUNK // (n * LANES)):
        x, w = work + _X + g * n * _V, work + _W + g * n * _V
        low, high = zero, load_f32(x)
        sum_w, sum_x = zero, zero
        for j in range(n):
            v, u = load_f32(x + _V * j), load_f32(w + _V * j)
            low, high = minimum(low, v), maximum(high, v)
            sum_w, sum_x = sum_w + u, fma(u, v, sum_x)
        span = high - low
        inverse = select_less(zero, span, one / span, zero)
        # What remains where no candidate has a regression, as all weight is on one level
        scale, least, cost = select_less(zero, span, span / top, zero), low, sum_w
        best = splat_f32(f32(-3e38))
        for i in range(n_steps + 2):
            if i < n_steps:
                factor, from_ = splat_f32(f32(largest + first + step * i)) * inverse, low
            else:
                factor, from_ = select_less(zero, scale, one / scale, zero), least
            shift = zero - from_ * factor
            sum_q, sum_q2, sum_xq = zero, zero, zero
            for j in range(n):
                v = load_f32(x + _V * j)
                q = minimum(maximum(round_even(fma(v, factor, shift)), zero), top)
                wq = load_f32(w + _V * j) * q
                sum_q, sum_q2, sum_xq = sum_q + wq, fma(wq, q, sum_q2), fma(wq, v, sum_xq)
            product = sum_w * sum_q2
            determinant = product - sum_q * sum_q
            inverse_d = one / determinant
            a = (sum_w * sum_xq - sum_x * sum_q) * inverse_d
            b = (sum_q2 * sum_x - sum_q * sum_xq) * inverse_d
            a, b = select_less(zero, b, sum_xq / sum_q2, a), minimum(b, zero)
            # the explained part of the weighted sum of x²
            gain = a * (two * sum_xq - a * sum_q2 - two * b * sum_q) + b * (two * sum_x - b * sum_w)
            gain = select_less(product * splat_f32(f32(1e-6)), determinant, gain, splat_f32(f32(-3e38)))
            scale = select_less(best, gain, a, scale)
            least = select_less(best, gain, b, least)
            cost = select_less(best, gain, sum_q2, cost)
            best = select_less(best, gain, gain, best)
        store(work + _SCALE + _V * g, maximum(scale, zero))
        store(work + _MINIMUM + _V * g, zero - least)
        store(work + _SCALE_COST + _V * g, cost)
        store(work + _MINIMUM_COST + _V * g, sum_w)


@function
def refit_minima(work, n, largest):
    """The best minima for the scales as they are now, rounded."""
    zero, top = splat_f32(f32(0.0)), splat_f32(f32(largest))
    for g in range(CHUNK // (n * LANES)):
        scale, inverse = load_f32(work + _SCALE + _V * g), inverse_scales(work, g)
        least, sum_w = load_f32(work + _MINIMUM + _V * g), load_f32(work + _MINIMUM_COST + _V * g)
        for _ in range(2):
            error = zero  # weighted sum of scale * q - x
            for i in range(g * n, g * n + n):
                x, w = load_f32(work + _X + _V * i), load_f32(work + _W + _V * i)
                q = minimum(maximum(round_even((x + least) * inverse), zero), top)
                error = fma(w, fma(scale, q, zero - x), error)
            least = select_less(zero, sum_w, maximum(error / sum_w, zero), least)
        store(work + _MINIMUM + _V * g, least)


@function
def extremes(x, n):
    """Lane by lane the value farthest from 0, and 1 over it; 0 for zeros."""
    zero = splat_f32(f32(0.0))
    far, amax = zero, zero
    for j in range(n):
        v = load_f32(x + _V * j)
        a = absolute(v)
        far, amax = select_less(amax, a, v, far), maximum(amax, a)
    return select_less(splat_f32(f32(1e-15)), amax, splat_f32(f32(1.0)) / far, zero)


@function
def fit_symmetric(work, n, half):
    """Scales of the sub-blocks for x ≈ scale * q with q in -half … half - 1, and the costs of errors in them.

    Candidates: the value farthest from 0 becomes q = -(half + i / 10), |i| < 10, before rounding; then x is divided
    twice by the best scale so far.
    """
    zero, one = splat_f32(f32(0.0)), splat_f32(f32(1.0))
    bottom, top = splat_f32(f32(-half)), splat_f32(f32(half - 1))
    for g in range(CHUNK // (n * LANES)):
        x, w = work + _X + g * n * _V, work + _W + g * n * _V
        inverse = extremes(x, n)
        scale, cost, best = zero, zero, zero
        for i in range(-9, 12):
            factor = (
                splat_f32(f32(-half - f32(0.1) * i)) * inverse if i < 10 else select_less(zero, best, one / scale, zero)
            )
            sum_q2, sum_xq = zero, zero
            for j in range(n):
                v = load_f32(x + _V * j)
                q = minimum(maximum(round_even(v * factor), bottom), top)
                wq = load_f32(w + _V * j) * q
                sum_q2, sum_xq = fma(wq, q, sum_q2), fma(wq, v, sum_xq)
            a = sum_xq / sum_q2
            gain = select_less(zero, sum_q2, a * sum_xq, zero)
            scale = select_less(best, gain, a, scale)
            cost = select_less(best, gain, sum_q2, cost)
            best = maximum(best, gain)
        store(work + _SCALE + _V * g, scale)
        store(work + _SCALE_COST + _V * g, cost)


@function
def fit_iq4(work, n):
    """The same with IQ4's values for q."""
    zero = splat_f32(f32(0.0))
    for g in range(CHUNK // (n * LANES)):
        x, w = work + _X + g * n * _V, work + _W + g * n * _V
        inverse = extremes(x, n)
        scale, cost, best = zero, zero, zero
        for i in range(16):
            # the value farthest from 0 near -127, and once exactly at +127
            aim = f32(i - 7 - 127) if i < 15 else f32(127.0)
            factor = splat_f32(aim) * inverse
            sum_q2, sum_xq = zero, zero
            for j in range(n):
                v = load_f32(x + _V * j)
                q = iq4_value(v * factor)
                wq = load_f32(w + _V * j) * q
                sum_q2, sum_xq = fma(wq, q, sum_q2), fma(wq, v, sum_xq)
            a = sum_xq / sum_q2
            gain = select_less(zero, sum_q2, a * sum_xq, zero)
            scale = select_less(best, gain, a, scale)
            cost = select_less(best, gain, sum_q2, cost)
            best = maximum(best, gain)
        store(work + _SCALE + _V * g, scale)
        store(work + _SCALE_COST + _V * g, cost)


# --- scales of a super-block ----------------------------------------------------------------------------------------


@function
def nearest(x):
    """x rounded to an integer, ties to even; |x| < 2^22."""
    return (x + f32(12582912.0)) - f32(12582912.0)


@function
def explained(values, costs, n, factor, bottom, top):
    """How much of the values' weighted square d * round(factor * value) explains with the best d; and that d."""
    sum_q2, sum_xq = f32(0.0), f32(0.0)
    for s in range(n):
        v = ld_f32(values + 4 * s)
        q = min(max(nearest(factor * v), bottom), top)
        wq = ld_f32(costs + 4 * s) * q
        sum_q2 += wq * q
        sum_xq += wq * v
    if sum_q2 > f32(0.0):
        return sum_xq / sum_q2 * sum_xq, sum_xq / sum_q2
    return f32(0.0), f32(0.0)


@function
def fit_scales(values, costs, n, bottom, top, d_at, to):
    """Rounds n scales to d * q with q in bottom … top: writes d as float16 and the q as bytes, and replaces the values by
    what decoding will make of them. If bottom < 0, the value farthest from 0 becomes about q = bottom."""
    far = f32(0.0)
    for s in range(n):
        v = ld_f32(values + 4 * s)
        if abs(v) > abs(far):
            far = v
    reach = bottom if bottom < f32(0.0) else top
    best, d, factor = f32(0.0), f32(0.0), f32(0.0)
    if abs(far) > f32(1e-15):
        for i in range(-9, 10):
            candidate = (reach + f32(0.1) * f32(i)) / far
            gain, a = explained(values, costs, n, candidate, bottom, top)
            if gain > best:
                best, d, factor = gain, a, candidate
        if factor == f32(0.0):  # nothing has weight
            factor = reach / far
            d = far / reach
    st_f16(d_at, d)
    d = ld_f16(d_at)
    for s in range(n):
        q = min(max(nearest(factor * ld_f32(values + 4 * s)), bottom), top)
        st_i8(to + s, i32(q))
        st_f32(values + 4 * s, d * q)


# --- quants ---------------------------------------------------------------------------------------------------------


@function
def quantize_affine(work, n, largest):
    zero, top = splat_f32(f32(0.0)), splat_f32(f32(largest))
    for g in range(CHUNK // (n * LANES)):
        inverse, least = inverse_scales(work, g), load_f32(work + _MINIMUM + _V * g)
        for i in range(g * n, g * n + n):
            q = round_even((load_f32(work + _X + _V * i) + least) * inverse)
            store_i8(work + _Q + LANES * i, to_i32(minimum(maximum(q, zero), top)))
    in_row_order(work + _Q, n, work + _L)


@function
def quantize_symmetric(work, n, half):
    bottom, top = splat_f32(f32(-half)), splat_f32(f32(half - 1))
    for g in range(CHUNK // (n * LANES)):
        inverse = inverse_scales(work, g)
        for i in range(g * n, g * n + n):
            q = round_even(load_f32(work + _X + _V * i) * inverse)
            store_i8(work + _Q + LANES * i, to_i32(minimum(maximum(q, bottom), top) - bottom))
    in_row_order(work + _Q, n, work + _L)


@function
def quantize_iq4(work, n):
    for g in range(CHUNK // (n * LANES)):
        inverse = inverse_scales(work, g)
        for i in range(g * n, g * n + n):
            store_i8(work + _Q + LANES * i, iq4_index(load_f32(work + _X + _V * i) * inverse))
    in_row_order(work + _Q, n, work + _L)


# --- packing --------------------------------------------------------------------------------------------------------


@function
def pack_2(q, to, mask):
    """256 quants' low two bits: byte l of each half holds those of l, l + 32, l + 64, l + 96."""
    for h in range(2):
        for j in range(32):
            at = q + 128 * h + j
            low = (ld_u8(at) & mask) | (ld_u8(at + 32) & mask) << 2
            st_i8(to + 32 * h + j, low | (ld_u8(at + 64) & mask) << 4 | (ld_u8(at + 96) & mask) << 6)


@function
def pack_4(q, to, n, half):
    """n quants' low four bits: byte j of each run of `half` holds those of j and j + half."""
    for h in range(n // (2 * half)):
        for j in range(half):
            at = q + 2 * half * h + j
            st_i8(to + half * h + j, (ld_u8(at) & 15) | (ld_u8(at + half) & 15) << 4)


@function
def pack_bits(q, to, bit):
    """Bit `bit` of 256 quants: bit k of byte j is that of quant 32 k + j."""
    for j in range(32):
        bits = 0
        for k in range(8):
            bits |= (ld_u8(q + 32 * k + j) >> bit & 1) << k
        st_i8(to + j, i32(bits))


@function
def pack_bits_32(q, to, bit):
    """Bit `bit` of 32 quants, in order."""
    for b in range(4):
        bits = 0
        for k in range(8):
            bits |= (ld_u8(q + 8 * b + k) >> bit & 1) << k
        st_i8(to + b, i32(bits))


@function
def pack_scales_and_minima(scales, minima, to):
    """Eight pairs of six bits: see `ggpy.quant.k_quants`."""
    for s in range(4):
        scale, least = ld_u8(scales + s + 4), ld_u8(minima + s + 4)
        st_i8(to + s, ld_u8(scales + s) | scale >> 4 << 6)
        st_i8(to + 4 + s, ld_u8(minima + s) | least >> 4 << 6)
        st_i8(to + 8 + s, (scale & 15) | (least & 15) << 4)


# --- types whose scales are searched --------------------------------------------------------------------------------
#
# A type's `scales`, `minima` and `pack` work on block k of a chunk, whose place in the row is `out`.


def _scales_k(count, bottom, top, d_at):
    """Rounds the scales of a super-block's `count` sub-blocks; their float16 factor is at d_at."""

    @function
    def scales(work, k, out):
        at, q = 4 * count * k, work + _SCALE_Q + count * k
        fit_scales(work + _SCALE + at, work + _SCALE_COST + at, count, f32(bottom), f32(top), out + d_at, q)

    return scales


def _minima_k(count, top, d_at):
    @function
    def minima(work, k, out):
        at, q = 4 * count * k, work + _MINIMUM_Q + count * k
        fit_scales(work + _MINIMUM + at, work + _MINIMUM_COST + at, count, f32(0.0), f32(top), out + d_at, q)

    return minima


@function
def scales_32(work, k, out):
    """A block of 32 values has one scale, and float16 is all that rounds it."""
    st_f16(out, ld_f32(work + _SCALE + 4 * k))
    st_f32(work + _SCALE + 4 * k, ld_f16(out))


@function
def minima_32(work, k, out):
    st_f16(out + 2, -ld_f32(work + _MINIMUM + 4 * k))
    st_f32(work + _MINIMUM + 4 * k, -ld_f16(out + 2))


def _affine(n, largest, reach, scales, minima):
    """The candidates spread the values over from `reach` levels fewer to two more (then cut off) than there are."""
    n_steps = 10 * (reach + 2) - 1
    first = 0.1 - reach

    @function
    def encode_chunk(work, out, n_bytes, block, n_blocks, per):
        fit_affine(work, n, largest, first, 0.1, n_steps)
        for k in range(CHUNK // per):
            scales(work, k, out + n_bytes * min(block + k, n_blocks - 1))
        refit_minima(work, n, largest)
        for k in range(CHUNK // per):
            minima(work, k, out + n_bytes * min(block + k, n_blocks - 1))
        quantize_affine(work, n, largest)

    return encode_chunk


def _symmetric(n, half, scales):
    @function
    def encode_chunk(work, out, n_bytes, block, n_blocks, per):
        fit_symmetric(work, n, half)
        for k in range(CHUNK // per):
            scales(work, k, out + n_bytes * min(block + k, n_blocks - 1))
        quantize_symmetric(work, n, half)

    return encode_chunk


def _iq4(scales):
    @function
    def encode_chunk(work, out, n_bytes, block, n_blocks, per):
        fit_iq4(work, 32)
        for k in range(CHUNK // per):
            scales(work, k, out + n_bytes * min(block + k, n_blocks - 1))
        quantize_iq4(work, 32)

    return encode_chunk


@function
def pack_q2_k(work, k, out):
    for s in range(16):
        st_i8(out + s, ld_u8(work + _SCALE_Q + 16 * k + s) | ld_u8(work + _MINIMUM_Q + 16 * k + s) << 4)
    pack_2(work + _L + 256 * k, out + 16, 3)


@function
def pack_q3_k(work, k, out):
    q, scales = work + _L + 256 * k, work + _SCALE_Q + 16 * k
    pack_bits(q, out, 2)
    pack_2(q, out + 32, 3)
    for s in range(8):
        st_i8(out + 96 + s, (ld_i8(scales + s) + 32 & 15) | (ld_i8(scales + 8 + s) + 32 & 15) << 4)
    for s in range(4):
        bits = i32(0)
        for h in range(4):
            bits |= (ld_i8(scales + 4 * h + s) + 32 >> 4) << 2 * h
        st_i8(out + 104 + s, i32(bits))


@function
def pack_q4_k(work, k, out):
    pack_scales_and_minima(work + _SCALE_Q + 8 * k, work + _MINIMUM_Q + 8 * k, out + 4)
    pack_4(work + _L + 256 * k, out + 16, 256, 32)


@function
def pack_q5_k(work, k, out):
    pack_scales_and_minima(work + _SCALE_Q + 8 * k, work + _MINIMUM_Q + 8 * k, out + 4)
    pack_bits(work + _L + 256 * k, out + 16, 4)
    pack_4(work + _L + 256 * k, out + 48, 256, 32)


@function
def pack_q6_k(work, k, out):
    for h in range(2):
        q = work + _L + 256 * k + 128 * h
        pack_4(q, out + 64 * h, 128, 64)
        for j in range(32):
            high = ld_u8(q + j) >> 4 | ld_u8(q + 32 + j) >> 4 << 2
            st_i8(out + 128 + 32 * h + j, high | ld_u8(q + 64 + j) >> 4 << 4 | ld_u8(q + 96 + j) >> 4 << 6)
    for s in range(16):
        st_i8(out + 192 + s, ld_u8(work + _SCALE_Q + 16 * k + s))


@function
def pack_iq4_xs(work, k, out):
    scales = work + _SCALE_Q + 8 * k
    high = i32(0)
    for s in range(8):
        high |= (ld_i8(scales + s) + 32 >> 4) << 2 * s
    st_i8(out + 2, i32(high & 255))
    st_i8(out + 3, i32(high >> 8))
    for s in range(4):
        st_i8(out + 4 + s, (ld_i8(scales + 2 * s) + 32 & 15) | (ld_i8(scales + 2 * s + 1) + 32 & 15) << 4)
    pack_4(work + _L + 256 * k, out + 8, 256, 16)


@function
def pack_at_2(work, k, out):
    pack_4(work + _L + 32 * k, out + 2, 32, 16)


@function
def pack_at_4(work, k, out):
    pack_4(work + _L + 32 * k, out + 4, 32, 16)


@function
def pack_q5_0(work, k, out):
    pack_bits_32(work + _L + 32 * k, out + 2, 4)
    pack_4(work + _L + 32 * k, out + 6, 32, 16)


@function
def pack_q5_1(work, k, out):
    pack_bits_32(work + _L + 32 * k, out + 4, 4)
    pack_4(work + _L + 32 * k, out + 8, 32, 16)


#: where sigma² is the mean over the row, and where the importance alone is the weight
_ROW, _NONE = 0, -1


def _searched(n, per, n_bytes, weigh, sigma_per, sigma_factor, encode_chunk, pack):
    """A function that encodes a row chunk by chunk: gathers, weighs, searches scales, quantizes and packs.

    Sub-blocks have n values, blocks `per` in n_bytes; sigma² is `sigma_factor` times the mean square of `sigma_per` values.
    """

    @function
    def encode_row(x, importance, out, n_cols):
        work, n_blocks = stack(_WORKSPACE), n_cols // per
        if importance != 0 and sigma_per == _ROW:
            total = f32(0.0)
            for j in range(n_cols):
                total += ld_f32(x + 4 * j) * ld_f32(x + 4 * j)
            for s in range(CHUNK // n):
                st_f32(work + _SIGMA2 + 4 * s, total / f32(n_cols))
        for first in range(0, n_cols, CHUNK):
            gather(x, first, n_cols, per, n, work + _X)
            if importance != 0:
                gather(importance, first, n_cols, per, n, work + _W)
                if sigma_per > 0:
                    mean_squares(work, n, sigma_per, sigma_factor)
                if sigma_per != _NONE:
                    weigh_by_importance(work, n)
            else:
                weigh(work, n)
            block = first // per
            encode_chunk(work, out, n_bytes, block, n_blocks, per)
            for k in range(CHUNK // per):
                pack(work, k, out + n_bytes * min(block + k, n_blocks - 1))

    return encode_row


# --- types with a plain rule ----------------------------------------------------------------------------------------


@function
def farthest(x, n):
    """The first of the values farthest from 0."""
    far = f32(0.0)
    for j in range(n):
        v = ld_f32(x + 4 * j)
        if abs(v) > abs(far):
            far = v
    return far


@function
def inverse_of(d):
    return f32(0.0) if d == f32(0.0) else f32(1.0) / d


@function
def plain_symmetric(x, work, out, half):
    d = farthest(x, 32) / f32(-half)
    st_f16(out, d)
    inverse = inverse_of(d)
    for j in range(32):
        q = ld_f32(x + 4 * j) * inverse + f32(half + 0.5)
        st_i8(work + _L + j, i32(min(max(q, f32(0.0)), f32(2 * half - 1))))


@function
def plain_affine(x, work, out, largest):
    low, high = ld_f32(x), ld_f32(x)
    for j in range(1, 32):
        v = ld_f32(x + 4 * j)
        low, high = min(low, v), max(high, v)
    d = (high - low) / f32(largest)
    st_f16(out, d)
    st_f16(out + 2, low)
    inverse = inverse_of(d)
    for j in range(32):
        q = (ld_f32(x + 4 * j) - low) * inverse + f32(0.5)
        st_i8(work + _L + j, i32(min(max(q, f32(0.0)), f32(largest))))


@function
def plain_q4_0(x, work, out):
    plain_symmetric(x, work, out, 8)
    pack_at_2(work, 0, out)


@function
def plain_q5_0(x, work, out):
    plain_symmetric(x, work, out, 16)
    pack_q5_0(work, 0, out)


@function
def plain_q4_1(x, work, out):
    plain_affine(x, work, out, 15)
    pack_at_4(work, 0, out)


@function
def plain_q5_1(x, work, out):
    plain_affine(x, work, out, 31)
    pack_q5_1(work, 0, out)


@function
def plain_q8_0(x, work, out):
    d = abs(farthest(x, 32)) / f32(127.0)
    st_f16(out, d)
    inverse = inverse_of(d)
    for j in range(32):
        v = ld_f32(x + 4 * j) * inverse
        a = abs(v)
        q = i32(min(a, f32(127.0)))
        if a - f32(q) >= f32(0.5):  # halves away from 0
            q += i32(1)
        st_i8(out + 2 + j, i32(-q if v < f32(0.0) else q))


#: 4-bit floats (e2m1) in ascending order of magnitude; halfway between two goes to the smaller one
_FP4_EDGES = (0.5, 1.5, 2.5, 3.5, 5.0, 7.0, 10.0)


@function
def floor_log2(x, work):
    """floor(log2(x)) of a normal x > 0 as C has it: log2f rounds to float32, up to a whole number from just below it."""
    st_f32(work, x)
    bits = ld_i32(work)
    k = (bits >> 23) - 127
    below = (1 << 23) - (bits & 0x7FFFFF)  # float32 steps of 2^(k - 23) up to 2^(k + 1)
    # log2 lacks below * 2^-24 / ln 2 of the whole number; it is rounded up if that is less than half a float32 step there.
    whole = k + 1
    magnitude = whole - 1 if whole > 0 else -whole
    step = 1
    while 2 * step <= magnitude:
        step *= 2
    return k + 1 if magnitude > 0 and f32(below) < f32(0.6931472) * f32(step) else k


@function
def plain_mxfp4(x, work, out):
    amax = abs(farthest(x, 32))
    e = 0
    if amax > f32(0.0):
        e = max(floor_log2(amax, work + _SCALE) + 125, 0)
    st_i8(out, i32(e))
    # d = 2^(e - 128); below 2^-126 it is subnormal
    st_i32(work + _SCALE, i32((e - 1) << 23) if e > 1 else i32(0x200000 << e))
    d = ld_f32(work + _SCALE)
    for j in range(32):
        v = ld_f32(x + 4 * j)
        a = abs(v)
        q = 0
        for edge in _FP4_EDGES:
            q += 1 if a > f32(edge) * d else 0
        st_i8(work + _L + j, i32(q | 8 if v < f32(0.0) and q > 0 else q))
    pack_4(work + _L, out + 1, 32, 16)


@function
def ternary(x, work):
    """max |x| of 256 values, and the values / that, rounded, + 1."""
    amax = abs(farthest(x, 256))
    inverse = inverse_of(amax)
    for j in range(256):
        v = ld_f32(x + 4 * j) * inverse
        st_i8(work + _L + j, i32(1 + (1 if v >= f32(0.5) else 0) - (1 if v <= f32(-0.5) else 0)))
    return amax


@function
def pack_trits(q, to, n, count):
    """`count` trits a byte, a fraction of 3^5 scaled to 256 and rounded up; byte j takes those of j, j + n, j + 2 n, …"""
    for j in range(n):
        total = 0
        for k in range(count):
            total = 3 * total + ld_u8(q + n * k + j)
        for _ in range(count, 5):
            total *= 3
        st_i8(to + j, i32((total * 256 + 242) // 243))


@function
def plain_tq1_0(x, work, out):
    st_f16(out + 52, ternary(x, work))
    pack_trits(work + _L, out, 32, 5)
    pack_trits(work + _L + 160, out + 32, 16, 5)
    pack_trits(work + _L + 240, out + 48, 4, 4)


@function
def plain_tq2_0(x, work, out):
    st_f16(out + 64, ternary(x, work))
    pack_2(work + _L, out, 3)


def _plain(per, n_bytes, encode_block):
    """A function that encodes a row block by block."""

    @function
    def encode_row(x, importance, out, n_cols):
        work = stack(_WORKSPACE)
        for b in range(n_cols // per):
            encode_block(x + 4 * per * b, work, out + n_bytes * b)

    return encode_row


# --- the kernels ----------------------------------------------------------------------------------------------------


def _either(plain, searched):
    """Without importance the plain rule, else a search."""

    @function
    def encode_row(x, importance, out, n_cols):
        if importance == 0:
            plain(x, importance, out, n_cols)
        else:
            searched(x, importance, out, n_cols)

    return encode_row


def _define(name, per, n_bytes, encode_row):
    @kernel(f"encode_{name}")
    def encode(ith, nth, x, importance, out, counter, n_rows, n_cols):
        while True:
            row = next_item(counter)
            if row >= n_rows:
                break
            encode_row(x + 4 * n_cols * row, importance, out + n_cols // per * n_bytes * row, n_cols)


# fmt: off
for _name, _n, _bytes, _weigh, _per, _factor, _chunk, _pack in (
    ("Q2_K", 16, 84, weigh_by_magnitude, 256, 1,
     _affine(16, 3, 2, _scales_k(16, 0, 15, 80), _minima_k(16, 15, 82)), pack_q2_k),
    ("Q3_K", 16, 110, weigh_by_magnitude, 256, 2, _symmetric(16, 4, _scales_k(16, -32, 31, 108)), pack_q3_k),
    ("Q4_K", 32, 144, weigh_by_magnitude_and_mean, 256, 2,
     _affine(32, 15, 3, _scales_k(8, 0, 63, 0), _minima_k(8, 63, 2)), pack_q4_k),
    ("Q5_K", 32, 176, weigh_by_magnitude_and_mean, 256, 2,
     _affine(32, 31, 5, _scales_k(8, 0, 63, 0), _minima_k(8, 63, 2)), pack_q5_k),
    ("Q6_K", 16, 210, weigh_by_square, _NONE, 0, _symmetric(16, 32, _scales_k(16, -128, 127, 208)), pack_q6_k),
    ("IQ4_XS", 32, 136, weigh_by_square, 256, 2, _iq4(_scales_k(8, -32, 31, 0)), pack_iq4_xs),
):
    _define(_name, 256, _bytes, _searched(_n, 256, _bytes, _weigh, _per, _factor, _chunk, _pack))

_define("IQ4_NL", 32, 18, _searched(32, 32, 18, weigh_by_square, 32, 2, _iq4(scales_32), pack_at_2))
for _name, _bytes, _block, _chunk, _pack in (
    ("Q4_0", 18, plain_q4_0, _symmetric(32, 8, scales_32), pack_at_2),
    ("Q4_1", 20, plain_q4_1, _affine(32, 15, 3, scales_32, minima_32), pack_at_4),
    ("Q5_0", 22, plain_q5_0, _symmetric(32, 16, scales_32), pack_q5_0),
    ("Q5_1", 24, plain_q5_1, _affine(32, 31, 5, scales_32, minima_32), pack_q5_1),
):
    _row = _searched(32, 32, _bytes, weigh_by_square, _ROW, 1, _chunk, _pack)
    _define(_name, 32, _bytes, _either(_plain(32, _bytes, _block), _row))

for _name, _per, _bytes, _block in (
    ("Q8_0", 32, 34, plain_q8_0),
    ("MXFP4", 32, 17, plain_mxfp4),
    ("TQ1_0", 256, 54, plain_tq1_0),
    ("TQ2_0", 256, 66, plain_tq2_0),
):
    _define(_name, _per, _bytes, _plain(_per, _bytes, _block))
# fmt: on
