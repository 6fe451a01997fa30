"""Quantized weights × int8 activations: out[t, r] = sum over k of w[r, k] x[t, k] (+ residual[t, r]).

One weight row sits in each lane, so nothing is summed across lanes, and the order of the additions never depends on the
threads. Two kernels for each block type:

- `mul_mat_one_T`, one token: each block is unpacked in registers and multiplied at once. Reads every weight once: bound by
  memory bandwidth.
- `mul_mat_T`, many tokens: LANES rows are unpacked into scratch once and multiplied by all tokens, TOKENS at a time, whose
  accumulators stay in registers. Bound by the rate of the byte dot products. Buffers hold a multiple of TOKENS tokens;
  what stands in the surplus rows is meaningless.
"""

from ..simd.vector import (
    LANES,
    TOKENS,
    broadcast_f32,
    broadcast_i32,
    copy_bytes,
    dot_tile,
    dot_tile_signed,
    dots,
    dots_signed,
    fma,
    get_range,
    ld_f32,
    ld_i32,
    load_f32,
    load_tile_f32,
    prefetch,
    splat_f32,
    splat_i32,
    st_f32,
    stack,
    store,
    store_tile,
    tile_f32,
    tile_i32,
    to_f32,
)
from .common import f32, i32, ld_state, next_item
from .source import function, kernel
from .table import QUANTIZED
from .unpack import LAYOUTS

_V = 4 * LANES  # bytes of a vector
_UNPACKED = 12 * _V  # of 32 values of LANES rows: 8 vectors of weights, 2 of scales, 2 of minima
_TILE = TOKENS * _V


def _define(name):
    layout = LAYOUTS[name]
    n_bytes, block, group = layout.n_bytes, layout.block, layout.group
    subs = block // 32
    has_min, has_bias = layout.has_min, layout.bias > 0
    shift = max(layout.bias.bit_length() - 1, 0)
    dot, dot_many = (dot_tile_signed, dots_signed) if layout.signed else (dot_tile, dots)
    negated_per_32 = 1 if block == 32 else 2  # negated sums of 32 values, by the activations' format
    d_bytes = 8 if block == 32 else 64  # n / d_bytes bytes of scales stand between q and the sums

    @function
    def emit_dot(g, j, w, s0, s1, m0, m1, places):
        x, sums, negated = places
        if group == 32:
            a = splat_i32(i32(0))
            if has_bias:
                a = splat_i32(ld_i32(negated + 4 * j)) << splat_i32(i32(shift))
            g = fma(to_f32(dot(a, w, x + 32 * j)), s0, g)
            if has_min:
                g = fma(splat_f32(ld_f32(sums + 4 * j)), m0, g)
        else:
            n0, n1 = splat_i32(ld_i32(negated + 8 * j)), splat_i32(ld_i32(negated + 8 * j + 4))
            a0, a1 = splat_i32(i32(0)), splat_i32(i32(0))
            if has_bias:
                a0, a1 = n0 << splat_i32(i32(shift)), n1 << splat_i32(i32(shift))
            g = fma(to_f32(dot(a0, get_range(w, 0, 4), x + 32 * j)), s0, g)
            g = fma(to_f32(dot(a1, get_range(w, 4, 4), x + 32 * j + 16)), s1, g)
            if has_min:
                g = g - fma(to_f32(n0), m0, to_f32(n1) * m1)
        return g

    @function
    def emit_store(g, j, w, s0, s1, m0, m1, places):
        to = places[0] + _UNPACKED * j
        store(to, w)
        store(to + 8 * _V, s0)
        if group == 16:
            store(to + 9 * _V, s1)
        if has_min:
            store(to + 10 * _V, m0)
            if group == 16:
                store(to + 11 * _V, m1)
        return g

    walk_dot, walk_store = layout.walk(emit_dot), layout.walk(emit_store)

    @function
    def one_token(w, stride, n_cols, x, ahead):
        """LANES rows times one token."""
        d, sums = x + n_cols, x + n_cols + n_cols // d_bytes
        negated = sums + n_cols // 8
        acc = splat_f32(f32(0.0))
        for b in range(n_cols // block):
            for line in range(0, LANES * n_bytes, 64):
                prefetch(w + ahead + LANES * n_bytes * b + line)
            places = (x + block * b, sums + 4 * subs * b, negated + 4 * subs * negated_per_32 * b)
            g = walk_dot(splat_f32(f32(0.0)), w + n_bytes * b, stride, places)
            acc = fma(g, splat_f32(ld_f32(d + 4 * b)), acc)
        return acc

    @function
    def unpack(w, stride, n_cols, scratch):
        g = splat_f32(f32(0.0))
        for b in range(n_cols // block):
            g = walk_store(g, w + n_bytes * b, stride, (scratch + _UNPACKED * subs * b,))

    @function
    def tokens(weights, n_cols, x, stride):
        """LANES unpacked rows times TOKENS tokens."""
        d, sums = x + n_cols, x + n_cols + n_cols // d_bytes
        negated = sums + n_cols // 8
        f = tile_f32(TOKENS)
        for b in range(n_cols // block):
            g = tile_f32(TOKENS)
            for k in range(subs):
                j = subs * b + k
                w, xj = weights + _UNPACKED * j, x + 32 * j
                s0 = load_f32(w + 8 * _V)
                if group == 32:
                    a = tile_i32(TOKENS)
                    if has_bias:
                        a = broadcast_i32(negated + 4 * j, stride, TOKENS) << splat_i32(i32(shift))
                    g = fma(to_f32(dot_many(a, w, 8, xj, stride)), s0, g)
                    if has_min:
                        g = fma(broadcast_f32(sums + 4 * j, stride, TOKENS), load_f32(w + 10 * _V), g)
                else:
                    s1 = load_f32(w + 9 * _V)
                    a0, a1 = tile_i32(TOKENS), tile_i32(TOKENS)
                    if has_bias:
                        a0 = broadcast_i32(negated + 8 * j, stride, TOKENS) << splat_i32(i32(shift))
                    g = fma(to_f32(dot_many(a0, w, 4, xj, stride)), s0, g)
                    if has_bias:
                        a1 = broadcast_i32(negated + 8 * j + 4, stride, TOKENS) << splat_i32(i32(shift))
                    g = fma(to_f32(dot_many(a1, w + 4 * _V, 4, xj + 16, stride)), s1, g)
                    if has_min:
                        n0 = to_f32(broadcast_i32(negated + 8 * j, stride, TOKENS))
                        n1 = to_f32(broadcast_i32(negated + 8 * j + 4, stride, TOKENS))
                        g = g - fma(n0, load_f32(w + 10 * _V), n1 * load_f32(w + 11 * _V))
            f = fma(g, broadcast_f32(d + 4 * b, stride, TOKENS), f)
        return f

    @function
    def rows_at(w, row, n_rows, row_bytes, copy):
        """The address of LANES rows from `row` on; the last few are copied aside, so that none is read past the end."""
        left = n_rows - row
        if left >= LANES:
            return w + row * row_bytes
        copy_bytes(copy, w + row * row_bytes, left * row_bytes)
        return copy

    @kernel(f"mul_mat_one_{name}")
    def mul_mat_one(
        ith, nth, w, x, out, residual, scratch, scratch_stride, counter, state, n_rows, n_cols, x_stride, out_stride
    ):
        row_bytes = n_cols // block * n_bytes
        n_tiles = (n_rows + LANES - 1) // LANES
        chunk = max(1, n_tiles // (8 * nth))
        tail = stack(_V)
        while True:
            first = next_item(counter) * chunk
            if first >= n_tiles:
                break
            for tile in range(first, min(first + chunk, n_tiles)):
                row = tile * LANES
                at = rows_at(w, row, n_rows, row_bytes, scratch + ith * scratch_stride)
                ahead = LANES * row_bytes if tile + 1 < n_tiles else 0
                acc = one_token(at, row_bytes, n_cols, x, ahead)
                if row + LANES <= n_rows:
                    if residual:
                        acc = acc + load_f32(residual + 4 * row)
                    store(out + 4 * row, acc)
                else:
                    store(tail, acc)
                    for i in range(n_rows - row):
                        v = ld_f32(tail + 4 * i)
                        if residual:
                            v += ld_f32(residual + 4 * (row + i))
                        st_f32(out + 4 * (row + i), v)

    @kernel(f"mul_mat_{name}")
    def mul_mat(
        ith, nth, w, x, out, residual, scratch, scratch_stride, counter, state, n_rows, n_cols, x_stride, out_stride
    ):
        n_tokens = ld_state(state, 0)
        row_bytes = n_cols // block * n_bytes
        n_tiles = (n_rows + LANES - 1) // LANES
        mine = scratch + ith * scratch_stride
        copy = mine + n_cols // 32 * _UNPACKED
        tail = stack(_TILE)
        while True:
            tile = next_item(counter)
            if tile >= n_tiles:
                break
            row = tile * LANES
            unpack(rows_at(w, row, n_rows, row_bytes, copy), row_bytes, n_cols, mine)
            for t in range(0, n_tokens, TOKENS):
                f = tokens(mine, n_cols, x + t * x_stride, x_stride)
                at = 4 * row + t * out_stride
                if row + LANES <= n_rows:
                    if residual:
                        f = f + load_tile_f32(residual + at, out_stride, TOKENS)
                    store_tile(out + at, out_stride, f)
                else:
                    store(tail, f)
                    for k in range(TOKENS):
                        for i in range(n_rows - row):
                            v = ld_f32(tail + _V * k + 4 * i)
                            if residual:
                                v += ld_f32(residual + at + k * out_stride + 4 * i)
                            st_f32(out + at + k * out_stride + 4 * i, v)


for _name in QUANTIZED:
    _define(_name)
