"""Points of a grid, looked up by their numbers: what the IQ types' blocks hold instead of values.

For 32 values of each lane's row a lookup takes the points' numbers and 32 flags, and gives a tile of 8 vectors like that of
`load_transposed`: byte b of vector q is value 4 q + b. There are two ways, by what the processor has:

- Where any of 128 bytes can be picked for each byte (AVX-512 VBMI), a point is two bytes of codes. They are looked up for
  all lanes at once in tables that take up to 16 pairs of vectors; codes are cut out of them, and a last table gives each
  code, beside its flag, its value. Bound by those instructions: some 40 for 32 values of all lanes, 90 with the largest
  grid.
- Elsewhere a point costs two loads, of its number and of its values; rows put together so are transposed. The instruction
  that gathers takes longer than both.
"""

import numpy as np
from llvmlite import ir

from .vector import (
    _BYTES,
    _I8,
    _I16,
    _I32,
    _I64,
    I32,
    LANES,
    TARGET,
    Tile,
    _call,
    _const,
    _constant,
    _hidden,
    _join,
    _load,
    _members,
    _offset,
    _pointer,
    _shuffle,
    _store,
    _transposed,
    intrinsic,
)

_PICKS_BYTES = LANES == 16 and TARGET.has("avx512vbmi")
_V = 4 * LANES  # bytes of a vector
_LEAF = 128  # bytes that one instruction picks from


def _dwords(k: int):
    return _const(I32.ir_type, k)


def _cut(b, v, *first: int):
    """Byte k of each lane: 8 bits of the lane, from bit first[k] on; those outside of the lane may be anything."""
    at = [(32 * (lane % 2) + bit) % 64 for lane in range(LANES) for bit in first]
    return _call(b, "llvm.x86.avx512.pmultishift.qb.512", _BYTES, [ir.Constant(_BYTES, at), b.bitcast(v, _BYTES)])


def _pick(b, low, index, high):
    """For each byte of the index the byte of that place, modulo 128, in the two vectors."""
    return _call(b, "llvm.x86.avx512.vpermi2var.qi.512", _BYTES, [low, index, high])


@intrinsic
def fields(tyctx, x, first, n):
    """Byte k of each lane: n bits of the lane, from bit first + k n on (literals; n ≤ 8)."""
    start, width = first.literal_value, n.literal_value

    def codegen(ctx, b, sig, a):
        if _PICKS_BYTES:
            cut = b.bitcast(_cut(b, a[0], *(start + k * width for k in range(4))), I32.ir_type)
            return b.and_(cut, _dwords(0x01010101 * ((1 << width) - 1)))
        v = b.lshr(a[0], _dwords(start))
        for kept, apart in ((2 * width, 16), (width, 8)):  # what is in a half goes to its own 16 bits, in a quarter to 8
            low = sum(((1 << kept) - 1) << at for at in range(0, 32, 2 * apart))
            v = b.or_(b.and_(v, _dwords(low)), b.and_(b.shl(v, _dwords(apart - kept)), _dwords(low << apart)))
        return v

    return I32(x, first, n), codegen


@intrinsic
def every_other_byte(tyctx, x, y, first):
    """Bytes first and first + 2 (a literal, 0 or 1) of each lane of x, then those of y."""
    start = first.literal_value
    order = [4 * lane + start + k for lane in range(LANES) for k in (0, 2, _V, _V + 2)]

    def codegen(ctx, b, sig, a):
        picked = _shuffle(b, b.bitcast(a[0], _BYTES), b.bitcast(a[1], _BYTES), order)
        return b.bitcast(picked, I32.ir_type)

    return I32(x, y, first), codegen


@intrinsic
def eight_signs(tyctx, x):
    """Of seven signs in each byte (below a bit of 0) all eight: the last makes the number of those set even."""
    all_eight = bytes(signs | signs.bit_count() % 2 << 7 for signs in range(_LEAF))

    def codegen(ctx, b, sig, a):
        if _PICKS_BYTES:
            halves = [ir.Constant(_BYTES, list(all_eight[i : i + _V])) for i in (0, _V)]
            return b.bitcast(_pick(b, halves[0], b.bitcast(a[0], _BYTES), halves[1]), I32.ir_type)
        t = a[0]
        for k in (4, 2, 1):
            t = b.xor(t, b.lshr(t, _dwords(k)))
        return b.or_(a[0], b.shl(b.and_(t, _dwords(0x01010101)), _dwords(7)))

    return I32(x), codegen


def point_lookup(points: np.ndarray, flagged: np.ndarray, per_value: bool):
    """A function (low, high, flags) -> tile of points' values.

    Byte k of vector i of `low` and `high` (vectors or tiles) is of the number of point 4 i + k: the low byte, and the bits
    above.

    Parameters
    ----------
    points, flagged : uint8 array (n_points, 4 or 8)
        Each point's values, and those where the flag is set: one function of a value and its flag.
    per_value : bool
        Whether `flags` has a bit for each value, in their order; those flags are signs: a value and that with the other
        sign have the same sum everywhere. Else each point has a flag, the last bit of its number, and `flags` is ignored.
    """
    emit = (_by_picking if _PICKS_BYTES else _by_loading)(points, flagged, per_value)

    @intrinsic
    def lookup(tyctx, low, high, flags):
        ret = Tile(I32, 8)

        def codegen(ctx, b, sig, a):
            return _join(b, ret, emit(b, _members(b, low, a[0]), _members(b, high, a[1]), a[2]))

        return ret(low, high, flags), codegen

    return lookup


# --- bytes picked from tables ---------------------------------------------------------------------------------------


def _by_picking(points, flagged, per_value):
    n_points, size = points.shape
    levels, codes = np.unique(points, return_inverse=True)
    codes = codes.reshape(points.shape)
    n_bits, width = (len(levels) - 1).bit_length(), 16 // size  # of a code, and of its place in the point's two bytes
    packed = (codes << width * np.arange(size)).sum(1).astype("<u2")
    planes = np.ascontiguousarray(packed.view(np.uint8).reshape(n_points, 2).T)
    n_high = (n_points // 256).bit_length() - 1  # bits of a number above its low byte
    # The value of a code and, a bit above, its flag; what stands in further bits doesn't matter.
    of_code = np.zeros((2, 1 << n_bits), np.uint8)
    of_code[0, codes], of_code[1, codes] = points, flagged
    values = np.resize(of_code, 64).tolist()

    def emit(b, low, high, flags):
        tables = _hidden(b, _constant(b, planes.tobytes()))

        def table(plane, k):
            load = b.load(_pointer(b, _offset(b, tables, n_points * plane + _V * k), _BYTES))
            load.align = _V
            return load

        def pick(plane, index, masks):
            """The plane's byte for each byte of the index, whose bits from 7 on are the masks."""
            left = [_pick(b, table(plane, 2 * k), index, table(plane, 2 * k + 1)) for k in range(n_points // _LEAF)]
            for mask in masks:
                left = [b.select(mask, left[i + 1], left[i]) for i in range(0, len(left), 2)]
            return left[0]

        found = []
        for v, w in zip(low, high, strict=True):
            v, w = b.bitcast(v, _BYTES), b.bitcast(w, _BYTES)
            masks = [b.icmp_signed("<", v, _const(_BYTES, 0))]
            for k in range(n_high):
                masks.append(b.icmp_unsigned("!=", b.and_(w, _const(_BYTES, 1 << k)), _const(_BYTES, 0)))
            found.append([pick(plane, v, masks) for plane in range(2)])
        out = []
        for q in range(8):
            vector, point = divmod(4 * q // size, 4)
            if size == 8:
                code = _cut(b, found[vector][q % 2], *(8 * point + width * k for k in range(4)))
            else:
                parts = [_cut(b, plane, *(8 * point + width * (k % 2) for k in range(4))) for plane in found[vector]]
                code = _shuffle(b, *parts, [i + _V * (i % 4 // 2) for i in range(_V)])
            if per_value:
                flag = _cut(b, flags, *(4 * q + k - n_bits for k in range(4)))
            else:
                flag = _cut(b, high[vector], *[8 * point + n_high - n_bits] * 4)
            low_bits = _const(_BYTES, (1 << n_bits) - 1)
            entry = b.or_(b.and_(code, low_bits), b.and_(flag, b.not_(low_bits)))
            value = _call(b, "llvm.x86.avx512.permvar.qi.512", _BYTES, [ir.Constant(_BYTES, values), entry])
            out.append(b.bitcast(value, I32.ir_type))
        return out

    return emit


# --- points loaded one by one ---------------------------------------------------------------------------------------


def _by_loading(points, flagged, per_value):
    size = points.shape[1]
    table = points if per_value else np.concatenate([points, flagged])
    is_wide = len(table) > 256
    entry = ir.IntType(8 * size)

    def numbers(b, low, high):
        """A function of a row and the number k of one of its points: the point's place in the table."""
        even = _dwords(0x00FF00FF)
        vectors = []
        for v, w in zip(low, high, strict=True):
            if is_wide:  # 16 bits for each, the even ones and the odd ones apart
                vectors.append(b.or_(b.and_(v, even), b.shl(b.and_(w, even), _dwords(8))))
                vectors.append(b.or_(b.and_(b.lshr(v, _dwords(8)), even), b.and_(w, _dwords(0xFF00FF00))))
            else:
                vectors.append(v)
        with b.goto_entry_block():
            room = b.alloca(ir.ArrayType(_I8, _V * len(vectors)))
            room.align = 64
        address = b.ptrtoint(room, _I64)
        for i, v in enumerate(vectors):
            _store(b, _offset(b, address, _V * i), v)

        def number(row, k):
            vector, byte = divmod(k, 4)
            if is_wide:
                offset = _V * (2 * vector + byte % 2) + 4 * row + byte // 2 * 2
            else:
                offset = _V * vector + 4 * row + byte
            return b.zext(_load(b, _offset(b, address, offset), _I16 if is_wide else _I8), _I64)

        return number

    def with_signs(b, q, v, flags):
        both = _const(_BYTES, int(points[0, 0]) + int(flagged[0, 0]))
        bits = ir.Constant(_BYTES, [1 << (4 * q + k) % 8 for _ in range(LANES) for k in range(4)])
        v, flags = b.bitcast(v, _BYTES), b.bitcast(flags, _BYTES)
        eight = _shuffle(b, flags, flags, [4 * lane + q // 2 for lane in range(LANES) for _ in range(4)])
        is_set = b.icmp_unsigned("!=", b.and_(eight, bits), _const(_BYTES, 0))
        return b.bitcast(b.select(is_set, b.sub(both, v), v), I32.ir_type)

    def emit(b, low, high, flags):
        number, first = numbers(b, low, high), _constant(b, table.tobytes())
        n_points_of_row = 32 // size
        per_part = 16 // size  # points of four dwords
        rows = []
        for row in range(LANES):
            parts = []
            for start in range(0, n_points_of_row, per_part):
                part = ir.Constant(ir.VectorType(entry, per_part), ir.Undefined)
                for k in range(per_part):
                    at = b.add(first, b.mul(number(row, start + k), ir.Constant(_I64, size)))
                    part = b.insert_element(part, _load(b, at, entry), ir.Constant(_I32, k))
                parts.append(b.bitcast(part, ir.VectorType(_I32, 4)))
            rows.append(parts)
        out = _transposed(b, rows)
        return [with_signs(b, q, v, flags) for q, v in enumerate(out)] if per_value else out

    return emit
