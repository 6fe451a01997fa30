"""Attention over a float16 KV cache, with an online softmax (Milakov & Gimelshein 2018; Dao et al. 2022).

The caches are laid out for reading. K: (n_head_kv, n_ctx / 16, head_dim, 16), so that 16 keys stand in the lanes and no
sum crosses lanes; V: (n_head_kv, n_ctx, head_dim_v), of mostly the same length. n_ctx is a multiple of KV_BLOCK. Queries
come scaled by nothing: the kernels multiply the scores by `scale`.

One token is shared out by (KV head, KEYS_PER_ITEM keys), so that long contexts use all threads whatever the number of
heads, and merged in order of position. Prompts are shared out by (head, TOKENS queries).
"""

from ..simd.vector import (
    LANES,
    TOKENS,
    broadcast_f32,
    fma,
    lane_numbers,
    ld_f32,
    load_f16,
    load_f32,
    load_tile_f16,
    load_tile_f32,
    max_f32,
    maximum,
    splat_f32,
    splat_i32,
    st_f16,
    st_f32,
    stack,
    store,
    store_tile,
    sum_f32,
    tile_f32,
    where_less,
)
from .common import bits_f32, exp, f32, i32, ld_state, next_item, share
from .source import function, kernel
from .table import KEYS_PER_ITEM, KV_BLOCK

_V = 4 * LANES
_ITEM_SCORES = 4 * KEYS_PER_ITEM
_SCORES = 4 * TOKENS * KV_BLOCK
_PER_TOKEN = 4 * TOKENS
_BLOCKS = KV_BLOCK // 16
_LOWEST = f32(-3e38)


@function
def _vector(x):
    return splat_f32(f32(x))


@function
def _softmax(scores, n, m):
    """exp(score - m) in place for n scores (a multiple of 16); their sum."""
    total = _vector(0.0)
    for i in range(0, 4 * n, _V):
        p = exp(load_f32(scores + i) - splat_f32(m))
        store(scores + i, p)
        total = total + p
    return sum_f32(total)


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
        total = _vector(0.0)
        for i in range(n_items):
            at = first + stride * i
            total = fma(exp(splat_f32(ld_f32(at) - m)), splat_f32(ld_f32(at + 4)), total)
        for d in range(0, 4 * head_dim, _V):
            acc = _vector(0.0)
            for i in range(n_items):
                at = first + stride * i
                acc = fma(exp(splat_f32(ld_f32(at) - m)), load_f32(at + 64 + d), acc)
            store(out + 4 * head_dim * h + d, acc / total)


def _define(name, size, load, load_tile, put):
    @kernel(f"store_k_{name}")
    def store_k(ith, nth, k, cache, state, n_head_kv, head_dim, n_ctx):
        n_past = ld_state(state, 1)
        start, stop = share(ld_state(state, 0) * n_head_kv, ith, nth)
        for item in range(start, stop):
            t, h = item // n_head_kv, item % n_head_kv
            pos = n_past + t
            to = cache + size * (h * n_ctx * head_dim + pos // 16 * 16 * head_dim + pos % 16)
            for d in range(head_dim):
                put(to + 16 * size * d, ld_f32(k + 4 * (item * head_dim + d)))

    @kernel(f"store_v_{name}")
    def store_v(ith, nth, v, cache, state, n_head_kv, head_dim, n_ctx):
        n_past = ld_state(state, 1)
        start, stop = share(ld_state(state, 0) * n_head_kv, ith, nth)
        for item in range(start, stop):
            t, h = item // n_head_kv, item % n_head_kv
            to = cache + size * (h * n_ctx + n_past + t) * head_dim
            for d in range(head_dim):
                put(to + size * d, ld_f32(v + 4 * (item * head_dim + d)))

    @function
    def weighted_sum(weights, values, n, head_dim, out):
        """out = sum over n keys of weight * value."""
        d = 0
        while d + 4 * LANES <= head_dim:
            acc4 = tile_f32(4)
            for k in range(n):
                v = load_tile(values + size * (k * head_dim + d), size * LANES, 4)
                acc4 = fma(v, splat_f32(ld_f32(weights + 4 * k)), acc4)
            store(out + 4 * d, acc4)
            d += 4 * LANES
        while d < head_dim:
            acc = _vector(0.0)
            for k in range(n):
                acc = fma(load(values + size * (k * head_dim + d)), splat_f32(ld_f32(weights + 4 * k)), acc)
            store(out + 4 * d, acc)
            d += LANES

    @kernel(f"attention_one_{name}")
    def attention_one(
        ith, nth, q, k_cache, v_cache, out, partial, state, counter, n_head, n_head_kv, head_dim, head_dim_v, n_ctx, scale
    ):
        n_kv = ld_state(state, 1) + 1
        n_items = (n_kv + KEYS_PER_ITEM - 1) // KEYS_PER_ITEM
        group = n_head // n_head_kv
        scores = stack(_ITEM_SCORES)
        factor = splat_f32(bits_f32(scale))
        while True:
            item = next_item(counter)
            if item >= n_items * n_head_kv:
                break
            kv, part = item // n_items, item % n_items
            first = part * KEYS_PER_ITEM
            n = min(KEYS_PER_ITEM, n_kv - first)
            padded = (n + KV_BLOCK - 1) // KV_BLOCK * KV_BLOCK
            keys = k_cache + size * head_dim * (kv * n_ctx + first)
            values = v_cache + size * head_dim_v * (kv * n_ctx + first)
            for h in range(kv * group, kv * group + group):
                qh = q + 4 * head_dim * h
                best = splat_f32(_LOWEST)
                for b in range(0, padded, KV_BLOCK):
                    for lane in range(0, 16, LANES):
                        acc = tile_f32(_BLOCKS)
                        at = keys + size * (head_dim * b + lane)
                        for d in range(head_dim):
                            x = splat_f32(ld_f32(qh + 4 * d))
                            acc = fma(load_tile(at + 16 * size * d, 16 * size * head_dim, _BLOCKS), x, acc)
                        store_tile(scores + 4 * (b + lane), 64, acc * factor)
                    for i in range(b, b + KV_BLOCK, LANES):
                        s = load_f32(scores + 4 * i)
                        s = where_less(lane_numbers() + splat_i32(i32(i)), splat_i32(i32(n)), s, splat_f32(_LOWEST))
                        store(scores + 4 * i, s)
                        best = maximum(best, s)
                m = max_f32(best)
                total = _softmax(scores, padded, m)
                to = partial + 4 * (part * n_head + h) * (head_dim_v + 16)
                st_f32(to, m)
                st_f32(to + 4, total)
                weighted_sum(scores, values, n, head_dim_v, to + 64)

    @kernel(f"attention_many_{name}")
    def attention_many(
        ith, nth, q, k_cache, v_cache, out, state, counter, n_head, n_head_kv, head_dim, head_dim_v, n_ctx, scale
    ):
        n_tokens, n_past = ld_state(state, 0), ld_state(state, 1)
        n_groups = (n_tokens + TOKENS - 1) // TOKENS
        row, row_v = 4 * n_head * head_dim, 4 * n_head * head_dim_v
        factor = splat_f32(bits_f32(scale))
        scores = stack(_SCORES)  # (TOKENS, KV_BLOCK)
        maxima, sums = stack(_PER_TOKEN), stack(_PER_TOKEN)
        shrink = stack(_PER_TOKEN)
        while True:
            item = next_item(counter)
            if item >= n_groups * n_head:
                break
            t0 = (n_groups - 1 - item // n_head) * TOKENS  # the longest first
            h = item % n_head
            kv = h // (n_head // n_head_kv)
            q_at, o_at = q + t0 * row + 4 * h * head_dim, out + t0 * row_v + 4 * h * head_dim_v
            keys, values = k_cache + size * head_dim * n_ctx * kv, v_cache + size * head_dim_v * n_ctx * kv
            for d in range(0, head_dim_v, LANES):
                store_tile(o_at + 4 * d, row_v, tile_f32(TOKENS))
            for i in range(TOKENS):
                st_f32(maxima + 4 * i, _LOWEST)
                st_f32(sums + 4 * i, f32(0.0))
            last = min(n_past + t0 + TOKENS, n_past + n_tokens)
            for b in range(0, last, KV_BLOCK):
                for k in range(0, KV_BLOCK, LANES):
                    at = keys + size * (head_dim * (b + k // 16 * 16) + k % 16)
                    s = tile_f32(TOKENS)
                    for d in range(head_dim):
                        s = fma(broadcast_f32(q_at + 4 * d, row, TOKENS), load(at + 16 * size * d), s)
                    store_tile(scores + 4 * k, 4 * KV_BLOCK, s * factor)
                for i in range(TOKENS):
                    line = scores + 4 * KV_BLOCK * i
                    limit = n_past + t0 + i + 1 - b  # keys of this block that query i may see
                    best = splat_f32(_LOWEST)
                    for k in range(0, KV_BLOCK, LANES):
                        s1 = load_f32(line + 4 * k)
                        if limit < KV_BLOCK:
                            seen = lane_numbers() + splat_i32(i32(k))
                            s1 = where_less(seen, splat_i32(i32(limit)), s1, splat_f32(_LOWEST))
                            store(line + 4 * k, s1)
                        best = maximum(best, s1)
                    before = ld_f32(maxima + 4 * i)
                    m = max(before, max_f32(best))
                    factor_i = max_f32(exp(splat_f32(before - m)))
                    total = _softmax(line, KV_BLOCK, m)
                    if limit <= 0:
                        total = f32(0.0)
                        for k in range(0, KV_BLOCK, LANES):
                            store(line + 4 * k, _vector(0.0))
                    st_f32(maxima + 4 * i, m)
                    st_f32(shrink + 4 * i, factor_i)
                    st_f32(sums + 4 * i, ld_f32(sums + 4 * i) * factor_i + total)
                n = min(KV_BLOCK, last - b)
                for d in range(0, head_dim_v, LANES):
                    o = load_tile_f32(o_at + 4 * d, row_v, TOKENS) * broadcast_f32(shrink, 4, TOKENS)
                    for k in range(n):
                        v = load(values + size * (head_dim_v * (b + k) + d))
                        o = fma(broadcast_f32(scores + 4 * k, 4 * KV_BLOCK, TOKENS), v, o)
                    store_tile(o_at + 4 * d, row_v, o)
            for d in range(0, head_dim_v, LANES):
                o = load_tile_f32(o_at + 4 * d, row_v, TOKENS) / broadcast_f32(sums, 4, TOKENS)
                store_tile(o_at + 4 * d, row_v, o)


_define("F16", 2, load_f16, load_tile_f16, st_f16)
_define("F32", 4, load_f32, load_tile_f32, st_f32)
