"""Layers that know a fixed size of each sequence: short convolutions, the gated delta rule, Mamba-2's scan.

What they know stands in the sequence's slot, slot_stride bytes after that of the slot before, and is brought up to date by
each run. Work is shared out by span and by columns or heads; an item goes through a span's tokens one after the other, so
that values are the same bits however a sequence is cut into runs. At a sequence's first token a slot counts as zeros.
Values at the end of a row or head that fill no vector are loaded with zeros behind them.
"""

from ..simd.vector import (
    LANES,
    fma,
    ld_f32,
    ld_i32,
    load_f32,
    load_first,
    load_tile_f32,
    max_f32,
    splat_f32,
    st_f32,
    store,
    store_first,
    tile_f32,
)
from .common import bits_f32, exp, f32, ld_state, next_item
from .rows import sigmoid, silu
from .source import function, kernel
from .table import SPAN_BYTES, STATE_COLUMNS

_V = 4 * LANES
_CONV_BYTES = 256  # of a token's row in an item


@function
def _span(spans, s):
    """First token, tokens, positions before them, slot."""
    at = spans + SPAN_BYTES * s
    return ld_i32(at), ld_i32(at + 4), ld_i32(at + 8), ld_i32(at + 16)


@function
def _load(at, n):
    """Up to a vector's values, the first n."""
    return load_f32(at) if n >= LANES else load_first(at, n)


@function
def _store(at, v, n):
    if n >= LANES:
        store(at, v)
    else:
        store_first(at, v, n)


@function
def _fill_zero(to, n_bytes):
    for i in range(0, n_bytes, _V):
        _store(to + i, splat_f32(f32(0.0)), (n_bytes - i) // 4)


@kernel("short_conv")
def short_conv(ith, nth, x, w, bias, tails, out, counter, state, n_cols, width, slot_stride, silu_after):
    """out[t] = bias + sum over k of w[k] * x[t - width + 1 + k], column by column, w (width, n_cols); bias may be 0.

    A slot holds the last width - 1 rows of x, (width - 1, n_cols).
    """
    n_spans, spans = ld_state(state, 1), ld_state(state, 3)
    row, before = 4 * n_cols, width - 1
    n_parts = (row + _CONV_BYTES - 1) // _CONV_BYTES
    item = next_item(counter)
    while item < n_spans * n_parts:
        # The longest spans come last in `spans`, and are begun first.
        token, n, n_past, slot = _span(spans, n_spans - 1 - item // n_parts)
        first = item % n_parts * _CONV_BYTES
        stop = min(first + _CONV_BYTES, row)
        tail, xs = tails + slot_stride * slot, x + row * token
        if n_past == 0:
            for k in range(before):
                _fill_zero(tail + row * k + first, stop - first)
        for t in range(n):
            to = out + row * (token + t)
            for c in range(first, stop, _V):
                left = (stop - c) // 4
                total = _load(bias + c, left) if bias else splat_f32(f32(0.0))
                for k in range(width):
                    at = t + k - before
                    source = tail + row * (at + before) if at < 0 else xs + row * at
                    total = fma(_load(w + row * k + c, left), _load(source + c, left), total)
                if silu_after:
                    total = silu(total)
                _store(to + c, total, left)
        for k in range(before):
            at = n - before + k
            source = tail + row * (at + before) if at < 0 else xs + row * at
            for c in range(first, stop, _V):
                _store(tail + row * k + c, _load(source + c, (stop - c) // 4), (stop - c) // 4)
        item = next_item(counter)


@function
def _log1p(y):
    """log(1 + y) for 0 ≤ y ≤ 1, lane by lane: twice the series of artanh(y / (2 + y)), whose argument is at most 1/3."""
    s = y / (splat_f32(f32(2.0)) + y)
    square = s * s
    p = splat_f32(f32(1.0 / 15.0))
    p = fma(p, square, splat_f32(f32(1.0 / 13.0)))
    p = fma(p, square, splat_f32(f32(1.0 / 11.0)))
    p = fma(p, square, splat_f32(f32(1.0 / 9.0)))
    p = fma(p, square, splat_f32(f32(1.0 / 7.0)))
    p = fma(p, square, splat_f32(f32(1.0 / 5.0)))
    p = fma(p, square, splat_f32(f32(1.0 / 3.0)))
    p = fma(p, square, splat_f32(f32(1.0)))
    return (s + s) * p


@function
def softplus(x):
    """log(1 + e^x) of one float32."""
    return (f32(0.0) if x < f32(0.0) else x) + max_f32(_log1p(exp(splat_f32(-abs(x)))))


@kernel("delta_gates")
def delta_gates(ith, nth, decay, beta, a, dt, out, state, n_head):
    """For each token and head, e^(a * softplus(decay + dt)) and sigmoid(beta), a pair; if beta is 0, the softplus.

    If beta is 0, the least that decay + dt may be stands behind all heads' dt.
    """
    n = ld_state(state, 0) * n_head
    for i in range(n * ith // nth, n * (ith + 1) // nth):
        h = i % n_head
        total = ld_f32(decay + 4 * i) + ld_f32(dt + 4 * h)
        if beta == 0:
            least = ld_f32(dt + 4 * n_head)
            total = least if total < least else total
        step = softplus(total)
        st_f32(out + 8 * i, max_f32(exp(splat_f32(ld_f32(a + 4 * h) * step))))
        if beta:
            step = max_f32(sigmoid(splat_f32(ld_f32(beta + 4 * i))))
        st_f32(out + 8 * i + 4, step)


def _columns(vectors, learns):
    """The rule for some columns of a head's state, all tokens of a span.

    `vectors`: how many of them, or 0 for the first `n_last` values of one. `learns`: a key's value is what the state
    doesn't answer to it yet; else the value as it is. `skip` is the address of the values' own share in the result, or 0.
    """
    if vectors:

        @function
        def zeros():
            return tile_f32(vectors)

        @function
        def load(at, n_last):
            return load_tile_f32(at, _V, vectors)

        @function
        def put(at, values, n_last):
            store(at, values)
    else:
        load, put = load_first, store_first

        @function
        def zeros():
            return splat_f32(f32(0.0))

    @function
    def columns(
        q, k, key_stride, v, value_stride, gates, n_head, memory, line, out, out_stride, n_last, n_tokens, n, scale, skip
    ):
        answer = zeros()  # of the state to the next key
        if learns:
            for i in range(n):
                answer = fma(load(memory + line * i, n_last), splat_f32(ld_f32(k + 4 * i)), answer)
        for t in range(n_tokens):
            decay, beta = splat_f32(ld_f32(gates)), splat_f32(ld_f32(gates + 4))
            # One pass reads and writes the state, and asks it for the next token's answer: of the last, for nothing.
            following = k + key_stride if t + 1 < n_tokens else k
            value = load(v, n_last)
            change = value * beta
            if learns:
                change = (value - answer * decay) * beta
            answer, total = zeros(), zeros()
            for i in range(n):
                row = load(memory + line * i, n_last) * decay
                row = fma(splat_f32(ld_f32(k + 4 * i)), change, row)
                put(memory + line * i, row, n_last)
                total = fma(row, splat_f32(ld_f32(q + 4 * i)), total)
                if learns:
                    answer = fma(row, splat_f32(ld_f32(following + 4 * i)), answer)
            total = total * splat_f32(scale)
            if skip:
                total = fma(value, splat_f32(ld_f32(skip)), total)
            put(out, total, n_last)
            k = following
            q, v, gates, out = q + key_stride, v + value_stride, gates + 8 * n_head, out + out_stride

    return columns


def _define(name, learns):
    two, one, last = _columns(2, learns), _columns(1, learns), _columns(0, learns)

    @kernel(name)
    def rule(
        ith,
        nth,
        queries,
        keys,
        values,
        gates,
        memory,
        skip,
        out,
        counter,
        state,
        n_head,
        n_head_k,
        tiled,
        head_dim_k,
        head_dim,
        key_stride,
        value_stride,
        slot_stride,
        scale,
    ):
        n_spans, spans = ld_state(state, 1), ld_state(state, 3)
        out_stride, factor = 4 * n_head * head_dim, bits_f32(scale)
        n_parts = (head_dim + STATE_COLUMNS - 1) // STATE_COLUMNS
        per_span = n_head * n_parts
        item = next_item(counter)
        while item < n_spans * per_span:
            token, n, n_past, slot = _span(spans, n_spans - 1 - item // per_span)
            h, first = item % per_span // n_parts, item % n_parts * STATE_COLUMNS
            hk = h % n_head_k if tiled else h // (n_head // n_head_k)
            line = 4 * min(STATE_COLUMNS, head_dim - first)
            s = memory + slot_stride * slot + 4 * head_dim_k * (h * head_dim + first)
            if n_past == 0:
                _fill_zero(s, line * head_dim_k)
            at = key_stride * token + 4 * head_dim_k * hk
            q, k, at = queries + at, keys + at, 4 * (h * head_dim + first)
            v, o, g = values + value_stride * token + at, out + out_stride * token + at, gates + 8 * (n_head * token + h)
            share = skip + 4 * h if skip else 0
            c = 0
            while c < line:
                left = (line - c) // 4
                where = (q, k, key_stride, v + c, value_stride, g, n_head, s + c, line, o + c, out_stride, left)
                if left >= 2 * LANES:
                    two(*where, n, head_dim_k, factor, share)
                    c += 2 * _V
                elif left >= LANES:
                    one(*where, n, head_dim_k, factor, share)
                    c += _V
                else:
                    last(*where, n, head_dim_k, factor, share)
                    c += _V
            item = next_item(counter)


# A head's state S (head_dim_k, head_dim) goes from token to token:
#
#     S = decay * S;  S += k (beta * (v - k S));  out = scale * q S                (the gated delta rule, Yang et al. 2025)
#     S = decay * S;  S += k (beta * v);          out = scale * q S + skip * v     (Mamba-2, Dao & Gu 2024)
#
# Of each token's n_head_k queries and keys, head h takes those of h % n_head_k if tiled, else of h // (n_head / n_head_k).
# `gates`: see `delta_gates`. A slot holds, for each head, STATE_COLUMNS columns of S row by row, then the next ones.
_define("delta_rule", True)
_define("state_scan", False)
