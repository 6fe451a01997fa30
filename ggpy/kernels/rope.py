"""Rotary position embedding (Su et al. 2021) by a table of cosines and sines.

`table` holds, for each token of the run, n_rot / 2 cosines and then n_rot / 2 sines (float32): frequencies, scaling and
attention factors are the host's business. The first n_rot values of each head are rotated, the others copied.
"""

from ..simd.vector import ld_f32, st_f32
from .common import ld_state, share
from .source import kernel


def _define(name, step, half):
    """`step`: bytes from a pair to the next; `half`: a pair's second member is n_rot / 2 values on, else the next value."""

    @kernel(name)
    def rope(ith, nth, x, table, out, state, n_head, head_dim, n_rot, x_stride, x_head_stride):
        start, stop = share(ld_state(state, 0) * n_head, ith, nth)
        pairs = n_rot // 2
        partner = 4 * pairs if half else 4
        for row in range(start, stop):
            angles = table + row // n_head * (4 * n_rot)
            xr = x + row // n_head * x_stride + row % n_head * x_head_stride
            outr = out + 4 * head_dim * row
            for i in range(pairs):
                c, s = ld_f32(angles + 4 * i), ld_f32(angles + 4 * (pairs + i))
                a, b = ld_f32(xr + step * i), ld_f32(xr + step * i + partner)
                st_f32(outr + step * i, a * c - b * s)
                st_f32(outr + step * i + partner, a * s + b * c)
            for i in range(n_rot, head_dim):
                st_f32(outr + 4 * i, ld_f32(xr + 4 * i))


_define("rope_norm", 8, False)  # pair i: values 2 i and 2 i + 1
_define("rope_neox", 4, True)  # pair i: values i and i + n_rot / 2
