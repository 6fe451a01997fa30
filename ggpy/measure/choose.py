"""Choosing each tensor's block type, so that a model of a given size diverges least.

What is measured: tensors of one kind in neighbouring layers form a group; with that group alone quantized coarsely, all
else as it was, the Kullback-Leibler divergence from the unquantized model on a calibration text. And, for each tensor and
type, the squared error of its encoded values, each column's counted as often as the square of what it is multiplied with,
from the importance matrix: for one matrix that is the expected squared error of its products.

What is assumed: a tensor's divergence is proportional to that squared error, by the factor measured for its group
(divergence is quadratic where it is small), and the divergences of tensors add up (their errors are independent). The
divergence of the finished file is measured too, so that one sees what the assumptions are worth; a target for the
divergence is met by that measurement, not by the sum.

Among all mixes the one with the least sum is then found by the steps of each tensor's convex hull, the best first: the
greedy form of Lagrangian relaxation (Everett 1963, Operations Research 11(3); for quantizers Shoham and Gersho 1988,
IEEE Trans. ASSP 36(9)).
"""

import math
import os
import re
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ..errors import Error
from ..file import GGUFFile, folder_of, read_text
from ..generate.model import Model
from ..graph import default_threads
from ..kernels.build import Progress, load
from ..kernels.table import ENCODED, QUANTIZED
from ..quant import block_type
from ..quantization import ImportanceMatrix, Override, Plan, encode, quantize_model, read_imatrix
from ..quantization.mixes import sizes, tensor_types
from ..quantization.model import check_places, new_data
from .importance import measure_importance
from .logits_file import LogitsFile
from .perplexity import chunks_of, measure_perplexity
from .statistics import mean

#: block types that can be chosen: those that ggpy encodes and multiplies with, and F16, the type of the unquantized copy
CANDIDATES = (*(name for name in QUANTIZED if name in ENCODED), "F16")
#: what groups are quantized to, to measure them: coarse enough to be seen; the second for rows that 256 doesn't divide
_PROBES = ("Q3_K", "Q4_0")
#: groups at most, unless there are more kinds of tensors
_GROUPS = 32
#: tokens of a chunk; chunks at most for divergences and for the importance of columns
_N_CTX, _KL_CHUNKS, _IMPORTANCE_CHUNKS = 256, 4, 32
#: values of a tensor whose error is looked at, at most but for a row of each matrix
_SAMPLE = 1 << 18
#: a divergence of less can't be told from the rounding of the saved log-probabilities
_LEAST_KL = 1e-7
#: files made to meet a divergence, and the share of it that is near enough
_ATTEMPTS, _NEAR = 5, 0.9


class Option(NamedTuple):
    """A type that a tensor may get: its bytes in the file, and the divergence that it is expected to cause, in nats."""

    type: str
    n_bytes: int
    kl: float


@dataclass(frozen=True)
class Choice:
    """What was chosen.

    Attributes
    ----------
    plan : Plan
        Of the file.
    n_bytes : int
        The file's size.
    expected_kl : float
        The sum of the tensors' divergences, in nats.
    kl, kl_error : float
        The divergence measured on the calibration text, and its standard error.
    """

    plan: Plan
    n_bytes: int
    expected_kl: float
    kl: float
    kl_error: float


def quantize_to_target(
    source: str | os.PathLike[str],
    out: str | os.PathLike[str],
    text: str | os.PathLike[str],
    *,
    size: int | None = None,
    kl: float | None = None,
    imatrix: str | os.PathLike[str] | None = None,
    overrides: Iterable[Override] = (),
    dry_run: bool = False,
    n_threads: int | None = None,
    progress: Callable[[int, int, str], None] | None = None,
    kernel_progress: Progress | None = None,
) -> Choice:
    """Quantizes a model so that it diverges least for its size, or is smallest for its divergence.

    Beside `out` space is needed for an F16 copy of the model and for another file of the result's size.

    Parameters
    ----------
    source, out : path-like
        GGUF files.
    text : path-like
        UTF-8, of 256 tokens at least: divergences are measured on 4 chunks of 256, importance on 32 such.
    size : int, optional
        Bytes that the file may have. Either this or `kl` is needed.
    kl : float, optional
        Mean divergence from the unquantized model that it may have on the text, in nats.
    imatrix : path-like, optional
        An importance matrix of this model; without it one is measured on the text.
    overrides : iterable of Override
        Tensors whose types are given.
    dry_run : bool
        Measure and choose, but keep no file.
    n_threads : int, optional
        Default: the physical cores.
    progress : callable, optional
        Called as progress(done, total, what).
    kernel_progress : callable, optional
        See `ggpy.kernels.build.load`.

    Raises
    ------
    Error
        No mix of types meets the target; the text is too short; and see `quantize_model`. Nothing is left then.
    ValueError
        Not one of `size` and `kl`.
    """
    if (size is None) == (kl is None):
        raise ValueError("either a size or a divergence is the target")
    out, overrides = Path(out), tuple(overrides)
    n_threads = n_threads or default_threads()
    tell = progress or (lambda done, total, what: None)
    with (
        GGUFFile(source) as file,
        tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=folder_of(out)) as folder,
    ):
        check_places(file, out)
        names = _choosable(file, overrides)
        bench = _Bench(file, Path(folder), names, n_threads, kernel_progress)
        fixed = _fixed_bytes(file, names, overrides)
        if size is not None:
            _check_size(file, names, fixed, size)
        tell(0, 1, "copying")
        bench.prepare(Path(text), None if imatrix is None else read_imatrix(imatrix), tell)
        options = bench.measure_options(tell)
        chosen = Path(folder) / "chosen.gguf"

        def attempt(mix: Mapping[str, Option]) -> Choice:
            exact = tuple(Override(re.compile(f"^{re.escape(name)}$"), o.type) for name, o in mix.items())
            plan = quantize_model(
                source,
                chosen,
                _file_type(mix),
                imatrix=bench.importance,
                overrides=(*overrides, *exact),
                n_threads=n_threads,
                kernel_progress=kernel_progress,
            )
            tell(0, 1, "measuring the result")
            divergence = bench.divergence(chosen)
            expected = sum(o.kl for o in mix.values())
            return Choice(replace(plan, path=out), chosen.stat().st_size, expected, *divergence)

        if size is not None:
            choice = attempt(cheapest(options, n_bytes=size - fixed - bench.header_bytes))
        else:
            assert kl is not None
            choice = _meet(kl, options, attempt)
        if not dry_run:
            chosen.replace(out)
        return choice


def cheapest(
    options: Mapping[str, Sequence[Option]], *, n_bytes: float = math.inf, kl: float = -math.inf
) -> dict[str, Option]:
    """The mix of least divergence that has at most n_bytes, or the smallest that diverges by at most `kl`.

    Within a step of one tensor of the best: see the module.

    Parameters
    ----------
    options : dict
        Tensor's name -> what it may get.
    n_bytes : float
        If even the smallest mix is larger, that one is returned.
    kl : float
        The sum of the tensors' divergences; if no mix has so little, that of least divergence is returned.
    """
    hulls = {name: _hull(of) for name, of in options.items()}
    mix = {name: hull[0] for name, hull in hulls.items()}
    size, divergence = sum(o.n_bytes for o in mix.values()), sum(o.kl for o in mix.values())
    steps = [(name, a, b) for name, hull in hulls.items() for a, b in pairwise(hull)]
    # Along a hull gains fall: a tensor's steps come in its order.
    for name, a, b in sorted(steps, key=lambda step: _gain(step[1], step[2]), reverse=True):
        if divergence <= kl:
            break
        more = b.n_bytes - a.n_bytes
        if mix[name] is a and size + more <= n_bytes:
            mix[name] = b
            size, divergence = size + more, divergence + b.kl - a.kl
    return mix


def _gain(a: Option, b: Option) -> float:
    """Less divergence, for each byte more."""
    return (a.kl - b.kl) / (b.n_bytes - a.n_bytes)


def _hull(options: Sequence[Option]) -> list[Option]:
    """The options that are best for some price of a byte, from the smallest on."""
    hull: list[Option] = []
    for option in sorted(options, key=lambda o: (o.n_bytes, o.kl)):
        if hull and option.kl >= hull[-1].kl:
            continue
        while len(hull) > 1 and _gain(hull[-2], hull[-1]) <= _gain(hull[-1], option):
            hull.pop()
        hull.append(option)
    return hull


def _meet(kl: float, options: Mapping[str, Sequence[Option]], attempt: Callable[[Mapping[str, Option]], Choice]) -> Choice:
    """The smallest file found whose measured divergence is at most `kl`.

    What the next one may be expected to have comes from the line through the last two, as measured: activations are rounded
    too, which no choice of weights' types changes, so that divergences aren't proportional to what was expected.
    """
    goal, aim = kl, (1 + _NEAR) / 2 * kl
    tried: list[tuple[Mapping[str, Option], Choice]] = []
    while len(tried) < _ATTEMPTS:
        mix = cheapest(options, kl=goal)
        if any(mix == other for other, _ in tried):
            break
        tried.append((mix, attempt(mix)))
        last = tried[-1][1]
        if _NEAR * kl <= last.kl <= kl:
            return last
        x, slope = max(last.expected_kl, _LEAST_KL), 0.0
        if len(tried) > 1:
            before = tried[-2][1]
            apart = last.expected_kl - before.expected_kl
            slope = (last.kl - before.kl) / apart if apart else 0.0
        goal = x + (aim - last.kl) / slope if slope > 0 else x * aim / last.kl
        goal = min(max(goal, x / 10), x * 10)
    met = [(choice.n_bytes, i) for i, (_, choice) in enumerate(tried) if choice.kl <= kl]
    if not met:
        best = min(choice.kl for _, choice in tried)
        raise Error(f"no mix of types was found with a divergence of {kl:g}; the best has {best:.3g}")
    smallest, choice = tried[min(met)[1]]
    return choice if smallest is tried[-1][0] else attempt(smallest)


def _choosable(file: GGUFFile, overrides: Sequence[Override]) -> dict[str, tuple[str, ...]]:
    """The matrices whose types are to be chosen -> what fits their rows."""
    names = [name for name, type in tensor_types(file, "Q8_0").items() if type == "Q8_0"]
    free = [name for name in names if not any(o.pattern.search(name) for o in overrides)]
    if not free:
        raise Error(f"{file.path}: has no tensors whose types could be chosen")
    return {
        name: tuple(type for type in CANDIDATES if file.tensors[name].shape[-1] % block_type(type).block_size == 0)
        for name in free
    }


def _padded(n_bytes: int, file: GGUFFile) -> int:
    return -(-n_bytes // file.alignment) * file.alignment


def _fixed_bytes(file: GGUFFile, names: Iterable[str], overrides: Sequence[Override]) -> int:
    """Of the tensors that get their types without choice."""
    kept = sizes(file, tensor_types(file, "Q8_0", overrides=overrides))
    return sum(_padded(n, file) for name, n in kept.items() if name not in set(names))


def _check_size(file: GGUFFile, names: Mapping[str, tuple[str, ...]], fixed: int, size: int) -> None:
    """Refuses early what can't be met, before anything is measured."""
    least = fixed
    for name, types in names.items():
        least += min(_bytes_as(file, name, type) for type in types)
    if least > size:
        raise Error(f"{file.path}: {size / 1e6:,.1f} MB are too few: its tensors have {least / 1e6:,.1f} MB at least")


def _bytes_as(file: GGUFFile, name: str, type: str) -> int:
    """Bytes that a tensor takes in a file, as a type, the padding included."""
    shape = file.tensors[name].shape
    return _padded(math.prod(shape[:-1]) * block_type(type).row_bytes(shape[-1]), file)


def _file_type(mix: Mapping[str, Option]) -> str:
    """The file type named after the block type that most bytes have."""
    total: dict[str, int] = {}
    for option in mix.values():
        total[option.type] = total.get(option.type, 0) + option.n_bytes
    return max(total, key=total.__getitem__)


class _Bench:
    """The unquantized copy of a model, in which tensors are replaced, and what it said of the text before.

    Attributes
    ----------
    importance : ImportanceMatrix
    header_bytes : int
        Of a file of this model, without the tensors.
    """

    importance: ImportanceMatrix
    header_bytes: int

    def __init__(
        self,
        file: GGUFFile,
        folder: Path,
        names: Mapping[str, tuple[str, ...]],
        n_threads: int,
        kernel_progress: Progress | None,
    ):
        self._file, self._names = file, names
        self._n_threads, self._kernel_progress = n_threads, kernel_progress
        self._copy, self._base = folder / "copy.gguf", folder / "base.bin"
        types = {type for of in names.values() for type in of}
        load([f"encode_{type}" for type in ENCODED if type in types], kernel_progress)

    def _open(self, path: Path) -> Model:
        return Model(path, n_ctx=_N_CTX, n_threads=self._n_threads, progress=self._kernel_progress)

    def prepare(self, text: Path, importance: ImportanceMatrix | None, tell: Callable[[int, int, str], None]) -> None:
        """Makes the copy, and measures what the rest needs of it."""
        words = read_text(text)
        quantize_model(self._file.path, self._copy, "F16", imatrix=importance, n_threads=self._n_threads)
        with GGUFFile(self._copy) as copy:
            tensors = sum(_padded(t.n_bytes, copy) for t in copy.tensors.values())
        # A measured importance matrix adds entries that name the text.
        self.header_bytes = (
            self._copy.stat().st_size - tensors + (256 + len(str(text).encode()) if importance is None else 0)
        )
        with self._open(self._copy) as model:
            chunks = chunks_of(model.tokenize(words, special=False), _N_CTX)
            self.importance = importance or measure_importance(
                model, _spread(chunks, _IMPORTANCE_CHUNKS), str(text), lambda done, total: tell(done, total, "importance")
            )
            measure_perplexity(model, _spread(chunks, _KL_CHUNKS), save=self._base)

    def divergence(self, path: Path) -> tuple[float, float]:
        """A file's mean divergence from the unquantized model, in nats, and its standard error."""
        with self._open(path) as model, LogitsFile(self._base) as base:
            result = measure_perplexity(model, base.tokens, base=base)
        assert result.divergence is not None
        value, error = mean(result.divergence.kl)
        return max(value, _LEAST_KL), error

    def measure_options(self, tell: Callable[[int, int, str], None]) -> dict[str, list[Option]]:
        """What each tensor may get, by measured divergence of its group and the tensors' errors."""
        groups = _groups(self._names)
        options: dict[str, list[Option]] = {}
        for i, group in enumerate(groups):
            tell(i, len(groups), group[0])
            errors = {name: self._errors(name) for name in group}
            probes = {name: next(t for t in (*_PROBES, "F16") if t in errors[name]) for name in group}
            for name, type in probes.items():
                self._put(name, type)
            kl, _ = self.divergence(self._copy)
            for name in group:
                self._put(name, "F16")
            factor = kl / max(sum(errors[name][type] for name, type in probes.items()), 1e-30)
            for name in group:
                of = errors[name].items()
                options[name] = [Option(type, _bytes_as(self._file, name, type), factor * error) for type, error in of]
        return options

    def _weights(self, name: str) -> np.ndarray | None:
        return self.importance.weights(name) if name in self.importance.sums else None

    def _errors(self, name: str) -> dict[str, float]:
        """A tensor's weighted squared error as each type, from some of its rows, evenly spread."""
        tensor, types = self._file.tensors[name], self._names[name]
        n_rows, n_cols = tensor.shape[-2:]
        data = tensor.data.reshape(-1, n_rows, tensor.data.shape[-1])
        counted = max(1, min(n_rows, _SAMPLE // (n_cols * len(data))))
        rows = np.linspace(0, n_rows - 1, counted).astype(np.intp)
        weights = self._weights(name)
        # How often each matrix is used counts too, where there are several: sums, not means.
        scale = np.ones((len(data), 1)) if weights is None else self.importance.sums[name].astype(np.float64)
        total = dict.fromkeys(types, 0.0)
        for i, matrix in enumerate(data):
            values = block_type(tensor.type).dequantize(np.ascontiguousarray(matrix[rows]))
            for type in types:
                blocks = encode(values, type, None if weights is None else weights[i], self._n_threads)
                squares = np.square(block_type(type).dequantize(blocks) - values, dtype=np.float64)
                total[type] += float((squares.sum(0) * scale[i]).sum()) * n_rows / counted
        return total

    def _put(self, name: str, type: str) -> None:
        """Gives a tensor of the copy the values that are left of it as `type`."""
        with GGUFFile(self._copy) as copy:
            offset = copy.tensors[name].offset
        with open(self._copy, "r+b") as out:
            out.seek(offset)
            for chunk in new_data(self._file.tensors[name], type, self._weights(name), self._n_threads):
                out.write(encode(block_type(type).dequantize(chunk), "F16").data)


def _spread(chunks: np.ndarray, n: int) -> np.ndarray:
    """n chunks at most, evenly spread over the text."""
    return chunks[np.linspace(0, len(chunks) - 1, min(n, len(chunks))).astype(np.intp)]


def _groups(names: Iterable[str]) -> list[list[str]]:
    """Tensors of one kind in neighbouring layers, about the same number of groups for each kind."""
    kinds: dict[str, list[str]] = {}
    for name in names:
        kinds.setdefault(re.sub(r"^blk\.\d+\.", "", name), []).append(name)
    each = max(1, _GROUPS // len(kinds))
    groups = []
    for of in kinds.values():
        of = sorted(of, key=_layer)
        cuts = [len(of) * i // min(each, len(of)) for i in range(min(each, len(of)) + 1)]
        groups += [of[a:b] for a, b in pairwise(cuts)]
    return groups


def _layer(name: str) -> int:
    found = re.match(r"blk\.(\d+)\.", name)
    return int(found[1]) if found else -1
