"""Attention over the KV cache, with an online softmax (Milakov & Gimelshein 2018; Dao et al. 2022).

The caches are laid out for reading (`kv_formats`). K: (n_head_kv, n_ctx / SLAB) slabs (head_dim, SLAB), so that keys
stand in the lanes and no sum crosses lanes; V: (n_head_kv, n_ctx / SLAB) slabs (SLAB, head_dim_v).

A work item has up to ROWS_PER_ITEM *rows*: the queries of some tokens and of some heads that share keys. Slab by slab, it
takes two small matrix products, with register tiles of ROWS rows, and a softmax. Many rows have each slab unpacked to
float32 once for all (`unpacked_products`); what bounds them is the rate of multiply-adds. The few rows of one token
multiply what they read at once, and ask for the next slab as they do so (`direct_products`); what bounds them is the
reading of the cache, whose values are read and converted once for all heads of a group.

One token is shared out by (KV head, KEYS_PER_ITEM keys), so that long contexts use all threads whatever the number of
heads, and merged in order of position. Prompts are shared out by (tokens, KV head), the longest items first. Scores are
in units of log2: queries are multiplied by `scale` and log2(e) as they are collected.
"""

from ..simd.vector import (
    LANES,
    any_less,
    copy_bytes,
    fma,
    fma_grid,
    fold_add_f32,
    fold_max,
    lane_numbers,
    ld_f32,
    load_f32,
    load_grid,
    load_tile_f32,
    max_f32,
    maximum,
    prefetch,
    splat_f32,
    splat_i32,
    st_f32,
    store,
    store_grid,
    sum_f32,
    tile_f32,
    where_less,
)
from .common import bits_f32, exp2, f32, i32, ld_state, next_item, share
from .kv_formats import KV_FORMATS, VECTORS
from .source import function, kernel
from .table import HEADS_PER_ITEM, KEYS_PER_ITEM, ROWS_PER_ITEM, SCORES_PER_ITEM, SLAB

LOG2_E = f32(1.4426950408889634)
ROWS = 4  # of a register tile
_V = 4 * LANES
_LOWEST = f32(-3e38)
LINE = 4 * SLAB  # bytes of a row's scores of a slab
_SLAB_VECTORS = SLAB // LANES


def _grid_product(rows, vectors):
    @function
    def add_product(x, x_stride, y, y_stride, n, out, out_stride):
        grid = load_grid(out, out_stride, rows, vectors)
        for k in range(n):
            grid = fma_grid(grid, x + 4 * k, x_stride, load_tile_f32(y + y_stride * k, _V, vectors))
        store_grid(out, out_stride, grid, vectors)

    return add_product


_tile, _tile_last = _grid_product(ROWS, VECTORS), _grid_product(ROWS, 1)
_row, _row_last = _grid_product(1, 4), _grid_product(1, 1)


@function
def add_product(x, x_stride, n_rows, y, n, n_cols, out):
    """out += x y, for x (n_rows, n), y (n, n_cols), out (n_rows, n_cols), float32; n_cols is a multiple of 16.

    There must be room for n_rows rounded up to ROWS.
    """
    stride = 4 * n_cols
    for r in range(0, n_rows, ROWS):
        xr, outr, c = x + x_stride * r, out + stride * r, 0
        if n_rows - r > 1:
            while c + VECTORS * _V <= stride:
                _tile(xr, x_stride, y + c, stride, n, outr + c, stride)
                c += VECTORS * _V
            while c < stride:
                _tile_last(xr, x_stride, y + c, stride, n, outr + c, stride)
                c += _V
        else:
            while c + 4 * _V <= stride:
                _row(xr, x_stride, y + c, stride, n, outr + c, stride)
                c += 4 * _V
            while c < stride:
                _row_last(xr, x_stride, y + c, stride, n, outr + c, stride)
                c += _V


def unpacked_products(unpack_keys, unpack_values):
    """The products of scores and of values by way of `room`, for caches that are read by the functions given."""

    @function
    def set_scores(q, n_rows, keys, slab_bytes, head_dim, n, scores, room, after):
        """scores = q k for n keys, one or more whole slabs."""
        unpack_keys(keys, head_dim, room)
        fill_zero(scores, LINE * padded_rows(n_rows))
        add_product(q, 4 * head_dim, n_rows, room, head_dim, SLAB, scores)

    @function
    def add_values(weights, n_rows, values, slab_bytes, width, n, head_dim_v, o, room, after):
        """o += weights v for n positions and the first head_dim_v of their `width` values."""
        unpack_values(values, width, n, head_dim_v, room)
        add_product(weights, LINE, n_rows, room, n, head_dim_v, o)

    return set_scores, add_values


def direct_products(kv, line_bytes):
    """The same products without `room` for unpacked values, for keys in the lanes."""
    size, load_tile, scaled_scores, scaled_weights = kv.size, kv.load_tile, kv.scaled_scores, kv.scaled_weights
    columns = 2 * LANES  # of a tile of values

    def scores_of(rows):
        grid_vectors = rows * VECTORS

        @function
        def scores_of(q, slab, head_dim, scores, after):
            for k in range(0, SLAB, VECTORS * LANES):
                total = tile_f32(grid_vectors)
                for b in range(0, head_dim, 32):
                    part = tile_f32(grid_vectors)
                    for d in range(b, min(b + 32, head_dim)):
                        for i in range(0, size * VECTORS * LANES, 64):
                            prefetch(after + size * (SLAB * d + k) + i)
                        tile = load_tile(slab + size * (SLAB * d + k), size * LANES, VECTORS)
                        part = fma_grid(part, q + 4 * d, 4 * head_dim, tile)
                    total = total + scaled_scores(part, slab, head_dim, b, k)
                store_grid(scores + 4 * k, line_bytes, total, VECTORS)

        return scores_of

    def values_of(rows, vectors):
        @function
        def values_of(weights, weight_stride, values, width, n, o, stride, after):
            grid = load_grid(o, stride, rows, vectors)
            for k in range(n):
                for i in range(0, size * vectors * LANES, 64):
                    prefetch(after + size * width * k + i)
                tile = load_tile(values + size * width * k, size * LANES, vectors)
                grid = fma_grid(grid, weights + 4 * k, weight_stride, tile)
            store_grid(o, stride, grid, vectors)

        return values_of

    scores_of_tile, scores_of_row = scores_of(ROWS), scores_of(1)
    values_of_tile, last_of_tile = values_of(ROWS, 2), values_of(ROWS, 1)
    values_of_row, last_of_row = values_of(1, 2), values_of(1, 1)

    @function
    def set_scores(q, n_rows, keys, slab_bytes, head_dim, n, scores, room, after):
        for k in range(0, n, SLAB):
            slab = keys + slab_bytes * (k // SLAB)
            for r in range(0, n_rows, ROWS):
                to, ahead = scores + line_bytes * r + 4 * k, slab + slab_bytes if k + SLAB < n else after
                if n_rows - r > 1:
                    scores_of_tile(q + 4 * head_dim * r, slab, head_dim, to, ahead)
                else:
                    scores_of_row(q + 4 * head_dim * r, slab, head_dim, to, ahead)

    @function
    def add_values(weights, n_rows, values, slab_bytes, width, n, head_dim_v, o, room, after):
        stride, padded = 4 * head_dim_v, padded_rows(n_rows)
        for k in range(0, n, SLAB):
            slab, left = values + slab_bytes * (k // SLAB), min(SLAB, n - k)
            ahead = slab + slab_bytes if k + SLAB < n else after
            for b in range(0, head_dim_v, 32):
                line, step = scaled_weights(weights + 4 * k, line_bytes, padded, slab, width, b, room, LINE)
                for r in range(0, n_rows, ROWS):
                    at, d, end = line + step * r, b, min(b + 32, head_dim_v)
                    while d < end:
                        to = o + stride * r + 4 * d
                        if n_rows - r > 1:
                            if d + columns <= end:
                                values_of_tile(at, step, slab + size * d, width, left, to, stride, ahead + size * d)
                            else:
                                last_of_tile(at, step, slab + size * d, width, left, to, stride, ahead + size * d)
                        elif d + columns <= end:
                            values_of_row(at, step, slab + size * d, width, left, to, stride, ahead + size * d)
                        else:
                            last_of_row(at, step, slab + size * d, width, left, to, stride, ahead + size * d)
                        d += columns

    return set_scores, add_values


@function
def padded_rows(n_rows):
    return (n_rows + ROWS - 1) // ROWS * ROWS


@function
def fill_zero(to, n_bytes):
    """Writes n_bytes zeros, a multiple of 64."""
    for i in range(0, n_bytes, _V):
        store(to + i, splat_f32(f32(0.0)))


@function
def copy_scaled(to, x, n, factor):
    """to = x * factor, n values."""
    for i in range(0, 4 * n, _V):
        store(to + i, load_f32(x + i) * splat_f32(factor))


@function
def rows_of(work, head_dim, head_dim_v):
    """Where in an item's memory (`table.attention_scratch`) things are.

    By rows: the sums of values, their maxima (a float32), the sums of weights (a vector). The queries stand at `work`.
    """
    o = work + 4 * ROWS_PER_ITEM * head_dim
    maxima = o + 4 * ROWS_PER_ITEM * head_dim_v
    return o, maxima, maxima + 4 * ROWS_PER_ITEM


@function
def start_rows(work, n_rows, head_dim, head_dim_v):
    """Makes rows ready for `attend`; their queries are collected by the caller."""
    o, maxima, sums = rows_of(work, head_dim, head_dim_v)
    for r in range(n_rows):
        st_f32(maxima + 4 * r, _LOWEST)
    fill_zero(sums, 64 * n_rows)
    fill_zero(work + 4 * head_dim * n_rows, 4 * head_dim * (padded_rows(n_rows) - n_rows))
    fill_zero(o, 4 * head_dim_v * padded_rows(n_rows))


@function
def _hide(line, n, seen):
    """Takes the scores from `seen` on out of the n of a row."""
    for k in range(0, n, LANES):
        s = load_f32(line + 4 * k)
        s = where_less(lane_numbers() + splat_i32(i32(k)), splat_i32(i32(seen)), s, splat_f32(_LOWEST))
        store(line + 4 * k, s)


@function
def _raise_maximum(best, maximum_at, sums, o, head_dim_v):
    """Makes the largest lane of `best` the maximum of a row, and scales what the row has so far to match."""
    now = max_f32(best)
    shrink = exp2(splat_f32(ld_f32(maximum_at) - now))
    st_f32(maximum_at, now)
    store(sums, load_f32(sums) * shrink)
    for d in range(0, 4 * head_dim_v, _V):
        store(o + d, load_f32(o + d) * shrink)


@function
def _soften(line, n, maximum_at, sums, o, head_dim_v):
    """A row's n scores (a multiple of SLAB) to weights 2^(score - maximum)."""
    best = splat_f32(_LOWEST)
    for k in range(0, 4 * n, 4 * SLAB):
        best = maximum(best, fold_max(load_tile_f32(line + k, _V, _SLAB_VECTORS)))
    # Mostly not: nothing is summed or compared across lanes.
    if any_less(splat_f32(ld_f32(maximum_at)), best):
        _raise_maximum(best, maximum_at, sums, o, head_dim_v)
    top, total = splat_f32(ld_f32(maximum_at)), load_f32(sums)
    for k in range(0, 4 * n, 4 * SLAB):
        weights = exp2(load_tile_f32(line + k, _V, _SLAB_VECTORS) - top)
        store(line + k, weights)
        total = total + fold_add_f32(weights)
    store(sums, total)


def attention_over(slab_bytes, block, products):
    """The function that attends over slabs of a type, with products that take `block` positions at a time."""
    set_scores, add_values = products
    line_bytes = 4 * block

    @function
    def attend(work, n_tokens, n_heads, n_seen, keys, values, n, head_dim, head_dim_v, width_v, after):
        """Adds n keys and values to what the rows, n_heads for each token, have.

        The first token may see n_seen of them, and each token one more than the one before. `keys` and `values` are the
        addresses of slabs of head_dim and width_v values, of which the first head_dim_v are taken; `after` is what will be
        read next.
        """
        o, maxima, sums = rows_of(work, head_dim, head_dim_v)
        scores = sums + 64 * ROWS_PER_ITEM
        room = scores + 4 * SCORES_PER_ITEM
        key_bytes, value_bytes, n_rows = slab_bytes(head_dim), slab_bytes(width_v), n_tokens * n_heads
        for b in range(0, n, block):
            left = min(block, n - b)
            # Positions past the last are within the cache, whose length is a multiple of SLAB.
            padded = (left + SLAB - 1) // SLAB * SLAB
            at = values + value_bytes * (b // SLAB)
            upcoming = keys + key_bytes * ((b + block) // SLAB) if b + block < n else after
            set_scores(work, n_rows, keys + key_bytes * (b // SLAB), key_bytes, head_dim, padded, scores, room, at)
            for t in range(n_tokens):
                seen = n_seen + t - b
                for r in range(t * n_heads, t * n_heads + n_heads):
                    line = scores + line_bytes * r
                    if seen <= 0:
                        fill_zero(line, line_bytes)
                        continue
                    if seen < padded:
                        _hide(line, padded, seen)
                    _soften(line, padded, maxima + 4 * r, sums + 64 * r, o + 4 * head_dim_v * r, head_dim_v)
            add_values(scores, n_rows, at, value_bytes, width_v, left, head_dim_v, o, room, upcoming)

    return attend


@function
def put_part(work, n_rows, head_dim, head_dim_v, to):
    """What rows have of some keys, to `partial`: a row of head_dim_v + 16 values, maximum and sum first."""
    o, maxima, sums = rows_of(work, head_dim, head_dim_v)
    row = 4 * (head_dim_v + 16)
    for r in range(n_rows):
        st_f32(to + row * r, ld_f32(maxima + 4 * r))
        st_f32(to + row * r + 4, sum_f32(load_f32(sums + 64 * r)))
        copy_bytes(to + row * r + 64, o + 4 * head_dim_v * r, 4 * head_dim_v)


@function
def put_result(work, first, n_rows, head_dim, head_dim_v, to):
    """What rows have of all keys, as results."""
    o, _, sums = rows_of(work, head_dim, head_dim_v)
    for r in range(first, first + n_rows):
        total = splat_f32(sum_f32(load_f32(sums + 64 * r)))
        for d in range(0, 4 * head_dim_v, _V):
            store(to + 4 * head_dim_v * (r - first) + d, load_f32(o + 4 * head_dim_v * r + d) / total)


@function
def tokens_per_item(n_tokens, n_items_a_token, n_heads, nth):
    """Of a prompt: as many as there are rows for, but so few that each thread gets several items."""
    few = n_tokens * n_items_a_token // (4 * nth)
    return max(1, min(ROWS_PER_ITEM // n_heads, few))


@kernel("attention_merge")
def attention_merge(ith, nth, partial, out, state, n_head, head_dim):
    n_items = (ld_state(state, 1) + KEYS_PER_ITEM) // KEYS_PER_ITEM
    start, stop = share(n_head, ith, nth)
    stride = 4 * n_head * (head_dim + 16)
    for h in range(start, stop):
        first = partial + 4 * h * (head_dim + 16)
        m = _LOWEST
        for i in range(n_items):
            m = max(m, ld_f32(first + stride * i))
        total = f32(0.0)
        for i in range(n_items):
            at = first + stride * i
            weight = max_f32(exp2(splat_f32(ld_f32(at) - m)))
            st_f32(at, weight)
            total += weight * ld_f32(at + 4)
        for d in range(0, 4 * head_dim, _V):
            acc = splat_f32(f32(0.0))
            for i in range(n_items):
                at = first + stride * i
                acc = fma(splat_f32(ld_f32(at)), load_f32(at + 64 + d), acc)
            store(out + 4 * head_dim * h + d, acc / splat_f32(total))


def _define(name, kv):
    slab_bytes, put_lane, put_row = kv.slab_bytes, kv.put_lane, kv.put_row
    attend_one = attention_over(slab_bytes, KEYS_PER_ITEM, direct_products(kv, 4 * KEYS_PER_ITEM))
    attend_many = attention_over(slab_bytes, SLAB, unpacked_products(kv.unpack_lanes, kv.unpack_rows))

    def define_store(part, put):
        @kernel(f"store_{part}_{name}")
        def store_part(ith, nth, x, cache, state, n_head_kv, head_dim, n_ctx):
            n_past = ld_state(state, 1)
            start, stop = share(ld_state(state, 0) * n_head_kv, ith, nth)
            for item in range(start, stop):
                position, h = n_past + item // n_head_kv, item % n_head_kv
                slab = cache + slab_bytes(head_dim) * (h * n_ctx // SLAB + position // SLAB)
                put(slab, position % SLAB, x + 4 * head_dim * item, head_dim)

    define_store("k", put_lane)
    define_store("v", put_row)

    @kernel(f"attention_one_{name}")
    def attention_one(
        ith,
        nth,
        q,
        k_cache,
        v_cache,
        partial,
        scratch,
        scratch_stride,
        state,
        counter,
        n_head,
        n_head_kv,
        head_dim,
        head_dim_v,
        n_ctx,
        scale,
    ):
        n_kv = ld_state(state, 1) + 1
        n_parts = (n_kv + KEYS_PER_ITEM - 1) // KEYS_PER_ITEM
        group = n_head // n_head_kv
        n_splits = (group + HEADS_PER_ITEM - 1) // HEADS_PER_ITEM
        work = scratch + ith * scratch_stride
        key_bytes, value_bytes = slab_bytes(head_dim), slab_bytes(head_dim_v)
        item = next_item(counter)
        while item < n_parts * n_head_kv * n_splits:
            following = next_item(counter)
            part, kv, split = item % n_parts, item // n_parts // n_splits, item // n_parts % n_splits
            h, n = kv * group + split * HEADS_PER_ITEM, min(HEADS_PER_ITEM, group - split * HEADS_PER_ITEM)
            start_rows(work, n, head_dim, head_dim_v)
            copy_scaled(work, q + 4 * head_dim * h, n * head_dim, bits_f32(scale) * LOG2_E)
            first = part * KEYS_PER_ITEM
            n_keys = min(KEYS_PER_ITEM, n_kv - first)
            slab = (kv * n_ctx + first) // SLAB
            after = (following // n_parts // n_splits * n_ctx + following % n_parts * KEYS_PER_ITEM) // SLAB
            attend_one(
                work,
                1,
                n,
                n_keys,
                k_cache + key_bytes * slab,
                v_cache + value_bytes * slab,
                n_keys,
                head_dim,
                head_dim_v,
                head_dim_v,
                k_cache + key_bytes * after,
            )
            put_part(work, n, head_dim, head_dim_v, partial + 4 * (head_dim_v + 16) * (part * n_head + h))
            item = following

    @kernel(f"attention_many_{name}")
    def attention_many(
        ith,
        nth,
        q,
        k_cache,
        v_cache,
        out,
        scratch,
        scratch_stride,
        state,
        counter,
        n_head,
        n_head_kv,
        head_dim,
        head_dim_v,
        n_ctx,
        scale,
    ):
        n_tokens, n_past = ld_state(state, 0), ld_state(state, 1)
        group = n_head // n_head_kv
        n_splits = (group + HEADS_PER_ITEM - 1) // HEADS_PER_ITEM
        per_item = tokens_per_item(n_tokens, n_head_kv * n_splits, min(group, HEADS_PER_ITEM), nth)
        n_parts = (n_tokens + per_item - 1) // per_item
        work = scratch + ith * scratch_stride
        while True:
            item = next_item(counter)
            if item >= n_parts * n_head_kv * n_splits:
                break
            t = (n_parts - 1 - item // (n_head_kv * n_splits)) * per_item
            n = min(per_item, n_tokens - t)
            kv, split = item // n_splits % n_head_kv, item % n_splits
            h, n_heads = kv * group + split * HEADS_PER_ITEM, min(HEADS_PER_ITEM, group - split * HEADS_PER_ITEM)
            start_rows(work, n * n_heads, head_dim, head_dim_v)
            for i in range(n):
                source = q + 4 * head_dim * (n_head * (t + i) + h)
                copy_scaled(work + 4 * head_dim * n_heads * i, source, n_heads * head_dim, bits_f32(scale) * LOG2_E)
            slab = kv * n_ctx // SLAB
            keys, values = k_cache + slab_bytes(head_dim) * slab, v_cache + slab_bytes(head_dim_v) * slab
            seen, v = n_past + t + 1, head_dim_v
            attend_many(work, n, n_heads, seen, keys, values, seen + n - 1, head_dim, v, v, keys)
            for i in range(n):
                to = out + 4 * head_dim_v * (n_head * (t + i) + h)
                put_result(work, n_heads * i, n_heads, head_dim, head_dim_v, to)


for _name, _kv in KV_FORMATS.items():
    _define(_name, _kv)
