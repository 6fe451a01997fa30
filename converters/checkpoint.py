"""A Hugging Face checkpoint's folder: its JSON files, and its weights read a few rows at a time."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from ggpy.errors import ConversionError, UnsupportedError

# safetensors' float types. NumPy has no bfloat16: its bits are the upper half of a float32.
FLOAT_TYPES: dict[str, np.dtype[Any]] = {
    "F64": np.dtype("<f8"),
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype("<u2"),
}

# The files that a conversion can use, as patterns of huggingface_hub.
FILE_PATTERNS = ("model*.safetensors", "*.json", "tokenizer.model", "*.jinja", "README.md")

# The safetensors format allows headers up to this size.
MAX_HEADER_BYTES = 100_000_000

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"


class Rows(Protocol):
    """A tensor's values, read a few rows at a time. A row is everything along the last axis."""

    @property
    def shape(self) -> tuple[int, ...]:
        """NumPy shape."""

    @property
    def sources(self) -> tuple[str, ...]:
        """Names of the checkpoint's tensors that the values come from."""

    def read(self, start: int, stop: int) -> np.ndarray:
        """Rows start to stop, all axes but the last counted as one: float32, (stop - start, shape[-1])."""


@dataclass(frozen=True)
class StoredRows:
    """A tensor of a safetensors file (implements `Rows`)."""

    path: Path
    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int

    @property
    def sources(self) -> tuple[str, ...]:
        return (self.name,)

    def read(self, start: int, stop: int) -> np.ndarray:
        dtype = FLOAT_TYPES[self.dtype]
        n_columns = self.shape[-1]
        # Read rather than mapped: pages of a map count as this process's memory until the system takes them back.
        count = (stop - start) * n_columns
        values = np.fromfile(self.path, dtype, count, offset=self.offset + start * n_columns * dtype.itemsize)
        if values.size != count:
            raise ConversionError(f"{self.path}: ends inside tensor {self.name}")
        if self.dtype == "BF16":
            floats = (values.astype(np.uint32) << 16).view(np.float32)
        else:
            floats = values.astype(np.float32, copy=False)
        return floats.reshape(stop - start, n_columns)


@dataclass(frozen=True)
class PickedRows:
    """Another tensor's rows in another order, or some of them: row i is the other's row ``order[i]`` (implements `Rows`).

    A tensor with one axis has one row; its values are picked.
    """

    rows: Rows
    order: np.ndarray
    shape: tuple[int, ...]

    @property
    def sources(self) -> tuple[str, ...]:
        return self.rows.sources

    def read(self, start: int, stop: int) -> np.ndarray:
        if len(self.shape) == 1:
            return self.rows.read(start, stop)[:, self.order]
        wanted = self.order[start:stop]
        first = int(wanted.min())
        return self.rows.read(first, int(wanted.max()) + 1)[wanted - first]


@dataclass(frozen=True)
class StackedRows:
    """Tensors of one shape, one after the other along a new first axis (implements `Rows`)."""

    parts: tuple[Rows, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        return len(self.parts), *self.parts[0].shape

    @property
    def sources(self) -> tuple[str, ...]:
        return tuple(name for part in self.parts for name in part.sources)

    def read(self, start: int, stop: int) -> np.ndarray:
        n = math.prod(self.shape[1:-1])
        pieces = [self.parts[i].read(max(start - i * n, 0), min(stop - i * n, n)) for i in range(start // n, -(-stop // n))]
        return pieces[0] if len(pieces) == 1 else np.concatenate(pieces)


@dataclass(frozen=True)
class TransposedRows:
    """A tensor with three axes, its last two exchanged (implements `Rows`)."""

    rows: Rows

    @property
    def shape(self) -> tuple[int, ...]:
        n, n_rows, n_columns = self.rows.shape
        return n, n_columns, n_rows

    @property
    def sources(self) -> tuple[str, ...]:
        return self.rows.sources

    def read(self, start: int, stop: int) -> np.ndarray:
        _, n_rows, n_columns = self.shape
        first, last = start // n_rows, -(-stop // n_rows)
        matrices = self.rows.read(first * n_columns, last * n_columns).reshape(last - first, n_columns, n_rows)
        return matrices.swapaxes(1, 2).reshape(-1, n_columns)[start - first * n_rows : stop - first * n_rows]


@dataclass(frozen=True)
class ComputedRows:
    """Values that no tensor of the checkpoint holds (implements `Rows`)."""

    values: np.ndarray

    @property
    def shape(self) -> tuple[int, ...]:
        return self.values.shape

    @property
    def sources(self) -> tuple[str, ...]:
        return ()

    def read(self, start: int, stop: int) -> np.ndarray:
        return self.values.reshape(-1, self.shape[-1])[start:stop].astype(np.float32)


class Config:
    """The hyperparameters of config.json, each read with the type that it must have.

    Parameters
    ----------
    values : dict
        The file's object.
    path : Path
        Where it was read, for messages.
    """

    def __init__(self, values: dict[str, Any], path: Path):
        self.values = values
        self.path = path

    def get(self, key: str, default: Any = None) -> Any:
        """The value as the file has it; `default` where it is missing or null."""
        value = self.values.get(key)
        return default if value is None else value

    def integer(self, key: str, default: int | None = None, least: int = 1) -> int:
        """An integer, positive unless `least` says otherwise.

        Raises
        ------
        ConversionError
            Missing without a default, or something else than such an integer.
        """
        value = self.get(key, default)
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            wanted = "a positive integer" if least == 1 else f"an integer of at least {least}"
            raise ConversionError(f"{self.path}: {key} must be {wanted}, not {json.dumps(value)}")
        return value

    def only(self, key: str, known: Any) -> None:
        """Refuse any other value than the one that GGUF's readers take for granted; a missing key is fine.

        Raises
        ------
        UnsupportedError
            Another value.
        """
        value = self.get(key, known)
        if value != known:
            raise UnsupportedError(f"{self.path}: {key} {value!r}; known: {known}")

    def number(self, key: str, default: float | None = None) -> float:
        """A finite number; the same errors as `integer`."""
        value = self.get(key, default)
        if not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value):
            raise ConversionError(f"{self.path}: {key} must be a number, not {json.dumps(value)}")
        return float(value)


class Checkpoint:
    """A checkpoint's folder.

    Attributes
    ----------
    folder : Path
    config : Config
        Of config.json.
    architecture : str
        The class that config.json names, such as ``LlamaForCausalLM``.
    tensors : dict of str to StoredRows
        All tensors of all shards, by the checkpoint's names.

    Raises
    ------
    ConversionError
        A file is missing, is not what its name says, or ends too early.
    UnsupportedError
        The weights are quantized already, or no safetensors files.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        if not folder.is_dir():
            raise ConversionError(f"{folder}: no such folder")
        self.config = Config(self.json("config.json"), folder / "config.json")
        names = self.config.get("architectures")
        if not isinstance(names, list) or not names or not isinstance(names[0], str):
            raise ConversionError(f"{self.config.path}: names no architecture")
        self.architecture: str = names[0]
        quantization = self.config.get("quantization_config")
        if quantization is not None:
            method = quantization.get("quant_method", "?") if isinstance(quantization, dict) else "?"
            raise UnsupportedError(
                f"{self.config.path}: the weights are quantized already ({method}); float ones are needed"
            )
        self.tensors = self._read_tensors()

    def json(self, name: str, optional: bool = False) -> dict[str, Any]:
        """A JSON file's object; empty where it is optional and missing."""
        path = self.folder / name
        if optional and not path.is_file():
            return {}
        return read_json(path)

    def text(self, name: str) -> str | None:
        """A text file's content, None where there is no such file."""
        path = self.folder / name
        if not path.is_file():
            return None
        try:
            return path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ConversionError(f"{path}: {error}") from error

    def _read_tensors(self) -> dict[str, StoredRows]:
        single = self.folder / SINGLE_FILE
        index = self.folder / INDEX_FILE
        if index.is_file():
            weight_map = read_json(index).get("weight_map")
            if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
                raise ConversionError(f"{index}: has no weight_map from tensor names to files")
            tensors: dict[str, StoredRows] = {}
            for file in sorted(set(weight_map.values())):
                if Path(file).name != file:
                    raise ConversionError(f"{index}: {file!r} is not a file of this folder")
                path = self.folder / file
                if not path.is_file():
                    raise ConversionError(f"{path}: missing, {INDEX_FILE} names it")
                tensors |= {name: rows for name, rows in read_safetensors(path).items() if weight_map.get(name) == file}
            for name, file in weight_map.items():
                if name not in tensors:
                    raise ConversionError(f"{self.folder / file}: has no tensor {name}, {INDEX_FILE} says it does")
            return tensors
        if single.is_file():
            return read_safetensors(single)
        if any(self.folder.glob("*.bin")) or any(self.folder.glob("*.pth")):
            raise UnsupportedError(f"{self.folder}: only PyTorch pickles here; weights are read from {SINGLE_FILE} alone")
        raise ConversionError(f"{self.folder}: neither {SINGLE_FILE} nor {INDEX_FILE} here")


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file's object.

    Raises
    ------
    ConversionError
        No such file, not JSON, or not an object.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConversionError(f"{path}: no such file") from None
    except (OSError, ValueError, RecursionError) as error:
        raise ConversionError(f"{path}: not a JSON file: {error}") from error
    if not isinstance(values, dict):
        raise ConversionError(f"{path}: not a JSON object")
    return values


def read_safetensors(path: Path) -> dict[str, StoredRows]:
    """The tensors of a safetensors file, by name; only the header is read.

    The format (https://huggingface.co/docs/safetensors): 8 bytes, little-endian, of the header's length; the header,
    a JSON object from names to ``{"dtype", "shape", "data_offsets"}``; then the data, to which the offsets relate.

    Raises
    ------
    ConversionError
        Not a sound safetensors file.
    UnsupportedError
        A tensor of a type other than a float of 16 bits or more.
    """
    n_file = path.stat().st_size
    with path.open("rb") as file:
        prefix = file.read(8)
        n_header = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else n_file
        if n_header > min(n_file - 8, MAX_HEADER_BYTES):
            raise ConversionError(f"{path}: not a safetensors file, or cut short inside its header")
        try:
            header = json.loads(file.read(n_header))
        except (ValueError, RecursionError) as error:
            raise ConversionError(f"{path}: its header is not JSON: {error}") from error
    if not isinstance(header, dict):
        raise ConversionError(f"{path}: its header is not a JSON object")
    header.pop("__metadata__", None)
    return {name: _stored(path, name, entry, 8 + n_header, n_file) for name, entry in header.items()}


def _stored(path: Path, name: str, entry: Any, data_start: int, n_file: int) -> StoredRows:
    where = f"{path}: tensor {name}"
    if not isinstance(entry, Mapping):
        raise ConversionError(f"{where}: its entry is not an object")
    shape, (start, stop, *_) = _sizes(entry.get("shape"), where), (*_sizes(entry.get("data_offsets"), where), 0, 0)
    dtype = entry.get("dtype")
    if not isinstance(dtype, str) or dtype not in FLOAT_TYPES:
        raise UnsupportedError(f"{where}: type {dtype}; known: {', '.join(FLOAT_TYPES)}")
    if stop - start != math.prod(shape) * FLOAT_TYPES[dtype].itemsize:
        raise ConversionError(f"{where}: {dtype} {shape} doesn't fill bytes {start} to {stop}")
    if data_start + stop > n_file:
        raise ConversionError(f"{where}: the file ends before it does")
    return StoredRows(path, name, dtype, shape, data_start + start)


def _sizes(value: Any, where: str) -> tuple[int, ...]:
    if not isinstance(value, list) or not all(type(number) is int and number >= 0 for number in value):
        raise ConversionError(f"{where}: shape and data_offsets must be lists of sizes")
    return tuple(value)
