"""Attention over latent keys and values (MLA, DeepSeek-V2: DeepSeek-AI 2024), absorbed form.

The cache is n_ctx / SLAB slabs (SLAB, n_latent + n_rot) (`kv_formats`): a position's latent vector, then its rotated key.
All heads share both, and the values are the latent vectors. Queries are (n_tokens, n_head, n_latent) in the latent space,
and (n_tokens, n_head, n_rot). Keys are transposed to the lanes as they are unpacked; all else is as in `attention`.
"""

from ..simd.vector import copy_bytes
from .attention import (
    LINE,
    LOG2_E,
    attention_over,
    copy_scaled,
    direct_products,
    put_part,
    put_result,
    start_rows,
    tokens_per_item,
    unpacked_products,
)
from .common import bits_f32, ld_state, next_item, share
from .kv_formats import KV_FORMATS
from .source import function, kernel
from .table import HEADS_PER_ITEM, KEYS_PER_ITEM, SLAB


@function
def collect(work, q_latent, q_rot, n_heads, n_latent, n_rot, scale):
    """Rows of n_latent + n_rot from the queries of some heads of a token."""
    row, factor = 4 * (n_latent + n_rot), bits_f32(scale) * LOG2_E
    for h in range(n_heads):
        copy_scaled(work + row * h, q_latent + 4 * n_latent * h, n_latent, factor)
        copy_scaled(work + row * h + 4 * n_latent, q_rot + 4 * n_rot * h, n_rot, factor)


def _define(name, kv):
    slab_bytes, put_row = kv.slab_bytes, kv.put_row
    products = unpacked_products(kv.unpack_transposed, kv.unpack_rows)
    attend_many = attention_over(slab_bytes, SLAB, products)
    # The values of a slab are near when its keys have been unpacked.
    attend_one = attention_over(slab_bytes, SLAB, (products[0], direct_products(kv, LINE)[1]))

    @kernel(f"store_latent_{name}")
    def store_latent(ith, nth, latent, k_rot, cache, scratch, scratch_stride, state, n_latent, n_rot):
        """Appends each token's latent vector and rotated key to the cache."""
        n_past, width = ld_state(state, 1), n_latent + n_rot
        start, stop = share(ld_state(state, 0), ith, nth)
        row = scratch + ith * scratch_stride
        for t in range(start, stop):
            copy_bytes(row, latent + 4 * n_latent * t, 4 * n_latent)
            copy_bytes(row + 4 * n_latent, k_rot + 4 * n_rot * t, 4 * n_rot)
            position = n_past + t
            put_row(cache + slab_bytes(width) * (position // SLAB), position % SLAB, row, width)

    @kernel(f"latent_attention_one_{name}")
    def latent_attention_one(
        ith, nth, q_latent, q_rot, cache, partial, scratch, scratch_stride, state, counter, n_head, n_latent, n_rot, scale
    ):
        n_kv, width = ld_state(state, 1) + 1, n_latent + n_rot
        n_parts = (n_kv + KEYS_PER_ITEM - 1) // KEYS_PER_ITEM
        n_splits = (n_head + HEADS_PER_ITEM - 1) // HEADS_PER_ITEM
        work = scratch + ith * scratch_stride
        item = next_item(counter)
        while item < n_parts * n_splits:
            following = next_item(counter)
            part, h = item // n_splits, item % n_splits * HEADS_PER_ITEM
            n = min(HEADS_PER_ITEM, n_head - h)
            start_rows(work, n, width, n_latent)
            collect(work, q_latent + 4 * n_latent * h, q_rot + 4 * n_rot * h, n, n_latent, n_rot, scale)
            first = part * KEYS_PER_ITEM
            n_keys = min(KEYS_PER_ITEM, n_kv - first)
            rows = cache + slab_bytes(width) * (first // SLAB)
            after = cache + slab_bytes(width) * (following // n_splits * KEYS_PER_ITEM // SLAB)
            attend_one(work, 1, n, n_keys, rows, rows, n_keys, width, n_latent, width, after)
            put_part(work, n, width, n_latent, partial + 4 * (n_latent + 16) * (part * n_head + h))
            item = following

    @kernel(f"latent_attention_many_{name}")
    def latent_attention_many(
        ith, nth, q_latent, q_rot, cache, out, scratch, scratch_stride, state, counter, n_head, n_latent, n_rot, scale
    ):
        n_tokens, n_past, width = ld_state(state, 0), ld_state(state, 1), n_latent + n_rot
        n_splits = (n_head + HEADS_PER_ITEM - 1) // HEADS_PER_ITEM
        per_item = tokens_per_item(n_tokens, n_splits, min(n_head, HEADS_PER_ITEM), nth)
        n_parts = (n_tokens + per_item - 1) // per_item
        work = scratch + ith * scratch_stride
        while True:
            item = next_item(counter)
            if item >= n_parts * n_splits:
                break
            t, h = (n_parts - 1 - item // n_splits) * per_item, item % n_splits * HEADS_PER_ITEM
            n, n_heads = min(per_item, n_tokens - t), min(HEADS_PER_ITEM, n_head - h)
            start_rows(work, n * n_heads, width, n_latent)
            for i in range(n):
                head, rows = n_head * (t + i) + h, work + 4 * width * n_heads * i
                collect(rows, q_latent + 4 * n_latent * head, q_rot + 4 * n_rot * head, n_heads, n_latent, n_rot, scale)
            seen = n_past + t + 1
            attend_many(work, n, n_heads, seen, cache, cache, seen + n - 1, width, n_latent, width, 0)
            for i in range(n):
                to = out + 4 * n_latent * (n_head * (t + i) + h)
                put_result(work, n_heads * i, n_heads, width, n_latent, to)


for _name, _kv in KV_FORMATS.items():
    _define(_name, _kv)
