"""Attention over latent keys and values (MLA, DeepSeek-V2: DeepSeek-AI 2024), absorbed form, float16 or float32 cache.

The cache is (n_ctx, n_latent + n_rot): a token's latent vector, then its rotated key. All heads share both, and the
values are the latent vectors. Queries are (n_tokens, n_head, n_latent) in the latent space, and (n_tokens, n_head, n_rot).

A work item is one token and up to HEADS_PER_ITEM of its heads, so that each key, once unpacked to the lanes, serves them
all. For one token, keys are shared out too, KEYS_PER_ITEM at a time; `attention_merge` merges these parts in order.
"""

from ..simd.vector import (
    LANES,
    TOKENS,
    as_f32,
    broadcast_f32,
    copy_bytes,
    f16_to_f32,
    fma,
    get,
    lane_numbers,
    ld_f32,
    load_f16,
    load_f32,
    load_tile_f32,
    load_transposed,
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
from .table import HEADS_PER_ITEM, KEYS_PER_ITEM

_V = 4 * LANES
_LOWEST = f32(-3e38)
_KEYS = 64  # a block's
_SCORES = 4 * HEADS_PER_ITEM * _KEYS
_STATS = 4 * HEADS_PER_ITEM


@function
def _halves(t):
    return f16_to_f32(t), f16_to_f32(t >> splat_i32(i32(16)))


def _define(name, size, load, put):
    per_dword = 4 // size

    @kernel(f"store_latent_{name}")
    def store_latent(ith, nth, latent, k_rot, cache, state, n_latent, n_rot):
        """Appends each token's latent vector and rotated key to the cache."""
        n_past = ld_state(state, 1)
        start, stop = share(ld_state(state, 0), ith, nth)
        for t in range(start, stop):
            to = cache + size * (n_past + t) * (n_latent + n_rot)
            for d in range(n_latent):
                put(to + size * d, ld_f32(latent + 4 * (t * n_latent + d)))
            for d in range(n_rot):
                put(to + size * (n_latent + d), ld_f32(k_rot + 4 * (t * n_rot + d)))

    @function
    def unpack_keys(keys, row_values, scratch):
        """LANES keys, transposed: value d of all of them at scratch + d * _V."""
        for c in range(0, row_values, 8 * per_dword):
            t = load_transposed(keys + size * c, size * row_values, 8)
            if size == 4:
                store(scratch + c * _V, as_f32(t))
            else:
                even, odd = _halves(t)
                store_in_turn(scratch + c * _V, even, odd)

    @function
    def attend(q, n_q, cache, first, n, n_latent, n_rot, factor, o, m, sums, keys, scores):
        """Adds n keys from `first` on to the softmax sums of n_q queries (a multiple of TOKENS, rows of `q`)."""
        row_values = n_latent + n_rot
        q_stride, o_stride = 4 * row_values, 4 * n_latent
        for b in range(0, n, _KEYS):
            block = cache + size * row_values * (first + b)
            for k in range(0, _KEYS, LANES):
                # Rows past the last key are within the cache, whose length is a multiple of 64.
                unpack_keys(block + size * row_values * k, row_values, keys)
                for h in range(0, n_q, TOKENS):
                    s = tile_f32(TOKENS)
                    at = q + h * q_stride
                    for d in range(row_values):
                        s = fma(broadcast_f32(at + 4 * d, q_stride, TOKENS), load_f32(keys + d * _V), s)
                    store_tile(scores + 4 * (_KEYS * h + k), 4 * _KEYS, s * factor)
            left = min(n - b, _KEYS)
            for h in range(n_q):
                line = scores + 4 * _KEYS * h
                best = splat_f32(_LOWEST)
                for k in range(0, _KEYS, LANES):
                    s1 = load_f32(line + 4 * k)
                    if left < _KEYS:
                        s1 = where_less(lane_numbers() + splat_i32(i32(k)), splat_i32(i32(left)), s1, splat_f32(_LOWEST))
                    store(line + 4 * k, s1)
                    best = maximum(best, s1)
                before = ld_f32(m + 4 * h)
                now = max(before, max_f32(best))
                total = splat_f32(f32(0.0))
                for k in range(0, _KEYS, LANES):
                    p = exp(load_f32(line + 4 * k) - splat_f32(now))
                    store(line + 4 * k, p)
                    total = total + p
                shrink = max_f32(exp(splat_f32(before - now)))
                st_f32(m + 4 * h, now)
                st_f32(sums + 4 * h, ld_f32(sums + 4 * h) * shrink + sum_f32(total))
                if shrink < f32(1.0):
                    for d in range(0, 4 * n_latent, _V):
                        store(o + h * o_stride + d, load_f32(o + h * o_stride + d) * splat_f32(shrink))
            for h in range(0, n_q, TOKENS):
                for d in range(0, n_latent, LANES):
                    at = o + h * o_stride + 4 * d
                    acc = load_tile_f32(at, o_stride, TOKENS)
                    for k in range(left):
                        p = broadcast_f32(scores + 4 * (_KEYS * h + k), 4 * _KEYS, TOKENS)
                        acc = fma(p, load(block + size * (row_values * k + d)), acc)
                    store_tile(at, o_stride, acc)

    @function
    def collect(q_latent, q_rot, n_head, head, n, n_latent, n_rot, q, o, m, sums, n_padded):
        """The queries of n heads in rows of n_latent + n_rot; sums at zero."""
        row = 4 * (n_latent + n_rot)
        for h in range(n_padded):
            if h < n:
                copy_bytes(q + row * h, q_latent + 4 * n_latent * (head + h), 4 * n_latent)
                copy_bytes(q + row * h + 4 * n_latent, q_rot + 4 * n_rot * (head + h), 4 * n_rot)
            st_f32(m + 4 * h, _LOWEST)
            st_f32(sums + 4 * h, f32(0.0))
            for d in range(0, 4 * n_latent, _V):
                store(o + 4 * n_latent * h + d, splat_f32(f32(0.0)))

    @kernel(f"latent_attention_one_{name}")
    def latent_attention_one(
        ith, nth, q_latent, q_rot, cache, partial, scratch, scratch_stride, state, counter, n_head, n_latent, n_rot, scale
    ):
        n_kv = ld_state(state, 1) + 1
        n_parts = (n_kv + KEYS_PER_ITEM - 1) // KEYS_PER_ITEM
        n_groups = (n_head + HEADS_PER_ITEM - 1) // HEADS_PER_ITEM
        q = scratch + ith * scratch_stride
        o = q + 4 * HEADS_PER_ITEM * (n_latent + n_rot)
        keys = o + 4 * HEADS_PER_ITEM * n_latent
        m, sums, scores = stack(_STATS), stack(_STATS), stack(_SCORES)
        factor = splat_f32(bits_f32(scale))
        while True:
            item = next_item(counter)
            if item >= n_parts * n_groups:
                break
            part, head = item // n_groups, item % n_groups * HEADS_PER_ITEM
            n = min(HEADS_PER_ITEM, n_head - head)
            n_padded = (n + TOKENS - 1) // TOKENS * TOKENS
            collect(q_latent, q_rot, n_head, head, n, n_latent, n_rot, q, o, m, sums, n_padded)
            first = part * KEYS_PER_ITEM
            n_keys = min(KEYS_PER_ITEM, n_kv - first)
            attend(q, n_padded, cache, first, n_keys, n_latent, n_rot, factor, o, m, sums, keys, scores)
            for h in range(n):
                to = partial + 4 * (part * n_head + head + h) * (n_latent + 16)
                st_f32(to, ld_f32(m + 4 * h))
                st_f32(to + 4, ld_f32(sums + 4 * h))
                copy_bytes(to + 64, o + 4 * n_latent * h, 4 * n_latent)

    @kernel(f"latent_attention_many_{name}")
    def latent_attention_many(
        ith, nth, q_latent, q_rot, cache, out, scratch, scratch_stride, state, counter, n_head, n_latent, n_rot, scale
    ):
        n_tokens, n_past = ld_state(state, 0), ld_state(state, 1)
        n_groups = (n_head + HEADS_PER_ITEM - 1) // HEADS_PER_ITEM
        q = scratch + ith * scratch_stride
        o = q + 4 * HEADS_PER_ITEM * (n_latent + n_rot)
        keys = o + 4 * HEADS_PER_ITEM * n_latent
        m, sums, scores = stack(_STATS), stack(_STATS), stack(_SCORES)
        factor = splat_f32(bits_f32(scale))
        while True:
            item = next_item(counter)
            if item >= n_tokens * n_groups:
                break
            t, head = n_tokens - 1 - item // n_groups, item % n_groups * HEADS_PER_ITEM  # the longest first
            n = min(HEADS_PER_ITEM, n_head - head)
            n_padded = (n + TOKENS - 1) // TOKENS * TOKENS
            of_token = t * n_head
            collect(
                q_latent + 4 * n_latent * of_token,
                q_rot + 4 * n_rot * of_token,
                n_head,
                head,
                n,
                n_latent,
                n_rot,
                q,
                o,
                m,
                sums,
                n_padded,
            )
            attend(q, n_padded, cache, 0, n_past + t + 1, n_latent, n_rot, factor, o, m, sums, keys, scores)
            for h in range(n):
                to = out + 4 * n_latent * (of_token + head + h)
                total = splat_f32(ld_f32(sums + 4 * h))
                for d in range(0, 4 * n_latent, _V):
                    store(to + d, load_f32(o + 4 * n_latent * h + d) / total)


@function
def store_in_turn(to, even, odd):
    """Stores two tiles of 8 vectors in turn."""
    store(to, get(even, 0))
    store(to + _V, get(odd, 0))
    store(to + 2 * _V, get(even, 1))
    store(to + 3 * _V, get(odd, 1))
    store(to + 4 * _V, get(even, 2))
    store(to + 5 * _V, get(odd, 2))
    store(to + 6 * _V, get(even, 3))
    store(to + 7 * _V, get(odd, 3))
    store(to + 8 * _V, get(even, 4))
    store(to + 9 * _V, get(odd, 4))
    store(to + 10 * _V, get(even, 5))
    store(to + 11 * _V, get(odd, 5))
    store(to + 12 * _V, get(even, 6))
    store(to + 13 * _V, get(odd, 6))
    store(to + 14 * _V, get(even, 7))
    store(to + 15 * _V, get(odd, 7))


_define("F16", 2, load_f16, st_f16)
_define("F32", 4, load_f32, st_f32)
