"""Weights that are quantized already: what the tensors of a module mean together, read as float32 or in GGUF's own blocks.

The tensors say what they are; config.json's quantization_config adds what they don't say, such as GPTQ's convention of zero
points. What isn't known here stays as it is and is refused where a matrix is needed.

Sources of the layouts: GPTQ, AutoGPTQ's QuantLinear (qlinear_cuda_old.py); AWQ, AutoAWQ's packing_utils.py; the package
compressed-tensors; bitsandbytes' QuantState.as_dict; NVFP4 of modelopt, vLLM's and compressed-tensors' readers; MXFP4 of
gpt-oss, transformers' integrations/mxfp4.py.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from ggpy.errors import ConversionError, UnsupportedError
from ggpy.quant import block_type

from .checkpoint import FLOAT8, FLOAT_TYPES, OTHER_TYPES, Config, Rows, ScaledRows, StoredRows, shown

# The 4-bit floats (e2m1) by their bits: a sign, two of the exponent, one of the mantissa.
FP4 = np.array((0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6), np.float32)
# Where AWQ has put the columns of eight: the first's bits are in place 0, the second's in place 4.
AWQ_ORDER = np.array((0, 4, 1, 5, 2, 6, 3, 7))
# What modules have for rounding activations, and keys and values in a cache: nothing is rounded by that here.
OF_ACTIVATIONS = ("input_scale", "input_zero_point", "input_global_scale", "activation_scale", "output_scale")
OF_CACHES = (".k_scale", ".v_scale", ".k_zero_point", ".v_zero_point")


@dataclass(frozen=True)
class BlockRows:
    """A tensor of MXFP4: 32 values share a scale, a power of two (implements `Rows`).

    Attributes
    ----------
    blocks : StoredRows
        U8, (…, n_rows, n_blocks, 16): two values a byte, neighbours, the first in the lower half.
    scales : StoredRows
        U8, (…, n_rows, n_blocks): exponents, 127 for 2^0.
    first, step : int
        Of the stored rows every `step`-th is taken, from `first` on.
    """

    blocks: StoredRows
    scales: StoredRows
    first: int = 0
    step: int = 1

    block_type: ClassVar[str] = "MXFP4"

    @property
    def shape(self) -> tuple[int, ...]:
        *stack, n_rows, n_blocks = self.scales.shape
        return *stack, n_rows // self.step, 32 * n_blocks

    @property
    def sources(self) -> tuple[str, ...]:
        return self.blocks.name, self.scales.name

    def every(self, step: int, first: int) -> BlockRows:
        """Every `step`-th row, from `first` on."""
        if self.scales.shape[-2] % step:
            raise ConversionError(f"{self.scales.path}: tensor {self.scales.name}: {self.scales.shape[-2]} rows are odd")
        return replace(self, step=step, first=first)

    def read_blocks(self, start: int, stop: int) -> np.ndarray:
        """Rows in GGUF's blocks: uint8 (stop - start, row_bytes). A block's exponent comes first, and a byte's halves are
        values 16 apart.

        Raises
        ------
        ConversionError
            A scale is NaN.
        """
        n_blocks = self.scales.shape[-1]
        low, high = start * self.step + self.first, (stop - 1) * self.step + self.first + 1
        scales = self.scales.raw(low, high)[:: self.step]
        if (scales == 255).any():
            raise ConversionError(f"{self.scales.path}: tensor {self.scales.name}: a scale is NaN (255)")
        packed = self.blocks.raw(low * n_blocks, high * n_blocks).reshape(-1, n_blocks, 16)[:: self.step]
        values = np.stack((packed & 15, packed >> 4), axis=-1).reshape(-1, n_blocks, 2, 16)
        out = np.concatenate((scales[:, :, None], values[:, :, 0] | values[:, :, 1] << 4), axis=-1)
        return out.reshape(stop - start, -1)

    def read(self, start: int, stop: int) -> np.ndarray:
        return block_type(self.block_type).dequantize(self.read_blocks(start, stop))


@dataclass(frozen=True)
class GroupedRows:
    """A matrix of integers or 4-bit floats, whose columns in a group share a scale and a zero point (implements `Rows`).

    Attributes
    ----------
    sources : tuple of str
    shape : tuple of int
    quants : callable
        ``quants(start, stop)``: numbers, (stop - start, n_columns).
    scales : callable
        The same for (stop - start, n_groups); float32.
    zeros : callable or None
        The same; None for 0.
    group : numpy.ndarray
        The group of each column.
    """

    sources: tuple[str, ...]
    shape: tuple[int, ...]
    quants: Callable[[int, int], np.ndarray]
    scales: Callable[[int, int], np.ndarray]
    zeros: Callable[[int, int], np.ndarray] | None
    group: np.ndarray

    def read(self, start: int, stop: int) -> np.ndarray:
        values = self.quants(start, stop).astype(np.float32)
        if self.zeros is not None:
            values -= self.zeros(start, stop).astype(np.float32)[:, self.group]
        return values * self.scales(start, stop)[:, self.group]


@dataclass(frozen=True)
class MappedRows:
    """A matrix of places in a table of 16 values; `size` values, one after the other, share a scale (implements `Rows`).

    ``scales(start, stop)`` gives some of the scales.
    """

    packed: StoredRows
    shape: tuple[int, ...]
    table: np.ndarray
    scales: Callable[[int, int], np.ndarray]
    size: int

    @property
    def sources(self) -> tuple[str, ...]:
        return (self.packed.name,)

    def read(self, start: int, stop: int) -> np.ndarray:
        low, high = start * self.shape[-1], stop * self.shape[-1]
        packed = replace(self.packed, shape=(self.packed.n_bytes, 1)).raw(low // 2, -(-high // 2))
        places = np.stack((packed >> 4, packed & 15), axis=-1).reshape(-1)[low % 2 :][: high - low]
        first = low // self.size
        scales = self.scales(first, -(-high // self.size))
        values = self.table[places] * scales[np.arange(low, high) // self.size - first]
        return values.reshape(stop - start, self.shape[-1])


def unpacked(words: np.ndarray, n_bits: int, n: int) -> np.ndarray:
    """Unsigned numbers of `n_bits` ≤ 8 that follow one another along the last axis, lowest bits first.

    Parameters
    ----------
    words : numpy.ndarray
        Little-endian integers, (…, n_words).
    n_bits, n : int

    Returns
    -------
    numpy.ndarray
        uint8 (…, n)
    """
    stream = np.ascontiguousarray(words).view(np.uint8)
    stream = np.concatenate((stream, np.zeros((*stream.shape[:-1], 1), np.uint8)), axis=-1).astype(np.uint16)
    first = np.arange(n) * n_bits
    pairs = stream[..., first // 8] | stream[..., first // 8 + 1] << np.uint16(8)
    return (pairs >> (first % 8).astype(np.uint16) & np.uint16((1 << n_bits) - 1)).astype(np.uint8)


def _columns(rows: StoredRows, start: int, stop: int) -> np.ndarray:
    """Columns of a stored matrix of integers: (n_rows, stop - start)."""
    n_rows, n_columns = rows.shape
    n, size = rows.itemsize, stop - start
    with rows.path.open("rb") as file:
        parts = []
        for i in range(n_rows):
            file.seek(rows.offset + (i * n_columns + start) * n)
            parts.append(file.read(size * n))
    data = b"".join(parts)
    if len(data) != n_rows * size * n:
        raise ConversionError(f"{rows.path}: ends inside tensor {rows.name}")
    return np.frombuffer(data, OTHER_TYPES[rows.dtype]).reshape(n_rows, size)


class _Parts:
    """The tensors of a checkpoint by name, and which of them have been taken.

    Attributes
    ----------
    tensors : mapping
    settings : Config
        quantization_config.
    taken : set of str
    """

    def __init__(self, tensors: Mapping[str, StoredRows], settings: Config):
        self.tensors, self.settings = tensors, settings
        self.taken: set[str] = set()

    def get(self, name: str, *dtypes: str) -> StoredRows | None:
        """A tensor of one of these types, and note it as taken."""
        rows = self.tensors.get(name)
        if rows is not None and rows.dtype not in dtypes:
            raise UnsupportedError(f"{rows.path}: tensor {name} is {rows.dtype}; known: {', '.join(dtypes)}")
        self.taken.add(name)
        return rows

    def need(self, name: str, *dtypes: str) -> StoredRows:
        rows = self.get(name, *dtypes)
        if rows is None:
            raise ConversionError(f"{self.settings.path}: no tensor {name}, which quantized weights need")
        return rows


_FLOATS = tuple(name for name in FLOAT_TYPES if name not in FLOAT8)


def _expect(rows: StoredRows, *shape: int) -> None:
    if rows.shape != shape:
        raise ConversionError(f"{rows.path}: tensor {rows.name} is {rows.shape}, not {shape}")


def _all(rows: StoredRows) -> np.ndarray:
    """All of a small tensor, in one dimension."""
    return replace(rows, shape=(1, math.prod(rows.shape))).read(0, 1)[0] if rows.dtype in FLOAT_TYPES else _all_raw(rows)


def _all_raw(rows: StoredRows) -> np.ndarray:
    return replace(rows, shape=(1, math.prod(rows.shape))).raw(0, 1)[0]


def _groups(index: StoredRows | None, n_columns: int, n_groups: int, size: int, where: str) -> np.ndarray:
    """The group of each column: by an index, or `size` columns after each other."""
    group = np.arange(n_columns) // size if index is None else _all_raw(index).astype(np.int64)
    if group.shape != (n_columns,) or group.min() < 0 or group.max() >= n_groups:
        raise ConversionError(f"{where}: its {n_columns} columns don't fall into {n_groups} groups")
    return group


def _gptq(parts: _Parts, stem: str) -> GroupedRows:
    """Words of a column go down the rows; a zero point is stored less one, unless checkpoint_format is gptq_v2."""
    settings = parts.settings
    quants, scales = parts.need(f"{stem}.qweight", "I32"), parts.need(f"{stem}.scales", *_FLOATS)
    zeros, index = parts.need(f"{stem}.qzeros", "I32"), parts.get(f"{stem}.g_idx", "I32")
    kind = settings.choice("format" if "format" in settings.values else "checkpoint_format", ("gptq", "gptq_v2"), "gptq")
    settings.only("is_marlin_format", False)
    n_bits = settings.integer("bits")
    n_words, n_rows = quants.shape
    if index is not None and not settings.get("dynamic") and n_words * 32 != n_bits * math.prod(index.shape):
        raise ConversionError(f"{quants.path}: tensor {quants.name} isn't of {n_bits} bits, as config.json says")
    if index is not None:  # GPTQModel's `dynamic` gives some matrices other bits
        n_bits = n_words * 32 // math.prod(index.shape)
    if n_bits not in (2, 3, 4, 8):
        raise UnsupportedError(f"{quants.path}: tensor {quants.name} has {n_bits} bits; known: 2, 3, 4, 8")
    n_columns, n_groups = n_words * 32 // n_bits, scales.shape[0]
    _expect(scales, n_groups, n_rows)
    _expect(zeros, n_groups, -(-n_rows * n_bits // 32))
    size = settings.integer("group_size", -1, least=-1)
    group = _groups(index, n_columns, n_groups, size if size > 0 else n_columns, f"{quants.path}: tensor {quants.name}")
    words = zeros.raw(0, n_groups)
    if kind == "gptq":
        if n_bits == 3:
            raise UnsupportedError(f"{quants.path}: GPTQ of 3 bits whose zero points are one less: programs differ on them")
        # One more in each place of a word, where a zero point of 0 has borrowed from the next place (GPTQModel).
        words = (words.view(np.uint32) + np.uint32(sum(1 << i for i in range(0, 32, n_bits)))).view(np.int32)
    zero_points = unpacked(words, n_bits, n_rows)  # (n_groups, n_rows)
    return GroupedRows(
        (quants.name, zeros.name, scales.name),
        (n_rows, n_columns),
        lambda start, stop: unpacked(_columns(quants, start, stop).T, n_bits, n_columns),
        lambda start, stop: scales.read(0, n_groups)[:, start:stop].T,
        lambda start, stop: zero_points[:, start:stop].T,
        group,
    )


def _awq(parts: _Parts, stem: str) -> GroupedRows:
    """Words go along the rows of the transposed matrix, eight columns a word in an order of their own."""
    settings = parts.settings
    quants, scales = parts.need(f"{stem}.qweight", "I32"), parts.need(f"{stem}.scales", *_FLOATS)
    zeros = parts.need(f"{stem}.qzeros", "I32")
    for key in ("version", "format"):
        if settings.get(key) is not None and str(settings.get(key)).lower() != "gemm":
            raise UnsupportedError(f"{settings.path}: AWQ in the form {shown(settings.get(key))}; known: gemm")
    settings.only("zero_point", True)
    settings.only("bits" if "bits" in settings.values else "w_bit", 4)
    n_columns, n_rows, n_groups = quants.shape[0], 8 * quants.shape[1], scales.shape[0]
    _expect(scales, n_groups, n_rows)
    _expect(zeros, n_groups, n_rows // 8)
    size = settings.integer("group_size" if "group_size" in settings.values else "q_group_size", 128, least=-1)
    group = _groups(None, n_columns, n_groups, size if size > 0 else n_columns, f"{quants.path}: tensor {quants.name}")

    def ordered(words: np.ndarray, n: int) -> np.ndarray:
        return unpacked(words, 4, n).reshape(len(words), -1, 8)[:, :, AWQ_ORDER].reshape(len(words), -1)

    def some(start: int, stop: int) -> np.ndarray:
        first, last = start // 8, -(-stop // 8)
        return ordered(_columns(quants, first, last), 8 * (last - first)).T[start - 8 * first : stop - 8 * first]

    zero_points = ordered(zeros.raw(0, n_groups), n_rows)
    return GroupedRows(
        (quants.name, zeros.name, scales.name),
        (n_rows, n_columns),
        some,
        lambda start, stop: scales.read(0, n_groups)[:, start:stop].T,
        lambda start, stop: zero_points[:, start:stop].T,
        group,
    )


def _weights_settings(settings: Config) -> list[dict[str, Any]]:
    """What compressed-tensors says of weights, for each of its groups of modules."""
    groups = settings.get("config_groups") or {}
    found = (
        [group.get("weights") for group in groups.values() if isinstance(group, dict)] if isinstance(groups, dict) else []
    )
    return [weights for weights in found if isinstance(weights, dict)]


def _sharing(scales: StoredRows, n_rows: int, shape: tuple[int, ...]) -> Callable[[int, int], np.ndarray]:
    """Scales by rows: stored so, or one for all rows."""
    if math.prod(scales.shape) == 1:
        one = _all(scales)[None]
        return lambda start, stop: np.broadcast_to(one, (stop - start, 1))
    if scales.shape not in (shape, shape[:1] if shape[1:] == (1,) else shape):
        raise ConversionError(f"{scales.path}: tensor {scales.name} is {scales.shape}, not {shape}")
    return replace(scales, shape=shape).read


def _integers(parts: _Parts, stem: str) -> GroupedRows:
    """compressed-tensors: signed integers, packed to words with an offset or as bytes, with scales and zero points."""
    settings = parts.settings
    index, scales = parts.get(f"{stem}.weight_g_idx", "I32", "I64"), parts.need(f"{stem}.weight_scale", *_FLOATS)
    packed = f"{stem}.weight_packed" in parts.tensors
    quants = parts.need(f"{stem}.weight_packed" if packed else f"{stem}.weight", "I32" if packed else "I8")
    if len(quants.shape) != 2:
        raise UnsupportedError(f"{quants.path}: tensor {quants.name} is {quants.shape}; known: matrices")
    n_rows, n_columns, n_bits = *quants.shape, 8
    if packed:
        given = _all_raw(parts.need(f"{stem}.weight_shape", "I64", "I32")).tolist()
        if len(given) != 2 or given[0] != n_rows or given[1] < 1:
            raise ConversionError(f"{quants.path}: tensor {quants.name} has {n_rows} rows, weight_shape says {given}")
        n_columns = given[1]
        known = {weights.get("num_bits") for weights in _weights_settings(settings)}
        bits = [n for n in range(1, 9) if n in known and -(-n_columns * n // 32) == quants.shape[1]]
        if len(bits) != 1:
            raise ConversionError(f"{quants.path}: tensor {quants.name}: config.json doesn't say how many bits it has")
        n_bits = bits[0]
    offset, n_groups = 1 << (n_bits - 1), 1 if len(scales.shape) < 2 else scales.shape[1]
    if index is not None and (_all_raw(index) < 0).any():
        index = None  # compressed-tensors' word for none
    sizes = [s for w in _weights_settings(settings) if isinstance(s := w.get("group_size"), int) and s > 0]
    size = next((s for s in sizes if -(-n_columns // s) == n_groups), -(-n_columns // n_groups))
    group = _groups(index, n_columns, n_groups, size, f"{quants.path}: tensor {quants.name}")
    zeros = parts.get(f"{stem}.weight_zero_point", "I32", "I8")
    points: Callable[[int, int], np.ndarray] | None = None
    if zeros is not None and zeros.dtype == "I32":
        _expect(zeros, -(-n_rows * n_bits // 32), n_groups)
        values = unpacked(zeros.raw(0, zeros.shape[0]).T, n_bits, n_rows).T.astype(np.int16) - offset
        points = lambda start, stop: values[start:stop]  # noqa: E731
    elif zeros is not None:
        shape = (1, 1) if math.prod(zeros.shape) == 1 else (n_rows, n_groups)
        all_points = np.broadcast_to(_all_raw(zeros).reshape(shape), (n_rows, n_groups))
        points = lambda start, stop: all_points[start:stop]  # noqa: E731

    def numbers(start: int, stop: int) -> np.ndarray:
        stored = quants.raw(start, stop)
        return unpacked(stored, n_bits, n_columns).astype(np.int16) - offset if packed else stored

    shares = _sharing(scales, n_rows, (n_rows, n_groups))
    return GroupedRows((quants.name, scales.name), (n_rows, n_columns), numbers, shares, points, group)


def _fp4(parts: _Parts, stem: str) -> GroupedRows | BlockRows:
    """4-bit floats, two a byte: MXFP4's with powers of two as scales, NVFP4's with 8-bit floats and a scale for all."""
    packed = f"{stem}.weight_packed" in parts.tensors
    quants = parts.need(f"{stem}.weight_packed" if packed else f"{stem}.weight", "U8")
    scales = parts.need(f"{stem}.weight_scale", "U8", "F8_E8M0", "F8_E4M3")
    if len(quants.shape) != 2:
        raise UnsupportedError(f"{quants.path}: tensor {quants.name} is {quants.shape}; known: matrices")
    n_rows, n_columns = quants.shape[0], 2 * quants.shape[1]
    if scales.dtype != "F8_E4M3":
        _expect(scales, n_rows, n_columns // 32)
        return BlockRows(replace(quants, shape=(n_rows, n_columns // 32, 16)), scales)
    _expect(scales, n_rows, n_columns // 16)
    whole = parts.need(f"{stem}.weight_global_scale" if packed else f"{stem}.weight_scale_2", *_FLOATS)
    factor = _all(whole)[0]
    factor = 1 / factor if packed else factor
    return GroupedRows(
        (quants.name, scales.name, whole.name),
        (n_rows, n_columns),
        lambda start, stop: FP4[unpacked(quants.raw(start, stop), 4, n_columns)],
        lambda start, stop: scales.read(start, stop) * factor,
        None,
        np.arange(n_columns) // 16,
    )


def _bnb_8(parts: _Parts, stem: str) -> GroupedRows:
    """bitsandbytes' LLM.int8: each row's largest value is 127."""
    quants, scales = parts.need(f"{stem}.weight", "I8"), parts.need(f"{stem}.SCB", *_FLOATS)
    form = parts.get(f"{stem}.weight_format", "U8")
    if form is not None and _all_raw(form).any():
        raise UnsupportedError(f"{form.path}: tensor {form.name}: an order of values for GPUs; known: rows")
    _expect(scales, quants.shape[0])
    n_rows, n_columns = quants.shape
    return GroupedRows(
        (quants.name, scales.name),
        (n_rows, n_columns),
        quants.raw,
        lambda start, stop: _all(scales)[start:stop, None] / np.float32(127),
        None,
        np.zeros(n_columns, np.int64),
    )


def _bnb_4(parts: _Parts, stem: str) -> MappedRows:
    """bitsandbytes' NF4 and FP4: a table of values, and scales that may be quantized themselves."""
    name = f"{stem}.weight"
    quants, scales = parts.need(name, "U8"), parts.need(f"{name}.absmax", "F32", "U8")
    table = _all(parts.need(f"{name}.quant_map", "F32"))
    kind = next((k for k in ("nf4", "fp4") if f"{name}.quant_state.bitsandbytes__{k}" in parts.tensors), "nf4")
    state = parts.need(f"{name}.quant_state.bitsandbytes__{kind}", "U8")
    try:
        values = json.loads(_all_raw(state).tobytes())
        read = Config(values, quants.path)
        shape = tuple(Config({"n": n}, quants.path).integer("n") for n in values["shape"])
    except (ValueError, TypeError, KeyError) as error:
        raise ConversionError(f"{state.path}: tensor {state.name} isn't a sound description: {error}") from None
    size, n = read.integer("blocksize"), math.prod(shape)
    n_scales = math.prod(scales.shape)
    column = replace(scales, shape=(n_scales, 1))
    if len(table) != 16 or n_scales != -(-n // size) or quants.n_bytes != -(-n // 2) or len(shape) != 2:
        raise ConversionError(f"{quants.path}: tensor {name}: its parts don't fit a matrix of {shape}")
    if scales.dtype != "U8":
        return MappedRows(quants, shape, table, lambda start, stop: column.read(start, stop)[:, 0], size)
    inner = _all(parts.need(f"{name}.nested_absmax", "F32"))
    outer = _all(parts.need(f"{name}.nested_quant_map", "F32"))
    n_inner, offset = read.integer("nested_blocksize"), np.float32(read.number("nested_offset"))
    if len(outer) != 256 or len(inner) != -(-n_scales // n_inner):
        raise ConversionError(f"{scales.path}: tensor {scales.name}: its own scales don't fit")

    def dequantized_scales(start: int, stop: int) -> np.ndarray:
        return outer[column.raw(start, stop)[:, 0]] * inner[np.arange(start, stop) // n_inner] + offset

    return MappedRows(quants, shape, table, dequantized_scales, size)


def _float8(parts: _Parts, stem: str) -> Rows:
    """8-bit floats with scales: one for all, for each row, or for each block."""
    rows = parts.tensors[f"{stem}.weight" if f"{stem}.weight" in parts.tensors else stem]
    scale = next((n for end in ("_scale_inv", "_scale") if (n := rows.name + end) in parts.tensors), None)
    if scale is None:
        raise UnsupportedError(f"{rows.path}: tensor {rows.name} is {rows.dtype} without {rows.name}_scale_inv")
    parts.taken |= {rows.name, scale}
    size = parts.settings.get("weight_block_size")
    sizes = (weights.get("block_structure") for weights in _weights_settings(parts.settings))
    return _with_scales(rows, parts.tensors[scale], size or next((s for s in sizes if s), None))


def _with_scales(rows: StoredRows, scales: StoredRows, block_size: Any) -> ScaledRows:
    where = f"{scales.path}: tensor {scales.name}"
    if scales.dtype not in _FLOATS:
        raise UnsupportedError(f"{where}: scales of type {scales.dtype}")
    *stack, n_rows, n_columns = (1, *rows.shape) if len(rows.shape) == 1 else rows.shape
    n_scales = math.prod(scales.shape)
    if n_scales == 1 and not stack:
        block = (n_rows, n_columns)
    elif n_scales == n_rows and scales.shape in ((n_rows,), (n_rows, 1)):
        block = (1, n_columns)
    else:
        config = f"{rows.path.parent / 'config.json'}: quantization_config's weight_block_size"
        sizes = block_size if isinstance(block_size, list) else []
        if len(sizes) != 2 or not all(type(size) is int and size > 0 for size in sizes):
            raise ConversionError(f"{config} must be a list of two sizes, not {shown(block_size)}")
        block = (sizes[0], sizes[1])
    expected = (*stack, -(-n_rows // block[0]), -(-n_columns // block[1]))
    if scales.shape != expected and n_scales != math.prod(expected):
        raise ConversionError(f"{where} is {scales.shape}; {rows.name} in blocks of {block} has {expected}")
    return ScaledRows(rows, replace(scales, shape=expected), block)


def _mxfp4(parts: _Parts, stem: str) -> BlockRows:
    """gpt-oss' experts."""
    blocks, scales = parts.need(f"{stem}_blocks", "U8"), parts.need(f"{stem}_scales", "U8", "F8_E8M0")
    _expect(blocks, *scales.shape, 16)
    return BlockRows(blocks, scales)


@dataclass(frozen=True)
class Method:
    """A form of quantized weights.

    Attributes
    ----------
    name : str
        For messages.
    end : str
        How the name of the tensor ends by which it is known; what precedes is the module's name.
    dtypes : tuple of str
        That tensor's types.
    beside : str
        How the name of another tensor ends that must be there.
    read : callable
        ``read(parts, stem)``
    becomes : str
        What follows the module's name in the tensor's new name.
    quant_method : str
        What quantization_config must say; "" for anything.
    """

    name: str
    end: str
    dtypes: tuple[str, ...]
    beside: str
    read: Callable[[_Parts, str], Rows]
    becomes: str = ".weight"
    quant_method: str = ""


# A tensor belongs to the first that fits it; scales may be 8-bit floats themselves, which therefore come last.
METHODS = (
    Method("GPTQ", ".qweight", ("I32",), ".qzeros", _gptq, quant_method="gptq"),
    Method("AWQ", ".qweight", ("I32",), ".qzeros", _awq, quant_method="awq"),
    Method("packed integers", ".weight_packed", ("I32",), ".weight_scale", _integers),
    Method("8-bit integers", ".weight", ("I8",), ".weight_scale", _integers),
    Method("8-bit integers (bitsandbytes)", ".weight", ("I8",), ".SCB", _bnb_8),
    Method("4-bit values (bitsandbytes)", ".weight", ("U8",), ".weight.absmax", _bnb_4),
    Method("NVFP4", ".weight_packed", ("U8",), ".weight_global_scale", _fp4),
    Method("NVFP4", ".weight", ("U8",), ".weight_scale_2", _fp4),
    Method("MXFP4", ".weight_packed", ("U8",), ".weight_scale", _fp4),
    Method("MXFP4", "_blocks", ("U8",), "_scales", _mxfp4, becomes="_blocks"),
    Method("8-bit floats", "", tuple(FLOAT8), "", _float8, becomes=""),
)


def dequantized(
    tensors: Mapping[str, StoredRows], settings: dict[str, Any], path: Path
) -> tuple[dict[str, Rows], dict[str, int]]:
    """The tensors, those of quantized weights as one matrix each.

    Parameters
    ----------
    tensors : mapping
    settings : dict
        quantization_config.
    path : Path
        Where that was read, for messages.

    Returns
    -------
    tensors : dict
        By name, such as ``model.layers.0.mlp.up_proj.weight``.
    found : dict
        How many matrices of which form, by `Method.name`.

    Raises
    ------
    ConversionError
        Parts are missing, or their shapes don't fit.
    UnsupportedError
        A variant that isn't known.
    """
    parts = _Parts(tensors, Config(settings, path))
    result: dict[str, Rows] = {}
    found: dict[str, int] = {}
    for method in METHODS:
        if method.quant_method not in ("", settings.get("quant_method")):
            continue
        for name, rows in tensors.items():
            stem = name.removesuffix(method.end)
            fits = name.endswith(method.end) and rows.dtype in method.dtypes and stem + method.beside in tensors
            if fits and name not in parts.taken:
                try:
                    result[stem + method.becomes] = method.read(parts, stem)
                except (ValueError, IndexError, TypeError, ZeroDivisionError) as error:  # shapes of any kind
                    raise ConversionError(f"{rows.path}: what belongs to {name} doesn't fit together: {error}") from None
                found[method.name] = found.get(method.name, 0) + 1
                parts.taken |= {f"{stem.removesuffix('.weight')}.{part}" for part in OF_ACTIVATIONS}
    if found:
        parts.taken |= {name for name in tensors if name.endswith(OF_CACHES)}
    return {name: rows for name, rows in tensors.items() if name not in parts.taken} | result, found
