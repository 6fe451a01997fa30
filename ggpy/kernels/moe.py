"""Mixture of experts: choosing experts, bringing tokens together by expert, and adding up what the experts say.

The router's result, `route`, holds n_expert_used pairs of float32 a token: (expert, weight), the best first.

For prompts `groups` sorts the pairs by expert, so that each expert's matrix meets its tokens in one product. It holds, as
int32: for each expert the first of its sorted rows, a multiple of 8, and how many it has; then, for each sorted row, which
pair it is (token * n_expert_used + slot), -1 where there is none.
"""

from ..simd.vector import LANES, copy_bytes, fma, ld_f32, ld_i32, load_f32, max_f32, splat_f32, st_f32, st_i32, stack, store
from .common import bits_f32, exp, f32, i32, ld_state, share
from .source import function, kernel
from .table import MOST_EXPERTS

_V = 4 * LANES
_PER_EXPERT = 4 * MOST_EXPERTS
_ROOM = 2 * _PER_EXPERT
_NONE = f32(-3e38)


@function
def _exp(x):
    return max_f32(exp(splat_f32(x)))


@function
def _best(scores, n):
    """The index of the greatest of n scores, the first of equals."""
    best = 0
    for i in range(1, n):
        if ld_f32(scores + 4 * i) > ld_f32(scores + 4 * best):
            best = i
    return best


@function
def _limit_groups(scores, copy, n_expert, n_group, n_group_used, two):
    """Leaves only the experts of the best groups. A group is as good as its best expert, or the sum of its best two."""
    size = n_expert // n_group
    groups = copy + 4 * size
    for g in range(n_group):
        first = scores + 4 * size * g
        a = _best(first, size)
        value = ld_f32(first + 4 * a)
        if two and size > 1:
            copy_bytes(copy, first, 4 * size)
            st_f32(copy + 4 * a, _NONE)
            value += ld_f32(copy + 4 * _best(copy, size))
        st_f32(groups + 4 * g, value)
    for _ in range(n_group_used):
        g = _best(groups, n_group)
        st_f32(groups + 4 * g, _NONE)
    for g in range(n_group):
        if ld_f32(groups + 4 * g) > _NONE:
            for i in range(size):
                st_f32(scores + 4 * (size * g + i), _NONE)


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
    """Softmax or sigmoid of the logits, the best n_used by it (plus bias), normalized to sum 1 if asked for, scaled."""
    start, stop = share(ld_state(state, 0), ith, nth)
    probs, scores, room = stack(_PER_EXPERT), stack(_PER_EXPERT), stack(_ROOM)
    for t in range(start, stop):
        x = logits + 4 * n_expert * t
        if sigmoid:
            for i in range(n_expert):
                st_f32(probs + 4 * i, f32(1.0) / (f32(1.0) + _exp(-ld_f32(x + 4 * i))))
        else:
            top = ld_f32(x + 4 * _best(x, n_expert))
            total = f32(0.0)
            for i in range(n_expert):
                e = _exp(ld_f32(x + 4 * i) - top)
                st_f32(probs + 4 * i, e)
                total += e
            for i in range(n_expert):
                st_f32(probs + 4 * i, ld_f32(probs + 4 * i) / total)
        for i in range(n_expert):
            value = ld_f32(probs + 4 * i)
            if bias:
                value += ld_f32(bias + 4 * i)
            st_f32(scores + 4 * i, value)
        if n_group > 1:
            _limit_groups(scores, room, n_expert, n_group, n_group_used, sigmoid)
        total = f32(0.0)
        for s in range(n_used):
            e = _best(scores, n_expert)
            st_f32(scores + 4 * e, _NONE)
            weight = ld_f32(probs + 4 * e)
            total += weight
            st_f32(out + 8 * (t * n_used + s), f32(e))
            st_f32(out + 8 * (t * n_used + s) + 4, weight)
        by = bits_f32(factor)
        if normalize:
            by = by / (total + f32(1e-20))
        for s in range(n_used):
            at = out + 8 * (t * n_used + s) + 4
            st_f32(at, ld_f32(at) * by)


@kernel("group_by_expert")
def group_by_expert(ith, nth, route, out, state, n_expert, n_used):
    """Makes `groups` by counting. One thread: some microseconds."""
    if ith == 0:
        n = ld_state(state, 0) * n_used
        order = out + 8 * n_expert
        for e in range(n_expert):
            st_i32(out + 8 * e + 4, i32(0))
        for i in range(n):
            at = out + 8 * int(ld_f32(route + 8 * i)) + 4
            st_i32(at, i32(ld_i32(at) + 1))
        first = 0
        for e in range(n_expert):
            st_i32(out + 8 * e, i32(first))
            first += (ld_i32(out + 8 * e + 4) + 7) // 8 * 8
            st_i32(out + 8 * e + 4, i32(0))
        for i in range(first):
            st_i32(order + 4 * i, i32(-1))
        for i in range(n):
            at = out + 8 * int(ld_f32(route + 8 * i))
            count = ld_i32(at + 4)
            st_i32(order + 4 * (ld_i32(at) + count), i32(i))
            st_i32(at + 4, i32(count + 1))


@kernel("gather_rows")
def gather_rows(ith, nth, x, groups, out, n_expert, per_row, row_bytes):
    """Copies the rows that the sorted pairs take: pair i takes row i // per_row."""
    last = groups + 8 * (n_expert - 1)
    n = ld_i32(last) + (ld_i32(last + 4) + 7) // 8 * 8
    start, stop = share(n, ith, nth)
    for i in range(start, stop):
        pair = ld_i32(groups + 8 * n_expert + 4 * i)
        if pair >= 0:
            copy_bytes(out + row_bytes * i, x + pair // per_row * row_bytes, row_bytes)


@kernel("combine")
def combine(ith, nth, x, route, out, state, n_used, n_cols):
    """out[t] = sum over slots of weight[t, slot] * x[t, slot]."""
    start, stop = share(ld_state(state, 0) * (n_cols // 16), ith, nth)
    per_token = n_cols // 16
    for item in range(start, stop):
        t, c = item // per_token, 64 * (item % per_token)
        for lane in range(c, c + 64, _V):
            acc = splat_f32(f32(0.0))
            for s in range(n_used):
                pair = t * n_used + s
                acc = fma(load_f32(x + 4 * n_cols * pair + lane), splat_f32(ld_f32(route + 8 * pair + 4)), acc)
            store(out + 4 * n_cols * t + lane, acc)


@kernel("sigmoid_gate")
def sigmoid_gate(ith, nth, x, gate, out, state, n_cols):
    """out[t] = x[t] * sigmoid(gate[t]), one gate a token."""
    start, stop = share(ld_state(state, 0), ith, nth)
    for t in range(start, stop):
        by = splat_f32(f32(1.0) / (f32(1.0) + _exp(-ld_f32(gate + 4 * t))))
        for i in range(0, 4 * n_cols, _V):
            store(out + 4 * n_cols * t + i, load_f32(x + 4 * n_cols * t + i) * by)
