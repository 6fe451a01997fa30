"""Attention over latent keys and values (MLA, DeepSeek-V2: DeepSeek-AI 2024), absorbed form.

The cache is n_pages slabs (SLAB, n_latent + n_rot) (`kv_formats`): a position's latent vector, then its rotated key.
All heads share both, and the values are the latent vectors. Queries are (n_tokens, n_head, n_latent) in the latent space,
and (n_tokens, n_head, n_rot). Keys are transposed to the lanes as they are unpacked; all else is as in `attention`.
"""

from ..simd.vector import copy_bytes, ld_i32
from .attention import define_attention, direct_products, unpacked_products
from .common import ld_state, share
from .kv_formats import KV_FORMATS
from .source import kernel
from .table import NO_LIMIT, SLAB


def _define(name, kv):
    slab_bytes, put_row = kv.slab_bytes, kv.put_row
    many = unpacked_products(kv, kv.unpack_transposed)
    # The values of a slab are near when its keys have been unpacked.
    attention = define_attention(kv, (many[0], direct_products(kv)[1]), many)

    @kernel(f"store_latent_{name}")
    def store_latent(ith, nth, latent, k_rot, cache, scratch, scratch_stride, state, n_latent, n_rot):
        """Stores each token's latent vector and rotated key where `places` says."""
        places, width = ld_state(state, 4), n_latent + n_rot
        start, stop = share(ld_state(state, 0), ith, nth)
        row = scratch + ith * scratch_stride
        for t in range(start, stop):
            copy_bytes(row, latent + 4 * n_latent * t, 4 * n_latent)
            copy_bytes(row + 4 * n_latent, k_rot + 4 * n_rot * t, 4 * n_rot)
            place = ld_i32(places + 4 * t)
            put_row(cache + slab_bytes(width) * (place // SLAB), place % SLAB, row, width)

    @kernel(f"latent_attention_{name}")
    def latent_attention(
        ith,
        nth,
        q_latent,
        q_rot,
        cache,
        out,
        partial,
        scratch,
        scratch_stride,
        state,
        counter,
        n_head,
        n_latent,
        n_rot,
        scale,
    ):
        attention(
            ith,
            nth,
            q_latent,
            q_rot,
            cache,
            cache,
            0,
            out,
            partial,
            scratch + ith * scratch_stride,
            state,
            counter,
            n_head,
            1,
            n_latent,
            n_rot,
            n_latent + n_rot,
            n_latent,
            scale,
            0,
            NO_LIMIT,
            0,
        )


for _name, _kv in KV_FORMATS.items():
    _define(_name, _kv)
