"""Norms, activations and sums over rows of float32.

Work is shared out by rows or, element by element, by 16 values of all rows together: results have room for a multiple of
16. The last values of a row that fill no vector are loaded with zeros behind them.
"""

from ..simd.vector import (
    LANES,
    absolute,
    copy_bytes,
    fma,
    ld_i32,
    load_f32,
    load_first,
    max_f32,
    maximum,
    minimum,
    splat_f32,
    sqrt,
    store,
    store_first,
    sum_f32,
)
from . import table
from .common import bits_f32, exp, f32, ld_state, share
from .source import function, kernel

_V = 4 * LANES


@function
def _one():
    return splat_f32(f32(1.0))


@function
def _negative(x):
    return splat_f32(f32(0.0)) - x


@function
def whole(n):
    """How many of n values fill vectors."""
    return n // LANES * LANES


#: `table.padded`, for kernels
padded = function(table.padded)


@function
def rms_scale(x, n_cols, eps):
    """1 / sqrt(mean(x²) + eps) of a row, in all lanes."""
    squares = splat_f32(f32(0.0))
    end = whole(n_cols)
    for i in range(0, 4 * end, _V):
        v = load_f32(x + i)
        squares = fma(v, v, squares)
    if end < n_cols:
        v = load_first(x + 4 * end, n_cols - end)
        squares = fma(v, v, squares)
    mean = splat_f32(sum_f32(squares) / f32(n_cols))
    return _one() / sqrt(mean + splat_f32(bits_f32(eps)))


@function
def _weighted(v, w, i):
    """v times the weights at w + i, if there are any."""
    return v * load_f32(w + i) if w else v


@kernel("rms_norm")
def rms_norm(ith, nth, x, w, out, state, n_cols, n_rows_per_token, x_stride, out_stride, eps):
    """out = x / sqrt(mean(x²) + eps) * w, row by row (Zhang & Sennrich 2019); without w if that is 0."""
    start, stop = share(ld_state(state, 0) * n_rows_per_token, ith, nth)
    end = whole(n_cols)
    for r in range(start, stop):
        xr, outr = x + r * x_stride, out + r * out_stride
        scale = rms_scale(xr, n_cols, eps)
        for i in range(0, 4 * end, _V):
            store(outr + i, _weighted(load_f32(xr + i) * scale, w, i))
        if end < n_cols:
            v = load_first(xr + 4 * end, n_cols - end) * scale
            if w:
                v = v * load_first(w + 4 * end, n_cols - end)
            store_first(outr + 4 * end, v, n_cols - end)


@kernel("layer_norm")
def layer_norm(ith, nth, x, w, bias, out, state, n_cols, n_rows_per_token, eps):
    """out = (x - mean(x)) / sqrt(var(x) + eps) * w + bias, row by row (Ba et al. 2016); without w or bias if they are 0."""
    start, stop = share(ld_state(state, 0) * n_rows_per_token, ith, nth)
    end, rest = whole(n_cols), n_cols - whole(n_cols)
    for r in range(start, stop):
        xr, outr = x + 4 * n_cols * r, out + 4 * n_cols * r
        total = load_first(xr + 4 * end, rest)
        for i in range(0, 4 * end, _V):
            total = total + load_f32(xr + i)
        mean = splat_f32(sum_f32(total) / f32(n_cols))
        # The deviations, of which those behind the row's end must not count.
        store_first(outr + 4 * end, load_first(xr + 4 * end, rest) - mean, rest)
        v = load_first(outr + 4 * end, rest)
        squares = v * v
        for i in range(0, 4 * end, _V):
            v = load_f32(xr + i) - mean
            store(outr + i, v)
            squares = fma(v, v, squares)
        variance = splat_f32(sum_f32(squares) / f32(n_cols))
        scale = _one() / sqrt(variance + splat_f32(bits_f32(eps)))
        for i in range(0, 4 * end, _V):
            v = _weighted(load_f32(outr + i) * scale, w, i)
            if bias:
                v = v + load_f32(bias + i)
            store(outr + i, v)
        if rest:
            v = load_first(outr + 4 * end, rest) * scale
            if w:
                v = v * load_first(w + 4 * end, rest)
            if bias:
                v = v + load_first(bias + 4 * end, rest)
            store_first(outr + 4 * end, v, rest)


# --- element by element ---


@function
def silu(x):
    """x / (1 + e^-x)."""
    return x / (_one() + exp(_negative(x)))


@function
def tanh(x):
    """1 - 2 / (e^2x + 1), to 1e-7."""
    return _one() - splat_f32(f32(2.0)) / (exp(x + x) + _one())


@function
def gelu_tanh(x):
    """The tanh approximation of GELU (Hendrycks & Gimpel 2016): x / 2 * (1 + tanh(z / 2)), which is x / (1 + e^-z), where
    nothing cancels."""
    z = x * fma(x * x, splat_f32(f32(2 * 0.044715 * 0.7978845608028654)), splat_f32(f32(2 * 0.7978845608028654)))
    return x / (_one() + exp(_negative(z)))


@function
def gelu_quick(x):
    """x / (1 + e^-1.702x) (Hendrycks & Gimpel 2016)."""
    return x / (_one() + exp(x * splat_f32(f32(-1.702))))


#: ln(erfc(z) / t) + z² for t = 1 / (1 + z / 2), highest power of t first: within 1.2e-7 of erfc(z), relatively, for all
#: z ≥ 0 (Press et al., Numerical Recipes, "erfcc").
_ERFC = (0.17087277, -0.82215223, 1.48851587, -1.13520398, 0.27886807, -0.18628806, 0.09678418, 0.37409196, 1.00002368)
_ERFC = tuple(f32(c) for c in (*_ERFC, -1.26551223))


@function
def gelu_erf(x):
    """GELU, x / 2 * (1 + erf(x / sqrt 2))."""
    z = absolute(x) * splat_f32(f32(0.7071067811865476))
    t = _one() / fma(z, splat_f32(f32(0.5)), _one())
    p = splat_f32(_ERFC[0])
    for i in range(1, 10):
        p = fma(p, t, splat_f32(_ERFC[i]))
    erfc = t * exp(p - z * z)
    # x ≥ 0: x - x / 2 * erfc; x < 0: x / 2 * erfc. Neither cancels.
    half = splat_f32(f32(0.5)) * absolute(x) * erfc
    return maximum(x, splat_f32(f32(0.0))) - half


@function
def _relu_squared(x):
    x = maximum(x, splat_f32(f32(0.0)))
    return x * x


def _unary(name, f):
    @kernel(name)
    def unary(ith, nth, x, out, state, n_cols):
        start, stop = share((ld_state(state, 0) * n_cols + 15) // 16, ith, nth)
        for i in range(64 * start, 64 * stop, _V):
            store(out + i, f(load_f32(x + i)))


def _binary(name, combine):
    combine = function(combine)

    @kernel(name)
    def binary(ith, nth, x, y, out, state, n_cols):
        start, stop = share((ld_state(state, 0) * n_cols + 15) // 16, ith, nth)
        for i in range(64 * start, 64 * stop, _V):
            store(out + i, combine(load_f32(x + i), load_f32(y + i)))


_unary("gelu_tanh", gelu_tanh)
_unary("gelu_erf", gelu_erf)
_unary("gelu_quick", gelu_quick)
_unary("relu_squared", _relu_squared)
_binary("add", lambda x, y: x + y)
_binary("mul", lambda x, y: x * y)
_binary("swiglu", lambda x, y: silu(x) * y)
_binary("geglu_tanh", lambda x, y: gelu_tanh(x) * y)
_binary("geglu_erf", lambda x, y: gelu_erf(x) * y)


@function
def _within(x, most):
    """x, no further than `most` from 0; NaN where x isn't finite, so that the bound hides no damage."""
    return maximum(minimum(x, most), _negative(most)) + (x - x)


@kernel("swiglu_clamped")
def swiglu_clamped(ith, nth, x, y, out, state, n_cols, alpha, limit):
    """out = g / (1 + e^(-alpha g)) * (u + 1) for g = min(x, limit) and u = y, no further than limit from 0."""
    start, stop = share((ld_state(state, 0) * n_cols + 15) // 16, ith, nth)
    by, most = splat_f32(f32(0.0) - bits_f32(alpha)), splat_f32(bits_f32(limit))
    for i in range(64 * start, 64 * stop, _V):
        gate, up = load_f32(x + i), load_f32(y + i)
        gate = minimum(gate, most) + (gate - gate)
        up = _within(up, most)
        store(out + i, gate / (_one() + exp(gate * by)) * (up + _one()))


@kernel("scale")
def scale(ith, nth, x, out, state, n_cols, factor):
    start, stop = share((ld_state(state, 0) * n_cols + 15) // 16, ith, nth)
    by = splat_f32(bits_f32(factor))
    for i in range(64 * start, 64 * stop, _V):
        store(out + i, load_f32(x + i) * by)


@kernel("clamp")
def clamp(ith, nth, x, out, state, n_cols, limit):
    """out = x, no further than limit from 0."""
    start, stop = share((ld_state(state, 0) * n_cols + 15) // 16, ith, nth)
    most = splat_f32(bits_f32(limit))
    for i in range(64 * start, 64 * stop, _V):
        store(out + i, _within(load_f32(x + i), most))


@kernel("soft_cap")
def soft_cap(ith, nth, x, out, state, n_cols, cap):
    """out = cap * tanh(x / cap)."""
    start, stop = share((ld_state(state, 0) * n_cols + 15) // 16, ith, nth)
    by = splat_f32(bits_f32(cap))
    for i in range(64 * start, 64 * stop, _V):
        store(out + i, tanh(load_f32(x + i) / by) * by)


@function
def sigmoid(x):
    """1 / (1 + e^-x)."""
    return _one() / (_one() + exp(_negative(x)))


@kernel("gated")
def gated(ith, nth, x, gate, out, state, n_cols, n_rows_per_token, gate_stride):
    """out = x * sigmoid(gate), row by row."""
    start, stop = share(ld_state(state, 0) * n_rows_per_token, ith, nth)
    for r in range(start, stop):
        xr, gr, outr = x + 4 * n_cols * r, gate + gate_stride * r, out + 4 * n_cols * r
        for i in range(0, 4 * n_cols, _V):
            store(outr + i, load_f32(xr + i) * sigmoid(load_f32(gr + i)))


@kernel("l2_norm")
def l2_norm(ith, nth, x, out, state, n_cols, n_rows_per_token, x_stride, eps):
    """out = x / sqrt(sum(x²) + eps), row by row; rows of a token stand together."""
    start, stop = share(ld_state(state, 0) * n_rows_per_token, ith, nth)
    for r in range(start, stop):
        xr, outr = x + r // n_rows_per_token * x_stride + r % n_rows_per_token * (4 * n_cols), out + 4 * n_cols * r
        squares = splat_f32(f32(0.0))
        for i in range(0, 4 * n_cols, _V):
            v = load_f32(xr + i)
            squares = fma(v, v, squares)
        scale = _one() / sqrt(splat_f32(sum_f32(squares)) + splat_f32(bits_f32(eps)))
        for i in range(0, 4 * n_cols, _V):
            store(outr + i, load_f32(xr + i) * scale)


def _with_row(name, combine):
    """x and one row y for all tokens."""
    combine = function(combine)

    @kernel(name)
    def with_row(ith, nth, x, y, out, state, n_cols):
        start, stop = share(ld_state(state, 0), ith, nth)
        end = whole(n_cols)
        for t in range(start, stop):
            xr, outr = x + 4 * n_cols * t, out + 4 * n_cols * t
            for i in range(0, 4 * end, _V):
                store(outr + i, combine(load_f32(xr + i), load_f32(y + i)))
            if end < n_cols:
                v = combine(load_first(xr + 4 * end, n_cols - end), load_first(y + 4 * end, n_cols - end))
                store_first(outr + 4 * end, v, n_cols - end)


_with_row("add_bias", lambda x, y: x + y)
_with_row("mul_row", lambda x, y: x * y)


@kernel("soft_max")
def soft_max(ith, nth, x, out, state, n_cols):
    """out = exp(x - max) / sum of them, row by row."""
    start, stop = share(ld_state(state, 0), ith, nth)
    for t in range(start, stop):
        xr, outr = x + 4 * n_cols * t, out + 4 * n_cols * t
        best = load_f32(xr)
        for i in range(_V, 4 * n_cols, _V):
            best = maximum(best, load_f32(xr + i))
        top = splat_f32(max_f32(best))
        total = splat_f32(f32(0.0))
        for i in range(0, 4 * n_cols, _V):
            e = exp(load_f32(xr + i) - top)
            store(outr + i, e)
            total = total + e
        factor = _one() / splat_f32(sum_f32(total))
        for i in range(0, 4 * n_cols, _V):
            store(outr + i, load_f32(outr + i) * factor)


@kernel("rows")
def rows(ith, nth, x, rows, out, state, n_cols):
    """Copies the rows of x that int32 `rows` names."""
    start, stop = share(ld_state(state, 0), ith, nth)
    for i in range(start, stop):
        copy_bytes(out + 4 * n_cols * i, x + 4 * n_cols * ld_i32(rows + 4 * i), 4 * n_cols)


@kernel("pad_rows")
def pad_rows(ith, nth, x, out, state, n_cols, n_rows_per_token, x_row_stride, n_padded):
    """Rows of n_cols values with zeros behind them, n_padded in all (a multiple of 16)."""
    start, stop = share(ld_state(state, 0) * n_rows_per_token, ith, nth)
    for r in range(start, stop):
        copy_padded(out + 4 * n_padded * r, x + x_row_stride * r, n_cols, n_padded)


@function
def copy_padded(to, x, n, n_padded):
    """The n values at x and zeros behind them, n_padded in all (a multiple of 16)."""
    end = whole(n)
    for i in range(0, end, LANES):
        store(to + 4 * i, load_f32(x + 4 * i))
    for i in range(end, n_padded, LANES):
        store(to + 4 * i, load_first(x + 4 * i, n - i))
