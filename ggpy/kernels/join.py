"""Heads made of two parts. Memory bounds it: each value is read once and written once."""

from ..simd.vector import copy_bytes
from .common import ld_state, share
from .source import kernel


@kernel("join_heads")
def join_heads(ith, nth, x, y, out, state, n_head, n_x, n_y, x_head_stride, y_stride, y_head_stride):
    """The first n_x values of each head of x, then n_y of y's, whose heads are y_head_stride apart (0: one for all)."""
    start, stop = share(ld_state(state, 0) * n_head, ith, nth)
    for row in range(start, stop):
        to = out + 4 * (n_x + n_y) * row
        copy_bytes(to, x + x_head_stride * row, 4 * n_x)
        copy_bytes(to + 4 * n_x, y + row // n_head * y_stride + row % n_head * y_head_stride, 4 * n_y)
