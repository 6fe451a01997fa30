"""Opening GGUF files: one memory map a file, everything checked before use.

The format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import os
import re
import struct
from collections.abc import Mapping
from pathlib import Path
from types import EllipsisType, MappingProxyType
from typing import Any, TypeVar, overload

from ..errors import GGUFError
from . import metadata, tensors
from .cursor import Cursor, shorten
from .foreign import N_BYTES, what_is
from .mapped import Mapped
from .metadata import Metadata
from .tensors import GGUFTensor

T = TypeVar("T")
D = TypeVar("D")

VERSIONS = (2, 3)
DEFAULT_ALIGNMENT = 32

_U32 = struct.Struct("<I")
_SPLIT_NAME = re.compile(r"(.*-)(\d{5})-of-(\d{5})\.gguf", re.DOTALL)


def is_fit(value: float) -> bool:
    """Whether a model may have a number: it is finite, and float32 holds it."""
    return abs(value) < 2.0**127


class GGUFFile:
    """A GGUF model, memory-mapped.

    Of a model that is split into files named `name-00001-of-00003.gguf`, any one opens all.

    Parameters
    ----------
    path : str or path-like
        A GGUF file, version 2 or 3, little-endian.

    Attributes
    ----------
    path : Path
        The file; of a split model the first one.
    version : int
        Version of the GGUF format.
    alignment : int
        Bytes that the tensors' data are aligned to within the file.
    metadata : Metadata
        Key -> value, read when asked for; of a split model those of the first file.
    tensors : Mapping of str to GGUFTensor
        In the files' order.

    Raises
    ------
    GGUFError
        The file can't be opened, breaks the format, ends too early, or one of a split model's files is missing.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        parts = _open_parts(Path(path))
        self._parts = parts
        self.path = parts[0].mapped.path
        self.version = parts[0].version
        self.alignment = parts[0].alignment
        self.metadata = parts[0].metadata
        self.tensors: Mapping[str, GGUFTensor] = MappingProxyType(_by_name(parts))

    @overload
    def get(self, key: str, kind: type[T]) -> T: ...
    @overload
    def get(self, key: str, kind: type[T], default: D) -> T | D: ...
    @overload
    def get(self, key: str, kind: tuple[type, ...], default: Any = ...) -> Any: ...
    def get(self, key: str, kind: type | tuple[type, ...], default: Any = ...) -> Any:
        """A value of the metadata whose type is known.

        Parameters
        ----------
        key : str
        kind : type or tuple of types
            bool, int, float, str, numpy.ndarray or StringArray. Where a float is asked for, an integer is taken too;
            a bool is no integer. A float is finite and fits float32, as kernels take it.
        default : optional
            What to give where there is no such key.

        Raises
        ------
        GGUFError
            The key is missing and there is no default, or the value has another type.
        """
        if key not in self.metadata:
            if isinstance(default, EllipsisType):
                raise GGUFError(f"{self.path}: key {shorten(key)} is missing")
            return default
        value = self.metadata[key]
        kinds = kind if isinstance(kind, tuple) else (kind,)
        if type(value) is int and int not in kinds and float in kinds:
            value = float(value)
        if type(value) is float and float in kinds and not is_fit(value):
            raise GGUFError(f"{self.path}: key {shorten(key)}: {value} is no number for a model")
        if type(value) in kinds:
            return value
        wanted = " or ".join(kind.__name__ for kind in kinds)
        raise GGUFError(f"{self.path}: key {shorten(key)} must be {wanted}, not {type(value).__name__}")

    def check(self) -> None:
        """Raises GGUFError if a file was changed in place after it was opened."""
        for part in self._parts:
            part.mapped.check()

    def close(self) -> None:
        """Closes the files. Arrays that view them stay valid, and keep the map until they are gone."""
        for part in self._parts:
            part.mapped.close()

    def __enter__(self) -> GGUFFile:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<GGUFFile {str(self.path)!r}: {len(self.tensors)} tensors, {len(self.metadata)} keys>"


class _Part:
    """One file."""

    def __init__(self, path: Path) -> None:
        self.mapped = Mapped(path)
        cursor = Cursor(path, self.mapped.buffer)
        self.version = _read_version(cursor)
        n_tensors = cursor.count("tensors", tensors.LEAST_BYTES, tensors.MOST_TENSORS)
        n_entries = cursor.count("key-values", metadata.LEAST_BYTES, metadata.MOST_ENTRIES)
        entries = metadata.read_entries(cursor, n_entries)
        self.metadata = Metadata(self.mapped, entries)
        self.alignment = self._check_alignment(entries.get("general.alignment"))
        self.tensors = tensors.read_tensors(cursor, n_tensors, self.alignment, self.mapped)

    def _check_alignment(self, entry: metadata.Entry | None) -> int:
        if entry is None:
            return DEFAULT_ALIGNMENT
        where = f"{self.mapped.path}: key 'general.alignment', byte {entry.offset}"
        if entry.type_id != metadata.UINT32 or entry.n_items is not None:
            raise GGUFError(f"{where}: must be a uint32")
        alignment = self.metadata["general.alignment"]
        if alignment.bit_count() != 1:
            raise GGUFError(f"{where}: {alignment} isn't a power of two")
        return alignment

    def split(self, key: str, default: int) -> int:
        """The integer `split.<key>`."""
        value = self.metadata.get(f"split.{key}", default)
        if type(value) is not int:
            raise GGUFError(f"{self.mapped.path}: key 'split.{key}' must be an integer")
        return value


def _read_version(cursor: Cursor) -> int:
    magic = bytes(cursor.buffer[:4])
    if magic != b"GGUF":
        what = what_is(bytes(cursor.buffer[:N_BYTES]))
        raise cursor.error(f"not a GGUF file, {f'but {what}' if what else f'it starts with {magic!r}'}")
    cursor.position += 4
    (version,) = cursor.numbers(_U32)
    if version not in VERSIONS:
        cursor.position -= 4
        if version and version % 65536 == 0:
            raise cursor.error("a big-endian GGUF file; ggpy reads little-endian ones")
        raise cursor.error(f"GGUF version {version}; ggpy reads versions {' and '.join(map(str, VERSIONS))}")
    return version


def _open_parts(path: Path) -> list[_Part]:
    """Opens `path` and, where it is part of a split model, the other files, and checks that they belong together."""
    opened = _Part(path)
    n_parts = opened.split("count", 1)
    if n_parts in (0, 1):
        return [opened]
    name = _SPLIT_NAME.fullmatch(path.name)
    if name is None or int(name[3]) != n_parts or not 1 <= int(name[2]) <= n_parts:
        raise GGUFError(f"{path}: part of a model in {n_parts} files, but not named like 'name-00001-of-{n_parts:05}.gguf'")
    parts = []
    for i in range(n_parts):
        part_path = path.with_name(f"{name[1]}{i + 1:05}-of-{name[3]}.gguf")
        part = opened if part_path == path else _Part(part_path)
        stated = part.split("no", -1), part.split("count", -1)
        if stated != (i, n_parts):
            raise GGUFError(
                f"{part_path}: 'split.no' and 'split.count' are {stated}, but {(i, n_parts)} by the file's name"
            )
        parts.append(part)
    n_tensors = sum(len(part.tensors) for part in parts)
    expected = parts[0].split("tensors.count", n_tensors)
    if n_tensors != expected:
        raise GGUFError(
            f"{parts[0].mapped.path}: {n_tensors} tensors in {n_parts} files; 'split.tensors.count' says {expected}"
        )
    return parts


def _by_name(parts: list[_Part]) -> dict[str, GGUFTensor]:
    by_name: dict[str, GGUFTensor] = {}
    for part in parts:
        for tensor in part.tensors:
            if tensor.name in by_name:
                raise GGUFError(f"{tensor.path}: tensor {shorten(tensor.name)} is also in {by_name[tensor.name].path.name}")
            by_name[tensor.name] = tensor
    return by_name
