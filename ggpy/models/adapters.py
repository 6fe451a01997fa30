"""LoRA adapters (Hu et al. 2021): a matrix W acts as W + B A, with two thin matrices beside it.

In GGUF an adapter is a file of its own, as llama.cpp's convert_lora_to_gguf.py writes it: ``general.type`` is "adapter",
``adapter.type`` "lora"; ``{weight}.lora_a`` is (rank, n_in) and ``{weight}.lora_b`` (n_out, rank); B A is multiplied by
``adapter.lora.alpha`` / rank, unless that is 0.
"""

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ..errors import Error, GGUFError, UnsupportedError
from ..quant import block_type

if TYPE_CHECKING:
    from ..file import GGUFFile

A, B = ".lora_a", ".lora_b"


@dataclass(frozen=True, eq=False)
class ThinPair:
    """What is added to a matrix: b @ a.

    Attributes
    ----------
    path : str
        Of the adapter, for messages.
    a, b : numpy.ndarray
        float32, (rank, n_in) and (n_out, rank), all scales in b.
    """

    path: str
    a: np.ndarray
    b: np.ndarray

    def __add__(self, other: "ThinPair") -> "ThinPair":
        a, b = np.concatenate((self.a, other.a)), np.concatenate((self.b, other.b), axis=1)
        return ThinPair(f"{self.path} and {other.path}", a, b)


def path_and_scale(text: str | os.PathLike[str]) -> tuple[Path, float]:
    """An adapter's path and its scale, from PATH or PATH:SCALE.

    Raises
    ------
    Error
        The scale isn't a finite number.
    """
    path, colon, scale = os.fspath(text).rpartition(":")
    if not colon or Path(text).exists():
        return Path(text), 1.0
    try:
        value = float(scale)
    except ValueError:
        return Path(text), 1.0
    if not abs(value) < 1e30:
        raise Error(f"{path}: a scale of {scale}")
    return Path(path), value


def added_up(adapters: Iterable[Mapping[str, ThinPair]]) -> dict[str, ThinPair]:
    """What several adapters add to a model's matrices together."""
    found: dict[str, ThinPair] = {}
    for adapter in adapters:
        for name, pair in adapter.items():
            found[name] = found[name] + pair if name in found else pair
    return found


def read_adapter(path: str | os.PathLike[str], model: "GGUFFile", scale: float = 1.0) -> dict[str, ThinPair]:
    """What an adapter's GGUF file adds to a model's matrices.

    Parameters
    ----------
    path : path-like
    model : GGUFFile
    scale : float
        What the adapter is multiplied by.

    Returns
    -------
    dict of str to ThinPair
        By the matrix's name.

    Raises
    ------
    GGUFError
        The file is damaged, no adapter, or another model's.
    UnsupportedError
        It adapts what isn't a matrix of a layer or the output matrix.
    """
    from ..file import GGUFFile

    with GGUFFile(path) as file:
        kind, what = (file.get(key, str, default="") for key in ("general.type", "adapter.type"))
        if (kind, what) != ("adapter", "lora"):
            raise GGUFError(f"{file.path}: not a LoRA adapter: general.type {kind!r}, adapter.type {what!r}")
        arch, own = (f.get("general.architecture", str, default="") for f in (file, model))
        if arch != own:
            raise GGUFError(f"{file.path}: an adapter of architecture {arch!r}; {model.path} is {own!r}")
        if "adapter.alora.invocation_tokens" in file.metadata:
            raise UnsupportedError(f"{file.path}: an adapter that certain tokens switch on (aLoRA)")
        alpha = file.get("adapter.lora.alpha", float, default=0.0)
        halves: dict[str, dict[str, np.ndarray]] = {}
        for name, tensor in file.tensors.items():
            end = name[-len(A) :]
            if end not in (A, B):
                raise UnsupportedError(f"{file.path}: {name} can't be adapted while running; known: pairs {A} and {B}")
            if block_type(tensor.type).decode is None:
                raise UnsupportedError(f"{file.path}: {name} is {tensor.type}, which ggpy only lists")
            halves.setdefault(name.removesuffix(end), {})[end] = tensor.dequantize()
        pairs = {}
        for name, found in halves.items():
            if len(found) < 2:
                raise GGUFError(f"{file.path}: {name} has only one of {A} and {B}")
            factor = scale * (alpha / max(1, len(found[A])) if alpha else 1.0)
            pairs[name] = checked_pair(str(file.path), model, name, found[A], found[B] * np.float32(factor))
        return pairs


def checked_pair(path: str, model: "GGUFFile", name: str, a: np.ndarray, b: np.ndarray) -> ThinPair:
    """What an adapter adds to the matrix `name`; see `read_adapter` for the errors."""
    stored = model.tensors.get(name)
    if stored is None:
        raise GGUFError(f"{path}: an adapter of another model: {model.path} has no {name}")
    if not name.startswith(("blk.", "output.weight")) or len(stored.shape) != 2:
        raise UnsupportedError(f"{path}: {name} can't be adapted while running; merge it at conversion (--lora)")
    if a.ndim != 2 or b.ndim != 2 or a.shape[0] != b.shape[1] or (b.shape[0], a.shape[1]) != stored.shape:
        raise GGUFError(f"{path}: {name} is {stored.shape}; its adapter's matrices are {a.shape} and {b.shape}")
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        raise GGUFError(f"{path}: {name}: an adapter with NaN or infinities")
    return ThinPair(path, np.ascontiguousarray(a, np.float32), np.ascontiguousarray(b, np.float32))
