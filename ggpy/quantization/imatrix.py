"""Importance matrices in the GGUF form that llama.cpp's imatrix tool writes, and in that which it wrote until 2025.

For a matrix `name` the file holds `name.in_sum2`, the sums of the squared activations that met each column, and
`name.counts`, of how many tokens; a stack of experts' matrices has sums and a count for each.

The older form (`.dat`) has a number of entries, and for each the name, a number of calls and means times that number; at
the end the number of chunks and the text's name. All numbers are int32, before strings their lengths. How many matrices a
stack has, the file doesn't say: see `ImportanceMatrix.split`.
"""

from __future__ import annotations

import os
import struct
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from ..errors import GGUFError
from ..file import GGUFFile, StringArray, writing_aside
from ..file.mapped import Mapped

_SUMS, _COUNTS = ".in_sum2", ".counts"
_MOST_EXPONENT = 30


@dataclass
class ImportanceMatrix:
    """What a calibration text's activations say about the weights' columns.

    Attributes
    ----------
    sums : dict
        Tensor's name -> float32 (n_matrices, n_cols): sums of squared activations.
    counts : dict
        Tensor's name -> float32 (n_matrices,): numbers of tokens.
    datasets : list of str
        The texts.
    n_chunks, chunk_size : int
        How many pieces of text, and tokens of a piece.
    path : str
        The file that it was read from; empty if it was measured.
    """

    sums: dict[str, np.ndarray]
    counts: dict[str, np.ndarray]
    datasets: list[str] = field(default_factory=list)
    n_chunks: int = 0
    chunk_size: int = 0
    path: str = ""

    def split(self, name: str, n_matrices: int, n_cols: int) -> None:
        """Divides an entry of the older form, which is one row, among the matrices of a stack, if it has their values."""
        if self.sums[name].shape == (1, n_matrices * n_cols):
            self.sums[name] = self.sums[name].reshape(n_matrices, n_cols)
            self.counts[name] = np.repeat(self.counts[name], n_matrices)

    def weights(self, name: str) -> np.ndarray:
        """Mean squared activations, float32 (n_matrices, n_cols).

        A matrix that no token met has ones; columns whose activations were all 0 have a millionth of the mean, so that
        even blocks of such columns keep their values.
        """
        sums, counts = self.sums[name], self.counts[name]
        with np.errstate(all="ignore"):
            means = np.where(counts[:, None] > 0, sums / counts[:, None], np.float32(1))
        least = means.mean(axis=1, keepdims=True, dtype=np.float64) * 1e-6  # a sum of float32 might be too large for one
        found = np.where(least > 0, np.maximum(means, least), 1)
        # Encoders add up squares of these in float32. Beyond what activations are, a power of 2 brings them near 1.
        exponents = np.frexp(found.max(axis=1, keepdims=True))[1]
        return np.ldexp(found, np.where(np.abs(exponents) > _MOST_EXPONENT, -exponents, 0)).astype(np.float32)


def read_imatrix(path: str | os.PathLike[str]) -> ImportanceMatrix:
    """Reads an importance matrix, of either form.

    Raises
    ------
    GGUFError
        The file isn't one, a tensor lacks its partner, or numbers and values are negative, none or too large.
    """
    mapped = Mapped(Path(path))
    beginning = bytes(mapped.buffer[:8])
    # The number of entries, and the length of the first one's name.
    is_old = len(beginning) == 8 and all(0 < n < 100_000 for n in struct.unpack("<2i", beginning))
    matrix = _read_old(mapped) if is_old else _read_gguf(path)
    mapped.close()
    if not all(0 <= n < 1 << 32 for n in (matrix.n_chunks, matrix.chunk_size)):
        raise GGUFError(f"{path}: of {matrix.n_chunks} chunks of {matrix.chunk_size} tokens")
    for name, sums in matrix.sums.items():
        counts = matrix.counts[name]
        for end, values in ((_SUMS, sums), (_COUNTS, counts)):
            if not (np.isfinite(values).all() and (values >= 0).all()):
                raise GGUFError(f"{path}: {name + end!r} has negative or infinite values, or NaN")
        with np.errstate(over="ignore"):
            if not np.isfinite(sums / np.where(counts > 0, counts, 1)[:, None]).all():
                raise GGUFError(f"{path}: {name!r} has sums too large for its counts")
    return matrix


def _read_gguf(path: str | os.PathLike[str]) -> ImportanceMatrix:
    with GGUFFile(path) as file:
        if file.get("general.type", str, "") != "imatrix":
            raise GGUFError(f"{path}: not an importance matrix: 'general.type' isn't 'imatrix'")
        names = [name.removesuffix(_SUMS) for name in file.tensors if name.endswith(_SUMS)]
        strays = set(file.tensors) - {name + end for name in names for end in (_SUMS, _COUNTS)}
        if not names or strays:
            raise GGUFError(f"{path}: tensor {min(strays)!r} has no partner" if strays else f"{path}: it has no entries")
        sums, counts = {}, {}
        for name in names:
            parts = []
            for end in (_SUMS, _COUNTS):
                tensor = file.tensors.get(name + end)
                if tensor is None or tensor.type != "F32":
                    raise GGUFError(f"{path}: {name + end!r} is missing or not F32")
                parts.append(tensor.dequantize())
            counts[name] = parts[1].reshape(-1)
            if not parts[0].size or not counts[name].size or parts[0].size % counts[name].size:
                raise GGUFError(f"{path}: {name!r} has {parts[0].size} sums for {counts[name].size} counts")
            sums[name] = parts[0].reshape(counts[name].size, -1)
        datasets = list(file.get("imatrix.datasets", (StringArray,), ()))
        n_chunks = file.get("imatrix.chunk_count", int, 0)
        chunk_size = file.get("imatrix.chunk_size", int, 0)
        return ImportanceMatrix(sums, counts, datasets, n_chunks, chunk_size, str(path))


def _read_old(mapped: Mapped) -> ImportanceMatrix:
    buffer, at = mapped.buffer, 0

    def take(n: int) -> memoryview:
        nonlocal at
        if not 0 <= n <= len(buffer) - at:
            raise GGUFError(f"{mapped.path}: not an importance matrix: {n} bytes at byte {at} reach beyond the end")
        at += n
        return buffer[at - n : at]

    def number() -> int:
        return int(struct.unpack("<i", take(4))[0])

    def text() -> str:
        return bytes(take(number())).decode("utf-8", "replace")

    matrix = ImportanceMatrix({}, {}, path=str(mapped.path))
    for _ in range(number()):
        name, n_calls, n_values = text(), number(), number()
        if n_values < 1 or name in matrix.sums:
            raise GGUFError(f"{mapped.path}: not an importance matrix: entry {name!r} is empty or there twice")
        matrix.sums[name] = np.frombuffer(take(4 * n_values), "<f4").astype(np.float32)[None]
        # Without calls the values are taken as they are.
        matrix.counts[name] = np.array([max(n_calls, 1)], np.float32)
    if at < len(buffer):
        matrix.n_chunks = number()
        matrix.datasets = [text()]
    return matrix


def write_imatrix(path: str | os.PathLike[str], matrix: ImportanceMatrix) -> None:
    """Writes an importance matrix, so that llama.cpp can read it.

    Raises
    ------
    Error
        The file can't be written; nothing is left of it.
    """
    import gguf

    writer = gguf.GGUFWriter(None, "")
    writer.kv_data[0].clear()  # an importance matrix has no architecture
    writer.add_type("imatrix")
    writer.add_array("imatrix.datasets", matrix.datasets or [""])
    writer.add_uint32("imatrix.chunk_count", matrix.n_chunks)
    writer.add_uint32("imatrix.chunk_size", matrix.chunk_size)
    for name in sorted(matrix.sums):
        counts = np.ascontiguousarray(matrix.counts[name], np.float32)[:, None]
        writer.add_tensor(name + _SUMS, np.ascontiguousarray(matrix.sums[name], np.float32))
        writer.add_tensor(name + _COUNTS, counts)
    with writing_aside(path) as aside, closing(writer):
        writer.write_header_to_file(aside)
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
