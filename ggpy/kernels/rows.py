"""Norms, activations and sums over rows of float32.

Row lengths are multiples of 16; work is shared out by rows or by 16 values.
"""

from ..simd.vector import LANES, fma, ld_i32, load_f32, max_f32, maximum, splat_f32, sqrt, store, sum_f32
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
def rms_scale(x, n_cols, eps):
    """1 / sqrt(mean(x²) + eps) of a row, in all lanes."""
    squares = splat_f32(f32(0.0))
    for i in range(0, 4 * n_cols, _V):
        v = load_f32(x + i)
        squares = fma(v, v, squares)
    mean = splat_f32(sum_f32(squares) / f32(n_cols))
    return _one() / sqrt(mean + splat_f32(bits_f32(eps)))


@function
def silu(x):
    """x / (1 + e^-x)."""
    return x / (_one() + exp(_negative(x)))


@kernel("rms_norm")
def rms_norm(ith, nth, x, w, out, state, n_cols, n_rows_per_token, x_stride, out_stride, eps):
    """out = x / sqrt(mean(x²) + eps) * w, row by row (Zhang & Sennrich 2019)."""
    start, stop = share(ld_state(state, 0) * n_rows_per_token, ith, nth)
    for r in range(start, stop):
        xr, outr = x + r * x_stride, out + r * out_stride
        scale = rms_scale(xr, n_cols, eps)
        for i in range(0, 4 * n_cols, _V):
            store(outr + i, load_f32(xr + i) * scale * load_f32(w + i))


def _binary(name, combine):
    combine = function(combine)

    @kernel(name)
    def binary(ith, nth, x, y, out, state, n_cols):
        start, stop = share(ld_state(state, 0) * n_cols // 16, ith, nth)
        for i in range(64 * start, 64 * stop, _V):
            store(out + i, combine(load_f32(x + i), load_f32(y + i)))


@function
def _gelu(x):
    # The tanh approximation (Hendrycks & Gimpel 2016); tanh(z) = 1 - 2 / (e^2z + 1).
    z = x * fma(x * x, splat_f32(f32(0.044715 * 0.7978845608028654)), splat_f32(f32(0.7978845608028654)))
    tanh = _one() - splat_f32(f32(2.0)) / (exp(z + z) + _one())
    return splat_f32(f32(0.5)) * x * (_one() + tanh)


_binary("add", lambda x, y: x + y)
_binary("mul", lambda x, y: x * y)
_binary("swiglu", lambda x, y: silu(x) * y)
_binary("geglu", lambda x, y: _gelu(x) * y)


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


@kernel("add_bias")
def add_bias(ith, nth, x, y, out, state, n_cols):
    """out = x + y, with one row y for all tokens."""
    start, stop = share(ld_state(state, 0), ith, nth)
    for t in range(start, stop):
        for i in range(0, 4 * n_cols, _V):
            store(out + 4 * n_cols * t + i, load_f32(x + 4 * n_cols * t + i) + load_f32(y + i))


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


@kernel("scale")
def scale(ith, nth, x, out, state, n_cols, factor):
    start, stop = share(ld_state(state, 0) * n_cols // 16, ith, nth)
    by = splat_f32(bits_f32(factor))
    for i in range(64 * start, 64 * stop, _V):
        store(out + i, load_f32(x + i) * by)


@kernel("rows")
def rows(ith, nth, x, rows, out, state, n_cols):
    """Copies the rows of x that int32 `rows` names."""
    start, stop = share(ld_state(state, 0), ith, nth)
    for i in range(start, stop):
        row = x + 4 * n_cols * ld_i32(rows + 4 * i)
        for k in range(0, 4 * n_cols, _V):
            store(out + 4 * n_cols * i + k, load_f32(row + k))
