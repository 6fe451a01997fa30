"""SIMD values as first-class numba values.

Two kinds of value exist in a kernel beside numba's own scalars:

- a *vector*: `LANES` float32 (`F32`), `LANES` int32 (`I32`), or `4 * LANES` int8 (held as `I32`, four to a lane);
- a *tile*: a fixed number of vectors of one type, kept in registers (`Tile(F32, 8)`).

`+ - * & | ^ << >>`, `fma`, `to_f32` … work lane by lane on both; a vector that meets a tile is used for each of its
members. `>>` is the logical shift. Addresses are int64; loads and stores may be unaligned. Everything here is emitted
as plain LLVM IR, so that LLVM picks the instructions; only the dot product of bytes is chosen by the form (`dots`).

This module is imported by the compiling process alone.
"""

import itertools
import operator
from functools import lru_cache

from llvmlite import ir
from numba import types
from numba.core.typing.templates import AbstractTemplate, infer_global, signature
from numba.extending import intrinsic as _intrinsic
from numba.extending import lower_builtin, models, register_model

from .target import cpu_is_amd, cpu_is_arm, cpu_is_x86, target

TARGET = target()
LANES = TARGET.lanes

intrinsic = _intrinsic(prefer_literal=True)
ADDRESS = types.int64  # signed: numba turns uint64 + int64 into float64
_I8, _I16, _I32, _I64, _F16, _F32 = (
    ir.IntType(8),
    ir.IntType(16),
    ir.IntType(32),
    ir.IntType(64),
    ir.HalfType(),
    ir.FloatType(),
)


class Vector(types.Type):
    """`LANES` values of one element type ('f32' or 'i32')."""

    def __init__(self, elem: str):
        self.elem = elem
        super().__init__(name=f"{elem}x{LANES}")

    @property
    def ir_type(self):
        return ir.VectorType(_F32 if self.elem == "f32" else _I32, LANES)


class Tile(types.Type):
    """`n` vectors, as one value that LLVM keeps in registers."""

    def __init__(self, vector: Vector, n: int):
        self.vector, self.n = vector, n
        super().__init__(name=f"Tile({vector.name}, {n})")

    @property
    def elem(self):
        return self.vector.elem

    @property
    def ir_type(self):
        return ir.ArrayType(self.vector.ir_type, self.n)


F32, I32 = Vector("f32"), Vector("i32")


@register_model(Vector)
class _VectorModel(models.PrimitiveModel):
    def __init__(self, dmm, fe_type):
        super().__init__(dmm, fe_type, fe_type.ir_type)


@register_model(Tile)
class _TileModel(models.PrimitiveModel):
    def __init__(self, dmm, fe_type):
        super().__init__(dmm, fe_type, fe_type.ir_type)


# --- helpers of the code generators ---------------------------------------------------------------------------------


def _members(b, ty, value):
    """The vectors of a vector or tile, as IR values."""
    return [b.extract_value(value, i) for i in range(ty.n)] if isinstance(ty, Tile) else [value]


def _join(b, ty, vectors):
    """The inverse of `_members`."""
    if not isinstance(ty, Tile):
        return vectors[0]
    out = ir.Constant(ty.ir_type, ir.Undefined)
    for i, v in enumerate(vectors):
        out = b.insert_value(out, v, i)
    return out


def _like(elem: str, ty):
    """The type of `ty`'s form with elements `elem`."""
    vector = Vector(elem)
    return Tile(vector, ty.n) if isinstance(ty, Tile) else vector


def _elementwise(ret, tys, emit):
    """A code generator that applies `emit(builder, *vectors)` to each member, spreading vectors over tiles."""

    def codegen(context, b, sig, args):
        n = ret.n if isinstance(ret, Tile) else 1
        columns = []
        for ty, arg in zip(tys, args, strict=True):
            column = _members(b, ty, arg)
            columns.append(column * n if len(column) < n else column)
        return _join(b, ret, [emit(b, *row) for row in zip(*columns, strict=True)])

    return codegen


def _shape_of(*tys):
    """The type (vector or tile) that an elementwise operation on `tys` gives, or None."""
    if not all(isinstance(t, (Vector, Tile)) for t in tys):
        return None
    tiles = {t.n for t in tys if isinstance(t, Tile)}
    if len(tiles) > 1 or len({t.elem for t in tys}) > 1:
        return None
    return Tile(Vector(tys[0].elem), tiles.pop()) if tiles else tys[0]


def _pointer(b, address, ty):
    return b.inttoptr(address, ty.as_pointer())


def _load(b, address, ty):
    value = b.load(_pointer(b, address, ty))
    value.align = 1
    return value


def _store(b, address, value):
    b.store(value, _pointer(b, address, value.type)).align = 1


def _offset(b, address, n: int):
    return b.add(address, ir.Constant(_I64, n)) if n else address


# x86 without F16C has no instruction for float16, and LLVM would call a library for it.
_NATIVE_F16 = TARGET.form != "portable" or not cpu_is_x86()


def _f16_to_f32(b, bits):
    """float32 of float16 bits (a scalar or vector of int16)."""
    n = bits.type.count if isinstance(bits.type, ir.VectorType) else 0
    of = (lambda t: ir.VectorType(t, n)) if n else (lambda t: t)
    if _NATIVE_F16:
        return b.fpext(b.bitcast(bits, of(_F16)), of(_F32))
    c = (lambda t, v: _const(of(t), v)) if n else ir.Constant
    wide = b.zext(bits, of(_I32))
    magnitude = b.shl(b.and_(wide, c(_I32, 0x7FFF)), c(_I32, 13))
    # The exponent is 112 too small, also that of subnormals: a product mends it.
    value = b.bitcast(b.fmul(b.bitcast(magnitude, of(_F32)), c(_F32, 2.0**112)), of(_I32))
    special = b.icmp_unsigned(">=", magnitude, c(_I32, 0x7C00 << 13))
    value = b.select(special, b.or_(magnitude, c(_I32, 0x7F800000)), value)
    return b.bitcast(b.or_(value, b.shl(b.and_(wide, c(_I32, 0x8000)), c(_I32, 16))), of(_F32))


def _f32_to_f16(b, value):
    """The bits (int16) of the float16 nearest to a float32 scalar or vector, ties to even."""
    n = value.type.count if isinstance(value.type, ir.VectorType) else 0
    of = (lambda t: ir.VectorType(t, n)) if n else (lambda t: t)
    if _NATIVE_F16:
        return b.bitcast(b.fptrunc(value, of(_F16)), of(_I16))
    c = (lambda t, v: _const(of(t), v)) if n else ir.Constant
    bits = b.bitcast(value, of(_I32))
    sign = b.and_(b.lshr(bits, c(_I32, 16)), c(_I32, 0x8000))
    magnitude = b.and_(bits, c(_I32, 0x7FFFFFFF))
    # Adding 0.5 aligns a subnormal's bits with the float32's last ones, and rounds as it does so.
    small = b.sub(b.bitcast(b.fadd(b.bitcast(magnitude, of(_F32)), c(_F32, 0.5)), of(_I32)), c(_I32, 0x3F000000))
    odd = b.and_(b.lshr(magnitude, c(_I32, 13)), c(_I32, 1))
    normal = b.lshr(b.add(b.add(magnitude, c(_I32, 0xFFF - (112 << 23))), odd), c(_I32, 13))
    result = b.select(b.icmp_unsigned("<", magnitude, c(_I32, 113 << 23)), small, normal)
    infinite = b.icmp_unsigned(">=", magnitude, c(_I32, 143 << 23))
    nan = b.icmp_unsigned(">", magnitude, c(_I32, 0x7F800000))
    result = b.select(infinite, b.select(nan, c(_I32, 0x7E00), c(_I32, 0x7C00)), result)
    return b.trunc(b.or_(result, sign), of(_I16))


def _splat(b, scalar, n):
    ty = ir.VectorType(scalar.type, n)
    one = b.insert_element(ir.Constant(ty, ir.Undefined), scalar, ir.Constant(_I32, 0))
    return b.shuffle_vector(one, ir.Constant(ty, ir.Undefined), ir.Constant(ir.VectorType(_I32, n), [0] * n))


def _const(ty, value):
    return ir.Constant(ty, [value] * ty.count)


def _call(b, name, ret, args):
    return b.call(b.module.declare_intrinsic(name, fnty=ir.FunctionType(ret, [a.type for a in args])), args)


def _shuffle(b, x, y, order):
    return b.shuffle_vector(x, y, ir.Constant(ir.VectorType(_I32, len(order)), list(order)))


def _hidden(b, address):
    """The same address; LLVM can't know that, so that what it works out from it, and loads from there, stays in place."""
    return b.asm(ir.FunctionType(_I64, [_I64]), "", "=r,0", [address], side_effect=True)


# --- operators ------------------------------------------------------------------------------------------------------

_OPERATORS = {
    operator.add: {"f32": "fadd", "i32": "add"},
    operator.sub: {"f32": "fsub", "i32": "sub"},
    operator.mul: {"f32": "fmul", "i32": "mul"},
    operator.truediv: {"f32": "fdiv"},
    operator.and_: {"i32": "and_"},
    operator.or_: {"i32": "or_"},
    operator.xor: {"i32": "xor"},
    operator.lshift: {"i32": "shl"},
    operator.rshift: {"i32": "lshr"},
}


def _register(op, table):
    @infer_global(op)
    class _Template(AbstractTemplate):
        key = op

        def generic(self, args, kws):
            ret = _shape_of(*args)
            if ret is not None and ret.elem in table:
                return signature(ret, *args)
            return None

    def lower(context, builder, sig, args):
        def emit(b, x, y):
            return getattr(b, table[sig.return_type.elem])(x, y)

        return _elementwise(sig.return_type, sig.args, emit)(context, builder, sig, args)

    for left in (Vector, Tile):
        for right in (Vector, Tile):
            lower_builtin(op, left, right)(lower)


for _op, _table in _OPERATORS.items():
    _register(_op, _table)


#: whether the processor has `fma`; LLVM would call a library for it
HAS_FMA = TARGET.form != "portable" or not cpu_is_x86()


def _fma(b, x, y, z):
    if HAS_FMA:
        return _call(b, f"llvm.fma.v{LANES}f32", F32.ir_type, [x, y, z])
    return b.fadd(b.fmul(x, y), z)


@intrinsic
def fma(tyctx, x, y, z):
    """x * y + z, rounded once if HAS_FMA."""
    ret = _shape_of(x, y, z)
    return ret(x, y, z), _elementwise(ret, (x, y, z), _fma)


def _bounded(sign):
    """x, or y where that is beyond it: where x is NaN, NaN, so that no bound hides damage. One instruction on x86-64."""

    @intrinsic
    def op(tyctx, x, y):
        ret = _shape_of(x, y)
        return ret(x, y), _elementwise(ret, (x, y), lambda b, v, w: b.select(b.fcmp_ordered(sign, w, v), w, v))

    return op


maximum, minimum = _bounded(">"), _bounded("<")


def _farther(b, x, y):
    """Lane by lane max(|x|, |y|), and NaN if either is NaN: as integers magnitudes have the same order, and NaN is above
    them all."""
    bits = ir.VectorType(_I32, x.type.count)
    mask = ir.Constant(bits, [0x7FFFFFFF] * x.type.count)
    x, y = (b.and_(b.bitcast(v, bits), mask) for v in (x, y))
    return b.bitcast(b.select(b.icmp_signed(">", x, y), x, y), ir.VectorType(ir.FloatType(), bits.count))


@intrinsic
def max_magnitude(tyctx, x, y):
    """max(|x|, |y|), lane by lane; NaN if either is."""
    ret = _shape_of(x, y)
    return ret(x, y), _elementwise(ret, (x, y), _farther)


def _unary(name):
    @intrinsic
    def op(tyctx, x):
        ty = F32.ir_type
        return x(x), _elementwise(x, (x,), lambda b, v: _call(b, f"llvm.{name}.v{LANES}f32", ty, [v]))

    return op


absolute, sqrt, round_even = _unary("fabs"), _unary("sqrt"), _unary("rint")


@intrinsic
def to_f32(tyctx, x):
    """int32 lanes converted to float32."""
    ret = _like("f32", x)
    return ret(x), _elementwise(ret, (x,), lambda b, v: b.sitofp(v, F32.ir_type))


@intrinsic
def to_i32(tyctx, x):
    """float32 lanes truncated to int32."""
    ret = _like("i32", x)
    return ret(x), _elementwise(ret, (x,), lambda b, v: b.fptosi(v, I32.ir_type))


@intrinsic
def as_f32(tyctx, x):
    """The bits of int32 lanes, read as float32."""
    ret = _like("f32", x)
    return ret(x), _elementwise(ret, (x,), lambda b, v: b.bitcast(v, F32.ir_type))


@intrinsic
def f16_to_f32(tyctx, x):
    """float32 of the float16 in the low half of each int32 lane."""
    bits = ir.VectorType(_I16, LANES)
    ret = _like("f32", x)
    return ret(x), _elementwise(ret, (x,), lambda b, v: _f16_to_f32(b, b.trunc(v, bits)))


# --- constants, loads, stores ---------------------------------------------------------------------------------------


@intrinsic
def splat_f32(tyctx, x):
    """A vector of `LANES` times the float32 `x`."""
    return F32(types.float32), lambda ctx, b, sig, a: _splat(b, a[0], LANES)


@intrinsic
def splat_i32(tyctx, x):
    """A vector of `LANES` times the int32 `x`."""
    return I32(types.int32), lambda ctx, b, sig, a: _splat(b, a[0], LANES)


@intrinsic
def tile_f32(tyctx, n):
    """A tile of `n` zero vectors."""
    ty = Tile(F32, n.literal_value)
    return ty(n), lambda ctx, b, sig, a: ir.Constant(ty.ir_type, None)


@intrinsic
def tile_i32(tyctx, n):
    """A tile of `n` zero vectors."""
    ty = Tile(I32, n.literal_value)
    return ty(n), lambda ctx, b, sig, a: ir.Constant(ty.ir_type, None)


@intrinsic
def get(tyctx, tile, i):
    """Vector `i` (a literal) of a tile."""
    k = i.literal_value
    return tile.vector(tile, i), lambda ctx, b, sig, a: b.extract_value(a[0], k)


def _loader(elem):
    @intrinsic
    def load(tyctx, address):
        ty = Vector(elem)
        return ty(ADDRESS), lambda ctx, b, sig, a: _load(b, a[0], ty.ir_type)

    return load


load_f32, load_i32 = _loader("f32"), _loader("i32")


@intrinsic
def load_f16(tyctx, address):
    """`LANES` float16 values at `address`, as float32."""
    bits = ir.VectorType(_I16, LANES)
    return F32(ADDRESS), lambda ctx, b, sig, a: _f16_to_f32(b, _load(b, a[0], bits))


@intrinsic
def load_i8(tyctx, address):
    """`LANES` int8 values at `address`, as float32."""
    ty = ir.VectorType(_I8, LANES)
    return F32(ADDRESS), lambda ctx, b, sig, a: b.sitofp(_load(b, a[0], ty), F32.ir_type)


@intrinsic
def store(tyctx, address, v):
    """Writes a vector, or the vectors of a tile one after the other."""

    def codegen(ctx, b, sig, a):
        for i, x in enumerate(_members(b, v, a[1])):
            _store(b, _offset(b, a[0], 4 * LANES * i), x)
        return ctx.get_dummy_value()

    return types.void(ADDRESS, v), codegen


def _first_lanes(b, n):
    """A mask of the first n (int64) lanes."""
    numbers = ir.Constant(ir.VectorType(_I64, LANES), list(range(LANES)))
    return b.icmp_signed("<", numbers, _splat(b, n, LANES))


@intrinsic
def load_first(tyctx, address, n):
    """The n float32 at `address`, and 0 in the other lanes; at most LANES are read."""

    def codegen(ctx, b, sig, a):
        ty, pointer = F32.ir_type, F32.ir_type.as_pointer()
        mask = _first_lanes(b, a[1])
        fnty = ir.FunctionType(ty, [pointer, _I32, mask.type, ty])
        f = b.module.declare_intrinsic(f"llvm.masked.load.v{LANES}f32.p0", fnty=fnty)
        return b.call(f, [b.inttoptr(a[0], pointer), ir.Constant(_I32, 1), mask, _const(ty, 0.0)])

    return F32(ADDRESS, ADDRESS), codegen


@intrinsic
def store_first(tyctx, address, v, n):
    """Writes the first n lanes of a vector of float32, LANES at most."""

    def codegen(ctx, b, sig, a):
        pointer = F32.ir_type.as_pointer()
        mask = _first_lanes(b, a[2])
        fnty = ir.FunctionType(ir.VoidType(), [F32.ir_type, pointer, _I32, mask.type])
        f = b.module.declare_intrinsic(f"llvm.masked.store.v{LANES}f32.p0", fnty=fnty)
        b.call(f, [a[1], b.inttoptr(a[0], pointer), ir.Constant(_I32, 1), mask])
        return ctx.get_dummy_value()

    return types.void(ADDRESS, F32, ADDRESS), codegen


@intrinsic
def store_i8(tyctx, address, v):
    """Writes the low byte of each int32 lane (LANES bytes a vector)."""

    def codegen(ctx, b, sig, a):
        for i, x in enumerate(_members(b, v, a[1])):
            _store(b, _offset(b, a[0], LANES * i), b.trunc(x, ir.VectorType(_I8, LANES)))
        return ctx.get_dummy_value()

    return types.void(ADDRESS, v), codegen


@intrinsic
def store_tile(tyctx, address, stride, tile):
    """Writes vector t of a tile at `address + t * stride`."""

    def codegen(ctx, b, sig, a):
        at = a[0]
        for x in _members(b, tile, a[2]):
            _store(b, at, x)
            at = b.add(at, a[1])
        return ctx.get_dummy_value()

    return types.void(ADDRESS, ADDRESS, tile), codegen


def _tile_loader(ir_type, convert):
    @intrinsic
    def load(tyctx, address, stride, n):
        ty, memory = Tile(F32, n.literal_value), ir.VectorType(ir_type, LANES)

        def codegen(ctx, b, sig, a):
            at, out = a[0], []
            for _ in range(ty.n):
                out.append(convert(b, _load(b, at, memory)))
                at = b.add(at, a[1])
            return _join(b, ty, out)

        return ty(ADDRESS, ADDRESS, n), codegen

    return load


# A tile whose vector t is the LANES values of a type at `address + t * stride`, as float32.
load_tile_f32 = _tile_loader(_F32, lambda b, v: v)
load_tile_f16 = _tile_loader(_I16, _f16_to_f32)
load_tile_i8 = _tile_loader(_I8, lambda b, v: b.sitofp(v, F32.ir_type))


@intrinsic
def load_tile_i32(tyctx, address, stride, n):
    """A tile whose vector t is the LANES int32 at `address + t * stride`."""
    ty = Tile(I32, n.literal_value)

    def codegen(ctx, b, sig, a):
        at, out = a[0], []
        for _ in range(ty.n):
            out.append(_load(b, at, I32.ir_type))
            at = b.add(at, a[1])
        return _join(b, ty, out)

    return ty(ADDRESS, ADDRESS, n), codegen


# A *grid* is a tile of rows × n vectors, row after row.


@intrinsic
def load_grid(tyctx, address, stride, rows, n):
    """A grid whose row r is the `n * LANES` float32 at `address + r * stride`."""
    ty = Tile(F32, rows.literal_value * n.literal_value)

    def codegen(ctx, b, sig, a):
        at, out = a[0], []
        for _ in range(rows.literal_value):
            out += [_load(b, _offset(b, at, 4 * LANES * j), F32.ir_type) for j in range(n.literal_value)]
            at = b.add(at, a[1])
        return _join(b, ty, out)

    return ty(ADDRESS, ADDRESS, rows, n), codegen


@intrinsic
def store_grid(tyctx, address, stride, grid, n):
    """The inverse of `load_grid`."""

    def codegen(ctx, b, sig, a):
        at, vectors = a[0], _members(b, grid, a[2])
        for i in range(0, grid.n, n.literal_value):
            for j in range(n.literal_value):
                _store(b, _offset(b, at, 4 * LANES * j), vectors[i + j])
            at = b.add(at, a[1])
        return ctx.get_dummy_value()

    return types.void(ADDRESS, ADDRESS, grid, n), codegen


@intrinsic
def fma_grid(tyctx, grid, address, stride, tile):
    """grid[r][j] + x[r] * tile[j], with x[r] the float32 at `address + r * stride`, given to every lane."""

    def codegen(ctx, b, sig, a):
        at, out, vectors = a[1], [], _members(b, tile, a[3])
        sums = _members(b, grid, a[0])
        for r in range(0, grid.n, tile.n):
            x = _splat(b, _load(b, at, _F32), LANES)
            out += [_fma(b, x, v, sums[r + j]) for j, v in enumerate(vectors)]
            at = b.add(at, a[2])
        return _join(b, grid, out)

    return grid(grid, ADDRESS, ADDRESS, tile), codegen


@intrinsic
def mul_grid(tyctx, grid, tile):
    """grid[r][j] * tile[j]."""

    def codegen(ctx, b, sig, a):
        columns = _members(b, tile, a[1]) * (grid.n // tile.n)
        return _join(b, grid, [b.fmul(x, y) for x, y in zip(_members(b, grid, a[0]), columns, strict=True)])

    return grid(grid, tile), codegen


@intrinsic
def dot_f32(tyctx, acc, tile, address, step):
    """acc + sum over i of tile[i] * x[i], with x[i] the float32 at `address + i * step`, given to every lane."""

    def codegen(ctx, b, sig, a):
        out, at = a[0], a[2]
        for v in _members(b, tile, a[1]):
            x = _splat(b, _load(b, at, _F32), LANES)
            out = _fma(b, v, x, out)
            at = b.add(at, a[3])
        return out

    return F32(F32, tile, ADDRESS, ADDRESS), codegen


def _broadcaster(elem):
    scalar = _F32 if elem == "f32" else _I32

    @intrinsic
    def broadcast(tyctx, address, stride, n):
        ty = Tile(Vector(elem), n.literal_value)

        def codegen(ctx, b, sig, a):
            at, out = a[0], []
            for _ in range(ty.n):
                out.append(_splat(b, _load(b, at, scalar), LANES))
                at = b.add(at, a[1])
            return _join(b, ty, out)

        return ty(ADDRESS, ADDRESS, n), codegen

    return broadcast


# A tile whose vector t holds LANES times the scalar at address + t * stride.
broadcast_f32, broadcast_i32 = _broadcaster("f32"), _broadcaster("i32")


def _scalar_loader(ir_type, numba_type, convert=lambda b, v: v):
    @intrinsic
    def load(tyctx, address):
        return numba_type(ADDRESS), lambda ctx, b, sig, a: convert(b, _load(b, a[0], ir_type))

    return load


ld_i64 = _scalar_loader(_I64, types.int64)
ld_i32 = _scalar_loader(_I32, types.int32)
ld_f32 = _scalar_loader(_F32, types.float32)
ld_f16 = _scalar_loader(_I16, types.float32, _f16_to_f32)
ld_u8 = _scalar_loader(_I8, types.int32, lambda b, v: b.zext(v, _I32))
ld_i8 = _scalar_loader(_I8, types.int32, lambda b, v: b.sext(v, _I32))


def _scalar_storer(numba_type, convert=lambda b, v: v):
    @intrinsic
    def write(tyctx, address, value):
        def codegen(ctx, b, sig, a):
            _store(b, a[0], convert(b, a[1]))
            return ctx.get_dummy_value()

        return types.void(ADDRESS, numba_type), codegen

    return write


ld_bf16 = _scalar_loader(_I16, types.float32, lambda b, v: b.bitcast(b.shl(b.zext(v, _I32), ir.Constant(_I32, 16)), _F32))


st_f32 = _scalar_storer(types.float32)
st_i32 = _scalar_storer(types.int32)
st_i64 = _scalar_storer(types.int64)
st_f16 = _scalar_storer(types.float32, _f32_to_f16)
st_i8 = _scalar_storer(types.int32, lambda b, v: b.trunc(v, _I8))


@intrinsic
def bits_f32(tyctx, x):
    """The float32 whose bits are the low half of a 64-bit parameter."""
    return types.float32(ADDRESS), lambda ctx, b, sig, a: b.bitcast(b.trunc(a[0], _I32), _F32)


def _prefetcher(locality, doc):
    """`locality` is LLVM's: 0 for data that is used once, to 3 for data to be kept in all caches."""
    pointer = _I8.as_pointer()

    @intrinsic
    def prefetch(tyctx, address):
        def codegen(ctx, b, sig, a):
            kind = ir.FunctionType(ir.VoidType(), [pointer, _I32, _I32, _I32])
            f = b.module.declare_intrinsic("llvm.prefetch.p0", fnty=kind)
            b.call(f, [b.inttoptr(a[0], pointer)] + [ir.Constant(_I32, k) for k in (0, locality, 1)])
            return ctx.get_dummy_value()

        return types.void(ADDRESS), codegen

    prefetch.__doc__ = doc
    return prefetch


prefetch = _prefetcher(2, "Asks for the cache line at `address`, into the second level; never faults.")
# AMD's processors keep such a line in the first level; Intel's lose it there again, and read at half the speed.
prefetch_once = _prefetcher(0 if cpu_is_amd() else 2, "The same for a line that is used once, soon: where that's best.")


@intrinsic
def hidden(tyctx, address):
    """The same address. Where tokens' addresses follow from it by a stride, they do so anew each time: LLVM would keep more
    of them ahead of a loop than there are registers, and store and load them instead."""
    return ADDRESS(ADDRESS), lambda ctx, b, sig, a: _hidden(b, a[0])


@intrinsic
def keep_order(tyctx):
    """Keeps LLVM from moving loads, stores and prefetches past this place, where it would bring them together; no code."""

    def codegen(ctx, b, sig, a):
        b.fence("seq_cst", targetscope="singlethread")
        return ctx.get_dummy_value()

    return types.void(), codegen


# --- reductions -----------------------------------------------------------------------------------------------------


def _reducer(combine):
    @intrinsic
    def reduce(tyctx, v):
        def codegen(ctx, b, sig, a):
            x, n = a[0], LANES
            while n > 1:  # halves are combined pairwise: a fixed order, the same on every machine of this width
                n //= 2
                x = combine(b, _shuffle(b, x, x, range(n)), _shuffle(b, x, x, range(n, 2 * n)), n)
            return b.extract_element(x, ir.Constant(_I32, 0))

        return (types.float32 if v.elem == "f32" else types.int32)(v), codegen

    return reduce


sum_f32 = _reducer(lambda b, x, y, n: b.fadd(x, y))
sum_i32 = _reducer(lambda b, x, y, n: b.add(x, y))
max_f32 = _reducer(lambda b, x, y, n: b.select(b.fcmp_ordered(">", x, y), x, y))
magnitude = _reducer(lambda b, x, y, n: _farther(b, x, y))  # the largest |x|, NaN if any is


def _folder(combine):
    @intrinsic
    def fold(tyctx, tile):
        def codegen(ctx, b, sig, a):
            vectors = _members(b, tile, a[0])
            while len(vectors) > 1:
                half = len(vectors) // 2
                vectors = [combine(b, vectors[i], vectors[i + half]) for i in range(half)]
            return vectors[0]

        return tile.vector(tile), codegen

    return fold


# The vectors of a tile (a power of two of them) combined into one.
fold_max = _folder(lambda b, x, y: b.select(b.fcmp_ordered(">", x, y), x, y))
fold_magnitude = _folder(_farther)
fold_add_i32 = _folder(lambda b, x, y: b.add(x, y))
fold_add_f32 = _folder(lambda b, x, y: b.fadd(x, y))


@intrinsic
def join(tyctx, x, y):
    """Two vectors or tiles, one after the other, as one tile."""
    n = sum(t.n if isinstance(t, Tile) else 1 for t in (x, y))
    ret = Tile(Vector(x.elem), n)
    return ret(x, y), lambda ctx, b, sig, a: _join(b, ret, _members(b, x, a[0]) + _members(b, y, a[1]))


@intrinsic
def get_range(tyctx, tile, start, n):
    """Vectors start … start + n - 1 of a tile (literals), as a tile."""
    i, ret = start.literal_value, Tile(tile.vector, n.literal_value)
    return ret(tile, start, n), lambda ctx, b, sig, a: _join(b, ret, _members(b, tile, a[0])[i : i + ret.n])


@intrinsic
def every_second(tyctx, tile, first):
    """Vectors first, first + 2, … of a tile (a literal), as a tile."""
    k, ret = first.literal_value, Tile(tile.vector, tile.n // 2)
    return ret(tile, first), lambda ctx, b, sig, a: _join(b, ret, _members(b, tile, a[0])[k::2])


@intrinsic
def alternating(tyctx, x, y):
    """The inverse of `every_second`: x[0], y[0], x[1], y[1], …"""
    ret = Tile(x.vector, 2 * x.n)

    def codegen(ctx, b, sig, a):
        return _join(b, ret, [v for pair in zip(_members(b, x, a[0]), _members(b, y, a[1]), strict=True) for v in pair])

    return ret(x, y), codegen


@intrinsic
def shift_right_signed(tyctx, x, y):
    """x >> y, copying the sign, lane by lane."""
    ret = _shape_of(x, y)
    return ret(x, y), _elementwise(ret, (x, y), lambda b, v, w: b.ashr(v, w))


@intrinsic
def spread_bits(tyctx, x):
    """32 bits a lane become 32 bytes of 0 or 1 a lane: byte b of vector g is bit 4 g + b."""
    ret = Tile(I32, 8)

    def codegen(ctx, b, sig, a):
        c = lambda k: _const(I32.ir_type, k)  # noqa: E731
        # x * (1 + 2^7 + 2^14 + 2^21) puts bit i of a nibble at bit 8 i; nothing carries.
        nibbles = [b.and_(b.lshr(a[0], c(4 * g)), c(15)) for g in range(8)]
        return _join(b, ret, [b.and_(b.mul(n, c(0x204081)), c(0x01010101)) for n in nibbles])

    return ret(I32), codegen


def _constant(b, data: bytes):
    """The address of `data`, aligned to 64, in the kernel's own object file."""
    ty = ir.ArrayType(_I8, len(data))
    place = ir.GlobalVariable(b.module, ty, b.module.get_unique_name("constant"))
    place.linkage, place.global_constant, place.align = "internal", True, 64
    place.initializer = ir.Constant(ty, bytearray(data))
    return b.ptrtoint(place, _I64)


@intrinsic
def load_halves(tyctx, address, stride):
    """The float16 at the start of each of `LANES` rows, as float32."""
    bits = ir.VectorType(_I16, LANES)

    def codegen(ctx, b, sig, a):
        out, at = ir.Constant(bits, ir.Undefined), a[0]
        for i in range(LANES):
            out = b.insert_element(out, _load(b, at, _I16), ir.Constant(_I32, i))
            at = b.add(at, a[1])
        return _f16_to_f32(b, out)

    return F32(ADDRESS, ADDRESS), codegen


@intrinsic
def stack(tyctx, n):
    """The address of `n` (a literal) bytes on the stack, aligned to 64."""
    size = n.literal_value

    def codegen(ctx, b, sig, a):
        with b.goto_entry_block():
            room = b.alloca(ir.ArrayType(_I8, size))
            room.align = 64
        return b.ptrtoint(room, _I64)

    return ADDRESS(n), codegen


@intrinsic
def copy_bytes(tyctx, to, source, n):
    """Copies n bytes; the two places don't overlap."""
    p = _I8.as_pointer()

    def codegen(ctx, b, sig, a):
        f = b.module.declare_intrinsic(
            "llvm.memcpy.p0.p0.i64", fnty=ir.FunctionType(ir.VoidType(), [p, p, _I64, ir.IntType(1)])
        )
        b.call(f, [b.inttoptr(a[0], p), b.inttoptr(a[1], p), a[2], ir.Constant(ir.IntType(1), 0)])
        return ctx.get_dummy_value()

    return types.void(ADDRESS, ADDRESS, ADDRESS), codegen


@intrinsic
def where_less(tyctx, x, y, a_, b_):
    """a where x < y, else b, lane by lane (x, y int32; a, b float32)."""

    def codegen(ctx, b, sig, a):
        return b.select(b.icmp_signed("<", a[0], a[1]), a[2], a[3])

    return F32(x, y, a_, b_), codegen


@intrinsic
def any_less(tyctx, x, y):
    """Whether x < y in any lane (float32)."""
    bits = ir.IntType(LANES)

    def codegen(ctx, b, sig, a):
        found = b.bitcast(b.fcmp_ordered("<", a[0], a[1]), bits)
        return b.icmp_unsigned("!=", found, ir.Constant(bits, 0))

    return types.boolean(x, y), codegen


@intrinsic
def lane_numbers(tyctx):
    """0, 1, … LANES - 1."""
    return I32(), lambda ctx, b, sig, a: ir.Constant(I32.ir_type, list(range(LANES)))


# --- transposition --------------------------------------------------------------------------------------------------


def _transposed(b, rows):
    """Vector j of the result holds dword j of each of LANES rows; a row is a list of vectors of 4 or 8 dwords, or one of
    less."""
    n = rows[0][0].type.count
    if n < 4:
        while len(rows) > 1:  # zipping row i with row i + half, over and over, ends in column order
            pairs = zip(rows[: len(rows) // 2], rows[len(rows) // 2 :], strict=True)
            rows = [[z for x, y in zip(*pair, strict=True) for z in _zip(b, x, y)] for pair in pairs]
        return rows[0]
    out = []
    for part in zip(*rows, strict=True):  # n columns of all rows, turned in fours, where shuffles are cheapest
        vectors = [_concatenate(b, part[i::n]) for i in range(n)]
        fours = [_turned(b, *vectors[i : i + 4]) for i in range(0, n, 4)]
        out += fours[0] if n == 4 else [_take_turns(b, x, y, i, 4, 8) for i in (0, 4) for x, y in zip(*fours, strict=True)]
    return out


def _zip(b, x, y):
    """x[0], y[0], x[1], y[1] … as one vector, or as two if it has more than LANES."""
    n = x.type.count
    order = [i // 2 + (n if i % 2 else 0) for i in range(2 * n)]
    return [_shuffle(b, x, y, order[i : i + LANES]) for i in range(0, 2 * n, LANES)]


def _concatenate(b, vectors):
    """One vector of several (a power of two)."""
    while len(vectors) > 1:
        n = 2 * vectors[0].type.count
        vectors = [_shuffle(b, x, y, range(n)) for x, y in zip(vectors[::2], vectors[1::2], strict=True)]
    return vectors[0]


def _turned(b, x, y, z, w):
    """Every four dwords of four vectors as a matrix, transposed."""
    out = []
    for half in (0, 2):
        first, second = _take_turns(b, x, y, half, 1, 4), _take_turns(b, z, w, half, 1, 4)
        out += [_take_turns(b, first, second, start, 2, 4) for start in (0, 2)]
    return out


def _take_turns(b, x, y, start, n, period):
    """In every `period` dwords: n of x from `start` on, n of y from there, the next n of x …, as many as fit."""
    picks = [start + i // (2 * n) * n + i % n + (LANES if i // n % 2 else 0) for i in range(period)]
    return _shuffle(b, x, y, [k + pick for k in range(0, LANES, period) for pick in picks])


@intrinsic
def load_transposed(tyctx, address, stride, n):
    """Dwords of `LANES` rows, one row to a lane.

    Row i starts at `address + i * stride`; vector j of the result holds dword j of each row. `n` (a literal, a power of
    two) is the number of dwords read from each row.
    """
    width = n.literal_value
    ty = Tile(I32, width)

    def codegen(ctx, b, sig, a):
        size = min(width, max(LANES // 2, 4))  # of a load, in dwords
        rows, at = [], a[0]
        for _ in range(LANES):
            parts = [_load(b, _offset(b, at, 4 * k), ir.VectorType(_I32, size)) for k in range(0, width, size)]
            rows.append(parts)
            at = b.add(at, a[1])
        return _join(b, ty, _transposed(b, rows))

    return ty(ADDRESS, ADDRESS, n), codegen


# --- dot products of bytes ------------------------------------------------------------------------------------------

_BYTES = ir.VectorType(_I8, 4 * LANES)
_HAS_ARM_DOT = cpu_is_arm() and TARGET.has("dotprod")
HAS_VNNI = LANES == 16 or (TARGET.form == "avx2" and TARGET.has("avxvnni"))
# What 8-bit weights are biased by to be unsigned: `vpdpbusd` wants one unsigned side; other forms multiply signed bytes.
BIAS_8BIT = 128 if HAS_VNNI else 0
MOST_8BIT = 127 + BIAS_8BIT
TOKENS = TARGET.tokens


#: Whether products of bytes are AVX2's: `vpmaddubsw` adds two in 16 bits, sums of which `vpmaddwd` brings to 32 bits.
HAS_PAIRS = TARGET.form == "avx2" and not HAS_VNNI
_PAIRS = ir.VectorType(_I16, 2 * LANES)
_MAX_ACTIVATION = 127


def _pairs_in_16_bits(most: int) -> int:
    """How many sums of two products of activations with weights up to `most` 16 bits hold."""
    return 32767 // (2 * _MAX_ACTIVATION * most)


def _pairs(b, w, x, signed: bool):
    """Sums of two byte products each, in 16 bits."""
    w, x = b.bitcast(w, _BYTES), b.bitcast(x, _BYTES)
    if signed:  # |w| * (x with w's sign)
        w, x = (_call(b, "llvm.x86.avx2.psign.b", _BYTES, [v, w]) for v in (w, x))
    return _call(b, "llvm.x86.avx2.pmadd.ub.sw", _PAIRS, [w, x])


def _add_pairs(b, acc, pairs):
    return b.add(acc, _call(b, "llvm.x86.avx2.pmadd.wd", I32.ir_type, [pairs, _const(_PAIRS, 1)]))


def _dot(b, acc, w, x):
    """acc + sum of the four byte products of each lane, where the processor, or plain LLVM, has that in one."""
    if HAS_VNNI:
        bits = 32 * LANES
        args = [acc, b.bitcast(w, _BYTES), b.bitcast(x, _BYTES)]
        return _call(b, f"llvm.x86.avx512.vpdpbusd.{bits}", I32.ir_type, args)
    if _HAS_ARM_DOT:
        args = [acc, b.bitcast(w, _BYTES), b.bitcast(x, _BYTES)]
        return _call(b, "llvm.aarch64.neon.sdot.v4i32.v16i8", I32.ir_type, args)
    # portable: the even and the odd bytes as int16, whose products' sums fit (2 * 127 * 127); then pairs of those as int32
    halves = ir.VectorType(_I16, 2 * LANES)

    def low_and_high(v, n):
        by = _const(v.type, n)
        return b.ashr(b.shl(v, by), by), b.ashr(v, by)

    (w0, w1), (x0, x1) = (low_and_high(b.bitcast(v, halves), 8) for v in (w, x))
    pairs = b.add(b.mul(w0, x0), b.mul(w1, x1))
    p0, p1 = low_and_high(b.bitcast(pairs, I32.ir_type), 16)
    return b.add(acc, b.add(p0, p1))


def _given_dword(b, address, g: int):
    """LANES times the dword at `address + 4 g`, one of a number that 4 divides."""
    if _HAS_ARM_DOT:  # `sdot` picks one of four itself
        four = _load(b, _offset(b, address, 16 * (g // 4)), I32.ir_type)
        return _shuffle(b, four, four, [g % 4] * LANES)
    return _splat(b, _load(b, _offset(b, address, 4 * g), _I32), LANES)


class _Assembly:
    """Lines of AVX2's assembly (AT&T's syntax) that add dot products to sums. LLVM would reorder the additions, run out of
    registers and take half as long again."""

    def __init__(self, n_sums: int, n_registers: int, span: int, n_addresses: int):
        places = (f"${{{i}}}" for i in itertools.count())

        def take(count: int) -> list[str]:
            return list(itertools.islice(places, count))

        # Results are the sums, then registers that are written to; operands those sums again, ones and addresses.
        self.sums, self._parts, self.registers, spare = map(take, (n_sums, n_sums if span > 1 else 0, n_registers, 2))
        self._spare = itertools.cycle(spare)
        self._n_written = n_sums + len(self._parts) + n_registers + 2
        take(n_sums)
        (self._ones,), self.addresses = take(1), take(n_addresses)
        self._span = span
        self.lines: list[str] = []

    def spare(self) -> str:
        """A register for one product."""
        return next(self._spare)

    def add(self, t: int, w: str, x: str, g: int, last: bool) -> None:
        """Adds product g, of unsigned bytes w and signed ones x, a register or a place in memory, to sum t."""
        span, pairs = self._span, self._parts[t] if self._span > 1 else ""
        first = g % span == 0
        product = pairs if pairs and first else x if x.startswith("$") else self.spare()
        pairs = pairs or product
        self.lines.append(f"vpmaddubsw {x}, {w}, {product}")
        if not first:
            self.lines.append(f"vpaddw {product}, {pairs}, {pairs}")
        if g % span == span - 1 or last:
            self.lines += [f"vpmaddwd {self._ones}, {pairs}, {pairs}", f"vpaddd {pairs}, {self.sums[t]}, {self.sums[t]}"]

    def run(self, b, sums, addresses):
        """The sums after these lines."""
        n = len(sums)
        args = [*sums, _const(_PAIRS, 1), *addresses]
        operands = [*map(str, range(n)), "x", *["r"] * len(addresses), "~{memory}"]
        results = ir.LiteralStructType([I32.ir_type] * self._n_written)
        kind = ir.FunctionType(results, [a.type for a in args])
        text = "\\0A".join(self.lines)
        done = b.asm(kind, text, ",".join(["=&x"] * self._n_written + operands), args, side_effect=False)
        return [b.extract_value(done, t) for t in range(n)]


def _dots_by_rows(b, sums, weights, n: int, tokens, signed: bool, span: int):
    """What `dots` does, with AVX2."""
    asm = _Assembly(len(sums), 1 + signed, span, 1 + len(sums))
    (w, *others), (panel, *places) = asm.registers, asm.addresses
    for g in range(n):
        asm.lines.append(f"vmovdqu {4 * LANES * g}({panel}), {w}")
        if signed:  # |w| * (x with w's sign)
            asm.lines.append(f"vpsignb {w}, {w}, {others[0]}")
        for t, place in enumerate(places):
            x = asm.spare()
            asm.lines.append(f"vpbroadcastd {4 * g}({place}), {x}")
            if signed:
                asm.lines.append(f"vpsignb {w}, {x}, {x}")
            asm.add(t, others[0] if signed else w, x, g, g == n - 1)
    return asm.run(b, sums, [weights, *tokens])


def _dots_by_tokens(b, sums, weights, n: int, tokens, signed: bool, span: int):
    """What `dots_by_tokens` does."""
    asm = _Assembly(len(sums), 1 + signed, span, 1 + len(sums))
    (w, *others), (panel, *places) = asm.registers, asm.addresses
    for g in range(n):
        asm.lines.append(f"vpbroadcastd {4 * LANES * g}({panel}), {w}")
        if signed:
            m = others[0]
            asm.lines += [f"vpxor {m}, {m}, {m}", f"vpcmpgtb {w}, {m}, {m}", f"vpabsb {w}, {w}"]
        for t, place in enumerate(places):
            x = f"{4 * LANES * g}({place})"
            if signed:  # `vpsignb` and the products share units; -1 - x will do, too: see `lacking`
                at, x = x, asm.spare()
                asm.lines.append(f"vpxor {at}, {others[0]}, {x}")
            asm.add(t, w, x, g, g == n - 1)
    return asm.run(b, sums, [weights, *tokens])


@intrinsic
def lacking(tyctx, w):
    """What `dots_by_tokens` lacks of signed weights: with a negative one it takes -1 - x for -x. The sum of the magnitudes
    of those in each lane of a tile; 0 where there is no `dots_by_tokens`."""

    def codegen(ctx, b, sig, a):
        zero, sums = _const(_BYTES, 0), None
        if not HAS_PAIRS:
            return _const(I32.ir_type, 0)
        for v in _members(b, w, a[0]):
            v = b.bitcast(v, _BYTES)
            negative = b.select(b.icmp_signed("<", v, zero), v, zero)
            pairs = _pairs(b, _const(_BYTES, 1), negative, False)
            sums = b.add(sums, pairs) if sums else pairs
        zero = _const(I32.ir_type, 0)
        return b.sub(zero, _add_pairs(b, zero, sums))

    return I32(w), codegen


@lru_cache
def dotter(signed: bool, most: int):
    """Functions for dot products of bytes: of weights up to `most`, 0 … most or, if `signed`, -most … most, with
    activations, -127 … 127. Their sums are exact, so that the order of additions doesn't matter.

    Returns
    -------
    dot_tile
        One token, weights in registers.
    dots
        Some tokens, a row of weights to a lane.
    dots_by_tokens
        The same with a token to a lane, but for what is `lacking`; None where it isn't faster.
    """
    span = _pairs_in_16_bits(most) if HAS_PAIRS else 0

    @intrinsic
    def dot_tile(tyctx, acc, w, address):
        """acc + sum over g of w[g] · x[g] over a tile of weights; x[g] is the dword at `address + 4 g`, given to every
        lane."""

        def codegen(ctx, b, sig, a):
            out, part = a[0], None
            members = _members(b, w, a[1])
            for g, v in enumerate(members):
                x = _given_dword(b, a[2], g)
                if not HAS_PAIRS:
                    out = _dot(b, out, v, x)
                    continue
                pairs = _pairs(b, v, x, signed)
                part = b.add(part, pairs) if part else pairs
                if g % span == span - 1 or g == len(members) - 1:
                    out, part = _add_pairs(b, out, part), None
            return out

        return I32(I32, w, ADDRESS), codegen

    @intrinsic
    def dots(tyctx, acc, weights, n, address, stride):
        """For each token t: acc[t] + w[g] · x[t][g] for g < n; w[g] is the vector at `weights + 4 LANES g`, x[t][g]
        the dword at `address + t * stride + 4 g`."""
        count = n.literal_value

        def codegen(ctx, b, sig, a):
            accs = _members(b, acc, a[0])
            tokens, at = [], a[3]
            for _ in accs:  # hidden, else LLVM multiplies token by token, eight sums that wait for one another
                tokens.append(at)
                at = _hidden(b, b.add(at, a[4]))
            if HAS_PAIRS:
                return _join(b, acc, _dots_by_rows(b, accs, a[1], count, tokens, signed, span))
            for g in range(count):
                w = _load(b, _offset(b, a[1], 4 * LANES * g), I32.ir_type)
                for t, x in enumerate(tokens):
                    accs[t] = _dot(b, accs[t], w, _given_dword(b, x, g))
            return _join(b, acc, accs)

        return acc(acc, ADDRESS, n, ADDRESS, ADDRESS), codegen

    @intrinsic
    def dots_by_tokens(tyctx, acc, weights, n, address, stride):
        """For each vector t of LANES tokens: acc[t] + w[g] · x[t][g] for g < n; w[g] is the dword at `weights + 4 LANES g`,
        x[t][g] the vector at `address + t * stride + 4 LANES g`, a dword of each token."""
        count = n.literal_value

        def codegen(ctx, b, sig, a):
            accs = _members(b, acc, a[0])
            tokens = [a[3]]
            for _ in accs[1:]:
                tokens.append(b.add(tokens[-1], a[4]))
            return _join(b, acc, _dots_by_tokens(b, accs, a[1], count, tokens, signed, span))

        return acc(acc, ADDRESS, n, ADDRESS, ADDRESS), codegen

    return dot_tile, dots, dots_by_tokens if HAS_PAIRS else None


# --- AMX: products of bytes by tiles ----------------------------------------------------------------------------------

#: Whether there are tiles: registers of 16 rows of 64 bytes, and products of two of them.
HAS_TILES = TARGET.form == "amx"
#: tokens of the largest product of tiles
TILE_TOKENS = 16
# The registers' uses: results and activations by the number of tokens, weights.
_RESULTS, _ACTIVATIONS, _WEIGHTS = {16: 0, 8: 1}, {16: 2, 8: 3}, 4


def _call_tiles(b, name, *args):
    """Calls an intrinsic of AMX's; Python's ints are its immediates."""
    values = [ir.Constant(_I8, a) if isinstance(a, int) else a for a in args]
    kind = ir.FunctionType(ir.VoidType(), [v.type for v in values])
    b.call(b.module.declare_intrinsic(f"llvm.x86.{name}", fnty=kind), values)


@intrinsic
def configure_tiles(tyctx):
    """Makes this thread's tiles ready for `tile_dots`."""
    widths, rows = [0] * 16, [0] * 16
    for n in (16, 8):
        widths[_RESULTS[n]], rows[_RESULTS[n]] = 64, n
        widths[_ACTIVATIONS[n]], rows[_ACTIVATIONS[n]] = 32, n
    widths[_WEIGHTS], rows[_WEIGHTS] = 64, 8
    palette = bytes([1]) + bytes(15)
    config = palette + b"".join(w.to_bytes(2, "little") for w in widths) + bytes(rows)

    def codegen(ctx, b, sig, a):
        _call_tiles(b, "ldtilecfg", b.inttoptr(_constant(b, config), _I8.as_pointer()))
        return ctx.get_dummy_value()

    return types.void(), codegen


@intrinsic
def release_tiles(tyctx):
    """Gives the tiles back, so that nothing of them need be saved when another thread has its turn."""

    def codegen(ctx, b, sig, a):
        _call_tiles(b, "tilerelease")
        return ctx.get_dummy_value()

    return types.void(), codegen


def _tile_dotter(product):
    @intrinsic
    def tile_dots(tyctx, to, weights, x, stride, n):
        """For each of n tokens (16 or 8) the sums w[g] · x[t][g] for g < 8, a vector of int32 each, to `to`; operands as
        those of `dots`."""
        c, rows = _RESULTS[n.literal_value], _ACTIVATIONS[n.literal_value]

        def codegen(ctx, b, sig, a):
            to, weights, x = (b.inttoptr(p, _I8.as_pointer()) for p in a[:3])
            line = ir.Constant(_I64, 64)
            _call_tiles(b, "tilezero", c)
            _call_tiles(b, "tileloadd64", rows, x, a[3])
            _call_tiles(b, "tileloadd64", _WEIGHTS, weights, line)
            _call_tiles(b, product, c, rows, _WEIGHTS)
            _call_tiles(b, "tilestored64", c, to, line)
            return ctx.get_dummy_value()

        return types.void(ADDRESS, ADDRESS, ADDRESS, ADDRESS, n), codegen

    return tile_dots


# Activations, signed, come first; weights are unsigned or signed.
tile_dots, tile_dots_signed = _tile_dotter("tdpbsud"), _tile_dotter("tdpbssd")


def lookup_16(values):
    """A function of a tile whose bytes are 0 … 15: values[i] (-128 … 255) for each byte i."""
    values = [v % 256 for v in values]

    def by_instruction(b, v):
        table = ir.Constant(_BYTES, values * (LANES // 4))
        name = {16: "x86.avx512.pshuf.b.512", 8: "x86.avx2.pshuf.b", 4: "aarch64.neon.tbl1.v16i8"}[LANES]
        return _call(b, f"llvm.{name}", _BYTES, [table, v])

    def by_halving(b, v):
        """Each bit of the index, the lowest first, picks from the pairs that are left."""
        left = [_const(_BYTES, value) for value in values]
        for k in range(4):
            bit = b.icmp_unsigned("!=", b.and_(v, _const(_BYTES, 1 << k)), _const(_BYTES, 0))
            left = [b.select(bit, left[i + 1], left[i]) for i in range(0, len(left), 2)]
        return left[0]

    emit = by_halving if TARGET.form == "portable" and not cpu_is_arm() else by_instruction

    @intrinsic
    def lookup(tyctx, x):
        def codegen(ctx, b, sig, a):
            return _join(b, x, [b.bitcast(emit(b, b.bitcast(v, _BYTES)), I32.ir_type) for v in _members(b, x, a[0])])

        return x(x), codegen

    return lookup


# --- between threads ------------------------------------------------------------------------------------------------


@intrinsic
def atomic_add(tyctx, address, value):
    """Adds to the int64 at `address`; the value before."""

    def codegen(ctx, b, sig, a):
        return b.atomic_rmw("add", _pointer(b, a[0], _I64), a[1], "seq_cst")

    return types.int64(ADDRESS, types.int64), codegen


@intrinsic
def atomic_load(tyctx, address):
    """The int64 at `address`, seen in order."""
    return types.int64(ADDRESS), lambda ctx, b, sig, a: b.load_atomic(_pointer(b, a[0], _I64), "seq_cst", 8)


@intrinsic
def atomic_store(tyctx, address, value):
    """Writes the int64 at `address`, in order."""

    def codegen(ctx, b, sig, a):
        b.store_atomic(a[1], _pointer(b, a[0], _I64), "seq_cst", 8)
        return ctx.get_dummy_value()

    return types.void(ADDRESS, types.int64), codegen


@intrinsic
def atomic_swap(tyctx, address, value):
    """Writes the int64 at `address`, in order; the value before."""

    def codegen(ctx, b, sig, a):
        return b.atomic_rmw("xchg", _pointer(b, a[0], _I64), a[1], "seq_cst")

    return types.int64(ADDRESS, types.int64), codegen


@intrinsic
def spin_hint(tyctx):
    """Tells the core that this is a spin loop."""

    def codegen(ctx, b, sig, a):
        if cpu_is_x86():
            _call(b, "llvm.x86.sse2.pause", ir.VoidType(), [])
        return ctx.get_dummy_value()

    return types.void(), codegen


@intrinsic
def clock(tyctx):
    """The CPU's time stamp counter; on ARM that of time, since programs may not read that of cycles."""
    name = "llvm.readcyclecounter" if cpu_is_x86() else "llvm.readsteadycounter"
    return types.int64(), lambda ctx, b, sig, a: _call(b, name, _I64, [])


@intrinsic
def call_kernel(tyctx, function, ith, nth, params):
    """Calls the kernel at the address `function` (for its convention see `kernels.source.compile_kernel`)."""

    def codegen(ctx, b, sig, a):
        with b.goto_entry_block():
            room = b.alloca(ir.ArrayType(_I64, 2))
        result = b.ptrtoint(room, _I64)
        ty = ir.FunctionType(_I32, [_I64] * 5)
        b.call(b.inttoptr(a[0], ty.as_pointer()), [result, _offset(b, result, 8), *a[1:]])
        return ctx.get_dummy_value()

    return types.void(ADDRESS, ADDRESS, ADDRESS, ADDRESS), codegen


@intrinsic
def call_plain(tyctx, function):
    """Calls the C function `int f(void)` at the address `function`."""

    def codegen(ctx, b, sig, a):
        ty = ir.FunctionType(_I32, [])
        b.call(b.inttoptr(a[0], ty.as_pointer()), [])
        return ctx.get_dummy_value()

    return types.void(ADDRESS), codegen


@intrinsic
def call_lock(tyctx, function, lock, flag):
    """Calls the C function `int f(void *lock, int flag)` at the address `function`; C lets it ignore the flag."""

    def codegen(ctx, b, sig, a):
        ty = ir.FunctionType(_I32, [_I64, _I32])
        b.call(b.inttoptr(a[0], ty.as_pointer()), [a[1], b.trunc(a[2], _I32)])
        return ctx.get_dummy_value()

    return types.void(ADDRESS, ADDRESS, types.int64), codegen


@intrinsic
def unpack_params(tyctx, address, n):
    """The `n` int64 at `address`, as a tuple."""
    count = n.literal_value
    ret = types.UniTuple(ADDRESS, count)

    def codegen(ctx, b, sig, a):
        values = [_load(b, _offset(b, a[0], 8 * i), _I64) for i in range(count)]
        return ctx.make_tuple(b, ret, values)

    return ret(ADDRESS, n), codegen


# --- for the encoders -----------------------------------------------------------------------------------------------


@intrinsic
def select_less(tyctx, x, y, a_, b_):
    """a where x < y, else b, lane by lane (x, y float32; a, b of one type). NaN is never less."""

    def codegen(ctx, b, sig, a):
        return b.select(b.fcmp_ordered("<", a[0], a[1]), a[2], a[3])

    return a_(x, y, a_, b_), codegen


def stairs(edges, values, elem):
    """A function of a float32 vector: values[k] for the number k of `edges` (ascending) that a lane reaches."""

    @intrinsic
    def step(tyctx, x):
        ret = Vector(elem)

        def codegen(ctx, b, sig, a):
            out = _const(ret.ir_type, values[0])
            for edge, value in zip(edges, values[1:], strict=True):
                reached = b.fcmp_ordered(">=", a[0], _const(F32.ir_type, edge))
                out = b.select(reached, _const(ret.ir_type, value), out)
            return out

        return ret(x), codegen

    return step
