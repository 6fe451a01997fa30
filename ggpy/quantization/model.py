"""Quantizing a model: plan every tensor's type, check, then stream the tensors into the new file."""

from __future__ import annotations

import math
import os
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..cpus import default_threads
from ..errors import Error, UnsupportedError
from ..file import GGUFFile, GGUFTensor, NewFile, StringArray, write_files
from ..kernels.build import Progress, load
from ..kernels.table import ENCODED
from ..quant import block_type
from .encode import check, encode
from .imatrix import ImportanceMatrix, read_imatrix
from .mixes import COPY, FILE_TYPES, Override, check_without_importance, file_type, sizes, tensor_types

#: values that a thread decodes and encodes at a time; bounds memory
CHUNK_VALUES = 1 << 20
#: version of ggml's block formats
_QUANTIZATION_VERSION = 2
_UINT32, _STRING = 4, 8

_NUMBERS = ("F32", "F16", "BF16")


class Step(NamedTuple):
    """What becomes of a tensor: its types and bytes, before and after."""

    name: str
    shape: tuple[int, ...]
    old_type: str
    new_type: str
    old_bytes: int
    new_bytes: int


@dataclass(frozen=True)
class Plan:
    """A model's quantization.

    Attributes
    ----------
    path : Path
        The new file.
    type : str
        Its file type.
    steps : tuple of Step
        The tensors, in the file's order.
    without_importance : tuple of str
        Quantized matrices that the importance matrix has no entry for; empty without such a matrix.
    """

    path: Path
    type: str
    steps: tuple[Step, ...]
    without_importance: tuple[str, ...]

    @property
    def n_bytes(self) -> int:
        """Bytes of the new tensors."""
        return sum(step.new_bytes for step in self.steps)

    @property
    def bits_per_weight(self) -> float:
        """Of the new file's tensors."""
        return 8 * self.n_bytes / max(1, sum(math.prod(step.shape) for step in self.steps))

    @property
    def decoded_again(self) -> tuple[str, ...]:
        """Tensors that are quantized already and will be quantized from what is left of their values."""
        return tuple(s.name for s in self.steps if s.new_type != s.old_type and s.old_type not in _NUMBERS)


def quantize_model(
    source: str | os.PathLike[str],
    out: str | os.PathLike[str],
    type: str,
    *,
    imatrix: str | os.PathLike[str] | ImportanceMatrix | None = None,
    overrides: Iterable[Override] = (),
    keep_split: bool = False,
    dry_run: bool = False,
    n_threads: int | None = None,
    progress: Callable[[int, int, str], None] | None = None,
    kernel_progress: Progress | None = None,
) -> Plan:
    """Writes a model anew with other block types.

    A few chunks of rows are in memory at a time, whatever the tensors' sizes. Of a model that is split into several files
    one file is made, or as many with `keep_split`. Metadata are kept, but for empty arrays.

    Parameters
    ----------
    source, out : path-like
        GGUF files.
    type : str
        The new file type, a name of `ggpy.quantization.mixes.FILE_TYPES` in any case, or COPY.
    imatrix : path-like or ImportanceMatrix, optional
        An importance matrix of this model.
    overrides : iterable of Override
        See `tensor_types`.
    keep_split : bool
        Split the new model as the old one is: OUT-00001-of-00003.gguf and so on.
    dry_run : bool
        Plan and check only.
    n_threads : int, optional
        Default: the physical cores.
    progress : callable, optional
        Called as progress(done_bytes, total_bytes, tensor), bytes of the new file.
    kernel_progress : callable, optional
        See `ggpy.kernels.build.load`.

    Returns
    -------
    Plan

    Raises
    ------
    UnsupportedError
        An unknown type, or one without encoder or decoder.
    GGUFError
        A file is damaged.
    Error
        The importance matrix is another model's or is needed and not given; a value isn't finite or is too large; the file
        can't be written, or is the model itself. Nothing is left of it then.
    """
    type = file_type(type)
    with GGUFFile(source) as file:
        if not (imatrix is None or isinstance(imatrix, ImportanceMatrix)):
            imatrix = read_imatrix(imatrix)
        importance = imatrix
        plan = _plan(file, Path(out), type, importance, tuple(overrides))
        parts = _parts(file, plan) if keep_split else [(plan.path, plan.steps)]
        check_places(file, *(path for path, _ in parts))
        if importance is not None:
            _check_importance(file, importance)
        _check_types(file, plan, importance)
        if not dry_run:
            load([f"encode_{name}" for name in ENCODED if any(_is_encoded(s, name) for s in plan.steps)], kernel_progress)
            entries = {} if importance is None else _entries(importance)
            _write(file, plan, parts, importance, entries, n_threads or default_threads(), progress)
    return plan


def _is_encoded(step: Step, type: str) -> bool:
    return step.new_type == type != step.old_type


def _plan(
    file: GGUFFile, out: Path, type: str, importance: ImportanceMatrix | None, overrides: tuple[Override, ...]
) -> Plan:
    types = tensor_types(file, type, importance is not None, overrides)
    new_bytes = sizes(file, types)
    steps = tuple(
        Step(name, tensor.shape, tensor.type, types[name], tensor.n_bytes, new_bytes[name])
        for name, tensor in file.tensors.items()
    )
    quantized = [step.name for step in steps if step.new_type != step.old_type and step.new_type not in _NUMBERS]
    missing = () if importance is None else tuple(name for name in quantized if name not in importance.sums)
    return Plan(out, type, steps, missing)


def check_places(file: GGUFFile, *paths: Path) -> None:
    """Refuses to write over the model.

    Raises
    ------
    Error
        One of the paths is one of its files.
    """
    old = {path.resolve() for path in (Path(file.path), *(tensor.path for tensor in file.tensors.values()))}
    for path in paths:
        if path.resolve() in old:
            raise Error(f"{path}: is the model that is to be quantized; name another file")


def _check_importance(file: GGUFFile, importance: ImportanceMatrix) -> None:
    """Whether the matrix is this model's: its names are there, and have its columns."""
    path = importance.path or "measured"
    shared = [name for name in importance.sums if name in file.tensors]
    if not shared:
        raise Error(f"{path}: the importance matrix of another model: it has none of {file.path}'s tensors")
    for name in shared:
        shape = file.tensors[name].shape
        expected = math.prod(shape[:-2]), shape[-1]
        importance.split(name, *expected)
        found = importance.sums[name].shape
        if found != expected:
            raise Error(
                f"{path}: the importance matrix of another model: {name!r} has {found[0]} × {found[1]} values, "
                f"{file.path} needs {expected[0]} × {expected[1]}"
            )


def _check_types(file: GGUFFile, plan: Plan, importance: ImportanceMatrix | None) -> None:
    for step in plan.steps:
        if step.new_type == step.old_type:
            continue
        if step.new_type not in (*_NUMBERS, *ENCODED):
            raise UnsupportedError(
                f"{step.name}: there is no encoder for {step.new_type}; there are for {', '.join((*_NUMBERS, *ENCODED))}"
            )
        if block_type(step.old_type).decode is None:
            raise UnsupportedError(f"{file.path}: {step.name} is {step.old_type}, which can't be decoded")
        if not (importance is not None and step.name in importance.sums):
            check_without_importance(step.name, step.new_type, plan.type)


def _entries(importance: ImportanceMatrix) -> dict[str, str | int]:
    """The metadata that say which importance matrix was used, as llama-quantize writes them."""
    datasets = {"quantize.imatrix.dataset": importance.datasets[0]} if importance.datasets else {}
    file = {"quantize.imatrix.file": importance.path} if importance.path else {}
    return {
        **file,
        **datasets,
        "quantize.imatrix.entries_count": len(importance.sums),
        "quantize.imatrix.chunks_count": importance.n_chunks,
    }


Parts = list[tuple[Path, tuple[Step, ...]]]


def _parts(file: GGUFFile, plan: Plan) -> Parts:
    """The new files and their tensors, split as the old model is."""
    by_file: dict[Path, list[Step]] = {}
    for step in plan.steps:
        by_file.setdefault(file.tensors[step.name].path, []).append(step)
    stem, n = str(plan.path.with_suffix("")), len(by_file)
    groups = [by_file[path] for path in sorted(by_file)]
    return [(Path(f"{stem}-{i + 1:05}-of-{n:05}.gguf"), tuple(steps)) for i, steps in enumerate(groups)]


def _write(
    file: GGUFFile,
    plan: Plan,
    parts: Parts,
    importance: ImportanceMatrix | None,
    entries: dict[str, str | int],
    n_threads: int,
    progress: Callable[[int, int, str], None] | None,
) -> None:
    def data(step: Step) -> Generator[np.ndarray, None, None]:
        weights = importance.weights(step.name) if importance and step.name in importance.sums else None
        yield from new_data(file.tensors[step.name], step.new_type, weights, n_threads)
        file.check()

    files = []
    for i, (path, steps) in enumerate(parts):
        writer = _writer(file, plan, entries, steps, i, len(parts))
        files.append(NewFile(path, writer, [(step.name, partial(data, step)) for step in steps]))
    write_files(files, plan.path, plan.n_bytes, progress)


def _writer(
    file: GGUFFile, plan: Plan, entries: dict[str, str | int], steps: tuple[Step, ...], part: int, n_parts: int
) -> Any:
    """A gguf.GGUFWriter with all metadata and the tensors' descriptions of one part."""
    import gguf

    writer = gguf.GGUFWriter(None, file.get("general.architecture", str))
    new: dict[str, str | int] = {"general.quantization_version": _QUANTIZATION_VERSION, **entries}
    if plan.type != COPY:
        new["general.file_type"] = FILE_TYPES[plan.type].id
    for key, value in file.metadata.items():
        type_id, is_array = file.metadata.kind(key)
        if key in new or key.startswith("split.") or key == "general.architecture" or (is_array and not len(value)):
            continue
        if key == "general.alignment":
            writer.add_custom_alignment(value)
        elif is_array:
            items = [value.bytes(i) for i in range(len(value))] if isinstance(value, StringArray) else value.tolist()
            writer.add_key_value(key, items, gguf.GGUFValueType.ARRAY, gguf.GGUFValueType(type_id))
        else:
            writer.add_key_value(key, value, gguf.GGUFValueType(type_id))
    for key, value in new.items():
        writer.add_key_value(key, value, gguf.GGUFValueType(_STRING if isinstance(value, str) else _UINT32))
    if n_parts > 1:
        writer.add_uint16("split.no", part)
        writer.add_uint16("split.count", n_parts)
        writer.add_int32("split.tensors.count", len(plan.steps))
    for step in steps:
        kind = gguf.GGMLQuantizationType(block_type(step.new_type).id)
        writer.add_tensor_info(step.name, step.shape, np.dtype(np.float32), step.new_bytes, kind)
    return writer


def new_data(
    tensor: GGUFTensor, type: str, weights: np.ndarray | None, n_threads: int
) -> Generator[np.ndarray, None, None]:
    """The tensor's bytes as `type`, uint8 (n, row_bytes) arrays of some rows each, in order.

    `weights`, float32 (n_matrices, n_cols), are those of `ImportanceMatrix.weights`; the encoder must be loaded.
    Each thread takes some rows through reading, decoding and encoding. The file is read, not mapped: what is mapped counts
    as this process's memory.
    """
    n_cols = tensor.shape[-1]
    n_rows = tensor.shape[-2] if len(tensor.shape) > 1 else 1
    n_matrices = math.prod(tensor.shape[:-2])
    row_bytes = block_type(tensor.type).row_bytes(n_cols)
    step = max(1, CHUNK_VALUES // max(1, n_cols))

    def rows(matrix: int, start: int) -> np.ndarray:
        n = min(step, n_rows - start)
        offset = tensor.offset + (matrix * n_rows + start) * row_bytes
        raw = np.fromfile(tensor.path, np.uint8, n * row_bytes, offset=offset).reshape(n, row_bytes)
        if type == tensor.type and type not in _NUMBERS:
            return raw
        try:
            values = block_type(tensor.type).dequantize(raw)
            if type == tensor.type:
                check(values, "F32", start)
                return raw
            return encode(values, type, None if weights is None else weights[matrix], 1, start)
        except Error as error:
            where = f"matrix {matrix} of " if n_matrices > 1 else ""
            raise Error(f"{tensor.path}: {where}{tensor.name}: {error}") from None

    starts = range(0, n_rows, step)
    yield from in_order((partial(rows, matrix, start) for matrix in range(n_matrices) for start in starts), n_threads)


def in_order(tasks: Iterable[Callable[[], np.ndarray]], n_threads: int) -> Generator[np.ndarray, None, None]:
    """The results of tasks that several threads work on, in the tasks' order; few are held at a time."""
    if n_threads == 1:
        yield from (task() for task in tasks)
        return
    pending: deque[Future[np.ndarray]] = deque()
    with ThreadPoolExecutor(n_threads) as pool:
        try:
            for task in tasks:
                pending.append(pool.submit(task))
                if len(pending) > 2 * n_threads:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            for future in pending:
                future.cancel()
