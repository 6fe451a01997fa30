"""Weights × activations: out[t, r] = sum over k of w[r, k] x[t, k] (+ residual[t, r]), for one matrix or several alike.

One weight row sits in each lane, so nothing is summed across lanes, and the order of the additions never depends on the
threads. Two kernels for each type of weights:

- `mul_mat_one_T`, one token: each block is unpacked in registers and multiplied at once. Reads every weight once: bound by
  memory bandwidth.
- `mul_mat_T`, many tokens: PANEL columns of LANES rows are unpacked into scratch, where they stay in the first-level
  cache, and multiplied by all tokens, TOKENS at a time, whose accumulators stay in registers. Bound by the rate of the dot
  products. Buffers hold a multiple of TOKENS tokens; what stands in the surplus rows is meaningless.

Both take `n_slots` products at once, `*_slot_stride` bytes apart, of matrices `w_stride` bytes apart: the heads of an
attention, or the experts of a mixture. Experts are named by `ids`, the router's pairs of (expert, weight): for one token,
slot s is multiplied with matrix ids[s]. For many tokens `groups` (see `moe`) says which rows of x go to which matrix, and
where the results belong.
"""

from ..simd.vector import (
    LANES,
    TOKENS,
    copy_bytes,
    keep_order,
    ld_f32,
    ld_i32,
    load_f32,
    load_tile_f32,
    st_f32,
    stack,
    store,
    store_tile,
    tile_f32,
)
from .common import ld_state, next_item
from .source import function, inlined, kernel
from .table import PANEL

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


@inlined
def ask_for(prefetch, soon, part, n_bytes):
    """Asks for part `part`, of n_bytes each, of what stands at `soon`.

    Few lines at a time, between the dot products: more misses than the processor can track would be dropped.
    """
    for line in range(0, n_bytes, 64):
        prefetch(soon + n_bytes * part + line)
    keep_order()


@function
def _matrix(w, slot, ids, w_stride):
    """The address of the matrix that slot `slot` is multiplied with."""
    if ids:
        return w + int(ld_f32(ids + 8 * slot)) * w_stride
    return w + slot * w_stride


@function
def _store_few(out, residual, values, n):
    """The first n of the values, of a vector stored at `values`."""
    for i in range(n):
        v = ld_f32(values + 4 * i)
        if residual:
            v += ld_f32(residual + 4 * i)
        st_f32(out + 4 * i, v)


def define_products(name, block, n_bytes, one_token, unpack, tokens, unpacked):
    """Defines the two kernels of a type whose blocks hold `block` values in `n_bytes`.

    one_token(w, row_bytes, n_cols, x, following) -> vector
        LANES rows times one token; prefetches those at `following`.
    unpack(w, row_bytes, first, stop, scratch, ahead)
        Columns first … stop - 1 of LANES rows into scratch, `unpacked` bytes for 32 columns; prefetches at `ahead` bytes
        from what it reads.
    tokens(sums, scratch, n_cols, first, stop, x, x_stride) -> tile
        sums + these columns of LANES unpacked rows times TOKENS tokens.
    """

    @kernel(f"mul_mat_one_{name}")
    def mul_mat_one(
        ith,
        nth,
        w,
        x,
        out,
        residual,
        ids,
        groups,
        scratch,
        scratch_stride,
        counter,
        state,
        n_slots,
        n_rows,
        n_cols,
        w_stride,
        x_stride,
        x_slot_stride,
        out_stride,
        out_slot_stride,
    ):
        row_bytes = n_cols // block * n_bytes
        n_tiles = (n_rows + LANES - 1) // LANES
        n_items = n_slots * n_tiles
        chunk = max(1, n_items // (16 * nth))
        tail = stack(_V)
        first = ith * chunk
        while first < n_items:
            # Taken one chunk ahead, so that the end of this one can ask for the beginning of the next.
            then = (nth + next_item(counter)) * chunk
            last = min(first + chunk, n_items) - 1
            for item in range(first, last + 1):
                slot, row = item // n_tiles, item % n_tiles * LANES
                soon = item + 1
                if item == last:
                    soon = min(then, n_items - 1)
                at = _rows_at(_matrix(w, slot, ids, w_stride), row, n_rows, row_bytes, scratch + ith * scratch_stride)
                following = _matrix(w, soon // n_tiles, ids, w_stride) + soon % n_tiles * LANES * row_bytes
                acc = one_token(at, row_bytes, n_cols, x + slot * x_slot_stride, following)
                to = out + slot * out_slot_stride + 4 * row
                more = residual
                if residual:
                    more = residual + 4 * row
                if row + LANES <= n_rows:
                    if residual:
                        acc = acc + load_f32(more)
                    store(to, acc)
                else:
                    store(tail, acc)
                    _store_few(to, more, tail, n_rows - row)
            first = then

    @function
    def store_tile_of_rows(f, t, out, out_stride, residual, n, tail):
        """Stores n rows' results for TOKENS tokens from token t on; out[t] is `out_stride` from out[t + 1]."""
        at = t * out_stride
        if n == LANES:
            if residual:
                f = f + load_tile_f32(residual + at, out_stride, TOKENS)
            store_tile(out + at, out_stride, f)
        else:
            store(tail, f)
            for k in range(TOKENS):
                more = residual
                if residual:
                    more = residual + at + k * out_stride
                _store_few(out + at + k * out_stride, more, tail + _V * k, n)

    @function
    def scatter_tile_of_rows(f, t, n_tokens, out, out_stride, order, n, tail):
        """The same for an expert's tokens: the result of row t belongs to row order[t]."""
        store(tail, f)
        for k in range(min(TOKENS, n_tokens - t)):
            to = out + ld_i32(order + 4 * (t + k)) * out_stride
            if n == LANES:
                store(to, load_f32(tail + _V * k))
            else:
                _store_few(to, 0, tail + _V * k, n)

    @kernel(f"mul_mat_{name}")
    def mul_mat(
        ith,
        nth,
        w,
        x,
        out,
        residual,
        ids,
        groups,
        scratch,
        scratch_stride,
        counter,
        state,
        n_slots,
        n_rows,
        n_cols,
        w_stride,
        x_stride,
        x_slot_stride,
        out_stride,
        out_slot_stride,
    ):
        row_bytes = n_cols // block * n_bytes
        n_tiles = (n_rows + LANES - 1) // LANES
        unpacked_rows = scratch + ith * scratch_stride
        copy = unpacked_rows + PANEL // 32 * unpacked
        sums = copy + (LANES * row_bytes + 63) // 64 * 64
        tail = stack(_TILE)
        while True:
            item = next_item(counter)
            if item >= n_slots * n_tiles:
                break
            slot, tile = item // n_tiles, item % n_tiles
            first_token, n_tokens = 0, ld_state(state, 0)
            if groups:
                first_token, n_tokens = ld_i32(groups + 8 * slot), ld_i32(groups + 8 * slot + 4)
                if n_tokens == 0:
                    continue
            row = tile * LANES
            n = min(LANES, n_rows - row)
            # The rows that this thread is likely to take next.
            ahead = nth * LANES * row_bytes if tile + nth < n_tiles else 0
            at = _rows_at(w + slot * w_stride, row, n_rows, row_bytes, copy)
            order = groups + 8 * n_slots + 4 * first_token
            xs = x + slot * x_slot_stride + first_token * x_stride
            to, more = out + slot * out_slot_stride + 4 * row, residual
            if residual:
                more = residual + 4 * row
            for first in range(0, n_cols, PANEL):
                stop = min(first + PANEL, n_cols)
                unpack(at, row_bytes, first, stop, unpacked_rows, ahead)
                for t in range(0, n_tokens, TOKENS):
                    f = tile_f32(TOKENS)
                    if first:
                        f = load_tile_f32(sums + _V * t, _V, TOKENS)
                    f = tokens(f, unpacked_rows, n_cols, first, stop, xs + t * x_stride, x_stride)
                    if stop < n_cols:
                        store(sums + _V * t, f)
                    elif groups:
                        scatter_tile_of_rows(f, t, n_tokens, to, out_stride, order, n, tail)
                    else:
                        store_tile_of_rows(f, t, to, out_stride, more, n, tail)
