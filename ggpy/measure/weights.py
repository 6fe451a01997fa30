"""How far a model's weights are from those of a better file, tensor by tensor."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from ..errors import Error
from ..quant import block_type

if TYPE_CHECKING:
    from ..file import GGUFFile, GGUFTensor

#: values of a tensor that are decoded at a time; bounds memory
_VALUES = 1 << 20


@dataclass(frozen=True)
class WeightError:
    """The error of a tensor, or of several together.

    Attributes
    ----------
    signal, noise : float array (n_matrices,)
        Sums of squares of the better values, and of the differences; one for each matrix where tensors hold several, such
        as experts.
    n_values : int
    """

    signal: np.ndarray
    noise: np.ndarray
    n_values: int

    @property
    def relative_rmse(self) -> float:
        """Root of the mean squared error over that of the mean squared value."""
        return float(relative_rmse(self.signal.sum(), self.noise.sum()))

    @property
    def snr(self) -> float:
        """Signal to noise, in decibels; infinite where nothing differs."""
        return decibels(self.relative_rmse)


@dataclass(frozen=True)
class TensorError(WeightError):
    """The error of one tensor.

    Attributes
    ----------
    name : str
    type_a, type_b : str
        Its block types in both files.
    """

    name: str
    type_a: str
    type_b: str

    @property
    def layer(self) -> int | None:
        """Its layer, None for what is in none."""
        return int(self.name.split(".")[1]) if self.name.startswith("blk.") else None

    @property
    def kind(self) -> str:
        """Its part of the model, such as ffn_down."""
        return self.name.removesuffix(".weight").split(".")[2 if self.layer is not None else 0]


def relative_rmse(signal: np.ndarray, noise: np.ndarray) -> np.ndarray:
    """From sums of squares; where there is no signal, infinite unless there is no noise either."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(noise == 0, 0.0, np.sqrt(noise / signal))


def decibels(rmse: float) -> float:
    """A relative error as a ratio of signal to noise."""
    return -20 * math.log10(rmse) if rmse else math.inf


def weight_errors(
    a: "GGUFFile", b: "GGUFFile", progress: Callable[[int, int, str], None] | None = None
) -> list[TensorError]:
    """Compares each tensor of `a` with that of the same name in `b`; some million values are in memory at a time.

    Parameters
    ----------
    a, b : GGUFFile
        The better file, and the other.
    progress : callable, optional
        Called as progress(done_bytes, total_bytes, tensor), bytes of both files.

    Returns
    -------
    list of TensorError
        In the order of `a`.

    Raises
    ------
    Error
        The files are of different models, or a value isn't finite.
    UnsupportedError
        A type that can't be decoded.
    """
    for name, x in a.tensors.items():
        y = b.tensors.get(name)
        if y is None:
            raise Error(f"{b.path}: has no tensor {name}, as {a.path} has")
        if x.shape != y.shape:
            raise Error(f"{name}: shape {x.shape} in {a.path}, {y.shape} in {b.path}: different models")
    pairs = [(x, b.tensors[name]) for name, x in a.tensors.items()]
    total, done, errors = sum(x.n_bytes + y.n_bytes for x, y in pairs), 0, []
    for x, y in pairs:
        if progress is not None:
            progress(done, total, x.name)
        errors.append(_compare(x, y))
        done += x.n_bytes + y.n_bytes
    if progress is not None:
        progress(done, total, "")
    return errors


def _compare(x: "GGUFTensor", y: "GGUFTensor") -> TensorError:
    n_matrices = x.shape[0] if len(x.shape) > 2 else 1
    signal, noise = np.zeros(n_matrices), np.zeros(n_matrices)
    parts = [(block_type(t.type), t.data.reshape(n_matrices, -1, t.data.shape[-1])) for t in (x, y)]
    step = max(1, _VALUES // x.shape[-1])
    for i in range(n_matrices):
        for first in range(0, parts[0][1].shape[1], step):
            u, v = (kind.dequantize(data[i, first : first + step]) for kind, data in parts)
            signal[i] += np.square(u, dtype=np.float64).sum()
            noise[i] += np.square(u - v, dtype=np.float64).sum()
    if not np.isfinite(signal + noise).all():
        raise Error(f"{x.name}: has values that aren't finite, in {x.path} or {y.path}")
    return TensorError(signal, noise, math.prod(x.shape), x.name, x.type, y.type)


def together(errors: Iterable[TensorError], key: Callable[[TensorError], object]) -> dict[object, WeightError]:
    """The error of each group of tensors that `key` puts together, in the order of their first members."""
    groups: dict[object, list[TensorError]] = {}
    for e in errors:
        groups.setdefault(key(e), []).append(e)
    return {
        name: WeightError(
            np.array([sum(e.signal.sum() for e in group)]),
            np.array([sum(e.noise.sum() for e in group)]),
            sum(e.n_values for e in group),
        )
        for name, group in groups.items()
    }
