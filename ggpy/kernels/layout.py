"""What the unpackers of all block types share."""

from collections.abc import Callable
from typing import NamedTuple

from ..simd.vector import shift_right_signed, splat_f32, splat_i32, to_f32
from .common import f32, i32
from .source import function


class Layout(NamedTuple):
    """What a matrix kernel must know of a block type."""

    walk: Callable  # emit -> walk
    n_bytes: int  # of a block
    block: int  # values in a block
    group: int  # values that share a scale: 16 or 32
    bias: int  # that the unpacked values carry
    has_min: bool
    most: int  # that an unpacked value can be
    signed: bool = False  # the unpacked values are signed bytes, -most … most


@function
def c(x):
    return splat_i32(i32(x))


@function
def zero():
    return splat_f32(f32(0.0))


@function
def low(t):
    return t & c(0x0F0F0F0F)


@function
def high(t):
    return (t >> c(4)) & c(0x0F0F0F0F)


@function
def byte(v, k):
    """Byte k of each lane, unsigned, as float32."""
    return to_f32((v >> c(8 * k)) & c(255))


@function
def signed_byte(v, k):
    return to_f32(shift_right_signed(v << c(24 - 8 * k), c(24)))


def bits(first, n, to):
    """A function that takes bits first … first + n - 1 of each byte to bit `to`: what a block's other bits lack."""
    mask = ((1 << n) - 1) << to
    mask = mask * 0x01010101
    shift = to - first

    @function
    def left(t):
        return (t << c(shift)) & c(mask)

    @function
    def right(t):
        return (t >> c(-shift)) & c(mask)

    return left if shift >= 0 else right
