"""Small functions that the kernels share."""

import numpy as np

from ..simd.vector import (
    LANES,
    as_f32,
    atomic_add,
    bits_f32,
    fma,
    ld_i64,
    maximum,
    minimum,
    round_even,
    splat_f32,
    splat_i32,
    to_i32,
)
from .source import function

f32 = np.float32
i32 = np.int32


@function
def share(n, ith, nth):
    """The part [start, stop) of n items that thread `ith` of `nth` takes."""
    return n * ith // nth, n * (ith + 1) // nth


@function
def ld_state(state, slot):
    """A slot of the run's state (`table.STATE`)."""
    return ld_i64(state + 8 * slot)


@function
def next_item(counter):
    """The next item that no thread has taken yet: threads that run faster take more."""
    return atomic_add(counter, 1)


@function
def exp(x):
    """e**x in float32, lane by lane, to 2 ulp; 0 below -87.3.

    Cody-Waite reduction to |r| ≤ ln2/2, then the degree-6 Taylor polynomial in Horner form.
    """
    x = minimum(maximum(x, splat_f32(f32(-87.33654))), splat_f32(f32(88.37626)))
    n = round_even(x * splat_f32(f32(1.44269504)))
    r = fma(n, splat_f32(f32(-0.693359375)), x)
    r = fma(n, splat_f32(f32(2.12194440e-4)), r)
    p = splat_f32(f32(1.0 / 720.0))
    p = fma(p, r, splat_f32(f32(1.0 / 120.0)))
    p = fma(p, r, splat_f32(f32(1.0 / 24.0)))
    p = fma(p, r, splat_f32(f32(1.0 / 6.0)))
    p = fma(p, r, splat_f32(f32(0.5)))
    p = fma(p, r, splat_f32(f32(1.0)))
    p = fma(p, r, splat_f32(f32(1.0)))
    power = as_f32((to_i32(n) + splat_i32(i32(127))) << splat_i32(i32(23)))
    return p * power


@function
def exp2(x):
    """2**x in float32, lane by lane, for x ≤ 0, to 2 ulp; 0 below -126.

    x is split into the nearest integer and a rest r, |r| ≤ 1/2; 2**r by the polynomial of degree 5 whose relative error is
    the least (7.5e-8; Remez 1934).
    """
    x = maximum(x, splat_f32(f32(-127.0)))
    n = round_even(x)
    r = x - n
    p = splat_f32(f32(1.3276472e-3))
    p = fma(p, r, splat_f32(f32(9.6755410e-3)))
    p = fma(p, r, splat_f32(f32(5.5507131e-2)))
    p = fma(p, r, splat_f32(f32(2.4022120e-1)))
    p = fma(p, r, splat_f32(f32(6.9314694e-1)))
    p = fma(p, r, splat_f32(f32(1.0000001)))
    return p * as_f32((to_i32(n) + splat_i32(i32(127))) << splat_i32(i32(23)))


__all__ = ["LANES", "bits_f32", "exp", "exp2", "f32", "i32", "ld_state", "next_item", "share"]
