"""Weights × activations: out[t, r] = sum over k of w[r, k] x[t, k] (+ residual[t, r]).

One weight row sits in each lane, so nothing is summed across lanes, and the order of the additions never depends on the
threads. Two kernels for each type of weights:

- `mul_mat_one_T`, one token: each block is unpacked in registers and multiplied at once. Reads every weight once: bound by
  memory bandwidth.
- `mul_mat_T`, many tokens: LANES rows are unpacked into scratch once and multiplied by all tokens, TOKENS at a time, whose
  accumulators stay in registers. Bound by the rate of the dot products. Buffers hold a multiple of TOKENS tokens; what
  stands in the surplus rows is meaningless.
"""

from ..simd.vector import LANES, TOKENS, copy_bytes, ld_f32, load_f32, load_tile_f32, st_f32, stack, store, store_tile
from .common import ld_state, next_item
from .source import function, kernel

_V = 4 * LANES
_TILE = TOKENS * _V


@function
def _rows_at(w, row, n_rows, row_bytes, copy):
    """The address of LANES rows from `row` on; the last few are copied aside, so that none is read past the end."""
    left = n_rows - row
    if left >= LANES:
        return w + row * row_bytes
    copy_bytes(copy, w + row * row_bytes, left * row_bytes)
    return copy


def define_products(name, block, n_bytes, one_token, unpack, tokens, unpacked):
    """Defines the two kernels of a type whose blocks hold `block` values in `n_bytes`.

    one_token(w, row_bytes, n_cols, x, ahead) -> vector
        LANES rows times one token; prefetches at `ahead` bytes from what it reads.
    unpack(w, row_bytes, n_cols, scratch)
        LANES rows into scratch, `unpacked` bytes for 32 columns.
    tokens(scratch, n_cols, x, x_stride) -> tile
        LANES unpacked rows times TOKENS tokens.
    """

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
                at = _rows_at(w, row, n_rows, row_bytes, scratch + ith * scratch_stride)
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
        copy = mine + n_cols // 32 * unpacked
        tail = stack(_TILE)
        while True:
            tile = next_item(counter)
            if tile >= n_tiles:
                break
            row = tile * LANES
            unpack(_rows_at(w, row, n_rows, row_bytes, copy), row_bytes, n_cols, mine)
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
