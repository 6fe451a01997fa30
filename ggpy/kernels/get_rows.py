"""Rows picked by token id from a weight matrix of any type, as float32."""

from ..simd.vector import (
    LANES,
    ld_bf16,
    ld_f16,
    ld_f32,
    ld_i8,
    ld_i32,
    ld_u8,
    max_f32,
    splat_f32,
    st_f32,
    stack,
    store,
)
from .common import f32, ld_state, share
from .source import function, kernel
from .table import FLOAT, QUANTIZED
from .unpack import LAYOUTS

_V = 4 * LANES
_ROOM = 8 * _V


def _define_quantized(name):
    layout = LAYOUTS[name]
    block, n_bytes, bias, signed = layout.block, layout.n_bytes, layout.bias, layout.signed

    @function
    def value_at(room, k):
        at = room + k // 4 * _V + k % 4
        return f32(ld_i8(at) if signed else ld_u8(at) - bias)

    @function
    def emit(g, j, w, s0, s1, m0, m1, places):
        # Every lane holds the same row: the greatest is any of them.
        out, room = places
        store(room, w)
        scale0, min0 = max_f32(s0), max_f32(m0)
        for k in range(16):
            st_f32(out + 4 * (32 * j + k), scale0 * value_at(room, k) + min0)
        scale1, min1 = max_f32(s1), max_f32(m1)
        for k in range(16, 32):
            st_f32(out + 4 * (32 * j + k), scale1 * value_at(room, k) + min1)
        return g

    walk = layout.walk(emit)

    @kernel(f"get_rows_{name}")
    def get_rows(ith, nth, w, ids, out, state, n_rows, n_cols):
        row_bytes = n_cols // block * n_bytes
        start, stop = share(ld_state(state, 0), ith, nth)
        room = stack(_ROOM)
        for t in range(start, stop):
            row = w + ld_i32(ids + 4 * t) * row_bytes
            for b in range(n_cols // block):
                walk(splat_f32(f32(0.0)), row + n_bytes * b, 0, (out + 4 * (t * n_cols + b * block), room))


def _define_float(name, size, load):
    @kernel(f"get_rows_{name}")
    def get_rows(ith, nth, w, ids, out, state, n_rows, n_cols):
        start, stop = share(ld_state(state, 0), ith, nth)
        for t in range(start, stop):
            row = w + ld_i32(ids + 4 * t) * size * n_cols
            for i in range(n_cols):
                st_f32(out + 4 * (t * n_cols + i), load(row + size * i))


for _name in QUANTIZED:
    _define_quantized(_name)
for _name, _size, _load in zip(FLOAT, (4, 2, 2), (ld_f32, ld_f16, ld_bf16), strict=True):
    _define_float(_name, _size, _load)
