"""Mixture of experts: choosing experts, bringing tokens together by expert, and adding up what the experts say.

The router's result, `route`, holds n_expert_used pairs of float32 a token: (expert, weight), the best first.

For several tokens `groups` sorts the pairs by expert, so that each expert's matrix meets its tokens in one product. It
holds int32, by fours: the number of chosen experts and of pairs; then for each chosen expert its number, the first of its
sorted rows, and how many it has, with room for all experts; then, for each sorted row, which pair it is (token *
n_expert_used + slot).
"""

import numpy as np

from ..simd.vector import (
    LANES,
    copy_bytes,
    fma,
    ld_f32,
    ld_i32,
    load_f32,
    load_first,
    max_f32,
    splat_f32,
    st_f32,
    st_i32,
    stack,
    store,
    store_first,
)
from .common import bits_f32, exp, f32, i32, ld_state, share
from .rows import whole
from .source import function, kernel
from .table import MOST_EXPERTS

_V = 4 * LANES
_PER_EXPERT = 4 * MOST_EXPERTS
# Scores are compared as int32 that order as they do, so that no value can be chosen twice: a NaN stands behind -inf, then
# what groups left out, then what is already chosen.
_MOST, _NO_NUMBER = f32(np.finfo(np.float32).max), f32(np.nan)
_NAN, _LEFT_OUT, _CHOSEN = i32(-(2**31) + 2), i32(-(2**31) + 1), i32(-(2**31))


@function
def _exp(x):
    return max_f32(exp(splat_f32(x)))


@function
def _set_key(keys, i, value):
    st_f32(keys + 4 * i, value + f32(0.0))  # -0 is 0
    bits = ld_i32(keys + 4 * i)
    if value != value:
        bits = _NAN
    elif bits < 0:
        bits = i32(bits ^ i32(0x7FFFFFFF))
    st_i32(keys + 4 * i, bits)


@function
def _choose(keys, n):
    """The index of the greatest of n keys, the first of equals, which is then no longer to be had."""
    best = 0
    for i in range(1, n):
        if ld_i32(keys + 4 * i) > ld_i32(keys + 4 * best):
            best = i
    st_i32(keys + 4 * best, _CHOSEN)
    return best


@function
def _limit_groups(scores, keys, n_expert, n_group, n_group_used, two):
    """Leaves only the experts of the best groups. A group is as good as its best expert, or the sum of its best two."""
    size = n_expert // n_group
    copy, groups = stack(_PER_EXPERT), stack(_PER_EXPERT)
    for g in range(n_group):
        copy_bytes(copy, keys + 4 * size * g, 4 * size)
        value = ld_f32(scores + 4 * (size * g + _choose(copy, size)))
        if two and size > 1:
            value += ld_f32(scores + 4 * (size * g + _choose(copy, size)))
        _set_key(groups, g, value)
    for _ in range(min(n_group_used, n_group)):
        _choose(groups, n_group)
    for g in range(n_group):
        if ld_i32(groups + 4 * g) != _CHOSEN:
            for i in range(size):
                st_i32(keys + 4 * (size * g + i), _LEFT_OUT)


@kernel("route")
def route(
    ith,
    nth,
    logits,
    bias,
    out,
    state,
    n_expert,
    n_used,
    sigmoid,
    normalize,
    factor,
    n_group,
    n_group_used,
):
    """Softmax or sigmoid of the logits, the best n_used by it, normalized to sum 1 if asked for, scaled.

    Behind `bias` stand n_expert values that are added for the choice alone, and as many factors of the weights.
    """
    start, stop = share(ld_state(state, 0), ith, nth)
    probs, scores, keys = stack(_PER_EXPERT), stack(_PER_EXPERT), stack(_PER_EXPERT)
    for t in range(start, stop):
        x = logits + 4 * n_expert * t
        if sigmoid:
            for i in range(n_expert):
                st_f32(probs + 4 * i, f32(1.0) / (f32(1.0) + _exp(-ld_f32(x + 4 * i))))
        else:
            top = ld_f32(x)
            for i in range(1, n_expert):
                top = max(top, ld_f32(x + 4 * i))
            total = f32(0.0)
            for i in range(n_expert):
                e = _exp(ld_f32(x + 4 * i) - top)
                st_f32(probs + 4 * i, e)
                total += e
            for i in range(n_expert):
                st_f32(probs + 4 * i, ld_f32(probs + 4 * i) / total)
        # A damaged router isn't passed over in silence: its weights are NaN. -inf rules an expert out.
        wrong = f32(0.0)
        for i in range(n_expert):
            value = ld_f32(probs + 4 * i)
            if bias:
                value += ld_f32(bias + 4 * i)
            if not (value <= _MOST and ld_f32(x + 4 * i) <= _MOST):
                wrong = _NO_NUMBER
            st_f32(scores + 4 * i, value)
            _set_key(keys, i, value)
        if n_group > 1:
            _limit_groups(scores, keys, n_expert, n_group, n_group_used, sigmoid)
        total = f32(0.0)
        for s in range(n_used):
            e = _choose(keys, n_expert)
            weight = ld_f32(probs + 4 * e) + wrong
            total += weight
            st_f32(out + 8 * (t * n_used + s), f32(e))
            st_f32(out + 8 * (t * n_used + s) + 4, weight)
        by = bits_f32(factor)
        if normalize:
            by = by / (total + f32(1e-20))
        for s in range(n_used):
            at = out + 8 * (t * n_used + s)
            weight = ld_f32(at + 4) * by
            if bias:
                weight *= ld_f32(bias + 4 * (n_expert + int(ld_f32(at))))
            st_f32(at + 4, weight)


@function
def _expert(route, i, n_expert):
    """The expert of pair i, whatever stands there one of n_expert."""
    return min(max(int(ld_f32(route + 8 * i)), 0), n_expert - 1)


@kernel("group_by_expert")
def group_by_expert(ith, nth, route, out, state, n_expert, n_used):
    """Makes `groups` by counting. One thread: some microseconds."""
    if ith == 0:
        n = ld_state(state, 0) * n_used
        entries, order, places = out + 16, out + 16 * (n_expert + 1), stack(_PER_EXPERT)
        for e in range(n_expert):
            st_i32(places + 4 * e, i32(0))
        for i in range(n):
            at = places + 4 * _expert(route, i, n_expert)
            st_i32(at, i32(ld_i32(at) + 1))
        first, n_chosen = 0, 0
        for e in range(n_expert):
            count = ld_i32(places + 4 * e)
            if count:
                entry = entries + 16 * n_chosen
                st_i32(entry, i32(e))
                st_i32(entry + 4, i32(first))
                st_i32(entry + 8, i32(count))
                n_chosen += 1
            st_i32(places + 4 * e, i32(first))
            first += count
        st_i32(out, i32(n_chosen))
        st_i32(out + 4, i32(n))
        for i in range(n):
            at = places + 4 * _expert(route, i, n_expert)
            st_i32(order + 4 * ld_i32(at), i32(i))
            st_i32(at, i32(ld_i32(at) + 1))


@kernel("gather_rows")
def gather_rows(ith, nth, x, groups, out, n_expert, per_row, row_bytes):
    """Copies the rows that the sorted pairs take: pair i takes row i // per_row."""
    start, stop = share(ld_i32(groups + 4), ith, nth)
    order = groups + 16 * (n_expert + 1)
    for i in range(start, stop):
        copy_bytes(out + row_bytes * i, x + ld_i32(order + 4 * i) // per_row * row_bytes, row_bytes)


@kernel("combine")
def combine(ith, nth, x, route, out, state, n_used, n_cols):
    """out[t] = sum over slots of weight[t, slot] * x[t, slot]."""
    per_token = (n_cols + 15) // 16
    start, stop = share(ld_state(state, 0) * per_token, ith, nth)
    for item in range(start, stop):
        t, c = item // per_token, 16 * (item % per_token)
        for lane in range(c, min(c + 16, n_cols), LANES):
            acc, n = splat_f32(f32(0.0)), min(LANES, n_cols - lane)
            for s in range(n_used):
                pair = t * n_used + s
                at = x + 4 * (n_cols * pair + lane)
                v = load_f32(at) if n == LANES else load_first(at, n)
                acc = fma(v, splat_f32(ld_f32(route + 8 * pair + 4)), acc)
            to = out + 4 * (n_cols * t + lane)
            if n == LANES:
                store(to, acc)
            else:
                store_first(to, acc, n)


@kernel("add_expert_bias")
def add_expert_bias(ith, nth, x, bias, route, out, state, n_expert, n_used, n_cols):
    """out = x + bias, for each of a token's rows the row of bias that its expert has."""
    start, stop = share(ld_state(state, 0) * n_used, ith, nth)
    end = whole(n_cols)
    for pair in range(start, stop):
        xr, outr = x + 4 * n_cols * pair, out + 4 * n_cols * pair
        row = bias + 4 * n_cols * _expert(route, pair, n_expert)
        for i in range(0, 4 * end, _V):
            store(outr + i, load_f32(xr + i) + load_f32(row + i))
        if end < n_cols:
            v = load_first(xr + 4 * end, n_cols - end) + load_first(row + 4 * end, n_cols - end)
            store_first(outr + 4 * end, v, n_cols - end)


@kernel("sigmoid_gate")
def sigmoid_gate(ith, nth, x, gate, out, state, n_cols):
    """out[t] = x[t] * sigmoid(gate[t]), one gate a token."""
    start, stop = share(ld_state(state, 0), ith, nth)
    for t in range(start, stop):
        by = splat_f32(f32(1.0) / (f32(1.0) + _exp(-ld_f32(gate + 4 * t))))
        xr, outr, end = x + 4 * n_cols * t, out + 4 * n_cols * t, whole(n_cols)
        for i in range(0, 4 * end, _V):
            store(outr + i, load_f32(xr + i) * by)
        if end < n_cols:
            store_first(outr + 4 * end, load_first(xr + 4 * end, n_cols - end) * by, n_cols - end)
