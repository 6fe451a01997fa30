"""Choosing the next token from its logits."""

from __future__ import annotations

from collections.abc import Sequence
from math import isfinite, log
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import Error

# How many neighbouring logits share one maximum when the highest are looked for.
_CHUNK = 256
# How many of the most likely tokens are sorted first when only top-p bounds them.
_TOP_P_START = 256

#: What each parameter may be: its type, the test, the words for it.
_RANGES: dict[str, tuple[type, Any, str]] = {
    "temperature": (float, lambda x: x >= 0, "a number, 0 or more"),
    "top_k": (int, lambda x: x >= 0, "a whole number, 0 (all) or more"),
    "top_p": (float, lambda x: 0 < x <= 1, "a number above 0, up to 1 (all)"),
    "min_p": (float, lambda x: 0 <= x <= 1, "a number from 0 (all) to 1"),
    "repetition_penalty": (float, lambda x: x > 0, "a number above 0; 1 is no penalty"),
    "penalty_window": (int, lambda x: x >= 0, "a whole number, 0 (no penalty) or more"),
}


class Sampler:
    """Chooses token ids: repetition penalty, then top-k, top-p, min-p and temperature, in llama.cpp's order.

    Parameters
    ----------
    temperature : float
        Divides the logits of the tokens that are left; 0 takes the highest, of equal ones the lowest id.
    top_k : int
        How many of the most likely tokens are left; 0 leaves all.
    top_p : float
        Leaves the fewest most likely tokens whose probabilities sum to this or more (Holtzman et al. 2020, "The Curious
        Case of Neural Text Degeneration", section 3.1); 1 leaves all.
    min_p : float
        Leaves tokens at least this times as likely as the most likely one (Nguyen et al. 2024, "Min-p Sampling"); 0
        leaves all.
    repetition_penalty : float
        Divides positive logits of recent tokens and multiplies negative ones (Keskar et al. 2019, "CTRL", section 4.1).
    penalty_window : int
        How many of the last ids count as recent.
    seed : int, optional
        The same seed gives the same tokens for the same logits. Left out: drawn from the system.

    Raises
    ------
    Error
        A parameter is out of its range.
    """

    def __init__(
        self,
        temperature: float = 0.8,
        top_k: int = 40,
        top_p: float = 0.95,
        min_p: float = 0.05,
        repetition_penalty: float = 1.0,
        penalty_window: int = 64,
        seed: int | None = None,
    ):
        self.temperature = _checked("temperature", temperature)
        self.top_k = _checked("top_k", top_k)
        self.top_p = _checked("top_p", top_p)
        self.min_p = _checked("min_p", min_p)
        self.repetition_penalty = _checked("repetition_penalty", repetition_penalty)
        self.penalty_window = _checked("penalty_window", penalty_window)
        if seed is not None and (isinstance(seed, bool) or not isinstance(seed, (int, np.integer)) or seed < 0):
            raise Error(f"seed must be a whole number, 0 or more, or None; got {seed!r}")
        self.seed = seed
        self._random = np.random.default_rng(seed)

    def sample(self, logits: NDArray[np.float32], recent: Sequence[int] = ()) -> int:
        """Choose a token.

        Parameters
        ----------
        logits : float32 array (n_vocab,)
            Not changed. -inf rules a token out.
        recent : sequence of int
            The ids so far, the prompt's among them.

        Returns
        -------
        int

        Raises
        ------
        Error
            The highest logit is NaN or infinite.
        """
        ids, probabilities = self.distribution(logits, recent)
        if len(ids) == 1:
            return int(ids[0])
        sums = np.cumsum(probabilities)
        return int(ids[np.searchsorted(sums, self._random.random() * sums[-1], side="right")])

    def distribution(
        self, logits: NDArray[np.float32], recent: Sequence[int] = ()
    ) -> tuple[NDArray[np.intp], NDArray[np.float64]]:
        """What `sample` draws from.

        Parameters
        ----------
        logits : float32 array (n_vocab,)
        recent : sequence of int

        Returns
        -------
        ids : intp array (n_left,)
            The tokens that can be chosen; most likely first, except where none of top-k, top-p and min-p cuts.
        probabilities : float64 array (n_left,)
            They sum to 1.

        Raises
        ------
        Error
            The highest logit is NaN or infinite.
        """
        if logits.ndim != 1 or not len(logits):
            raise Error(f"logits must have the shape (n_vocab,), got {logits.shape}")
        logits = self._penalized(logits, recent)
        best = int(np.argmax(logits))  # a NaN counts as the highest
        highest = float(logits[best])
        if not isfinite(highest):
            raise Error(f"the model's logits can't be sampled: the highest is {highest}, of token {best}")
        if self.temperature == 0:
            return np.array([best]), np.ones(1)

        ids = _highest(logits, self.top_k) if 0 < self.top_k < len(logits) else None
        if self.top_p < 1:
            ids = _nucleus(logits, ids, highest, self.top_p)
        if self.min_p > 0:
            bound = highest + log(self.min_p)
            ids = _sorted(logits, np.flatnonzero(logits >= bound)) if ids is None else ids[logits[ids] >= bound]
        if ids is None:
            ids = np.arange(len(logits))
        weights = np.exp((logits[ids].astype(np.float64) - highest) / self.temperature)
        return ids, weights / weights.sum()

    def _penalized(self, logits: NDArray[np.float32], recent: Sequence[int]) -> NDArray[np.float32]:
        if self.repetition_penalty == 1 or not self.penalty_window or not len(recent):
            return logits
        ids = np.unique(np.asarray(recent[-self.penalty_window :], np.intp))
        if ids[0] < 0 or ids[-1] >= len(logits):
            raise Error(f"recent ids must be from 0 to {len(logits) - 1}, got {ids[0]} to {ids[-1]}")
        values = logits[ids]
        logits = logits.copy()
        logits[ids] = np.where(values > 0, values / self.repetition_penalty, values * self.repetition_penalty)
        return logits


def _checked(name: str, value: Any) -> Any:
    kind, in_range, words = _RANGES[name]
    kinds = (int, np.integer) if kind is int else (int, float, np.integer, np.floating)
    if isinstance(value, bool) or not isinstance(value, kinds) or not isfinite(value) or not in_range(value):
        raise Error(f"{name} must be {words}; got {value!r}")
    return kind(value)


def _sorted(logits: NDArray[np.float32], ids: NDArray[np.intp]) -> NDArray[np.intp]:
    """Ids, which rise, by falling logit; of equal logits the lower id first."""
    return ids[np.argsort(-logits[ids], kind="stable")]


def _highest(logits: NDArray[np.float32], k: int) -> NDArray[np.intp]:
    """The ids of the k highest logits, highest first; of equal logits the lower id first.

    The k-th highest of the chunks' maxima is no higher than the k-th highest logit: few logits reach it, and one cheap
    pass finds them.
    """
    n_chunks = len(logits) // _CHUNK
    if n_chunks > k:
        maxima = logits[: n_chunks * _CHUNK].reshape(n_chunks, _CHUNK).max(axis=1)
        bound = np.partition(maxima, n_chunks - k)[n_chunks - k]
        ids = np.flatnonzero(logits >= bound)
    else:
        ids = np.arange(len(logits))
    return _sorted(logits, ids)[:k]


def _nucleus(logits: NDArray[np.float32], ids: NDArray[np.intp] | None, highest: float, top_p: float) -> NDArray[np.intp]:
    """The fewest of the most likely ids that hold `top_p` of the probability; `ids` is sorted, None stands for all."""
    if ids is not None:
        return _first_holding(logits, ids, highest, top_p, total=None)[0]
    total = float(np.exp(logits - np.float32(highest)).sum(dtype=np.float64))
    found, enough = _first_holding(logits, _highest(logits, _TOP_P_START), highest, top_p, total)
    return found if enough else _first_holding(logits, _highest(logits, len(logits)), highest, top_p, total)[0]


def _first_holding(
    logits: NDArray[np.float32], ids: NDArray[np.intp], highest: float, top_p: float, total: float | None
) -> tuple[NDArray[np.intp], bool]:
    sums = np.cumsum(np.exp(logits[ids].astype(np.float64) - highest))
    wanted = top_p * (sums[-1] if total is None else total)
    n = int(np.searchsorted(sums, wanted, side="left")) + 1
    return ids[:n], n <= len(ids)
