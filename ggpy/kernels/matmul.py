"""Weights × activations: out[t, r] = sum over k of w[r, k] x[t, k] (+ residual[t, r]), for one matrix or several alike.

One weight row sits in each lane, so nothing is summed across lanes, and the order of the additions depends neither on the
threads nor on the number of tokens. Two kernels for each type of weights:

- `mul_mat_one_T`, one token: each block is unpacked in registers and multiplied at once. Reads every weight once: bound by
  memory bandwidth.
- `mul_mat_T`, any number of tokens. Up to FEW are multiplied, one after the other, with each block while it is in
  registers: bound by bandwidth, too. For more, PANEL columns of LANES rows are unpacked into scratch, where they stay in
  the first-level cache, and multiplied by TOKENS tokens at a time, whose accumulators stay in registers, then by smaller
  tiles: bound by the rate of the dot products. Buffers hold a multiple of 8 tokens; surplus rows are meaningless. With
  AVX2, which has no product that gives a dword to every lane, most tokens sit in lanes instead, TOKENS_AT_ONCE at a time:
  their activations are brought there once for all rows of a matrix, and a weight goes to all lanes for 32 tokens.

Both take `n_slots` products at once, `*_slot_stride` bytes apart, of matrices `w_stride` bytes apart: the heads of an
attention, or the experts of a mixture. Experts are named by `ids`, the router's pairs of (expert, weight): for one token,
slot s is multiplied with matrix ids[s]. For several tokens `groups` (see `moe`) says which matrices there are, which rows
of x go to each, and where the results belong; n_slots is then the room for matrices in it.
"""

from ..simd.vector import (
    HAS_TILES,
    LANES,
    TILE_TOKENS,
    TOKENS,
    as_f32,
    copy_bytes,
    hidden,
    keep_order,
    ld_f32,
    ld_i32,
    load_f32,
    load_tile_f32,
    load_transposed,
    st_f32,
    stack,
    store,
    store_tile,
    tile_f32,
)
from .common import ld_state, next_item
from .source import function, inlined, kernel
from .table import PANEL, TOKENS_AT_ONCE, activation_bytes

_V = 4 * LANES
_TILE = max(TOKENS, TILE_TOKENS if HAS_TILES else 0) * _V
#: tokens that are multiplied with a block while it is in registers; of more, it is unpacked to scratch
FEW = 6 if TOKENS == 8 else 3
_ROOM, _SQUARE = 3 * FEW * _V, LANES * _V
#: vectors with a token to a lane that are multiplied at once, and their tokens
VECTORS = 4
_AT_ONCE = VECTORS * LANES
_activation_bytes = function(activation_bytes)


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
def _store_rows(at, to, residual, n_rows):
    """The first n_rows of the vector at `at`, plus those at `residual` unless that is 0, to `to`."""
    if n_rows >= LANES:
        v = load_f32(at)
        if residual:
            v = v + load_f32(residual)
        store(to, v)
        return
    for i in range(n_rows):
        v = ld_f32(at + 4 * i)
        if residual:
            v += ld_f32(residual + 4 * i)
        st_f32(to + 4 * i, v)


@function
def _store_tokens(at, first, n, out, out_stride, residual, order, n_rows):
    """The vectors at `at` as results of tokens first … first + n - 1, or of those that `order`, unless it is 0, names."""
    for k in range(n):
        t = first + k
        if order:
            t = int(ld_i32(order + 4 * t))
        more = residual
        if residual:
            more = residual + t * out_stride
        _store_rows(at + _V * k, out + t * out_stride, more, n_rows)


@function
def nothing():
    """What there is to do before and after products without AMX's tiles."""


@function
def _by_lanes(n_tokens):
    """How many of n_tokens sit in lanes, _AT_ONCE by _AT_ONCE; the last time few lanes may be idle. Others are too few."""
    return min(n_tokens, (n_tokens + LANES // 2 + 1) // _AT_ONCE * _AT_ONCE)


@function
def _first_token(v, n):
    """The first token of vector v; the last one begins sooner where it would go beyond n tokens."""
    return min(LANES * v, n - LANES)


@function
def _bring_to_lanes(x, x_stride, n_bytes, n, to):
    """The n_bytes of n tokens' activations, a token to a lane: dword k of vector v goes to `to + LANES * (v * n_bytes +
    4 k)`."""
    for v in range((n + LANES - 1) // LANES):
        row = x + _first_token(v, n) * x_stride
        for k in range(0, n_bytes, _V):
            store(to + LANES * (v * n_bytes + k), load_transposed(row + k, x_stride, LANES))


def _by_tokens(product):
    """A function that adds a panel times n tokens, a token to a lane, to sums: vector v of row r at `sums + _V * (LANES * v
    + r)`."""

    @function
    def multiply(n, sums, scratch, n_cols, first, stop, x, room):
        wide = LANES * _activation_bytes(n_cols)
        for v in range(0, (n + LANES - 1) // LANES, VECTORS):
            for r in range(hidden(LANES)):  # LLVM takes assembly for short, and would unroll the loop
                at, f = sums + _V * (LANES * v + r), tile_f32(VECTORS)
                if first:
                    f = load_tile_f32(at, LANES * _V, VECTORS)
                store_tile(at, LANES * _V, product(f, scratch + 4 * r, n_cols, first, stop, x + v * wide, wide, room))

    return multiply


@function
def _by_no_tokens(n, sums, scratch, n_cols, first, stop, x, room):
    """Where no token sits in a lane."""


def define_products(name, block, n_bytes, unpacked, sizes, products, start=nothing, end=nothing, by_tokens=None):
    """Defines the two kernels of a type whose blocks hold `block` values in `n_bytes`.

    `sizes` are the numbers of tokens that are multiplied at once, of which the second is for the last few, `products`
    these functions:

    one_token(w, row_bytes, n_cols, x, following) -> vector
        LANES rows times one token; prefetches those at `following`.
    few_tokens(w, row_bytes, n_cols, x, x_stride, n, room, following)
        The same for n tokens, up to FEW: their vectors go to `room`, which holds three times as many.
    unpack(w, row_bytes, first, stop, scratch, following)
        Columns first … stop - 1 of LANES rows into scratch, `unpacked` bytes for 32 columns; prefetches the same columns of
        the rows at `following`.
    tokens(sums, scratch, n_cols, first, stop, x, x_stride, room) -> tile
        sums + these columns of LANES unpacked rows times sizes[0] tokens; `room` is for a vector a token.
    last_tokens
        The same for sizes[1] tokens.

    start() and end() are what threads do before and after. `by_tokens` is a function like `tokens` for VECTORS vectors with
    a token to a lane.
    """
    one_token, few_tokens, unpack, tokens, last_tokens = products
    most, part = sizes
    has_lanes = by_tokens is not None
    multiply_by_tokens = _by_tokens(by_tokens) if has_lanes else _by_no_tokens

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
        room = stack(_V)
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
                store(room, one_token(at, row_bytes, n_cols, x + slot * x_slot_stride, following))
                more = residual
                if residual:
                    more = residual + 4 * row
                _store_rows(room, out + slot * out_slot_stride + 4 * row, more, n_rows - row)
            first = then

    @function
    def many_tokens(
        w, row_bytes, n_cols, x, x_stride, x_by_tokens, n, scratch, sums, following, out, out_stride, more, order, n_rows
    ):
        """LANES rows times n tokens, panel by panel; stores the results."""
        tail, room, lanes = stack(_TILE), stack(_TILE), stack(_SQUARE)
        n_by_tokens = 0
        if has_lanes:
            n_by_tokens = _by_lanes(n)
        for first in range(0, n_cols, PANEL):
            stop = min(first + PANEL, n_cols)
            unpack(w, row_bytes, first, stop, scratch, following)
            ends = stop == n_cols
            multiply_by_tokens(n_by_tokens, sums, scratch, n_cols, first, stop, x_by_tokens, room)
            t = n_by_tokens
            while t < n:
                here, at = most, sums + _V * t
                to = tail if ends else at
                if n - t > most - part:
                    f = tile_f32(most)
                    if first:
                        f = load_tile_f32(at, _V, most)
                    store(to, tokens(f, scratch, n_cols, first, stop, x + t * x_stride, x_stride, room))
                else:  # the last few; a tile for them all would cost more
                    here = part
                    f = tile_f32(part)
                    if first:
                        f = load_tile_f32(at, _V, part)
                    store(to, last_tokens(f, scratch, n_cols, first, stop, x + t * x_stride, x_stride, room))
                if ends:
                    _store_tokens(tail, t, min(here, n - t), out, out_stride, more, order, n_rows)
                t += here
        for t in range(0, n_by_tokens, LANES):
            skipped = t - _first_token(t // LANES, n_by_tokens)  # of the last vector: another has them
            store(lanes, as_f32(load_transposed(sums + _V * t, _V, LANES)))
            _store_tokens(lanes + _V * skipped, t, LANES - skipped, out, out_stride, more, order, n_rows)

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
        n_tokens, order = ld_state(state, 0), 0
        room = stack(_ROOM)
        n_matrices, n_mean = n_slots, n_tokens
        if groups:
            n_matrices = int(ld_i32(groups))
            n_mean = int(ld_i32(groups + 4)) // max(n_matrices, 1)
        n_parts = 1  # of the tokens
        if has_lanes:
            n_most = n_tokens
            if groups:
                n_most = 0
                for slot in range(n_matrices):
                    n_most = max(n_most, int(ld_i32(groups + 16 * (slot + 1) + 8)))
            n_parts = (n_most + TOKENS_AT_ONCE - 1) // TOKENS_AT_ONCE
        tiles_of_all = n_matrices * n_tiles
        n_items = n_parts * tiles_of_all
        in_lanes, in_lanes_of = sums + TOKENS_AT_ONCE * _V, 0
        # Few tokens: as one, in chunks taken one ahead. Many: a tile of rows takes long, so that none is taken ahead.
        ahead, chunk = n_mean <= FEW, 1
        start()
        if ahead:
            chunk = min(max(1, n_items // (16 * nth)), 16)  # experts' tiles may differ much
            first = ith * chunk
        else:
            first = next_item(counter)
        while first < n_items:
            if ahead:
                then = (nth + next_item(counter)) * chunk
            else:
                then = first + nth  # likely
            last = min(first + chunk, n_items) - 1
            for item in range(first, last + 1):
                part, slot, row = item // tiles_of_all, item % tiles_of_all // n_tiles, item % n_tiles * LANES
                soon = item + 1
                if item == last:
                    soon = min(then, n_items - 1)
                matrix, soon_matrix, first_token = slot, soon % tiles_of_all // n_tiles, 0
                if groups:
                    entry = groups + 16 * (slot + 1)
                    matrix, soon_matrix = int(ld_i32(entry)), int(ld_i32(groups + 16 * (soon_matrix + 1)))
                    first_token, n_tokens = int(ld_i32(entry + 4)), int(ld_i32(entry + 8))
                    order = groups + 16 * (n_slots + 1) + 4 * first_token
                at = _rows_at(w + matrix * w_stride, row, n_rows, row_bytes, copy)
                following = w + soon_matrix * w_stride + soon % n_tiles * LANES * row_bytes
                xs = x + slot * x_slot_stride + first_token * x_stride
                to, more, left = out + slot * out_slot_stride + 4 * row, residual, n_rows - row
                if residual:
                    more = residual + 4 * row
                n = n_tokens
                if has_lanes:
                    skipped = part * TOKENS_AT_ONCE
                    n = min(n_tokens - skipped, TOKENS_AT_ONCE)
                    xs += skipped * x_stride
                    if order:
                        order += 4 * skipped
                    else:
                        to += skipped * out_stride
                        if residual:
                            more += skipped * out_stride
                    if n > FEW and xs != in_lanes_of:
                        _bring_to_lanes(xs, x_stride, _activation_bytes(n_cols), _by_lanes(n), in_lanes)
                        in_lanes_of = xs
                if n <= 0:  # other matrices have more parts
                    continue
                if n <= FEW:
                    few_tokens(at, row_bytes, n_cols, xs, x_stride, n, room, following)
                    _store_tokens(room, 0, n, to, out_stride, more, order, left)
                else:
                    many_tokens(
                        at, row_bytes, n_cols, xs, x_stride, in_lanes, n, unpacked_rows, sums, following,
                        to, out_stride, more, order, left,
                    )  # fmt: skip
            first = then if ahead else next_item(counter)
        end()
