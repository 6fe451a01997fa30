"""A Hugging Face checkpoint's folder: its JSON files, and its weights read a few rows at a time."""

from __future__ import annotations

import json
import math
import re
import stat
import struct
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from ggpy.errors import ConversionError, UnsupportedError
from ggpy.file.foreign import N_BYTES, what_is


def _float8(n_mantissa: int) -> np.ndarray:
    """The 256 values of an 8-bit float, float32 (OCP 8-bit Floating Point Specification, revision 1.0).

    E4M3 has no infinities, and NaN only where all bits but the sign are set; E5M2 is the upper half of a float16.
    """
    bits = np.arange(256, dtype=np.uint16)
    if n_mantissa == 2:
        with np.errstate(invalid="ignore"):  # ARM says so of NaN
            return (bits << 8).view("<f2").astype(np.float32)
    exponent, mantissa = (bits >> 3 & 15).astype(np.int32), (bits & 7) / 8
    values = np.where(exponent == 0, np.ldexp(mantissa, -6), np.ldexp(1 + mantissa, exponent - 7))
    values[bits & 127 == 127] = np.nan
    return np.where(bits & 128, -values, values).astype(np.float32)


# safetensors' types of weights. NumPy has no bfloat16: its bits are the upper half of a float32; and no 8-bit floats.
FLOAT_TYPES: dict[str, np.dtype[Any]] = {
    "F64": np.dtype("<f8"),
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype("<u2"),
    "F8_E4M3": np.dtype("u1"),
    "F8_E5M2": np.dtype("u1"),
}
FLOAT8: dict[str, np.ndarray] = {"F8_E4M3": _float8(3), "F8_E5M2": _float8(2)}

# The types that hold no floats; parts of quantized weights.
OTHER_TYPES: dict[str, np.dtype[Any]] = {
    "BOOL": np.dtype("u1"),
    "F8_E8M0": np.dtype("u1"),
    **{f"{kind}{8 * n}": np.dtype(f"<{kind.lower()}{n}") for kind in "UI" for n in (1, 2, 4, 8)},
}

# The files that a conversion can use, as patterns of huggingface_hub.
FILE_PATTERNS = (
    *("model*.safetensors", "adapter_model.safetensors", "*.json", "tokenizer.model", "merges.txt", "*.jinja", "README.md"),
)
# What is taken besides where there are no safetensors.
PICKLED_PATTERNS = ("pytorch_model*.bin",)

# The safetensors format allows headers up to this size; no JSON file of a checkpoint is larger either.
MAX_HEADER_BYTES = 100_000_000
# The most tensors of one file. DeepSeek V3 has 92,000 in 163 files.
MAX_TENSORS = 200_000

# What programs that wrap a model put before the names of all its tensors (torch.compile, DistributedDataParallel, PEFT).
WRAPPERS = ("_orig_mod.", "module.", "base_model.model.")
SHARD = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.safetensors")

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
PICKLED_FILE = "pytorch_model.bin"
PICKLED_INDEX = "pytorch_model.bin.index.json"
# Where AutoGPTQ kept its settings before config.json had them.
OLD_SETTINGS = "quantize_config.json"


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

    @property
    def itemsize(self) -> int:
        """Bytes of a value."""
        return (FLOAT_TYPES | OTHER_TYPES)[self.dtype].itemsize

    @property
    def n_bytes(self) -> int:
        """Size of the data."""
        return math.prod(self.shape) * self.itemsize

    def raw(self, start: int, stop: int) -> np.ndarray:
        """Rows start to stop as they are stored: of the dtype in `FLOAT_TYPES` or `OTHER_TYPES`."""
        dtype, n_columns = (FLOAT_TYPES | OTHER_TYPES)[self.dtype], self.shape[-1] if self.shape else 1
        # Read rather than mapped: pages of a map count as this process's memory until the system takes them back.
        count = (stop - start) * n_columns
        values = np.fromfile(self.path, dtype, count, offset=self.offset + start * n_columns * dtype.itemsize)
        if values.size != count:
            raise ConversionError(f"{self.path}: ends inside tensor {self.name}")
        return values.reshape(stop - start, n_columns)

    def read(self, start: int, stop: int) -> np.ndarray:
        values = self.raw(start, stop)
        if self.dtype == "BF16":
            return (values.astype(np.uint32) << 16).view(np.float32)
        return FLOAT8[self.dtype][values] if self.dtype in FLOAT8 else values.astype(np.float32, copy=False)


@dataclass(frozen=True)
class _OtherRows:
    """What is made of another tensor's values comes from where they come from."""

    rows: Rows

    @property
    def sources(self) -> tuple[str, ...]:
        return self.rows.sources


@dataclass(frozen=True)
class PickedRows(_OtherRows):
    """Another tensor's rows in another order, or some of them: row i is the other's row ``order[i]`` (implements `Rows`).

    A tensor with one axis has one row; its values are picked.
    """

    order: np.ndarray
    shape: tuple[int, ...]

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
class TransposedRows(_OtherRows):
    """A tensor with two or three axes, its last two exchanged (implements `Rows`)."""

    @property
    def shape(self) -> tuple[int, ...]:
        *n, n_rows, n_columns = self.rows.shape
        return *n, n_columns, n_rows

    def read(self, start: int, stop: int) -> np.ndarray:
        n_rows, n_columns = self.shape[-2:]
        first, last = start // n_rows, -(-stop // n_rows)
        matrices = self.rows.read(first * n_columns, last * n_columns).reshape(last - first, n_columns, n_rows)
        return matrices.swapaxes(1, 2).reshape(-1, n_columns)[start - first * n_rows : stop - first * n_rows]


@dataclass(frozen=True)
class ScaledRows(_OtherRows):
    """A tensor times scales, one for each block of its matrices (implements `Rows`).

    Attributes
    ----------
    rows : Rows
        (…, n_rows, n_columns)
    scales : Rows
        (…, n_rows / block[0], n_columns / block[1]), rounded up.
    block : tuple of int
    """

    scales: Rows
    block: tuple[int, int]

    @property
    def shape(self) -> tuple[int, ...]:
        return self.rows.shape

    def read(self, start: int, stop: int) -> np.ndarray:
        n_rows, n_columns = self.shape[-2:]
        numbers = np.arange(start, stop)
        blocks = numbers // n_rows * -(-n_rows // self.block[0]) + numbers % n_rows // self.block[0]
        first = int(blocks[0])
        scales = self.scales.read(first, int(blocks[-1]) + 1)[blocks - first]
        return self.rows.read(start, stop) * scales[:, np.arange(n_columns) // self.block[1]]


@dataclass(frozen=True)
class StridedRows(_OtherRows):
    """Of a tensor's columns every `step`-th, from `first` on (implements `Rows`)."""

    first: int
    step: int

    @property
    def shape(self) -> tuple[int, ...]:
        return *self.rows.shape[:-1], len(range(self.first, self.rows.shape[-1], self.step))

    def read(self, start: int, stop: int) -> np.ndarray:
        return self.rows.read(start, stop)[:, self.first :: self.step]


@dataclass(frozen=True)
class ReshapedRows(_OtherRows):
    """A tensor with one axis, its values in rows (implements `Rows`)."""

    shape: tuple[int, ...]

    def read(self, start: int, stop: int) -> np.ndarray:
        return self.rows.read(0, 1).reshape(-1, self.shape[-1])[start:stop]


@dataclass(frozen=True)
class ChangedRows(_OtherRows):
    """A tensor whose values a function changes, any rows by themselves (implements `Rows`)."""

    change: Callable[[np.ndarray], np.ndarray]

    @property
    def shape(self) -> tuple[int, ...]:
        return self.rows.shape

    def read(self, start: int, stop: int) -> np.ndarray:
        return self.change(self.rows.read(start, stop))


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


# The largest float32.
LARGEST = float(np.finfo(np.float32).max)


class Config:
    """The hyperparameters of config.json, each read with the type that it must have.

    Which keys were asked for is remembered: one that nobody asked for and that isn't known to be harmless has no effect on
    the file, and so must not be there (`converters.family.refuse_unread`).

    Parameters
    ----------
    values : dict
        The file's object.
    path : Path
        Where it was read, for messages.

    Attributes
    ----------
    defaults : dict
        What holds where a key is missing, as transformers has it for the architecture.
    asked : set of str
        The keys that were asked for.
    """

    def __init__(self, values: dict[str, Any], path: Path):
        self.values = values
        self.path = path
        self.defaults: Mapping[str, Any] = {}
        self.asked: set[str] = set()

    def replaced(self, **values: Any) -> Config:
        """The same with other values; what is asked of it counts as asked of this one."""
        other = Config(self.values | values, self.path)
        other.defaults, other.asked = self.defaults, self.asked
        return other

    def get(self, key: str, default: Any = None) -> Any:
        """The value, or transformers' default where it is missing; `default` where that is null or there is none."""
        self.asked.add(key)
        value = self.values.get(key, self.defaults.get(key))
        return default if value is None else value

    def part(self, key: str) -> dict[str, Any]:
        """An object, empty where it is missing.

        Raises
        ------
        ConversionError
            Something else.
        """
        value = self.get(key, {})
        if not isinstance(value, dict):
            raise ConversionError(f"{self.path}: {key} must be an object, not {shown(value)}")
        return value

    def several(self, key: str) -> list[Any]:
        """A list, empty where it is missing; the same errors as `part`."""
        value = self.get(key, [])
        if not isinstance(value, list):
            raise ConversionError(f"{self.path}: {key} must be a list, not {shown(value)}")
        return value

    def integer(self, key: str, default: int | None = None, least: int = 1) -> int:
        """An integer of at most 31 bits, positive unless `least` says otherwise.

        Raises
        ------
        ConversionError
            Missing without a default, or something else than such an integer.
        """
        value = self.get(key, default)
        if not isinstance(value, int) or isinstance(value, bool) or not least <= value < 1 << 31:
            wanted = "a positive integer" if least == 1 else f"an integer of at least {least}"
            raise ConversionError(f"{self.path}: {key} must be {wanted}, not {shown(value)}")
        return value

    def only(self, key: str, known: Any) -> None:
        """Refuse any other value than the one that GGUF's readers take for granted; a missing key is fine, unless
        transformers takes another value then.

        Raises
        ------
        UnsupportedError
            Another value.
        """
        value = self.get(key, known)
        if value != known:
            missing = "" if key in self.values else "missing, which means "
            raise UnsupportedError(f"{self.path}: {key} {missing}{shown(value)}; known: {shown(known)}")

    def choice(self, key: str, known: Iterable[str], default: str) -> str:
        """One of some words.

        Raises
        ------
        UnsupportedError
            Another value.
        """
        value = self.get(key, default)
        if not isinstance(value, str) or value not in known:
            raise UnsupportedError(f"{self.path}: {key} {shown(value)}; known: {', '.join(known)}")
        return value

    def words(self, key: str, known: Iterable[str], n: int, default: list[str] | None = None) -> list[str]:
        """One of some words for each of n layers.

        Raises
        ------
        UnsupportedError
            Missing without a default, or something else than such a list.
        """
        value = self.get(key, default)
        known = tuple(known)  # whatever JSON holds can be looked for in it
        if not isinstance(value, list) or len(value) != n or not all(word in known for word in value):
            raise UnsupportedError(f"{self.path}: {key} {shown(value)}; known: {', '.join(known)} for each layer")
        return value

    def number(self, key: str, default: float | None = None, least: float = -math.inf) -> float:
        """A number of at least `least` that float32 can hold; the same errors as `integer`."""
        value = self.get(key, default)
        fits = isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= LARGEST
        if not fits or value < least:
            wanted = "a number" if least == -math.inf else f"a number of at least {least:g}"
            raise ConversionError(f"{self.path}: {key} must be {wanted}, not {shown(value)}")
        return float(value)


def shown(value: Any) -> str:
    """A value of a JSON file for a message: on one line, and not long."""
    text = json.dumps(value, ensure_ascii=True) if not isinstance(value, str) else repr(value)
    return text if len(text) <= 100 else text[:97] + "..."


class Checkpoint:
    """A checkpoint's folder.

    Attributes
    ----------
    folder : Path
    config : Config
        Of config.json.
    architecture : str
        The class that config.json names, such as ``LlamaForCausalLM``.
    tensors : dict of str to Rows
        All tensors of all shards, by the checkpoint's names; quantized weights as one matrix each.
    quantized : tuple of str
        How many matrices were quantized already, and how.
    notes : list of str
        What a user should know of the conversion: what was changed or left aside.

    Raises
    ------
    ConversionError
        A file is missing, is not what its name says, or ends too early.
    UnsupportedError
        The weights are quantized already, or no safetensors files.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.notes: list[str] = []
        if not folder.is_dir():
            raise ConversionError(f"{folder}: no such folder")
        self._refuse_adapter()
        self.config = Config(self.json("config.json"), folder / "config.json")
        names = self.config.get("architectures")
        if not isinstance(names, list) or not names or not isinstance(names[0], str):
            raise ConversionError(f"{self.config.path}: names no architecture")
        self.architecture: str = names[0]
        self.tensors = self._dequantized(self._without_wrappers(self._read_tensors()))

    def json(self, name: str, optional: bool = False) -> dict[str, Any]:
        """A JSON file's object; empty where it is optional and missing."""
        path = self.folder / name
        if optional and not path.exists():
            return {}
        return read_json(path)

    def text(self, name: str) -> str | None:
        """A text file's content, None where there is no such file."""
        path = self.folder / name
        if not path.exists():
            return None
        try:
            return read_bytes(path).decode("utf-8")
        except UnicodeDecodeError as error:
            raise ConversionError(f"{path}: {error}") from error

    def _refuse_adapter(self) -> None:
        """A folder of PEFT's says in adapter_config.json what it is; transformers loads another model for it."""
        path = self.folder / "adapter_config.json"
        if not path.exists():
            return
        adapter = read_json(path)
        base = adapter.get("base_model_name_or_path") or "another model"
        if (self.folder / "config.json").exists():
            raise UnsupportedError(
                f"{path}: says that this folder is an adapter of {base}; if its weights are merged, remove that file"
            )
        kind = adapter.get("peft_type") or "PEFT"
        raise UnsupportedError(
            f"{self.folder}: a {kind} adapter of {base}, not a model; convert that with 'lora' and this folder"
        )

    def _files(self) -> tuple[list[Path], dict[str, str]]:
        """The files with the weights, and where the index says that tensors are. Of a single file and an index, the file
        counts, as for transformers."""
        single, index = self.folder / SINGLE_FILE, self.folder / INDEX_FILE
        if single.exists():
            if index.exists():
                self.notes.append(f"{single}: holds all weights; {INDEX_FILE} and its shards are left aside")
            return [single], {}
        if index.exists():
            return self._indexed(index)
        shards = {path.name: found for path in self.folder.glob("*.safetensors") if (found := SHARD.fullmatch(path.name))}
        if shards:
            first = next(iter(shards.values()))
            names = [f"{first[1]}-{i + 1:05}-of-{first[3]}.safetensors" for i in range(int(first[3]))]
            missing = sorted(set(names) ^ set(shards))
            if missing:
                raise ConversionError(
                    f"{self.folder}: shards without {INDEX_FILE}, and {missing[0]} is missing or of another set"
                )
            self.notes.append(f"{self.folder}: no {INDEX_FILE}; all {len(names)} shards are taken")
            return [self.folder / name for name in names], {}
        if (self.folder / PICKLED_FILE).exists():
            return [self.folder / PICKLED_FILE], {}
        if (self.folder / PICKLED_INDEX).exists():
            return self._indexed(self.folder / PICKLED_INDEX)
        raise ConversionError(f"{self.folder}: neither {SINGLE_FILE} nor {INDEX_FILE} here")

    def _indexed(self, index: Path) -> tuple[list[Path], dict[str, str]]:
        """The shards that an index names."""
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
            raise ConversionError(f"{index}: has no weight_map from tensor names to files")
        files = sorted(set(weight_map.values()))
        for file in files:
            if Path(file).name != file:
                raise ConversionError(f"{index}: {file!r} is not a file of this folder")
            if not (self.folder / file).exists():
                raise ConversionError(f"{self.folder / file}: missing, {index.name} names it")
        return [self.folder / file for file in files], weight_map

    def _read_tensors(self) -> dict[str, StoredRows]:
        from .pickled import read_pickled

        files, weight_map = self._files()
        tensors: dict[str, StoredRows] = {}
        unlisted = []
        for path in files:
            read = read_pickled if path.suffix == ".bin" else read_safetensors
            for name, rows in read(path).items():
                if name not in weight_map and weight_map:
                    unlisted.append(name)
                if name not in tensors or weight_map.get(name) == path.name:
                    tensors[name] = rows
                elif weight_map.get(name) != tensors[name].path.name:
                    raise ConversionError(f"{path}: tensor {name} is in {tensors[name].path.name} too")
        for name, file in weight_map.items():
            if name not in tensors:
                raise ConversionError(f"{self.folder / file}: has no tensor {name}, the index says it does")
        if unlisted:
            self.notes.append(f"{self.folder}: the index doesn't list {_some(unlisted)}, which its shards have; taken")
        return tensors

    def _without_wrappers(self, tensors: dict[str, StoredRows]) -> dict[str, StoredRows]:
        """The tensors under their own names, where programs that wrapped the model left prefixes."""
        for prefix in WRAPPERS:
            if tensors and all(name.startswith(prefix) for name in tensors):
                self.notes.append(f"{self.folder}: all tensors' names begin with {prefix}, which is taken off")
                return self._without_wrappers({name.removeprefix(prefix): rows for name, rows in tensors.items()})
        lora = next((name for name in tensors if ".lora_A." in name or ".base_layer." in name), None)
        if lora is not None:
            raise UnsupportedError(
                f"{tensors[lora].path}: tensor {lora} is a LoRA adapter's; merge it into its model first"
            )
        return tensors

    def _dequantized(self, tensors: dict[str, StoredRows]) -> dict[str, Rows]:
        """The tensors, those of quantized weights as float32 or in GGUF's own blocks."""
        from .quantized import dequantized

        settings = self._quantization
        path = self.config.path
        if not settings and (self.folder / OLD_SETTINGS).exists():
            path = self.folder / OLD_SETTINGS
            settings = {"quant_method": "gptq"} | read_json(path)
        result, found = dequantized(tensors, settings, path)
        self.quantized = tuple(f"{n} matrices of {what}" for what, n in found.items())
        if settings and all(rows.dtype in FLOAT_TYPES for rows in tensors.values()) and not found:
            method = shown(settings.get("quant_method"))
            self.notes.append(f"{self.config.path}: quantization_config ({method}) is left aside: all weights are floats")
        return result

    @property
    def _quantization(self) -> dict[str, Any]:
        settings = self.config.get("quantization_config")
        return settings if isinstance(settings, dict) else {}

    def refuse_quantized(self, tensors: Mapping[str, Rows]) -> None:
        """Refuse parts of quantized weights, which hold no floats. They tell, not quantization_config: that stays behind
        when weights are dequantized.

        Raises
        ------
        UnsupportedError
            There is such a tensor.
        """
        for rows in tensors.values():
            if isinstance(rows, StoredRows) and rows.dtype in OTHER_TYPES:
                method = self._quantization.get("quant_method", "by a method that config.json doesn't name")
                raise UnsupportedError(
                    f"{rows.path}: tensor {rows.name} is {rows.dtype}: the weights are quantized already ({method}); "
                    "no code for that here; float ones are needed"
                )


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more tensors" if len(names) > 3 else "")


def read_bytes(path: Path, most: int = MAX_HEADER_BYTES) -> bytes:
    """A regular file's content.

    Raises
    ------
    ConversionError
        No such file, a device or pipe, or more than `most` bytes.
    """
    try:
        status = path.stat()  # before opening, which would wait for the other end of a pipe
        if not stat.S_ISREG(status.st_mode):
            raise ConversionError(f"{path}: not a regular file")
        if status.st_size > most:
            raise ConversionError(f"{path}: {status.st_size:,} bytes; no such file has more than {most:,}")
        return path.read_bytes()
    except FileNotFoundError:
        raise ConversionError(f"{path}: no such file") from None
    except OSError as error:
        raise ConversionError(f"{path}: {error.strerror or error}") from error


def _parsed(text: bytes) -> Any:
    """JSON whose objects have no key twice; the same errors as json.loads."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        values: dict[str, Any] = {}
        for key, value in pairs:
            if key in values:
                raise ValueError(f"the key {shown(key)} is there twice")
            values[key] = value
        return values

    return json.loads(text.decode("utf-8"), object_pairs_hook=unique)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file's object.

    Raises
    ------
    ConversionError
        No such file, not JSON, a key twice, or not an object.
    """
    text = read_bytes(path)
    try:
        values = _parsed(text)
    except (ValueError, RecursionError) as error:
        what = what_is(text[:N_BYTES])
        raise ConversionError(f"{path}: not a JSON file{f', but {what}' if what else f': {error}'}") from error
    if not isinstance(values, dict):
        raise ConversionError(f"{path}: not a JSON object")
    return values


def read_safetensors(path: Path) -> dict[str, StoredRows]:
    """The tensors of a safetensors file, by name; only the header is read.

    The format (https://huggingface.co/docs/safetensors): 8 bytes, little-endian, of the header's length; the header,
    a JSON object from names to ``{"dtype", "shape", "data_offsets"}``; then the data, to which the offsets relate, one
    tensor after the other without gaps.

    Raises
    ------
    ConversionError
        Not a sound safetensors file.
    UnsupportedError
        A tensor of a type that isn't known.
    """
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise ConversionError(f"{path}: not a regular file")
        n_file = status.st_size
        with path.open("rb") as file:
            beginning = file.read(N_BYTES)
            n_header = struct.unpack("<Q", beginning[:8])[0] if len(beginning) >= 8 else n_file
            if n_header > min(n_file - 8, MAX_HEADER_BYTES):
                what = what_is(beginning)
                reason = f"but {what}" if what else "or cut short inside its header"
                raise ConversionError(f"{path}: not a safetensors file, {reason}")
            file.seek(8)
            text = file.read(n_header)
    except OSError as error:
        raise ConversionError(f"{path}: {error.strerror or error}") from error
    if text.count(b'"dtype"') > MAX_TENSORS:
        raise ConversionError(f"{path}: its header has more than {MAX_TENSORS:,} tensors")
    try:
        header = _parsed(text)
    except (ValueError, RecursionError) as error:
        raise ConversionError(f"{path}: its header is not JSON: {error}") from error
    if not isinstance(header, dict):
        raise ConversionError(f"{path}: its header is not a JSON object")
    header.pop("__metadata__", None)
    tensors = {name: _stored(path, name, entry, 8 + n_header) for name, entry in header.items()}
    end = 8 + n_header
    for rows in sorted(tensors.values(), key=lambda rows: (rows.offset, rows.n_bytes)):
        if rows.offset != end:
            raise ConversionError(f"{path}: tensor {rows.name}: begins at byte {rows.offset}, not at {end}")
        end += rows.n_bytes
        if end > n_file:
            raise ConversionError(f"{path}: tensor {rows.name}: the file ends before it does")
    if end != n_file:
        raise ConversionError(f"{path}: {n_file - end} bytes follow the last tensor")
    return tensors


def _stored(path: Path, name: str, entry: Any, data_start: int) -> StoredRows:
    where = f"{path}: tensor {name}"
    if not isinstance(entry, Mapping):
        raise ConversionError(f"{where}: its entry is not an object")
    shape = _sizes(entry.get("shape"), f"{where}: shape")
    start, stop, *_ = (*_sizes(entry.get("data_offsets"), f"{where}: data_offsets"), 0, 0)
    dtype = entry.get("dtype")
    if not isinstance(dtype, str) or (dtype not in FLOAT_TYPES and dtype not in OTHER_TYPES):
        raise UnsupportedError(f"{where}: type {shown(dtype)}; known: {', '.join(FLOAT_TYPES)}")
    rows = StoredRows(path, name, dtype, shape, data_start + start)
    if stop - start != rows.n_bytes:
        raise ConversionError(f"{where}: {dtype} {shape} doesn't fill bytes {start} to {stop}")
    return rows


def _sizes(value: Any, where: str) -> tuple[int, ...]:
    if not isinstance(value, list) or not all(type(number) is int and number >= 0 for number in value):
        raise ConversionError(f"{where} must be a list of sizes")
    return tuple(value)
