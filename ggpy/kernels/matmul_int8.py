"""Quantized weights × int8 activations (formats: see `activations`). Drivers and plan: see `matmul`."""

from ..simd.vector import (
    HAS_FMA,
    HAS_TILES,
    LANES,
    TILE_TOKENS,
    TOKENS,
    as_f32,
    broadcast_f32,
    broadcast_i32,
    configure_tiles,
    dotter,
    fma,
    get_range,
    hidden,
    join,
    lacking,
    ld_f32,
    ld_i32,
    load_f32,
    load_i32,
    load_tile_f32,
    load_tile_i32,
    prefetch,
    prefetch_once,
    release_tiles,
    splat_f32,
    splat_i32,
    store,
    tile_dots,
    tile_dots_signed,
    tile_f32,
    tile_i32,
    to_f32,
)
from .common import f32, i32
from .matmul import VECTORS, ask_for, define_products
from .source import function, inlined
from .table import QUANTIZED
from .unpack import LAYOUTS

_V = 4 * LANES  # bytes of a vector
# Of 32 values of LANES rows: 8 vectors of weights, 2 of scales, of which signed ones need one and have what is `lacking` in
# the other's place, 2 of minima.
_UNPACKED, _LACKING = 12 * _V, 9 * _V
#: the bits, as an int32, of the float32 1.5 * 2^23, whose last bit is worth 1. A sum of integers that begins with them is,
#: read as float32, _MAGIC plus that sum, without a conversion, as long as the sum is less than 2^22.
_MAGIC_BITS, _MAGIC = i32(0x4B400000), f32(1.5 * 2**23)


@inlined
def spread_f32(at):
    return splat_f32(ld_f32(at))


@inlined
def spread_i32(at):
    return splat_i32(ld_i32(at))


# What lanes stand for, rows of weights or tokens: how a value of each row is loaded, float32 and int32, how one of each
# token, and how many times as far values of a token are apart.
_BY_ROWS = (load_f32, load_i32, broadcast_f32, broadcast_i32, 1)
_BY_TOKENS = (spread_f32, spread_i32, load_tile_f32, load_tile_i32, LANES)


@inlined
def first_of(x, y):
    return x


@function
def start_tiles():
    configure_tiles()


@function
def end_tiles():
    release_tiles()


def _define(name):
    layout = LAYOUTS[name]
    n_bytes, block, group = layout.n_bytes, layout.block, layout.group
    subs = block // 32
    by_32 = block == 32  # activations have a scale for 32 values, as the weights, or for 256
    share_of_emit = LANES * n_bytes // subs  # bytes of the next LANES rows that stand for 32 columns of these
    has_min, bias = layout.has_min, layout.bias
    has_bias = bias > 0
    shift = max(bias.bit_length() - 1, 0)
    dot, dots, dots_by_tokens = dotter(layout.signed, layout.most)
    has_assembly = dots_by_tokens is not None
    lacks = layout.signed and has_assembly
    d_bytes = 8 if by_32 else 64  # n / d_bytes bytes of scales stand between q and the sums

    @function
    def least(s0, m0):
        """What 0 of the unpacked values is worth: the block's minimum, or what the bias says."""
        if by_32 and has_bias:
            return s0 * splat_f32(f32(-bias))
        return m0

    @function
    def negated_sum(negated, j):
        return splat_i32(i32(ld_i32(negated + 8 * j) + ld_i32(negated + 8 * j + 4)))

    @inlined
    def dot_32(g, j, w, s0, s1, m0, m1, x, d, sums, negated):
        """g + 32 columns times one token."""
        if by_32:
            g = fma(to_f32(dot(splat_i32(i32(0)), w, x)) * s0, splat_f32(ld_f32(d)), g)
            if has_min or has_bias:
                g = fma(splat_f32(ld_f32(sums)), least(s0, m0), g)
        elif group == 32:
            a = splat_i32(i32(0))
            if has_bias:
                a = negated_sum(negated, j) << splat_i32(i32(shift))
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

    @inlined
    def emit_dot(g, j, w, s0, s1, m0, m1, places):
        x, d, sums, negated, soon = places
        ask_for(prefetch_once, soon, j, share_of_emit)
        return dot_32(g, j, w, s0, s1, m0, m1, x, d, sums, negated)

    @inlined
    def emit_few(g, j, w, s0, s1, m0, m1, places):
        x, d, sums, negated, soon, stride, n, room = places
        ask_for(prefetch_once, soon, j, share_of_emit)
        for t in range(n):
            at = t * stride
            g_t = load_f32(room + _V * t)
            g_t = dot_32(g_t, j, w, s0, s1, m0, m1, x + at, d + at, sums + at, negated + at)
            store(room + _V * t, g_t)
        return g

    @function
    def emit_store(g, j, w, s0, s1, m0, m1, places):
        scratch, soon = places
        to = scratch + _UNPACKED * j
        ask_for(prefetch, soon, j, share_of_emit)
        store(to, w)
        store(to + 8 * _V, s0)
        if lacks:
            store(to + _LACKING, lacking(w))
        if group == 16:
            store(to + 9 * _V, s1)
        if has_min or (by_32 and has_bias):
            store(to + 10 * _V, least(s0, m0))
            if group == 16:
                store(to + 11 * _V, m1)
        return g

    walk_dot, walk_store = inlined(layout.walk(emit_dot).py_func), layout.walk(emit_store)
    walk_few = inlined(layout.walk(emit_few).py_func)

    @function
    def one_token(w, stride, n_cols, x, following):
        """LANES rows times one token."""
        d, sums = x + n_cols, x + n_cols + n_cols // d_bytes
        negated = sums + n_cols // 8
        acc = splat_f32(f32(0.0))
        for b in range(n_cols // block):
            soon = following + LANES * n_bytes * b
            places = (x + block * b, d + 4 * b, sums + 4 * subs * b, negated + 8 * subs * b, soon)
            if by_32:
                acc = walk_dot(acc, w + n_bytes * b, stride, places)
            else:
                g = walk_dot(splat_f32(f32(0.0)), w + n_bytes * b, stride, places)
                acc = fma(g, splat_f32(ld_f32(d + 4 * b)), acc)
        return acc

    @function
    def few_tokens(w, stride, n_cols, x, x_stride, n, room, following):
        d, sums = x + n_cols, x + n_cols + n_cols // d_bytes
        negated = sums + n_cols // 8
        g, accs = splat_f32(f32(0.0)), room
        if not by_32:
            accs = room + _V * n  # `room` has the sums of a block
        for t in range(n):
            store(accs + _V * t, splat_f32(f32(0.0)))
        for b in range(n_cols // block):
            soon = following + LANES * n_bytes * b
            if not by_32:
                for t in range(n):
                    store(room + _V * t, splat_f32(f32(0.0)))
            at = (x + block * b, d + 4 * b, sums + 4 * subs * b, negated + 8 * subs * b, soon, x_stride, n, room)
            g = walk_few(g, w + n_bytes * b, stride, at)
            if not by_32:
                for t in range(n):
                    by = splat_f32(ld_f32(d + 4 * b + t * x_stride))
                    store(accs + _V * t, fma(load_f32(room + _V * t), by, load_f32(accs + _V * t)))
        if not by_32:
            for t in range(n):
                store(room + _V * t, load_f32(accs + _V * t))

    @function
    def unpack(w, stride, first, stop, scratch, following):
        g = splat_f32(f32(0.0))
        for b in range(first // block, stop // block):
            places = (scratch, following + LANES * n_bytes * b)
            g = walk_store(g, w + n_bytes * b, stride, places)
            scratch += _UNPACKED * subs

    def for_tokens(n, dot_many, lanes):
        """The product of a panel with n tokens, or n vectors of them: see _BY_ROWS."""
        row_f32, row_i32, tokens_f32, tokens_i32, wide = lanes

        @inlined
        def by_32_(f, weights, n_cols, first, stop, x, stride, room):
            d = x + wide * n_cols
            for b in range(first // 32, stop // 32):
                s0, xb, db = row_f32(weights + 8 * _V), hidden(x + wide * 32 * b), hidden(d + wide * 4 * b)
                a = tile_i32(n)
                if lacks and wide > 1:
                    a = a + row_i32(weights + _LACKING)
                if HAS_FMA:
                    a = dot_many(a + splat_i32(_MAGIC_BITS), weights, 8, xb, stride)
                    # Exact but for the one rounding that a product has: _MAGIC * s0 has no more bits than a float32.
                    v = fma(as_f32(a), s0, s0 * splat_f32(-_MAGIC))
                else:
                    v = to_f32(dot_many(a, weights, 8, xb, stride)) * s0
                f = fma(v, tokens_f32(db, stride, n), f)
                if has_min or has_bias:
                    f = fma(tokens_f32(db + wide * (n_cols // 8), stride, n), row_f32(weights + 10 * _V), f)
                weights += _UNPACKED
            return f

        @inlined
        def by_256_(f, weights, n_cols, first, stop, x, stride, room):
            d, sums = x + wide * n_cols, x + wide * (n_cols + n_cols // d_bytes)
            negated, n_subs = sums + wide * (n_cols // 8), 8
            if has_assembly:  # LLVM takes assembly for short, and would unroll the loop
                n_subs = hidden(8)
            for b in range(first // 256, stop // 256):
                g = tile_f32(n)
                for k in range(n_subs):
                    j = 8 * b + k
                    w, xj, nj = weights + _UNPACKED * k, hidden(x + wide * 32 * j), hidden(negated + wide * 8 * j)
                    s0 = row_f32(w + 8 * _V)
                    if group == 32:
                        a = tile_i32(n)
                        if lacks and wide > 1:
                            a = a + row_i32(w + _LACKING)
                        if has_bias:
                            a = tokens_i32(nj, stride, n) + tokens_i32(nj + wide * 4, stride, n)
                            a = a << splat_i32(i32(shift))
                        g = fma(to_f32(dot_many(a, w, 8, xj, stride)), s0, g)
                        if has_min:
                            g = fma(tokens_f32(hidden(sums + wide * 4 * j), stride, n), row_f32(w + 10 * _V), g)
                    else:
                        s1 = row_f32(w + 9 * _V)
                        a0, a1 = tile_i32(n), tile_i32(n)
                        if has_bias:
                            a0 = tokens_i32(nj, stride, n) << splat_i32(i32(shift))
                        g = fma(to_f32(dot_many(a0, w, 4, xj, stride)), s0, g)
                        if has_bias:
                            a1 = tokens_i32(nj + wide * 4, stride, n) << splat_i32(i32(shift))
                        g = fma(to_f32(dot_many(a1, w + 4 * _V, 4, xj + wide * 16, stride)), s1, g)
                        if has_min:
                            n0 = to_f32(tokens_i32(nj, stride, n))
                            n1 = to_f32(tokens_i32(nj + wide * 4, stride, n))
                            g = g - fma(n0, row_f32(w + 10 * _V), n1 * row_f32(w + 11 * _V))
                f = fma(g, tokens_f32(hidden(d + wide * 4 * b), stride, n), f)
                weights += _UNPACKED * 8
            return f

        return by_32_ if by_32 else by_256_

    # The same by AMX's tiles: the sums of 32 columns of TILE_TOKENS tokens, or of half as many, go to `room` first. With a
    # scale for every 16 columns tiles would be half empty, and lose.
    tile_dot = tile_dots_signed if layout.signed else tile_dots
    half = TILE_TOKENS // 2

    @inlined
    def add_32(f, room, weights, n_cols, d, stride):
        """f + 32 columns of half a tile's tokens, whose sums are at `room` and whose scales at d."""
        f = fma(to_f32(load_tile_i32(room, _V, half)) * load_f32(weights + 8 * _V), broadcast_f32(d, stride, half), f)
        if has_min or has_bias:
            f = fma(broadcast_f32(d + n_cols // 8, stride, half), load_f32(weights + 10 * _V), f)
        return f

    @inlined
    def add_256(g, room, weights, sums, negated, stride):
        """g + 32 columns likewise."""
        a = load_tile_i32(room, _V, half)
        if has_bias:
            a = a + (
                (broadcast_i32(negated, stride, half) + broadcast_i32(negated + 4, stride, half)) << splat_i32(i32(shift))
            )
        g = fma(to_f32(a), load_f32(weights + 8 * _V), g)
        if has_min:
            g = fma(broadcast_f32(sums, stride, half), load_f32(weights + 10 * _V), g)
        return g

    def for_tiles(n):
        """The product of a panel with n tokens."""
        joined, last = join if n > half else first_of, n - half

        @inlined
        def by_32_(f, weights, n_cols, first, stop, x, stride, room):
            f0, f1 = get_range(f, 0, half), get_range(f, last, half)
            for b in range(first // 32, stop // 32):
                d = hidden(x + n_cols + 4 * b)
                tile_dot(room, weights, x + 32 * b, stride, n)
                f0 = add_32(f0, room, weights, n_cols, d, stride)
                if n > half:
                    f1 = add_32(f1, room + half * _V, weights, n_cols, d + half * stride, stride)
                weights += _UNPACKED
            return joined(f0, f1)

        @inlined
        def by_256_(f, weights, n_cols, first, stop, x, stride, room):
            d, sums, later = x + n_cols, x + n_cols + n_cols // d_bytes, half * stride
            f0, f1 = get_range(f, 0, half), get_range(f, last, half)
            for b in range(first // 256, stop // 256):
                g0, g1 = tile_f32(half), tile_f32(half)
                for j in range(8 * b, 8 * b + 8):
                    sj, nj = hidden(sums + 4 * j), hidden(sums + n_cols // 8 + 8 * j)
                    tile_dot(room, weights, x + 32 * j, stride, n)
                    g0 = add_256(g0, room, weights, sj, nj, stride)
                    if n > half:
                        g1 = add_256(g1, room + half * _V, weights, sj + later, nj + later, stride)
                    weights += _UNPACKED
                f0 = fma(g0, broadcast_f32(hidden(d + 4 * b), stride, half), f0)
                if n > half:
                    f1 = fma(g1, broadcast_f32(hidden(d + 4 * b + later), stride, half), f1)
            return joined(f0, f1)

        return by_32_ if by_32 else by_256_

    if HAS_TILES and group == 32:
        products = (one_token, few_tokens, unpack, for_tiles(TILE_TOKENS), for_tiles(half))
        define_products(name, block, n_bytes, _UNPACKED, (TILE_TOKENS, half), products, start_tiles, end_tiles)
    else:
        products = (one_token, few_tokens, unpack, for_tokens(TOKENS, dots, _BY_ROWS), for_tokens(2, dots, _BY_ROWS))
        by_tokens = for_tokens(VECTORS, dots_by_tokens, _BY_TOKENS) if has_assembly else None
        define_products(name, block, n_bytes, _UNPACKED, (TOKENS, 2), products, by_tokens=by_tokens)


for _name in QUANTIZED:
    _define(_name)
