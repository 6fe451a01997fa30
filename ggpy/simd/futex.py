"""How a thread sleeps until an int64 has another value, on Linux: its system call `futex`, by C's `syscall`."""

from llvmlite import ir
from numba import types

from .vector import _I64, ADDRESS, intrinsic

#: in the process's own memory, so that the system needn't look who else has it mapped
_PRIVATE = 128
_WAIT, _WAKE = 0 | _PRIVATE, 1 | _PRIVATE


def _call(b, syscall, number, *arguments):
    """`syscall(number, address, operation, value, no time limit)`."""
    ty = ir.FunctionType(_I64, [_I64], var_arg=True)
    values = [a if isinstance(a, ir.Value) else ir.Constant(_I64, a) for a in arguments]
    b.call(b.inttoptr(syscall, ty.as_pointer()), [number, *values, ir.Constant(_I64, 0)])


@intrinsic
def sleep_while(tyctx, syscall, futex, address, value):
    """Sleeps, but for a moment at least or until `wake_all`, unless the low half of `address` differs from that of `value`.

    `syscall` is the address of the C function, `futex` the call's number.
    """

    def codegen(ctx, b, sig, a):
        _call(b, a[0], a[1], a[2], _WAIT, a[3])
        return ctx.get_dummy_value()

    return types.void(ADDRESS, types.int64, ADDRESS, types.int64), codegen


@intrinsic
def wake_all(tyctx, syscall, futex, address):
    """Wakes who sleeps at `address`."""

    def codegen(ctx, b, sig, a):
        _call(b, a[0], a[1], a[2], _WAKE, (1 << 31) - 1)
        return ctx.get_dummy_value()

    return types.void(ADDRESS, types.int64, ADDRESS), codegen
