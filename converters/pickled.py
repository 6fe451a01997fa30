"""PyTorch's weights (pytorch_model.bin), read without PyTorch and without running what is in them.

The form since PyTorch 1.6: a zip archive of uncompressed entries, among them ``data.pkl``, a pickle of a dict from names to
tensors, and ``data/0``, ``data/1`` … with the values. The pickle may name the few functions and types that make up tensors;
another name is refused, so that no code of the file's choice is ever called.
"""

from __future__ import annotations

import io
import math
import pickle
import struct
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any, NamedTuple

from ggpy.errors import ConversionError, UnsupportedError

from .checkpoint import MAX_HEADER_BYTES, MAX_TENSORS, StoredRows

# Names of PyTorch's storages -> safetensors' types.
STORAGES = {
    "DoubleStorage": "F64",
    "FloatStorage": "F32",
    "HalfStorage": "F16",
    "BFloat16Storage": "BF16",
    "LongStorage": "I64",
    "IntStorage": "I32",
    "ShortStorage": "I16",
    "CharStorage": "I8",
    "ByteStorage": "U8",
    "BoolStorage": "BOOL",
}


class _Type(NamedTuple):
    dtype: str


class _Storage(NamedTuple):
    key: str
    dtype: str


class _Tensor(NamedTuple):
    storage: _Storage
    first: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


def _tensor(storage: Any, first: Any, shape: Any, stride: Any, *_: Any) -> _Tensor:
    numbers = (first, *shape, *stride)
    if not isinstance(storage, _Storage) or not all(type(n) is int and 0 <= n < 1 << 59 for n in numbers):
        raise ValueError("a tensor of something else than numbers")
    return _Tensor(storage, first, tuple(shape), tuple(stride))


def _parameter(tensor: Any, *_: Any) -> Any:
    return tensor


_CALLABLE = {
    ("collections", "OrderedDict"): OrderedDict,
    ("torch._utils", "_rebuild_tensor_v2"): _tensor,
    ("torch._utils", "_rebuild_parameter"): _parameter,
}


# The one in Python: that in C takes memory by numbers that stand in the file.
class _Unpickler(pickle._Unpickler):  # type: ignore[name-defined,misc]
    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and name in STORAGES:
            return _Type(STORAGES[name])
        if (module, name) not in _CALLABLE:
            raise pickle.UnpicklingError(f"it names {module}.{name}, which no weights need")
        return _CALLABLE[module, name]

    def persistent_load(self, pid: Any) -> _Storage:
        kind, dtype, key, *_ = pid
        if kind != "storage" or not isinstance(dtype, _Type) or not isinstance(key, str):
            raise pickle.UnpicklingError("it refers to something else than values")
        return _Storage(key, dtype.dtype)


def read_pickled(path: Path) -> dict[str, StoredRows]:
    """The tensors of a PyTorch file, by name.

    Raises
    ------
    ConversionError
        Not a sound file of weights.
    UnsupportedError
        A form from before PyTorch 1.6, something else than weights, or a tensor whose rows don't lie one after the other.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            infos = {info.filename.partition("/")[2]: info for info in archive.infolist()}
            if len(infos) > MAX_TENSORS:
                raise ConversionError(f"{path}: has more than {MAX_TENSORS:,} entries")
            if any(info.compress_type != zipfile.ZIP_STORED for info in infos.values()) or "data.pkl" not in infos:
                raise ConversionError(f"{path}: not PyTorch's weights: compressed, or without data.pkl")
            if infos["data.pkl"].file_size > MAX_HEADER_BYTES:
                raise ConversionError(f"{path}: its data.pkl has more than {MAX_HEADER_BYTES:,} bytes")
            if "byteorder" in infos and infos["byteorder"].file_size < 16 and archive.read(infos["byteorder"]) != b"little":
                raise UnsupportedError(f"{path}: its numbers are big-endian")
            pickled = archive.read(infos["data.pkl"])
    except zipfile.BadZipFile as error:
        raise UnsupportedError(f"{path}: {error}; PyTorch's weights are read from version 1.6 on") from None
    except (ConversionError, UnsupportedError):
        raise
    except Exception as error:  # an archive can be broken in many ways
        raise ConversionError(f"{path}: {error}") from error
    try:
        values = _Unpickler(io.BytesIO(pickled)).load()
        named = {name: tensor for name, tensor in values.items() if isinstance(name, str) and isinstance(tensor, _Tensor)}
        if len(named) != len(values):
            raise ValueError("it has more than tensors and their names")
    except Exception as error:  # a pickle can be broken in all ways
        reason = " ".join(str(error).split())
        raise UnsupportedError(f"{path}: not weights alone: {reason}") from None
    return {name: _rows(path, name, tensor, infos) for name, tensor in named.items()}


def _rows(path: Path, name: str, tensor: _Tensor, infos: dict[str, zipfile.ZipInfo]) -> StoredRows:
    where = f"{path}: tensor {name}"
    contiguous = tuple(math.prod(tensor.shape[i + 1 :]) for i in range(len(tensor.shape)))
    if any(a != b for a, b, n in zip(tensor.stride, contiguous, tensor.shape, strict=False) if n > 1):
        raise UnsupportedError(f"{where}: its values don't lie in order")
    info = infos.get(f"data/{tensor.storage.key}")
    if info is None:
        raise ConversionError(f"{where}: data/{tensor.storage.key} is missing")
    rows = StoredRows(path, name, tensor.storage.dtype, tensor.shape, 0)
    first = tensor.first * rows.itemsize
    if first + rows.n_bytes > info.file_size:
        raise ConversionError(f"{where}: {rows.dtype} {rows.shape} doesn't fit the {info.file_size} bytes that it has")
    with path.open("rb") as file:
        file.seek(info.header_offset)
        header = file.read(30)
    if len(header) < 30 or header[:4] != b"PK\x03\x04":
        raise ConversionError(f"{where}: data/{tensor.storage.key} isn't where the archive says")
    n_name, n_extra = struct.unpack("<2H", header[26:30])
    offset = info.header_offset + 30 + n_name + n_extra + first
    if offset + rows.n_bytes > path.stat().st_size:
        raise ConversionError(f"{where}: the file ends before it does")
    return StoredRows(path, name, rows.dtype, rows.shape, offset)
