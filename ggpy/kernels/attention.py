"""Attention over the KV cache, with an online softmax (Milakov & Gimelshein 2018; Dao et al. 2022).

The cache is laid out for reading (`kv_formats`), in pages of SLAB positions that sequences hold in any order. K: (n_pages,
n_head_kv) slabs (head_dim, SLAB), so that keys stand in the lanes and no sum crosses lanes; V: (n_pages, n_head_kv) slabs
(SLAB, head_dim_v).

A work item has up to ROWS_PER_ITEM *rows*: the queries of some tokens of a span and of some heads that share keys. Slab by
slab, it takes two small matrix products, with register tiles of ROWS rows, and a softmax. Many rows have each slab unpacked
to float32 once for all (`unpacked_products`); what bounds them is the rate of multiply-adds. The few rows of one token
multiply what they read at once, and ask for the next slab as they do so (`direct_products`); what bounds them is the
reading of the cache, whose values are read and converted once for all heads of a group.

Each row's result has the same bits however many rows, tokens, sequences and threads are at work: both kinds of products add
up in the same order; and the keys of a row are taken in parts of KEYS_PER_PART, slab by slab, each part's sums are merged
with those of the parts before (`merge_row`), wherever and by whomever the parts were computed.

A token sees n_before keys before its own and n_after behind it, as far as there are any: all before and none behind for
causal attention, fewer before for a window, as many on both sides for a symmetric one. Slabs that no row of an item sees
are left out; in others, what a row doesn't see gets no weight. A row's parts stay where they are, and a slab of which it
sees nothing adds zeros to it: results don't depend on which slabs are left out.

Spans of many tokens are shared out by (tokens, KV head), the longest items first, spans of one token by KV head. Where
these are too few for all threads, each part is an item of its own (`is_split`), so that long contexts use all threads
whatever the number of heads, and `attention_merge` merges them. Scores are in units of log2: queries are multiplied by
`scale` and log2(e) as they are collected, or, where scores are capped, as they pass through the tanh. Heads' values are
padded with zeros to multiples of 16, in the cache too. A sink, one more logit of a head that no value belongs to, is added
to a row's sum of weights at its end.
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
    ld_i32,
    load_f32,
    load_first,
    load_grid,
    load_tile_f32,
    max_f32,
    prefetch,
    splat_f32,
    splat_i32,
    st_f32,
    store,
    store_first,
    store_grid,
    sum_f32,
    tile_f32,
    where_less,
)
from .common import bits_f32, exp2, f32, i32, ld_state, next_item, share
from .kv_formats import KV_FORMATS, VECTORS
from .rows import copy_padded, padded, tanh, whole
from .source import function, kernel
from .table import HEADS_PER_ITEM, ITEMS_PER_THREAD, KEYS_PER_PART, ROWS_PER_ITEM, SLAB, SPAN_BYTES

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
def add_product(x, x_stride, n_rows, y, y_stride, n, n_cols, out, out_stride):
    """out += x y, for x (n_rows, n), y (n, n_cols), out (n_rows, n_cols), float32; n_cols is a multiple of 16.

    There must be room for n_rows rounded up to ROWS.
    """
    end = 4 * n_cols
    for r in range(0, n_rows, ROWS):
        xr, outr, c = x + x_stride * r, out + out_stride * r, 0
        if n_rows - r > 1:
            while c + VECTORS * _V <= end:
                _tile(xr, x_stride, y + c, y_stride, n, outr + c, out_stride)
                c += VECTORS * _V
            while c < end:
                _tile_last(xr, x_stride, y + c, y_stride, n, outr + c, out_stride)
                c += _V
        else:
            while c + 4 * _V <= end:
                _row(xr, x_stride, y + c, y_stride, n, outr + c, out_stride)
                c += 4 * _V
            while c < end:
                _row_last(xr, x_stride, y + c, y_stride, n, outr + c, out_stride)
                c += _V


def unpacked_products(kv, unpack_keys):
    """The products of scores and of values by way of `room`, for keys that are unpacked by the function given."""
    unpack_values, scaled_scores, scaled_weights = kv.unpack_rows, kv.scaled_scores, kv.scaled_weights

    def scaled_product(rows):
        grid_vectors = rows * VECTORS

        @function
        def scaled_product(q, q_stride, keys, n, scores, slab, width, d, lane):
            part = tile_f32(grid_vectors)
            for i in range(n):
                part = fma_grid(part, q + 4 * i, q_stride, load_tile_f32(keys + LINE * i, _V, VECTORS))
            total = load_grid(scores, LINE, rows, VECTORS) + scaled_scores(part, slab, width, d, lane)
            store_grid(scores, LINE, total, VECTORS)

        return scaled_product

    scaled_tile, scaled_row = scaled_product(ROWS), scaled_product(1)

    @function
    def set_plain_scores(q, n_rows, slab, width, scores, room, after):
        unpack_keys(slab, width, room)
        fill_zero(scores, LINE * padded_rows(n_rows))
        add_product(q, 4 * width, n_rows, room, LINE, width, SLAB, scores, LINE)

    @function
    def set_scaled_scores(q, n_rows, slab, width, scores, room, after):
        unpack_keys(slab, width, room)
        fill_zero(scores, LINE * padded_rows(n_rows))
        for r in range(0, n_rows, ROWS):
            for d in range(0, width, 32):
                n, x = min(32, width - d), q + 4 * (width * r + d)
                for k in range(0, SLAB, VECTORS * LANES):
                    keys, to = room + LINE * d + 4 * k, scores + LINE * r + 4 * k
                    if n_rows - r > 1:
                        scaled_tile(x, 4 * width, keys, n, to, slab, width, d, k)
                    else:
                        scaled_row(x, 4 * width, keys, n, to, slab, width, d, k)

    @function
    def add_plain_values(weights, n_rows, slab, width, n, head_dim_v, o, spare, room, after):
        unpack_values(slab, width, n, head_dim_v, room)
        add_product(weights, LINE, n_rows, room, 4 * head_dim_v, n, head_dim_v, o, 4 * head_dim_v)

    @function
    def add_scaled_values(weights, n_rows, slab, width, n, head_dim_v, o, spare, room, after):
        unpack_values(slab, width, n, head_dim_v, room)
        stride = 4 * head_dim_v
        for d in range(0, head_dim_v, 32):
            scaled, _ = scaled_weights(weights, LINE, padded_rows(n_rows), slab, width, d, spare, LINE)
            m = min(32, head_dim_v - d)
            add_product(scaled, LINE, n_rows, room + 4 * d, stride, n, m, o + 4 * d, stride)

    return (set_scaled_scores, add_scaled_values) if kv.scaled else (set_plain_scores, add_plain_values)


def direct_products(kv):
    """The same products without `room` for what is unpacked, for keys in the lanes.

    set_scores(q, n_rows, slab, width, scores, room, after)
        scores = q k for a slab of keys. What is read next stands at `after`.
    add_values(weights, n_rows, slab, width, n, head_dim_v, o, spare, room, after)
        o += weights v for the first n positions of a slab and the first head_dim_v of their `width` values.
    """
    size, scaled, load_tile = kv.size, kv.scaled, kv.load_tile
    scaled_scores, scaled_weights = kv.scaled_scores, kv.scaled_weights
    columns = 2 * LANES  # of a tile of values

    def scores_of(rows):
        grid_vectors = rows * VECTORS

        @function
        def add_scores(grid, q, slab, width, first, stop, k, after):
            for d in range(first, stop):
                for i in range(0, size * VECTORS * LANES, 64):
                    prefetch(after + size * (SLAB * d + k) + i)
                tile = load_tile(slab + size * (SLAB * d + k), size * LANES, VECTORS)
                grid = fma_grid(grid, q + 4 * d, 4 * width, tile)
            return grid

        @function
        def plain_scores(q, slab, width, scores, after):
            for k in range(0, SLAB, VECTORS * LANES):
                total = add_scores(tile_f32(grid_vectors), q, slab, width, 0, width, k, after)
                store_grid(scores + 4 * k, LINE, total, VECTORS)

        @function
        def summed_scores(q, slab, width, scores, after):
            for k in range(0, SLAB, VECTORS * LANES):
                total = tile_f32(grid_vectors)
                for d in range(0, width, 32):
                    part = add_scores(tile_f32(grid_vectors), q, slab, width, d, min(d + 32, width), k, after)
                    total = total + scaled_scores(part, slab, width, d, k)
                store_grid(scores + 4 * k, LINE, total, VECTORS)

        return summed_scores if scaled else plain_scores

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
    def set_scores(q, n_rows, slab, width, scores, room, after):
        for r in range(0, n_rows, ROWS):
            if n_rows - r > 1:
                scores_of_tile(q + 4 * width * r, slab, width, scores + LINE * r, after)
            else:
                scores_of_row(q + 4 * width * r, slab, width, scores + LINE * r, after)

    @function
    def add_values(weights, n_rows, slab, width, n, head_dim_v, o, spare, room, after):
        stride, padded = 4 * head_dim_v, padded_rows(n_rows)
        for b in range(0, head_dim_v, 32):
            line, step = scaled_weights(weights, LINE, padded, slab, width, b, spare, LINE)
            for r in range(0, n_rows, ROWS):
                at, d, end = line + step * r, b, min(b + 32, head_dim_v)
                while d < end:
                    to = o + stride * r + 4 * d
                    if n_rows - r > 1:
                        if d + columns <= end:
                            values_of_tile(at, step, slab + size * d, width, n, to, stride, after + size * d)
                        else:
                            last_of_tile(at, step, slab + size * d, width, n, to, stride, after + size * d)
                    elif d + columns <= end:
                        values_of_row(at, step, slab + size * d, width, n, to, stride, after + size * d)
                    else:
                        last_of_row(at, step, slab + size * d, width, n, to, stride, after + size * d)
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
def copy_scaled(to, x, n, n_padded, factor):
    """to = x * factor, n values, and zeros behind them, n_padded in all."""
    end = whole(n)
    for i in range(0, end, LANES):
        store(to + 4 * i, load_f32(x + 4 * i) * splat_f32(factor))
    for i in range(end, n_padded, LANES):
        store(to + 4 * i, load_first(x + 4 * i, n - i) * splat_f32(factor))


@function
def rows_of(work, width, head_dim_v):
    """Where in an item's memory (`table.attention_scratch`) things are. The queries stand at `work`.

    By rows, of this part: the sums of values, their maxima (a float32), the sums of weights (a vector); of all parts: the
    sums of values, pairs of maximum and sum of weights; scores of a slab, which become weights; the same times scales of
    values. Behind them there is room for a slab.
    """
    o = work + 4 * ROWS_PER_ITEM * width
    maxima = o + 4 * ROWS_PER_ITEM * head_dim_v
    sums = maxima + 4 * ROWS_PER_ITEM
    total = sums + 64 * ROWS_PER_ITEM
    pairs = total + 4 * ROWS_PER_ITEM * head_dim_v
    scores = pairs + 12 * ROWS_PER_ITEM
    spare = scores + LINE * ROWS_PER_ITEM
    return o, maxima, sums, total, pairs, scores, spare, spare + LINE * ROWS_PER_ITEM


@function
def start_rows(work, n_rows, width, head_dim_v):
    """Makes rows ready for `attend`; their queries are collected by the caller."""
    fill_zero(work + 4 * width * n_rows, 4 * width * (padded_rows(n_rows) - n_rows))
    start_part(work, n_rows, width, head_dim_v)


@function
def start_part(work, n_rows, width, head_dim_v):
    """Makes rows ready for a part of the keys."""
    o, maxima, sums, _, _, _, _, _ = rows_of(work, width, head_dim_v)
    for r in range(n_rows):
        st_f32(maxima + 4 * r, _LOWEST)
    fill_zero(sums, 64 * n_rows)
    fill_zero(o, 4 * head_dim_v * padded_rows(n_rows))


@function
def _hide(line, begins, seen):
    """Leaves only the scores from `begins` to `seen` - 1 of a row's scores of a slab."""
    for k in range(0, SLAB, LANES):
        s, positions = load_f32(line + 4 * k), lane_numbers() + splat_i32(i32(k))
        s = where_less(positions, splat_i32(i32(seen)), s, splat_f32(_LOWEST))
        s = where_less(positions, splat_i32(i32(begins)), splat_f32(_LOWEST), s)
        store(line + 4 * k, s)


@function
def _cap(line, cap):
    """cap * tanh(score) of a row's scores of a slab."""
    for k in range(0, SLAB, LANES):
        store(line + 4 * k, tanh(load_f32(line + 4 * k)) * splat_f32(cap))


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
def _soften(line, maximum_at, sums, o, head_dim_v):
    """A row's scores of a slab to weights 2^(score - maximum). Where one is NaN, so are the sums, whatever the maximum."""
    scores = load_tile_f32(line, _V, _SLAB_VECTORS)
    best = fold_max(scores)
    # Mostly not: nothing is summed or compared across lanes.
    if any_less(splat_f32(ld_f32(maximum_at)), best):
        _raise_maximum(best, maximum_at, sums, o, head_dim_v)
    weights = exp2(scores - splat_f32(ld_f32(maximum_at)))
    store(line, weights)
    store(sums, load_f32(sums) + fold_add_f32(weights))


@function
def merge_row(o, maximum, weights, total, total_maximum, total_weights, head_dim_v):
    """Adds a row's sums of values o, their maximum and sum of weights to those of the parts before; the latter two."""
    if maximum > total_maximum:
        shrink = exp2(splat_f32(total_maximum - maximum))
        for d in range(0, 4 * head_dim_v, _V):
            store(total + d, fma(load_f32(total + d), shrink, load_f32(o + d)))
        return maximum, total_weights * max_f32(shrink) + weights
    shrink = exp2(splat_f32(maximum - total_maximum))
    for d in range(0, 4 * head_dim_v, _V):
        store(total + d, fma(load_f32(o + d), shrink, load_f32(total + d)))
    return total_maximum, weights * max_f32(shrink) + total_weights


@function
def _seen(position, n_after, n_keys):
    """How many keys from the sequence's first on a token sees, were it not for a window's beginning."""
    return min(position + n_after + 1, n_keys)


@function
def _begins(position, n_before):
    """The first key that a token sees."""
    return max(position - n_before, 0)


@function
def _merge_rows(work, n_tokens, n_heads, position, n_before, n_after, n_keys, part, width, head_dim_v):
    """Ends the part of the keys that begins at `part`, for the rows that see any of it. Each row's first part is taken as
    it is."""
    o, maxima, sums, total, pairs, _, _, _ = rows_of(work, width, head_dim_v)
    row = 4 * head_dim_v
    for t in range(n_tokens):
        begins = _begins(position + t, n_before)
        if _seen(position + t, n_after, n_keys) > part and begins < part + KEYS_PER_PART:
            for r in range(t * n_heads, t * n_heads + n_heads):
                maximum, weights, pair = ld_f32(maxima + 4 * r), sum_f32(load_f32(sums + 64 * r)), pairs + 8 * r
                if begins >= part:
                    copy_bytes(total + row * r, o + row * r, row)
                else:
                    before, sum_before = ld_f32(pair), ld_f32(pair + 4)
                    maximum, weights = merge_row(
                        o + row * r, maximum, weights, total + row * r, before, sum_before, head_dim_v
                    )
                st_f32(pair, maximum)
                st_f32(pair + 4, weights)


@function
def has_parts(first, stop):
    """Whether keys first … stop - 1 are of several parts."""
    return first // KEYS_PER_PART != (stop - 1) // KEYS_PER_PART


def attention_over(products):
    """The function that attends over keys and values by way of these products."""
    set_scores, add_values = products

    @function
    def attend(
        work,
        n_tokens,
        n_heads,
        position,
        n_before,
        n_after,
        n_keys,
        cap,
        keys,
        key_stride,
        values,
        value_stride,
        pages,
        first,
        stop,
        width,
        head_dim_v,
        width_v,
        after,
    ):
        """Attends to keys and values first … stop - 1, `first` a multiple of SLAB, for n_heads rows of each token.

        The tokens stand at `position` and behind it in their sequence, which has n_keys keys. Scores go through
        cap * tanh unless cap is 0. Page p of keys and values, slabs of `width` and width_v values, of which the first
        head_dim_v are taken, is at keys + key_stride * p and values + value_stride * p; `pages` is the address of the
        span's page numbers, int32, `after` of what will be read next.
        """
        _, maxima, sums, _, _, scores, spare, room = rows_of(work, width, head_dim_v)
        o, n_rows = work + 4 * ROWS_PER_ITEM * width, n_tokens * n_heads
        page = ld_i32(pages + first // SLAB * 4)
        for b in range(first, stop, SLAB):
            slab, upcoming, next_page = values + value_stride * page, after, page
            if b + SLAB < stop:
                next_page = ld_i32(pages + (b // SLAB + 1) * 4)
                upcoming = keys + key_stride * next_page
            set_scores(work, n_rows, keys + key_stride * page, width, scores, room, slab)
            for t in range(n_tokens):
                seen, begins = _seen(position + t, n_after, n_keys) - b, _begins(position + t, n_before) - b
                for r in range(t * n_heads, t * n_heads + n_heads):
                    line = scores + LINE * r
                    if seen <= 0 or begins >= SLAB:
                        fill_zero(line, LINE)
                        continue
                    if cap != f32(0.0):
                        _cap(line, cap)
                    if seen < SLAB or begins > 0:
                        _hide(line, begins, seen)
                    _soften(line, maxima + 4 * r, sums + 64 * r, o + 4 * head_dim_v * r, head_dim_v)
            add_values(scores, n_rows, slab, width_v, min(SLAB, stop - b), head_dim_v, o, spare, room, upcoming)
            page = next_page
            if has_parts(first, stop) and (b + SLAB >= stop or (b + SLAB) % KEYS_PER_PART == 0):
                part = b // KEYS_PER_PART * KEYS_PER_PART
                _merge_rows(work, n_tokens, n_heads, position, n_before, n_after, n_keys, part, width, head_dim_v)
                if b + SLAB < stop:
                    start_part(work, n_rows, width, head_dim_v)

    return attend


@function
def put_part(work, n_rows, width, head_dim_v, to):
    """What rows have of one part of the keys, to `partial`: a row of head_dim_v + 16 values, maximum and sum first."""
    o, maxima, sums, _, _, _, _, _ = rows_of(work, width, head_dim_v)
    row = 4 * (head_dim_v + 16)
    for r in range(n_rows):
        st_f32(to + row * r, ld_f32(maxima + 4 * r))
        st_f32(to + row * r + 4, sum_f32(load_f32(sums + 64 * r)))
        copy_bytes(to + row * r + 64, o + 4 * head_dim_v * r, 4 * head_dim_v)


@function
def _power(x):
    """2**x of a scalar."""
    if x > f32(0.0):
        return f32(1.0) / max_f32(exp2(splat_f32(-x)))
    return max_f32(exp2(splat_f32(x)))


@function
def _put_mean(to, values, maximum, weights, sinks, row, n):
    """A row's sums of values by its sum of weights, to which its head's sink is added unless `sinks` is 0: n values."""
    if sinks:
        sink = ld_f32(sinks + 4 * row)
        weights += _power(sink * LOG2_E - maximum) + f32(0.0) * sink  # NaN for an infinite one, which is damage
    by, end = splat_f32(weights), whole(n)
    for d in range(0, 4 * end, _V):
        store(to + d, load_f32(values + d) / by)
    if end < n:
        store_first(to + 4 * end, load_first(values + 4 * end, n - end) / by, n - end)


@function
def put_result(work, first, n_rows, is_merged, sinks, width, head_dim_v, n_out, to):
    """What rows have of all their keys, as results of n_out values; `sinks` are those of the rows' heads."""
    o, maxima, sums, total, pairs, _, _, _ = rows_of(work, width, head_dim_v)
    row = 4 * head_dim_v
    for i in range(n_rows):
        r, at = first + i, to + 4 * n_out * i
        if is_merged:
            _put_mean(at, total + row * r, ld_f32(pairs + 8 * r), ld_f32(pairs + 8 * r + 4), sinks, i, n_out)
        else:
            weights = sum_f32(load_f32(sums + 64 * r))
            _put_mean(at, o + row * r, ld_f32(maxima + 4 * r), weights, sinks, i, n_out)


@function
def _tokens_per_item(n_tokens, items_per_token, n_heads, nth):
    """Of long spans: as many as there are rows for, but so few that each thread gets several items."""
    few = n_tokens * items_per_token // (ITEMS_PER_THREAD * nth)
    return max(1, min(ROWS_PER_ITEM // n_heads, few))


@function
def is_split(n_single, items_per_token, nth):
    """Whether the parts of spans of one token are items of their own."""
    return n_single * items_per_token < ITEMS_PER_THREAD * nth


@function
def _parts(position, n_before):
    """The first part that a token alone sees, and how many."""
    first = _begins(position, n_before) // KEYS_PER_PART
    return first, position // KEYS_PER_PART - first + 1


@function
def _span(spans, s):
    """First token, tokens, positions before them, first of their entries in `pages`."""
    at = spans + SPAN_BYTES * s
    return ld_i32(at), ld_i32(at + 4), ld_i32(at + 8), ld_i32(at + 12)


@kernel("attention_merge")
def attention_merge(ith, nth, partial, sinks, out, state, n_head, head_dim, n_before, items_per_token):
    """Merges what `put_part` left of spans of one token, in the place of each one's first part."""
    n_single, spans = ld_state(state, 2), ld_state(state, 3)
    start, stop = share(n_head, ith, nth)
    width = padded(head_dim)
    row = 4 * (width + 16)
    at = partial
    if is_split(n_single, items_per_token, nth):
        for s in range(n_single):
            token, _, n_past, _ = _span(spans, s)
            _, n_parts = _parts(n_past, n_before)
            for h in range(start, stop):
                total, part = at + row * h + 64, at + row * h
                maximum, weights = ld_f32(part), ld_f32(part + 4)
                for _ in range(1, n_parts):
                    part += row * n_head
                    maximum, weights = merge_row(part + 64, ld_f32(part), ld_f32(part + 4), total, maximum, weights, width)
                _put_mean(out + 4 * head_dim * (n_head * token + h), total, maximum, weights, sinks, h, head_dim)
            at += row * n_head * n_parts


@function
def _collect(work, q, q_rot, n_heads, n_q, n_rot, factor):
    """The rows of some heads of a token: n_q values of each from q, then n_rot from q_rot."""
    row = 4 * padded(n_q + n_rot)
    for h in range(n_heads):
        copy_scaled(work + row * h, q + 4 * n_q * h, n_q, padded(n_q), factor)
        copy_scaled(work + row * h + 4 * n_q, q_rot + 4 * n_rot * h, n_rot, n_rot, factor)


def define_attention(kv, one_products, many_products):
    """The body of the attention kernels over caches of a type, with the products for spans of one token and of many.

    Queries are n_q values of each head from q, then n_rot from q_rot (none, or both multiples of 16); keys have as many,
    the slabs of values width_v a position, of which the first n_out count.
    """
    slab_bytes = kv.slab_bytes
    attend_one, attend_many = attention_over(one_products), attention_over(many_products)

    @function
    def attention(
        ith,
        nth,
        q,
        q_rot,
        k_cache,
        v_cache,
        sinks,
        out,
        partial,
        work,
        state,
        counter,
        n_head,
        n_head_kv,
        n_q,
        n_rot,
        width_v,
        n_out,
        scale,
        cap,
        n_before,
        n_after,
    ):
        n_spans, n_single, spans, pages = ld_state(state, 1), ld_state(state, 2), ld_state(state, 3), ld_state(state, 5)
        group = n_head // n_head_kv
        n_splits = (group + HEADS_PER_ITEM - 1) // HEADS_PER_ITEM
        per_token = n_head_kv * n_splits
        width, head_dim_v, factor, most = padded(n_q + n_rot), padded(n_out), bits_f32(scale) * LOG2_E, bits_f32(cap)
        if most != f32(0.0):
            factor, most = bits_f32(scale) / most, most * LOG2_E
        key_bytes, value_bytes = slab_bytes(width), slab_bytes(width_v)
        key_stride, value_stride = key_bytes * n_head_kv, value_bytes * n_head_kv
        item, first_item = next_item(counter), 0

        per_item = _tokens_per_item(ld_state(state, 0) - n_single, per_token, min(group, HEADS_PER_ITEM), nth)
        for s in range(n_single, n_spans):
            token, n_tokens, n_past, page = _span(spans, s)
            n_keys = n_past + n_tokens
            n_pieces = (n_tokens + per_item - 1) // per_item
            while item < first_item + n_pieces * per_token:
                i = item - first_item
                t = (n_pieces - 1 - i // per_token) * per_item
                n = min(per_item, n_tokens - t)
                kv_head, split = i // n_splits % n_head_kv, i % n_splits
                h, n_heads = kv_head * group + split * HEADS_PER_ITEM, min(HEADS_PER_ITEM, group - split * HEADS_PER_ITEM)
                start_rows(work, n * n_heads, width, head_dim_v)
                for j in range(n):
                    head = n_head * (token + t + j) + h
                    to = work + 4 * width * n_heads * j
                    _collect(to, q + 4 * n_q * head, q_rot + 4 * n_rot * head, n_heads, n_q, n_rot, factor)
                first = _begins(n_past + t, n_before) // SLAB * SLAB
                stop = _seen(n_past + t + n - 1, n_after, n_keys)
                attend_many(
                    work,
                    n,
                    n_heads,
                    n_past + t,
                    n_before,
                    n_after,
                    n_keys,
                    most,
                    k_cache + key_bytes * kv_head,
                    key_stride,
                    v_cache + value_bytes * kv_head,
                    value_stride,
                    pages + 4 * page,
                    first,
                    stop,
                    width,
                    head_dim_v,
                    width_v,
                    0,
                )
                head_sinks, is_merged = sinks, has_parts(first, stop)
                if sinks:
                    head_sinks = sinks + 4 * h
                for j in range(n):
                    to = out + 4 * n_out * (n_head * (token + t + j) + h)
                    put_result(work, n_heads * j, n_heads, is_merged, head_sinks, width, head_dim_v, n_out, to)
                item = next_item(counter)
            first_item += n_pieces * per_token

        split_up, row = is_split(n_single, per_token, nth), 4 * (head_dim_v + 16) * n_head
        for s in range(n_single):
            token, _, n_past, page = _span(spans, s)
            n_keys = n_past + 1
            first_part, n_parts = _parts(n_past, n_before)
            if not split_up:
                n_parts = 1
            while item < first_item + n_parts * per_token:
                following = next_item(counter)
                i, j = item - first_item, following - first_item
                part, kv_head, split = i % n_parts, i // n_parts // n_splits, i // n_parts % n_splits
                h, n_heads = kv_head * group + split * HEADS_PER_ITEM, min(HEADS_PER_ITEM, group - split * HEADS_PER_ITEM)
                first, stop = _begins(n_past, n_before) // SLAB * SLAB, n_keys
                if split_up:
                    part_at = (first_part + part) * KEYS_PER_PART
                    first, stop = max(first, part_at), min(part_at + KEYS_PER_PART, n_keys)
                start_rows(work, n_heads, width, head_dim_v)
                head = n_head * token + h
                _collect(work, q + 4 * n_q * head, q_rot + 4 * n_rot * head, n_heads, n_q, n_rot, factor)
                keys, after = k_cache + key_bytes * kv_head, 0
                if j < n_parts * per_token:
                    at = pages + 4 * (page + (first_part + j % n_parts) * (KEYS_PER_PART // SLAB))
                    after = k_cache + key_bytes * (j // n_parts // n_splits) + key_stride * ld_i32(at)
                attend_one(
                    work,
                    1,
                    n_heads,
                    n_past,
                    n_before,
                    n_after,
                    n_keys,
                    most,
                    keys,
                    key_stride,
                    v_cache + value_bytes * kv_head,
                    value_stride,
                    pages + 4 * page,
                    first,
                    stop,
                    width,
                    head_dim_v,
                    width_v,
                    after,
                )
                if split_up:
                    put_part(work, n_heads, width, head_dim_v, partial + row * part + 4 * (head_dim_v + 16) * h)
                else:
                    head_sinks = sinks
                    if sinks:
                        head_sinks = sinks + 4 * h
                    is_merged, to = has_parts(first, stop), out + 4 * n_out * head
                    put_result(work, 0, n_heads, is_merged, head_sinks, width, head_dim_v, n_out, to)
                item = following
            first_item += n_parts * per_token
            if split_up:
                partial += row * n_parts

    return attention


def _define(name, kv):
    slab_bytes = kv.slab_bytes
    attention = define_attention(kv, direct_products(kv), unpacked_products(kv, kv.unpack_lanes))

    def define_store(part, put):
        @kernel(f"store_{part}_{name}")
        def store_part(ith, nth, x, cache, scratch, scratch_stride, state, n_head_kv, head_dim):
            """Stores the keys or values of each token and head where `places` says."""
            places, width, room = ld_state(state, 4), padded(head_dim), scratch + ith * scratch_stride
            start, stop = share(ld_state(state, 0) * n_head_kv, ith, nth)
            for item in range(start, stop):
                place, h = ld_i32(places + item // n_head_kv * 4), item % n_head_kv
                slab, row = cache + slab_bytes(width) * (place // SLAB * n_head_kv + h), x + 4 * head_dim * item
                if head_dim < width:
                    copy_padded(room, row, head_dim, width)
                    row = room
                put(slab, place % SLAB, row, width)

    define_store("k", kv.put_lane)
    define_store("v", kv.put_row)

    @kernel(f"attention_{name}")
    def attend_to_cache(
        ith,
        nth,
        q,
        k_cache,
        v_cache,
        sinks,
        out,
        partial,
        scratch,
        scratch_stride,
        state,
        counter,
        n_head,
        n_head_kv,
        head_dim,
        head_dim_v,
        scale,
        cap,
        n_before,
        n_after,
    ):
        attention(
            ith,
            nth,
            q,
            q,
            k_cache,
            v_cache,
            sinks,
            out,
            partial,
            scratch + ith * scratch_stride,
            state,
            counter,
            n_head,
            n_head_kv,
            head_dim,
            0,
            padded(head_dim_v),
            head_dim_v,
            scale,
            cap,
            n_before,
            n_after,
        )


for _name, _kv in KV_FORMATS.items():
    _define(_name, _kv)
